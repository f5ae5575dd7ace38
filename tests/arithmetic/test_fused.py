"""The compiled loops give the bits of the eager ones."""

import logging
import shutil
import threading

import pytest
import torch
from torch import nn

from mnet_fx import MnetWarning
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.arithmetic.kernels import c as native
from mnet_fx.arithmetic.kernels import choice as fused
from mnet_fx.arithmetic.kernels.eager import EAGER
from mnet_fx.runtime.steps import Chain, run_chain
from mnet_fx.runtime.tape import PlainTape, ReversingTape


class Step(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return (self.f(x),)


pytestmark = pytest.mark.skipif(not shutil.which("cc") or not shutil.which("g++"), reason="needs compilers")
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_same_bits(kernels, x, ys, held=None):
    states = [State(x, kernels=k, held=held) for k in (EAGER, kernels)]
    runs = [[state.step(y, 0.3, 0.7) for y in ys] for state in states]
    for (_, a), (_, b) in zip(*runs, strict=True):
        assert torch.equal(a, b)
    for t in reversed(range(len(ys))):
        a, b = (state.unstep_x(run[t][0]) for state, run in zip(states, runs, strict=True))
        assert torch.equal(a, b)
        for state, run in zip(states, runs, strict=True):
            state.unstep_u(run[t][0], ys[t])
        assert torch.equal(states[0].X, states[1].X)
        assert torch.equal(states[0].U, states[1].U)
    assert not states[1].U.any()


@pytest.mark.parametrize(("scale", "threads"), [(1.0, 1), (1e-38, 1), (1.0, 2)])
@pytest.mark.parametrize(("stream", "branch"), [(a, b) for a in FLOATS for b in FLOATS if b in (a, torch.float32)], ids=str)
def test_same_bits_as_the_eager_loops(stream, branch, scale, threads):
    torch.set_num_threads(threads)
    x = (scale * torch.randn(70001)).to(stream)
    ys = [(scale * torch.randn(70001) * 10**k).to(branch) for k in (0, 2, 3)]
    assert_same_bits(fused.FUSED, x, ys)
    assert_same_bits(fused.AUTOMATIC, x, ys, held=torch.float32 if stream is torch.float16 else torch.float64)
    loops = [loop for kernel in (fused.FUSED.shear, fused.FUSED.unshear_x, fused.FUSED.unshear_u) for loop in kernel.loops.values()]
    assert loops
    assert all(loop.__module__.endswith("kernels.c") for loop in loops)  # none fell back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_values_are_rounded_as_torch_does(dtype):
    X = torch.randint(-(2**31) + 1, 2**31 - 1, (1 << 16,), dtype=torch.int32)
    X[:99] = torch.arange(-49, 50) << 7  # ties
    for unit in (2.0**-8, 2.0**-24, 2.0**-60, 2.0**-140, 2.0**97):
        out, expected = torch.empty_like(X, dtype=dtype), torch.empty_like(X, dtype=dtype)
        for kernels, into in ((fused.FUSED, out), (EAGER, expected)):
            kernels.unshear_x(X.clone(), torch.zeros(1 << 16, dtype=torch.int32), into, 0.5, unit)
        assert torch.equal(out, expected)


@pytest.fixture
def inductor(monkeypatch):
    """The loops as they are compiled for other devices."""
    monkeypatch.setattr(fused, "compiled", lambda name, dtypes: fused.by_inductor(getattr(fused, f"_{name}"), dtypes))
    return fused._loops(asked=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_inductor_gives_the_same_bits_and_compiles_once_for_every_size_and_mode(inductor, caplog):
    with caplog.at_level(logging.WARNING, logger="mnet_fx"):
        assert_same_bits(inductor, torch.randn(150001), [torch.randn(150001) * 10**k for k in (0, 2, 5)])
    assert caplog.text.count("compiling") == 3

    def loop(size, grad=False):
        U, y = torch.zeros(size, dtype=torch.float64), torch.full((size,), 2.0, requires_grad=grad)
        inductor.unshear_u(U, y, 3.0)
        assert (U == -6).all()

    with torch.compiler.set_stance("fail_on_recompile"):
        loop(200001, grad=True)
        torch.set_num_threads(2)
        with torch.inference_mode():
            loop(150016)
        with torch.autocast("cpu", torch.bfloat16):
            loop(150016)


def test_a_chain_on_the_compiled_loops_gives_the_gradients_of_stored_activations(monkeypatch):
    monkeypatch.setitem(fused.SMALLEST, "cpu", 1)
    layers, x = nn.ModuleList(nn.Linear(8, 8) for _ in range(12)), torch.randn(5, 8)
    factors = ((0.3, 0.7),) * 12

    def gradients(kind, kernels):
        steps = [(Step(f), ()) for f in layers]
        out, _, _ = run_chain(Chain(kind("region", State(x, kernels=kernels), factors), x, None), steps)
        return torch.autograd.grad(out.square().sum(), list(layers.parameters()))

    assert all(map(torch.equal, gradients(ReversingTape, fused.FUSED), gradients(PlainTape, EAGER)))


class Tagged(torch.Tensor):
    pass


ODD = {"negative": torch._neg_view, "subclass": lambda y: y.as_subclass(Tagged), "zero": lambda y: torch._efficientzerotensor(y.shape)}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_tensors_whose_memory_is_not_what_they_hold_take_the_eager_loop(odd):
    U, y = torch.zeros(9000, dtype=torch.float64), torch.ones(9000)
    fused.FUSED.unshear_u(U, odd(y), 3.0)
    assert torch.equal(U, torch.zeros(9000, dtype=torch.float64) - (odd(y) * 3))


def test_layouts_other_than_contiguous():
    x = torch.randn(2, 8, 30, 40).to(memory_format=torch.channels_last)
    y = torch.randn(2, 8, 30, 40)
    assert_same_bits(fused.FUSED, x, [y, y.to(memory_format=torch.channels_last), torch.randn(1, 8, 1, 40).expand(2, 8, 30, 40)])


@pytest.mark.parametrize(("value", "chosen"), [(None, "AUTOMATIC"), ("1", "FUSED"), ("0", "EAGER")])
def test_the_environment_chooses(monkeypatch, value, chosen):
    monkeypatch.delenv("MNET_FX_FUSED", raising=False)
    if value is not None:
        monkeypatch.setenv("MNET_FX_FUSED", value)
    assert fused.kernels() is getattr(fused, chosen)
    assert fused.fusing() == (value != "0")


def without_compiler(monkeypatch):
    monkeypatch.setenv("CC", "/no/such/compiler")


def with_a_compiler_that_fails(monkeypatch):
    monkeypatch.setenv("CC", "false")


def with_other_bits(monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda name, dtypes: lambda tensors, factors: tensors[0].sub_(tensors[1].double(), alpha=4))


TROUBLES = [(without_compiler, "No such file"), (with_a_compiler_that_fails, "no reason given"), (with_other_bits, "other bits")]


@pytest.mark.parametrize(("trouble", "reason"), TROUBLES, ids=lambda v: v.__name__ if callable(v) else "")
@pytest.mark.parametrize("asked", [True, False])
def test_the_eager_loops_go_on_where_nothing_can_be_compiled(monkeypatch, caplog, recwarn, trouble, reason, asked):
    trouble(monkeypatch)
    native.compiled.cache_clear()
    loop = fused._loops(asked).unshear_u
    with caplog.at_level(logging.INFO, logger="mnet_fx"):
        for _ in range(2):  # tried once
            U, y = torch.zeros(150000, dtype=torch.float64), torch.ones(150000)
            loop(U, y, 3.0)
            assert (U == -3).all()
    assert caplog.text.count("unshear_u cannot be compiled") == 1
    assert reason in caplog.text
    assert [reason in str(w.message) for w in recwarn if issubclass(w.category, MnetWarning)] == [True] * asked
    native.compiled.cache_clear()


def test_first_uses_in_several_threads_compile_once(caplog):
    native.compiled.cache_clear()
    loop, U = fused._loops(asked=True).unshear_u, torch.zeros(4, 9000, dtype=torch.float64)
    threads = [threading.Thread(target=loop, args=(U[i], torch.ones(9000), 3.0)) for i in range(4)]
    with caplog.at_level(logging.INFO, logger="mnet_fx"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (U == -3).all()
    assert caplog.text.count("compiled unshear_u") == 1
