"""Streams whose values lie in memory in different orders: f(x) + x lies as f(x) does, x + f(x) as x."""

import copy

import pytest
import torch
import torch.fx as fx
from torch import nn

import mnet_fx
from passes.graphs.orders import laid, order_of

WIDTH = 8


class Block(nn.Module):
    def __init__(self, first, viewed):
        super().__init__()
        self.first, self.viewed = first, viewed
        self.norm, self.one, self.two = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x):
        return self.two(nn.functional.dropout(nn.functional.gelu(self.one(x)), 0.3, self.training))

    def forward(self, x):
        x = self.branch(self.norm(x)) + x if self.first else x + self.branch(self.norm(nn.functional.dropout(x, 0.3, self.training)))
        return self.branch(x.view(-1, WIDTH)).view(x.shape) + x if self.viewed else x


class Net(nn.Module):
    """Tokens of an image, channels first in memory. Blocks: b adds the branch first, x the stream first, v takes a view of x."""

    def __init__(self, blocks, end="linear"):
        super().__init__()
        self.stem, self.end = nn.Conv2d(3, WIDTH, 2, 2), end
        self.blocks = nn.ModuleList(Block(letter in "bv", letter == "v") for letter in blocks)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        if self.end == "view":
            x = x.view(-1, WIDTH)
        if self.end == "seen":
            return [*seen, self.head(x)]
        return self.head(x)


class Outer(nn.Module):
    """A chain within each step of another."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.ModuleList(Block(True, False) for _ in range(3)) for _ in range(3))

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2)
        for inner in self.nets:
            y = x.transpose(1, 2).contiguous().transpose(1, 2)
            for block in inner:
                y = block(y)
            x = y * 0.5 + x
        return x


def grown(module):
    torch.manual_seed(0)
    return module().double()


def images(n=2, channels=3, size=8):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def outcome(net, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    outputs = net(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *net.parameters()])], [y.stride() for y in outputs]


MODELS = {
    **{blocks: (lambda blocks=blocks: Net(blocks)) for blocks in ("bbb", "xxx", "xbbx", "vvv", "bxvb")},
    **{f"{blocks}, a view": (lambda blocks=blocks: Net(blocks, "view")) for blocks in ("bbb", "xbx")},
    **{f"{blocks}, each value": (lambda blocks=blocks: Net(blocks, "seen")) for blocks in ("bbb", "xxbbb", "xxx")},
}
WAYS = {
    "captured": {},
    "aot": {"inner": "aot_eager"},
    "rest": {"rest": "checkpoint"},
}


@pytest.mark.parametrize("way", ["captured", *(pytest.param(way, marks=pytest.mark.long) for way in ("aot", "rest"))])
@pytest.mark.parametrize("name", MODELS)
def test_the_order_is_the_models_own(name, way):
    """So that dropout draws the same masks, and views are views."""
    model = grown(MODELS[name])
    zero = mnet_fx.momentumize(copy.deepcopy(model), gamma=0.0, **WAYS[way])
    for n in (2, 3):
        (ours, strides), (theirs, expected) = outcome(zero, images(n)), outcome(model, images(n))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert strides == expected
    assert zero.report.regions
    nets = [mnet_fx.momentumize(copy.deepcopy(model), gamma=0.9, backward=b, **WAYS[way]) for b in ("reversible", "stored")]
    (ours, _), (theirs, _) = (outcome(net, images()) for net in nets)
    assert all(map(torch.equal, ours, theirs))


def test_a_chain_within_a_step():
    model, x = grown(Outer), images(2, WIDTH, 4)
    for options in ({"gamma": 0.0}, {"gamma": 0.0, "granularity": "module"}):
        (ours, strides), (theirs, expected) = outcome(mnet_fx.momentumize(copy.deepcopy(model), **options), x), outcome(model, x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert strides == expected


def node_of(value):
    node = fx.Graph().placeholder("x")
    node.meta["example_value"] = value
    return node


def test_orders():
    x = torch.zeros(2, 3, 4)
    assert order_of(node_of(x)) == (0, 1, 2)
    assert order_of(node_of(x.permute(1, 2, 0))) == (2, 0, 1)
    assert order_of(node_of(torch.zeros(2, 1, 4).transpose(0, 2))) == (1, 2, 0)
    assert order_of(node_of(torch.zeros(1, 3).expand(5, 3))) is None
    assert order_of(node_of(x.to_sparse())) is None
    assert order_of(node_of(3)) is None
    assert order_of(fx.Graph().placeholder("x")) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_laid(order):
    x = torch.randn(2, 3, 4)
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = x
    result = laid(graph, node, order)
    graph.output(result)
    y = fx.GraphModule({}, graph)(x)
    assert torch.equal(x, y)
    assert order_of(node_of(y)) == order_of(result) == order
