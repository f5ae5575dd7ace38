"""A rerun sees torch's switches as the first run did, and leaves them as it found them."""

import pytest
import torch
from test_tape import TAPES, D, Step, factors
from torch import nn
from torch.backends import cudnn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime.steps import Chain
from mnet_fx.runtime.surroundings import _DEVICES, SWITCHES, surrounded, surroundings


class Doubling(TorchFunctionMode):
    """Doubles what tanh gives."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.tanh else result


OTHERS = {
    "threads": 3,
    "default dtype": torch.float64,
    "default device and torch function modes": ((DeviceContext("meta"), Doubling()), None, torch.device("meta")),
    "deterministic algorithms": (True, True),
    "_cuda_get_cudnn_benchmark_limit": 7,
    "cudnn_depthwise_kernel": "native",
    "cublas_allow_fp16_reduced_precision_reduction": (False, False),
    "cublas_allow_bf16_reduced_precision_reduction": (False, False),
    "sdp_priority_order": [2, 1, 0, 3, 4],
    "float32_matmul_precision": "medium",
    "autocast": (False, {d: (True, torch.float16) if i % 2 else (False, torch.bfloat16) for i, d in enumerate(_DEVICES)}),
    "__torch_function__": torch._C._TorchFunctionState.SUBCLASSES_DISABLED,
    "strategy of opt_einsum": "greedy",
}
UNSET = {"onednn_allow_tf32", "blas_preferred_backend", "linalg_preferred_backend", "rocm_fa_preferred_backend", "qengine"}
UNSET |= {
    "cpu_allow_fp16_reduced_precision_reduction",
    "flash attention implementation",
    "grad mode",
}  # they need other hardware, or there are no gradients without them


def other(switch):
    """A value that a switch does not have now."""
    now = switch.get()
    if switch.name.startswith("fp32_precision"):
        return "ieee"
    return (not now) if isinstance(now, bool) and switch.name not in OTHERS else OTHERS[switch.name]


FLIPPED = [switch for switch in SWITCHES if switch.name not in UNSET]


@pytest.fixture(autouse=True)
def _as_before():
    before = surroundings()
    yield
    torch._C._set_torch_function_state(torch._C._TorchFunctionState.ALL_DISABLED)
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.set(value)
    assert surroundings() == before


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("switch", FLIPPED, ids=lambda switch: switch.name)
@pytest.mark.parametrize("when", ["after the forward", "before the forward"])
def test_a_rerun_sees_each_switch_as_the_first_run_did(kind, switch, when):
    seen, x0 = [], torch.randn(5, D, requires_grad=True)
    first, then = (switch.get(), other(switch)) if when == "after the forward" else (other(switch), switch.get())
    assert first != then

    def seeing(x):
        seen.append((surroundings(), torch.get_default_device()))
        return x.sin()

    run = Chain(kind("region", State(x0.detach()), factors([0.9] * 3)), x0, None)
    switch.set(first)
    for _ in range(3):
        run.step(Step(seeing), ())
    switch.set(then)
    before, runs = surroundings(), len(seen)
    torch.autograd.grad(run.x.sum(), x0, torch.ones((), device="cpu"))
    assert surroundings() == before
    assert len(seen) > runs
    assert all(found == seen[0] for found in seen)


def test_the_list_is_complete():
    """Whatever torch._C can set by a pair of getter and setter is in the list, or is not about kernels."""
    pairs = {name for name in dir(torch._C) if "get_" in name and hasattr(torch._C, name.replace("get_", "set_", 1))}
    words = ["cudnn", "blas", "mkldnn", "onednn", "nnpack", "miopen", "linalg", "rocm", "sdp", "deterministic", "precision", "qengine"]
    about_kernels = {name.removeprefix("_get_") for name in pairs if any(word in name for word in words)}
    about_kernels -= {"deterministic_algorithms", "cublas_allow_tf32"}  # under another name; the same as float32_matmul_precision
    about_kernels -= {name for name in about_kernels if "tunableop" in name}  # what is tuned and how; not whether
    assert not about_kernels - {switch.name for switch in SWITCHES}
    backends = {name for name in dir(torch._C) if name.startswith("_set_sdp_use_")}
    assert {name.removeprefix("_set_") for name in backends} < {switch.name for switch in SWITCHES}


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("where", ["default", "with"])
def test_the_default_device_of_the_first_run(kind, where):
    x0, layer = torch.randn(5, D, requires_grad=True), nn.Linear(D, D)

    def scaled(x):
        device = torch.zeros(1).device.type
        return torch.tanh(layer(x)) * (2.0 if device == "meta" else 1.0)

    def gradient(backward_inside):
        run = Chain(kind("region", State(x0.detach()), factors([0.9] * 3)), x0, None)
        torch.set_default_device("meta" if where == "default" else None)
        with torch.device("meta" if where == "with" else "cpu") if where == "with" else torch.device("meta"):
            for _ in range(3):
                run.step(Step(scaled), ())
            loss = run.x.sum()
            ones = torch.ones((), device="cpu")
            if backward_inside:
                return torch.autograd.grad(loss, x0, ones)[0]
        torch.set_default_device(None)
        return torch.autograd.grad(loss, x0, ones)[0]

    inside = gradient(True)
    torch.set_default_device(None)
    assert torch.equal(gradient(False), inside)
    assert torch.get_default_device() == torch.device("cpu")


@pytest.mark.parametrize("kind", TAPES)
def test_a_mode_around_the_forward_is_around_the_rerun(kind):
    x0, layer = torch.randn(5, D, requires_grad=True), nn.Linear(D, D)

    def gradient(with_mode, factor):
        run = Chain(kind("region", State(x0.detach()), factors([0.9] * 3)), x0, None)
        if with_mode:
            with Doubling():
                for _ in range(3):
                    run.step(Step(lambda x: torch.tanh(layer(x))), ())
        else:
            for _ in range(3):
                run.step(Step(lambda x: torch.tanh(layer(x)) * factor), ())
        return torch.autograd.grad(run.x.sum(), x0)[0]

    assert torch.equal(gradient(True, 1), gradient(False, 2))


def test_precisions_that_follow_others_still_do_so_afterwards():
    convolution = next(switch for switch in SWITCHES if switch.name == "fp32_precision of mkldnn conv")
    whole = next(switch for switch in SWITCHES if switch.name == "fp32_precision of generic all")
    convolution.set("ieee")
    first = surroundings()
    torch._C._set_fp32_precision_setter("mkldnn", "conv", "none")
    whole.set("tf32")
    with surrounded(first):
        assert convolution.get() == "ieee"
    assert convolution.get() == "tf32"
    whole.set("ieee")
    assert convolution.get() == "ieee"


def test_old_and_new_precision_switches_at_once():
    first = surroundings()
    torch._C._set_fp32_precision_setter("cuda", "matmul", "tf32")
    with pytest.raises(RuntimeError, match="mix"):
        torch.get_float32_matmul_precision()
    mixed = surroundings()
    with surrounded(first):
        assert surroundings() == first
    assert surroundings() == mixed
    assert cudnn.allow_tf32
