"""The compiled loops give the bits of the eager ones."""

import logging
import shutil

import pytest
import torch
from torch import nn

from mnet_fx import MnetWarning, fused
from mnet_fx.fixed_point import State
from mnet_fx.loops import EAGER
from mnet_fx.tape import PlainTape, ReversingTape, run_chain


class Step(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return (self.f(x),)


pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
]


@pytest.mark.parametrize("scale", [1.0, 1e-38])
@pytest.mark.parametrize(
    ("stream", "branch"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str
)
def test_same_bits_as_the_eager_loops(stream, branch, scale):
    x, ys = scale * torch.randn(150001).to(stream), [scale * torch.randn(150001).to(branch) * 10**k for k in (0, 2, 5)]
    states = [State(x, kernels=kernels) for kernels in (EAGER, fused.FUSED)]
    runs = [[state.step(y, 0.3, 0.7) for y in ys] for state in states]
    for (_, a), (_, b) in zip(*runs, strict=True):
        assert torch.equal(a, b)
    for t in (2, 1, 0):
        a, b = (state.unstep_x(run[t][0]) for state, run in zip(states, runs, strict=True))
        assert torch.equal(a, b)
        for state, run in zip(states, runs, strict=True):
            state.unstep_u(run[t][0], ys[t])
        assert torch.equal(states[0].X, states[1].X)
        assert torch.equal(states[0].U, states[1].U)
    assert not states[1].U.any()


def test_one_compilation_serves_every_size_and_mode():
    def loop(size, grad=False):
        U, y = torch.zeros(size, dtype=torch.float64), torch.full((size,), 2.0, requires_grad=grad)
        fused.FUSED.unshear_u(U, y, 3.0)
        assert (U == -6).all()

    loop(150000)
    with torch.compiler.set_stance("fail_on_recompile"):
        loop(200001, grad=True)
        torch.set_num_threads(2)
        with torch.inference_mode():
            loop(150016)
        with torch.autocast("cpu", torch.bfloat16):
            loop(150016)


def test_a_chain_on_the_compiled_loops_gives_the_gradients_of_stored_activations(monkeypatch):
    monkeypatch.setattr(fused, "SMALLEST", 1)
    layers, x = nn.ModuleList(nn.Linear(8, 8) for _ in range(12)), torch.randn(5, 8)
    factors = ((0.3, 0.7),) * 12

    def gradients(kind, kernels):
        steps = [(Step(f), ()) for f in layers]
        out, _, _ = run_chain(kind("region", State(x, kernels=kernels), factors), x, None, steps)
        return torch.autograd.grad(out.square().sum(), list(layers.parameters()))

    assert all(map(torch.equal, gradients(ReversingTape, fused.FUSED), gradients(PlainTape, EAGER)))


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("MNET_FX_FUSED", "1")
    assert fused.kernels() is fused.FUSED
    monkeypatch.setenv("MNET_FX_FUSED", "0")
    assert fused.kernels() is EAGER


def test_first_use_is_announced_and_a_missing_compiler_is_no_error(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    loop = fused._Fused(fused._unshear_u, EAGER.unshear_u)
    U, y = torch.zeros(150000, dtype=torch.float64), torch.ones(150000)
    with caplog.at_level(logging.WARNING, logger="mnet_fx"), pytest.warns(MnetWarning, match="no compiler"):
        loop(U, y, 3.0)
    assert "compiling" in caplog.text
    loop(U, y, 3.0)  # silent from now on
    assert (U == -6).all()
