"""Launches of Triton kernels that find the compiled kernel by themselves.

`JITFunction.run` works out at each launch which of its compilations the arguments need, in several times the time of the launch itself.
Here that is asked only for arguments of a kind not seen before. The kind of an argument is whatever Triton tells kernels apart by (its own
`specialization`): dtype and alignment of a tensor; of an integer whether it is 1, whether 16 divides it, and how many bits it needs; the
value of a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["Launcher", "raw_stream"]


class Launcher:
    """One kernel.

    Args:
        kernel: a function decorated with `triton.jit`, none of whose arguments is a float.
        options: of its compilation.
    """

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self.compiles = hasattr(kernel, "device_caches")  # else it is interpreted
        self.kinds: list[Callable[[Any], Any]] = [_kind_of(parameter) for parameter in getattr(kernel, "params", ())]
        self.compiled: dict[Any, Any] = {}

    def __call__(self, device: torch.device, programs: int, *arguments: Any) -> None:
        """Launches it on the current stream of a device.

        Args:
            device: of all tensors among the arguments.
            programs: how many.
            arguments: of the kernel, constants too, in order.
        """
        here = device.index is None or device.index == torch.cuda.current_device()
        with nullcontext() if here else torch.cuda.device(device.index):
            if not self.compiles:
                self.kernel[(programs,)](*arguments, **self.options)
                return
            key = (device.index, *[kind(argument) for kind, argument in zip(self.kinds, arguments, strict=True)])
            if (compiled := self.compiled.get(key)) is not None:
                compiled[(programs, 1, 1)](*arguments)
            else:
                self.compiled[key] = self.kernel.run(*arguments, grid=(programs,), warmup=False, **self.options)


def raw_stream(device: torch.device) -> int:
    """The address of the current stream of a device, in a tenth of the time that `torch.cuda.current_stream` takes; 0 but on CUDA."""
    if device.type != "cuda":
        return 0
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)


def _kind_of(parameter: Any) -> Callable[[Any], Any]:
    if parameter.is_constexpr:
        return _value
    return _wide if parameter.do_not_specialize else _specialised


def _value(constant: Any) -> Any:
    return type(constant), constant


def _specialised(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument == 1, argument % 16 == 0, _wide(argument)


def _wide(argument: int) -> bool:
    """Whether an integer needs 64 bits."""
    return not -(1 << 31) <= argument < 1 << 31
