"""The switches of torch that decide which kernel runs, or what it computes: read around the first run of a step, set again for every rerun.

    values = surroundings()        as they are here and now
    with surrounded(values): ...   as they were then; afterwards as they were before

One list, `SWITCHES`, says which. A getter takes a tenth of a microsecond, so that all are read at each step; a setter runs only where a
value differs. Private getters and setters are used where the public ones warn, build contexts, or are missing; those that a version of
torch does not have are left out. Not here: the anomaly mode, which changes no value, and `set_flush_denormal`, which cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.backends import mha, opt_einsum
from torch.nn import attention
from torch.utils import _device

from ..errors import warn_once

__all__ = ["SWITCHES", "Switch", "around", "exported", "surrounded", "surroundings", "transformed", "untuned"]


_C: Any = torch._C  # of which the type stubs know a part
_AS_IT_IS = nullcontext()

_PAIRS = (
    "_{}_deterministic_fill_uninitialized_memory",
    "_{}_mkldnn_enabled",
    "_{}_mkldnn_deterministic",
    "_{}_onednn_allow_tf32",
    "_{}_cudnn_enabled",
    "_{}_cudnn_benchmark",
    "_cuda_{}_cudnn_benchmark_limit",
    "_{}_cudnn_deterministic",
    "_{}_cudnn_depthwise_kernel",
    "_{}_cublas_allow_fp16_reduced_precision_reduction",
    "_{}_cublas_allow_bf16_reduced_precision_reduction",
    "_{}_cublas_allow_fp16_accumulation",
    "_{}_cublaslt_prefer_grouped_gemm",
    "_{}_cpu_allow_fp16_reduced_precision_reduction",
    "_{}_blas_preferred_backend",
    "_{}_linalg_preferred_backend",
    "_{}_rocm_fa_preferred_backend",
    "_{}_miopen_immediate",
    "_{}_nnpack_enabled",
    "_{}_qengine",
    "_{}_math_sdp_allow_fp16_bf16_reduction",
    "_{}_sdp_priority_order",
    "_{}_cudnn_allow_tf32",
    "_{}_float32_matmul_precision",
)
"""Getters in torch._C, with "get" left out; the setters have the same names. The last two move values of `_precisions`."""


_DEVICES: list[str] = _C._autocast_supported_devices()
_COMMON = ["cpu", "cuda"]


@dataclass(frozen=True)
class Switch:
    """One setting of torch's: its value now, and how to set it."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def surroundings() -> tuple[Any, ...]:
    """The values of all switches."""
    return tuple([get() for get in _GETTERS])


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation surrounds the call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exported() -> bool:
    """Whether torch.export, torch.jit.trace or make_fx records the call: what loops write would not be seen."""
    keys = torch._C._TorchDispatchModeKey
    modes = any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FUNCTIONAL))
    return modes or torch.compiler.is_exporting() or torch.jit.is_tracing()


def around(device: torch.device) -> tuple[Any, ...]:
    """The same as steps on a device find them."""
    with untuned(device):
        return surroundings()


def surrounded(then: tuple[Any, ...], moves: bool = True) -> AbstractContextManager[None]:
    """Sets all switches to the values of another time, and back; `moves`: what runs meanwhile may move them too."""
    if (now := surroundings()) != then:
        return _surrounded(then, now)
    return _put_back(now) if moves else _AS_IT_IS


@contextmanager
def _put_back(now: tuple[Any, ...]) -> Iterator[None]:
    try:
        yield
    finally:
        if surroundings() != now:
            _turn(now)


@contextmanager
def _surrounded(then: tuple[Any, ...], now: tuple[Any, ...]) -> Iterator[None]:
    torch.autocast_increment_nesting()  # as torch.autocast does: casts of weights are kept no longer than this
    try:
        _turn(then)
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        _turn(now)


def untuned(device: torch.device) -> AbstractContextManager[None]:
    """Without cudnn.benchmark, where a rerun in another thread would tune apart from the first run, and take another algorithm.

    The plans that cuDNN found fastest are kept by each thread, and autograd goes back on CUDA in a thread of its own.
    """
    on_cuda = device.type == "cuda" and _C._get_cudnn_benchmark() and _C._is_multithreading_enabled()
    return _untuned() if on_cuda else _AS_IT_IS


@contextmanager
def _untuned() -> Iterator[None]:
    warn_once(
        "torch.backends.cudnn.benchmark is on: it is off within the steps of reversible chains, as autograd's thread would choose other "
        "algorithms for a rerun than the forward pass did, and the gradient would be lost. "
        "torch.autograd.set_multithreading_enabled(False) around the forward and the backward pass keeps it on"
    )
    _C._set_cudnn_benchmark(False)
    try:
        yield
    finally:
        _C._set_cudnn_benchmark(True)


def _turn(values: tuple[Any, ...]) -> None:
    """Sets what differs, in the order of the list: some setters move later switches too, which are then set to their own value."""
    _C._set_torch_function_state(_C._TorchFunctionState.ALL_DISABLED)  # some setters are functions that modes see
    for switch, value in zip(SWITCHES, values, strict=True):
        if switch.get() != value:
            switch.set(value)


def _pairs() -> Iterator[Switch]:
    """Those with a getter and a setter in torch._C, of the same name."""
    for name in _PAIRS:
        getter, setter = (getattr(_C, name.format(verb), None) for verb in ("get", "set"))
        if getter is not None and setter is not None:
            yield Switch(name.format("get").removeprefix("_get_"), _readable(getter), _spread(setter))


def _readable(getter: Callable[[], Any]) -> Callable[[], Any]:
    """The getter; those of the old precision switches raise where the new ones have been used as well, and then say nothing."""

    def get() -> Any:
        try:
            return getter()
        except RuntimeError:
            return None

    return get if "precision" in getter.__name__ or "tf32" in getter.__name__ else getter


def _spread(setter: Callable[..., Any]) -> Callable[[Any], Any]:
    """The setter, as a function of what the getter returns; None means that it could not be read."""

    def set_(value: Any) -> None:
        if value is not None:
            setter(*value) if isinstance(value, tuple) else setter(value)

    return set_


def _attention() -> Iterator[Switch]:
    """Which kernels scaled_dot_product_attention may use."""
    for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable", "fa3"):
        setter = getattr(_C, f"_set_sdp_use_{name}", None)
        if setter is not None:
            yield Switch(f"sdp_use_{name}", getattr(_C, f"_get_{name}_sdp_enabled"), setter)
    if hasattr(attention, "current_flash_attention_impl"):  # torch 2.11
        yield Switch("flash attention implementation", attention.current_flash_attention_impl, _activate)


def _activate(name: str | None) -> None:
    if name is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(name)


def _precisions() -> Iterator[Switch]:
    """fp32_precision, where an operation that is set to "none" follows its backend, and a backend the whole."""
    if not hasattr(_C, "_get_fp32_precision_getter"):
        return
    for backend, ops in {"generic": ["all"], "cuda": ["all", "matmul", "conv", "rnn"], "mkldnn": ["all", "matmul", "conv", "rnn"]}.items():
        for op in ops:
            yield _precision(backend, op)


def _precision(backend: str, op: str) -> Switch:
    def get() -> str:
        return _C._get_fp32_precision_getter(backend, op)

    def set_(value: str) -> None:
        for candidate in ("none", value):  # first to follow, if that comes to the same
            if get() != value:
                _C._set_fp32_precision_setter(backend, op, candidate)

    return Switch(f"fp32_precision of {backend} {op}", get, set_)


def _autocast() -> tuple[Any, ...]:
    """Whether casts are kept; and of each device, whether it is on, and its dtype: of all devices only where it is on for some."""
    devices = _DEVICES if _C._is_any_autocast_enabled() else _COMMON
    return torch.is_autocast_cache_enabled(), {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices}


def _set_autocast(states: tuple[Any, ...]) -> None:
    torch.set_autocast_cache_enabled(states[0])
    for device in _DEVICES:
        enabled, dtype = states[1].get(device, (False, torch.get_autocast_dtype(device)))
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def _modes() -> tuple[Any, ...]:
    """The torch function modes around this call, one of which is the default device, and where torch notes that besides."""
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    stack = tuple(torch.overrides._get_current_function_mode_stack()) if _C._len_torch_function_stack() else ()
    return stack, default, _device.CURRENT_DEVICE


def _set_modes(value: tuple[Any, ...]) -> None:
    stack, torch._GLOBAL_DEVICE_CONTEXT.device_context, _device.CURRENT_DEVICE = value
    for _ in range(_C._len_torch_function_stack()):
        _C._pop_torch_function_stack()
    for mode in stack:
        _C._push_on_torch_function_stack(mode)


def _einsum() -> Iterator[Switch]:
    """The order in which einsum contracts, where the package opt_einsum is there to choose it."""
    if opt_einsum.is_available():
        yield Switch("opt_einsum", opt_einsum._get_enabled, opt_einsum._set_enabled)
        yield Switch("strategy of opt_einsum", opt_einsum._get_strategy, opt_einsum._set_strategy)


def _tunable() -> Iterator[Switch]:
    """Whether products are tuned as they run; builds of torch without CUDA have no such thing."""
    if hasattr(_C, "_cuda_tunableop_is_enabled"):
        yield Switch("tunable operations", _C._cuda_tunableop_is_enabled, _C._cuda_tunableop_enable)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


SWITCHES: tuple[Switch, ...] = (
    Switch("threads", torch.get_num_threads, torch.set_num_threads),
    Switch("grad mode", torch.is_grad_enabled, _C._set_grad_enabled),
    Switch("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Switch("default device and torch function modes", _modes, _set_modes),
    Switch("deterministic algorithms", _deterministic, lambda v: torch.use_deterministic_algorithms(v[0], warn_only=v[1])),
    *_pairs(),
    *_attention(),
    *_precisions(),
    Switch("autocast", _autocast, _set_autocast),
    Switch("fast path of nn.MultiheadAttention", mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    *_tunable(),
    *_einsum(),
    Switch("__torch_function__", _C._get_torch_function_state, _C._set_torch_function_state),  # off in Tensor.backward
)
"""Every switch; see above. A setter may move switches that come later, never one that comes before."""

_GETTERS = tuple(switch.get for switch in SWITCHES)
