"""Inductor's CUDA graphs, which no recomputation survives: off for what our backend compiles. That runs in `tests/test_cuda.py`."""

import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config

import mnet_fx
from mnet_fx import MnetWarning, errors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def trained(seen):
    def inner(gm, inputs):
        seen.append(config.triton.cudagraphs)
        return gm.forward

    torch.compile(Net(), backend=mnet_fx.backend(inner=inner))(torch.randn(2, 6)).sum().backward()


def test_they_are_off_for_steps_and_what_is_between_and_that_is_told_once(monkeypatch):
    monkeypatch.setattr(errors, "_TOLD", set())
    seen = []
    with config.patch({"triton.cudagraphs": True}):
        with pytest.warns(MnetWarning, match="cudagraphs is on: it is off for"):
            trained(seen)
        trained(seen)  # not told again, as warnings are errors here
        assert config.triton.cudagraphs
    assert seen
    assert not any(seen)


def test_they_are_off_for_backward_passes_too():
    """Which AOTAutograd would else compile later, at the first backward pass."""
    seen = []

    def compiled(gm, inputs):
        seen.append(config.triton.cudagraphs)
        return make_boxed_func(gm.forward)

    def inner(gm, inputs):
        return aot_module_simplified(gm, inputs, fw_compiler=compiled, bw_compiler=compiled)

    with config.patch({"triton.cudagraphs": True}), warnings.catch_warnings():
        warnings.simplefilter("ignore", MnetWarning)
        out = torch.compile(Net(), backend=mnet_fx.backend(inner=inner))(torch.randn(2, 6)).sum()
        out.backward()
    assert len(seen) > 1
    assert not any(seen)


def test_nothing_is_told_where_they_are_off():
    trained(seen := [])
    assert not any(seen)


@pytest.mark.parametrize("way", ["by name", "made"])
def test_a_mode_with_cuda_graphs_is_refused(way):
    backend = "mnet_fx" if way == "by name" else mnet_fx.backend()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"option of inductor, whose CUDA graphs"):
        torch.compile(Net(), backend=backend, mode="reduce-overhead")(torch.randn(2, 6))


def test_options_beside_a_made_backend_are_refused():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"give them to that function"):
        torch.compile(Net(), backend=mnet_fx.backend(), options={"gamma": 0.5})(torch.randn(2, 6))
