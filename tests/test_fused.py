"""The compiled loops give the bits of the eager ones."""

import logging
import shutil

import pytest
import torch

from mnet_fx import MnetWarning, fused
from mnet_fx.fixed_point import State
from mnet_fx.loops import EAGER

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inductor's own
]


@pytest.mark.parametrize(
    ("stream", "branch"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str
)
def test_same_bits_as_the_eager_loops(stream, branch):
    x, ys = torch.randn(50001).to(stream), [torch.randn(50001).to(branch) * 10**k for k in (0, 2, 5)]
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
    U, y = torch.zeros(20000, dtype=torch.float64), torch.ones(20000)
    with caplog.at_level(logging.WARNING, logger="mnet_fx"), pytest.warns(MnetWarning, match="no compiler"):
        loop(U, y, 3.0)
    assert "compiling" in caplog.text
    loop(U, y, 3.0)  # silent from now on
    assert (U == -6).all()
