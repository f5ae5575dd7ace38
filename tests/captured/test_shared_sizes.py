"""Sizes that one layer reads and all use: with other sizes than at the first call they are symbols, and the chain stays what it is."""

import copy

import pytest
import torch
from torch import nn

import mnet_fx
import passes

WIDTH = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def read(self, y):
        raise NotImplementedError

    def forward(self, x):
        known = None
        for layer in self.layers:
            y = torch.tanh(layer(x))
            known = self.read(y) if known is None else known
            x = x + y.reshape(known[0], -1).reshape(x.shape) * known[1]
        return x


class OfRows(Net):
    def read(self, y):
        rows = y.unsqueeze(1).expand(-1, 3, -1, -1).flatten(0, 1)
        rows /= 2  # written to, so that it could not be computed before the chain
        return rows.size(0) // 3, rows.size(0) * 0.1


class OfElements(Net):
    def read(self, y):
        y = y.transpose(0, 1).contiguous()
        return y.shape[1], y.numel() // WIDTH % 5 * 0.1


class OfBoth(Net):
    def read(self, y):
        y = torch.cat([y, y[:, :-1]], 1)
        return len(y), max(y.size(1) - y.shape[0], 1) * 0.1


class OfStrides(Net):
    def read(self, y):
        rows = len(y)
        y = y.transpose(0, 1).contiguous()
        y /= 2
        stride = list(y.stride())  # Dynamo asks the tensor
        stride[0] = stride[0] // WIDTH
        return rows, stride[0] * 0.1


class Masked(nn.Module):
    """All layers read what is made of x[0], which only the first could be thought to own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        mask = (x.abs().sum(-1, keepdim=True) > 5).to(x.dtype) + torch.zeros_like(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * mask
        return x


class Latents(nn.Module):
    """The stream starts at a parameter, once for each sample."""

    def __init__(self, repeated=False):
        super().__init__()
        self.start, self.repeated = nn.Parameter(torch.randn(3, WIDTH)), repeated
        self.keys, self.layers = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        z = self.start.repeat(len(x), 1, 1) if self.repeated else self.start.expand(x.shape[0], -1, -1)
        for key, layer in zip(self.keys, self.layers, strict=True):
            z = z + torch.softmax(z @ key(x).mT, -1) @ x
            z = z + torch.tanh(layer(z))
        return z


def outcome(net, x):
    x = x.clone().requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


MODELS = {OfRows: 4, OfElements: 4, OfBoth: 4, OfStrides: 4, Masked: 4, Latents: 5, lambda: Latents(True): 5}  # and the steps of the chain


@pytest.mark.parametrize("inner", ["eager", *(pytest.param(inner, marks=pytest.mark.slow) for inner in ("aot_eager", "inductor"))])
@pytest.mark.parametrize("model", MODELS, ids=lambda made: made.__name__)
def test_other_sizes_are_the_same_network(model, inner):
    torch.manual_seed(0)
    original = model().double()
    zero = mnet_fx.momentumize(copy.deepcopy(original), gamma=0.0, inner=inner)
    nets = [mnet_fx.momentumize(copy.deepcopy(original), gamma=0.9, backward=b, inner=inner) for b in ("reversible", "stored")]
    for shape in ((2, 5), (3, 5), (3, 6), (7, 4), (2, 9)):
        x = torch.randn(*shape, WIDTH, dtype=torch.float64)
        for a, b in zip(outcome(zero, x), outcome(original, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        ours, theirs = (outcome(net, x) for net in nets)
        assert all(map(torch.equal, ours, theirs))
    assert [len(chain) for chain in zero.forward.network.chains] == [MODELS[model]]


def test_sizes_are_computed_from_those_of_the_inputs():
    graphs = []

    def keep(gm, inputs):
        graphs.append((gm, inputs))
        return gm

    def f(x):
        y = (x + 1).transpose(0, 1).repeat(1, 3)
        stride = list(y.stride())
        return x.as_strided((y.size(1) // 3, 2), (stride[0] // y.shape[-1], stride[1])) * y.numel(), stride[0] + 1

    torch.compile(f, backend=keep, dynamic=True)(torch.randn(4, 6))
    ((gm, _),) = graphs
    result = passes.unlift(gm).graph_module
    reads = [node for node in result.graph.nodes if node.target in ("size", "stride", "numel")]
    assert [node for node in gm.graph.nodes if node.target in ("size", "stride", "numel")]
    assert not reads
    x = torch.randn(5, 7)
    for ours, theirs in zip(result(5, 7, x), gm(5, 7, x), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


class OfARange(Net):
    """A size that is the ceiling of a number, as that of the coordinates of patches."""

    def read(self, y):
        return y.size(0), torch.arange(0.5, y.size(1)).shape[0] * 0.1 + torch.arange(0.25, y.size(1) / 2).shape[0]


@pytest.mark.parametrize("known", [True, False])
def test_a_size_that_is_rounded_is_computed_from_those_of_the_inputs(known, monkeypatch):
    if not known:  # as with an operation that only numbers have: then it is read where it was
        monkeypatch.delattr("passes.capturing.sizes._OfProxies.ceil_to_int")
    torch.manual_seed(0)
    model = OfARange()
    net = mnet_fx.momentumize(model, gamma=0)
    for length in (8, 12, 10):
        x = torch.randn(3, length, WIDTH)
        torch.testing.assert_close(net(x), model(x))
    assert [region.steps for region in net.report.regions] == [4]
