"""`rest="checkpoint"` of named regions: modules outside of the chains run again in the backward pass, and nothing else changes."""

import copy
import warnings

import pytest
import torch
from captures import tiny
from torch import nn

import mnet_fx
from mnet_fx import momentumize


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.conv(x)))


class Twice(nn.Sequential):
    """Two convolutions, statistics, dropout, an activation in place."""

    def __init__(self, a, b):
        parts = (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Dropout(0.2))
        super().__init__(*parts, nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class Up(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.up, self.twice = nn.ConvTranspose2d(a, b, 2, 2), Twice(2 * b, b)

    def forward(self, x, *, skip):
        return self.twice(torch.cat([self.up(x), skip], 1))


class UNet(nn.Module):
    """A chain at each level."""

    def __init__(self, w=4):
        super().__init__()
        self.stem = Twice(3, w)
        self.levels = nn.ModuleList(nn.Sequential(*(Block(w * 2**i) for _ in range(2))) for i in range(3))
        self.downs = nn.ModuleList(Twice(w * 2**i, w * 2 ** (i + 1)) for i in range(2))
        self.ups = nn.ModuleList(Up(w * 2 ** (i + 1), w * 2**i) for i in reversed(range(2)))
        self.head = nn.Conv2d(w, 5, 1)

    def forward(self, x):
        x, skips = self.stem(x), []
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < 2:
                skips.append(x)
                x = self.downs[i](nn.functional.max_pool2d(x, 2))
        for up in self.ups:
            x = up(x, skip=skips.pop())
        return self.head(x)


LEVELS = [f"levels.{i}" for i in range(3)]


def both(model, regions, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [momentumize(copy.deepcopy(model), gamma=0.5, regions=regions, rest=rest, **options) for rest in ("store", "checkpoint")]


def trained(net, *args, steps=2, loss=lambda out: out.square().mean(), **kwargs):
    """Everything that some steps give and leave."""
    torch.manual_seed(1)
    net.zero_grad()
    args = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    found = []
    for _ in range(steps):
        value = loss(net(*args, **kwargs))
        value.backward()
        found.append(value.detach())
    grads = [a.grad for a in args] + [p.grad for p in net.parameters()]
    return [*found, *(g.clone() for g in grads if g is not None), *(b.clone() for b in net.buffers()), torch.get_rng_state()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def taken(net, *args, **kwargs):
    def forward():
        out = net(*args, **kwargs)
        return (out if isinstance(out, torch.Tensor) else out[0]).square().mean()

    for _ in range(2):
        forward().backward()
    return mnet_fx.measure(forward, lambda value: value.backward())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def test_a_unet():
    model, x = UNet(), torch.randn(3, 3, 16, 16)
    stored, again = both(model, LEVELS)
    assert again.report.again == ("stem", "downs.0", "downs.1", "ups.0", "ups.1")
    assert again.report.rest == "checkpoint"
    assert "5 module(s) run again in the backward pass, each by itself: stem, downs.0" in str(again.report)
    assert again.report.to_dict()["again"] == list(again.report.again)
    assert stored.report.again == ()
    assert same(trained(stored, x), trained(again, x))
    assert list(again.state_dict()) == list(model.state_dict())
    assert again.mnet_fx_options["rest"] == "checkpoint"
    kept, less = taken(stored, x), taken(again, x)
    assert less.kept < 0.4 * kept.kept
    assert less.peak < 0.7 * kept.peak


def test_the_estimate_knows():
    model, x = UNet(), torch.randn(3, 3, 16, 16)
    found = taken(both(model, LEVELS)[1], x)
    way = mnet_fx.estimate(model, x, gamma=0.5, regions=LEVELS, rest="checkpoint", loss=lambda out: out.square().mean()).momentum
    assert way.kept_bytes == pytest.approx(found.kept, rel=0.01)
    assert way.peak_bytes == pytest.approx(found.peak, rel=0.05)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_hugging_face(name):
    model, inputs = tiny(name)
    stored, again = both(model, "auto")

    def loss(out):
        return sum(t.square().mean() for t in out.values() if isinstance(t, torch.Tensor) and t.requires_grad)

    assert same(trained(stored, loss=loss, **inputs), trained(again, loss=loss, **inputs))
    assert ("embeddings" in again.report.again) == (name in ("bert", "vit"))


class Residual(nn.Module):
    def __init__(self, d=6):
        super().__init__()
        self.f = nn.Linear(d, d)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


class Part(nn.Module):
    """What a test has run again: `way` decides how."""

    def __init__(self, way, d=6):
        super().__init__()
        self.a, self.b, self.drop, self.norm = nn.Linear(d, d), nn.Linear(d, d), nn.Dropout(0.3), nn.BatchNorm1d(d)
        self.way, self.calls, self.last = way, [], None
        self.register_buffer("count", torch.zeros(()))

    def work(self, x):
        return self.b(torch.sin(self.drop(torch.exp(torch.tanh(self.norm(self.a(x)))))))

    def forward(self, *args, **kwargs):
        return self.way(self, *args, **kwargs)


class Net(nn.Module):
    """part, chain, part: `body` calls them."""

    def __init__(self, way, body=None, d=6):
        super().__init__()
        self.stem, self.layers, self.part = Part(Part.work, d), nn.ModuleList(Residual(d) for _ in range(3)), Part(way, d)
        self.body = body or Net.plain

    def chain(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def plain(self, x):
        return self.part(self.chain(self.stem(x)))

    def forward(self, x, **kwargs):
        return self.body(self, x, **kwargs)


def points():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def assert_same(way=Part.work, body=None, steps=3, prepare=lambda net: None, **kwargs):
    nets = both(Net(way, body), ["layers"])
    assert nets[1].report.again == ("stem", "part")
    for net in nets:
        prepare(net)
    assert same(*(trained(net, points(), steps=steps, **kwargs) for net in nets))
    return nets[1]
