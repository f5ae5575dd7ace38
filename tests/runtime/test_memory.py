"""Bytes kept and peak bytes do not grow with depth."""

import functools
import gc

import pytest
import torch
from models import Encoder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from mnet_fx import backend, momentumize
from mnet_fx.budget.measured import measure
from mnet_fx.errors import MnetWarning
from passes.graphs.doubles import Double

GENERATOR_STATE = 5056  # bytes of a CPU generator's state, kept by a step that draws


def memory(layers: int, dropout: float):
    torch.set_num_threads(2)
    net = momentumize(Encoder(layers, dropout=dropout), gamma=0.9)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(8, 256, 256)
    return measure(lambda: net(x).sum(), Tensor.backward)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_kept_and_peak_bytes_of_an_encoder_do_not_grow_with_depth(dropout):
    memory(1, dropout)  # lazily made buffers
    shallow, deep = memory(4, dropout), memory(14, dropout)
    drawn = 2 * 10 * GENERATOR_STATE if dropout else 0
    assert deep.kept <= 1.02 * shallow.kept + drawn
    assert deep.peak <= 1.02 * shallow.peak + drawn
    assert shallow.kept <= 8 * 2**20 * 1.02 + 8 * GENERATOR_STATE  # X, U and the output: 16 bytes for each of 2**19 elements


def test_the_meter_counts_what_is_kept_and_the_peak():
    a = torch.ones(1000, requires_grad=True)
    a.grad = torch.zeros(1000)
    (a * 2).sum().backward()
    counted = measure(lambda: (a * a).exp(), lambda y: y.backward(torch.ones(1000)))
    assert 4000 <= counted.kept <= 4000 + 4096  # exp keeps its result; a is not counted
    assert 12000 <= counted.peak <= 12000 + 3 * 4096


def test_a_whole_step_is_measured_as_its_two_halves_are():
    layer, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(32, 64)
    layer(x).sum().backward()
    halves = measure(lambda: layer(x).sum(), Tensor.backward)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)

    def step():
        layer(x).sum().backward()
        optimizer.step()

    assert measure(lambda: layer(x).sum().backward()) == halves
    assert measure(lambda: torch.autograd.grad(layer(x).sum(), list(layer.parameters()))).kept == halves.kept
    assert measure(step).kept == halves.kept
    with pytest.warns(MnetWarning, match="ran no backward pass"):
        assert measure(lambda: layer(x)).kept == halves.kept + 32 * 64 * 4 - 4  # what is left at the end
    assert torch.autograd.backward.__module__ == "torch.autograd"


class Blocks(nn.Module):
    """Residual blocks with batch statistics and dropout, each under a checkpoint if that is wanted."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


class Layer(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Layers(nn.Module):
    """The same as layers that hold their sums."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(map(Layer, Blocks().blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def objects(net: nn.Module) -> tuple[float, int]:
    """Python objects that a training step leaves to the collector of cycles, and that 200 steps leave for good."""
    x, optimizer = torch.randn(16, 8), torch.optim.SGD(net.parameters(), 0.01)

    def train(steps: int) -> int:
        before = len(gc.get_objects())
        for _ in range(steps):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return len(gc.get_objects()) - before

    train(10)
    gc.collect()
    gc.freeze()  # what is there already, which would only make the collector slow
    gc.disable()
    try:
        train(10)  # what is made anew once, as it was not there when the rest was frozen
        left = train(50) / 50
        gc.collect()
        before = len(gc.get_objects())
        train(200)
        gc.collect()
        return left, len(gc.get_objects()) - before
    finally:
        gc.enable()
        gc.unfreeze()


@functools.cache
def objects_of_a_checkpoint() -> float:
    return objects(Blocks(checkpointed=True))[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: momentumize(Blocks()),
        lambda: momentumize(Blocks(), gamma=0.5),
        lambda: momentumize(Blocks(), inner="aot_eager"),
        lambda: momentumize(Layers(), regions=["blocks"]),
        lambda: torch.compile(Blocks(), backend=backend(inner="eager")),
    ],
    ids=["captured", "spilling", "compiled inside", "named", "torch.compile"],
)
def test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow(make):
    left, grown = objects(make())
    assert left <= objects_of_a_checkpoint() + 0.1  # what the measurement itself leaves
    assert grown <= 5


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.f(x).tanh()


def _stays(model_to_net):
    """How many fake tensors with a history, and how many runs on fake tensors, stay of nets that were trained for a step and dropped."""
    for _ in range(3):
        net = model_to_net(nn.Sequential(*(_Block() for _ in range(3))))
        net(torch.randn(2, 4)).sum().backward()
        del net
    torch._dynamo.reset()
    gc.collect()
    alive = gc.get_objects()
    fakes = [t for t in alive if type(t) is FakeTensor and t.grad_fn is not None]
    return len(fakes), sum(type(thing) is Double for thing in alive)


@pytest.mark.parametrize("inner", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_no_fake_tensor_keeps_its_history(inner):
    """An operation that saves its own result, as tanh does, and a hook that returns what it is given, keep each other, unseen by gc."""
    before = _stays(lambda model: model)
    assert _stays(lambda model: momentumize(model, inner=inner)) == before
    assert _stays(lambda model: torch.compile(model, backend=backend(inner=inner))) == before
