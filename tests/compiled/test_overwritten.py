"""Parts that AOTAutograd would get wrong, or cannot trace, run as they are."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mnet_fx
from mnet_fx.compiled.compiler import Compiler
from mnet_fx.inner import rereads

WIDTH = 4


class Layer(nn.Module):
    def __init__(self, counts, residual):
        super().__init__()
        self.linear, self.counts, self.residual = nn.Linear(WIDTH, WIDTH), counts, residual
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        if self.counts:
            y = y * (1 + 0.5 * self.count)
            self.count.add_(1)
        return x + y if self.residual else y


class Net(nn.Module):
    """A counter is used and moved: in the steps; before and after the chain; all before it, also out of what took it over. Or the form of a
    value from before the chain is changed after it; or one batch norm is before and after it; or the end of the chain and
    the counter are overwritten and returned; or the counter takes a value with a gradient.
    """

    def __init__(self, where, residual=False):
        super().__init__()
        self.residual, self.where, self.stem, self.head = residual, where, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(where == "steps", residual) for _ in range(4))
        self.register_buffer("count", torch.ones(1))
        self.norm = nn.BatchNorm1d(WIDTH) if where == "norm" else nn.Identity()

    def scaled(self, x):
        if self.where == "taken over":
            return x * (1 + 0.5 * torch.ones(WIDTH, dtype=x.dtype).mul_(self.count))
        return x if self.where in ("steps", "form", "norm", "returned", "graded") else x * (1 + 0.5 * self.count)

    def forward(self, x):
        x = self.norm(self.scaled(self.stem(x)))
        if self.where == "graded":  # the buffer has a gradient from here on
            self.count.detach_()
            self.count.mul_(0.5).add_(x.mean())
            x = x * (1 + self.count)
        side = torch.sin(x)
        if self.where in ("stem", "taken over"):
            self.count.mul_(3)
        for layer in self.layers:
            x = layer(x) if self.residual else x + layer(x)
        if self.where in ("around", "returned"):
            self.count += 1
        if self.where == "returned":
            x += side
            return x, self.head(x * 2)
        x = self.norm(self.head(self.scaled(x) if self.where == "around" else x))
        return x * side.unsqueeze_(0).transpose_(1, 2).mul(2)[0].t() if self.where == "form" else x


def outcome(net, x):
    found = []
    for _ in range(2):
        ys = (y,) if isinstance(y := net(x), torch.Tensor) else y
        found += [*(y.detach() for y in ys), *torch.autograd.grad(sum(y.square().sum() for y in ys), [*net.parameters()])]
    return [*found, *(b.detach().clone() for b in net.buffers())]


WAYS = {
    "captured": lambda model, inner, **o: mnet_fx.momentumize(model, inner=inner, **o),
    "rest": lambda model, inner, **o: mnet_fx.momentumize(model, inner=inner, rest="checkpoint", **o),
    "backend": lambda model, inner, **o: torch.compile(model, backend=mnet_fx.backend(inner=inner, **o)),
    "named": lambda model, inner, **o: mnet_fx.momentumize(model, regions=["layers"], inner=inner, **o),
}


@pytest.mark.parametrize("inner", ["aot", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["steps", "stem", "around", "taken over", "form", "norm", "returned", "graded"])
def test_gradients_are_those_of_the_original(where, way, inner):
    torch.manual_seed(0)
    inner = {"aot": "aot_eager"}.get(inner, inner)
    model, x = Net(where, way == "named").double(), torch.randn(3, WIDTH, dtype=torch.float64)
    expected = outcome(copy.deepcopy(model), x)
    for a, b in zip(outcome(WAYS[way](copy.deepcopy(model), inner, gamma=0.0), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    nets = [WAYS[way](copy.deepcopy(model), inner, gamma=0.9, backward=b) for b in ("reversible", "stored")]
    assert all(map(torch.equal, *(outcome(net, x) for net in nets)))


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()


def both(x, part):
    x.mul_(2)
    part.add_(1)
    return (torch.ones(2),)


def test_what_cannot_be_traced_runs_as_it_is():
    """As where a part is given a value and what `detach` made of it, and writes to both."""
    mode = FakeTensorMode()
    with mode:
        value = torch.randn(3, 4, requires_grad=True) * 2
    gm = torch.fx.symbolic_trace(both)
    with pytest.warns(mnet_fx.MnetWarning, match="AOTAutograd cannot trace a part of the model .*: it runs uncompiled"):
        run = Compiler(torch._dynamo.lookup_backend("aot_eager"), mode)(gm, [value, value.detach()])
    x = torch.ones(3, 4)
    run(x, x)
    assert torch.equal(x, torch.full((3, 4), 3.0))


def test_what_dynamo_begins_anew_for_is_no_failure():
    """A number in float64 that lies outside of the chain: AOTAutograd has Dynamo take it for a constant."""

    class Scaled(Net):
        def __init__(self):
            super().__init__("steps")
            self.register_buffer("scale", torch.full((), 0.5, dtype=torch.float64))

        def scaled(self, x):
            return x * self.scale

    model, x = Scaled().double(), torch.randn(3, WIDTH, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mnet_fx.MnetWarning)
        found = outcome(mnet_fx.momentumize(copy.deepcopy(model), gamma=0.0, inner="aot_eager"), x)
    for a, b in zip(found, outcome(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def broken(gm, inputs):
    raise RuntimeError("no such device")


def test_errors_of_the_inner_compiler_are_its_own():
    net = mnet_fx.momentumize(Net("stem"), inner=broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such device"):
        net(torch.randn(3, WIDTH))


def moved(x, buffer):
    y = x * buffer
    buffer.add_(1)
    return y


def moved_by_a_view(x, buffer):
    buffer.view(2, 2)[0].add_(1)
    return x + buffer.sum()


def normed(x, mean):
    return torch.nn.functional.batch_norm(x, mean, torch.ones(4), training=True)


def only_moved(x, buffer):
    buffer.add_(x.detach().sum())
    return x * 2


def local(x, buffer):
    y = x * buffer
    z = y + 1
    y.relu_()
    return z, y


def a_graded_one(x, buffer):
    y = x * 2
    x.add_(1)
    return y * buffer


def a_graded_one_at_once(x, buffer):
    x.relu_()
    return x * buffer


def returned(x, buffer):
    buffer.add_(1)
    return x * 2, buffer


REREAD = {
    moved: True,
    moved_by_a_view: True,
    normed: False,
    only_moved: False,
    local: False,
    a_graded_one: True,
    a_graded_one_at_once: False,
    returned: True,
}


@pytest.mark.parametrize(("function", "expected"), REREAD.items())
def test_what_rereads(function, expected):
    mode = FakeTensorMode()
    x, buffer = mode.from_tensor(torch.randn(3, 4, requires_grad=True)), mode.from_tensor(torch.zeros(4))
    gm = torch.fx.symbolic_trace(function)
    assert rereads(gm, [x, buffer]) is expected
    assert not buffer.requires_grad
    assert not rereads(gm, [torch.randn(3, 4), torch.zeros(4)])
    assert rereads(gm, [x.detach(), buffer]) is (function is returned)
    with torch.no_grad():
        assert rereads(gm, [x, buffer]) is (function is returned)
