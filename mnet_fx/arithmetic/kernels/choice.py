"""The shears of `eager`, each as one compiled pass over the elements. Same bits, about half the time.

On a CPU they are C (see `c`), compiled on first use in some tenths of a second. They are used wherever there is a C compiler; the
eager loops go on where there is none. With Triton a whole `DeviceState` takes their place. Elsewhere inductor compiles them, in some ten
seconds, and is asked only with MNET_FX_FUSED=1 in the environment. MNET_FX_FUSED=0 turns all of these off. Every compiled loop first has to
give the bits of the eager one on a part of its input.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ...errors import MnetWarning
from .c import compiled
from .eager import EAGER, Kernels, flat, is_normal

__all__ = ["AUTOMATIC", "FUSED", "fusing", "kernels", "usable"]

log = logging.getLogger("mnet_fx")
SMALLEST = {"cpu": 1, "other": 1 << 17}  # elements; below, calling inductor's loop takes longer than the eager one
SAMPLE = 1 << 16  # elements on which a compiled loop is tried
_lock = threading.Lock()
Loop = Callable[[Sequence[Tensor], Sequence[float]], None]


def kernels() -> Kernels:
    """The loops that the environment asks for, see above."""
    return {"0": EAGER, "1": FUSED}.get(os.environ.get("MNET_FX_FUSED", ""), AUTOMATIC)


@cache
def usable(device: torch.device) -> bool:
    """Whether Triton is there, wanted, and can compile for a device; its interpreter takes tensors on the CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda") or not (interpreted or fusing()):
        return False
    try:
        from . import device_math  # noqa: F401
    except ImportError:
        return False
    return interpreted or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def fusing() -> bool:
    """Whether a compiled graph may use the fused loops: unless MNET_FX_FUSED=0 in the environment."""
    return os.environ.get("MNET_FX_FUSED", "1") != "0"


def _shear(X: Tensor, U: Tensor, y: Tensor, out: Tensor, scale: Tensor, ratio: Tensor, unit: Tensor) -> None:
    U.add_((y.double() * scale).round().to(U.dtype))
    X.add_((U.double() * ratio).round().to(X.dtype))
    _put(X, out, unit)


def _unshear_x(X: Tensor, U: Tensor, out: Tensor, ratio: Tensor, unit: Tensor) -> None:
    X.sub_((U.double() * ratio).round().to(X.dtype))
    _put(X, out, unit)


def _put(X: Tensor, out: Tensor, unit: Tensor) -> None:
    out.copy_(X.float() * unit.float() if X.dtype is torch.int32 and out.dtype is torch.float32 else X.double() * unit)


def _unshear_u(U: Tensor, y: Tensor, scale: Tensor) -> None:
    U.sub_((y.double() * scale).round().to(U.dtype))


class _Fused:
    """One loop: compiled on first use for each combination of dtypes, and eager where it cannot be or need not be.

    Args:
        function: the loop in torch, for inductor; the loop of `c` has its name.
        eager: the loop of `eager`.
        asked: whether the user wants it, also if that takes inductor, and is told if it cannot be.
        writes_no_x: whether the last factor is no unit.
    """

    def __init__(self, function: Callable[..., None], eager: Callable[..., None], asked: bool, writes_no_x: bool = False) -> None:
        self.function, self.eager, self.asked, self.writes_no_x = function, eager, asked, writes_no_x
        self.loops: dict[Any, Loop] = {}

    def __call__(self, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        factors = [a for a in arguments if isinstance(a, float)]
        cpu = tensors[0].device.type == "cpu"
        if (
            tensors[0].numel() < SMALLEST["cpu" if cpu else "other"]
            or not (cpu or self.asked)
            or not (self.writes_no_x or is_normal(factors[-1]))
            or any(type(t) is not Tensor or t.is_neg() or t._is_zerotensor() for t in tensors)  # whose memory is not what they seem to hold
        ):
            return self.eager(*arguments)
        key = tuple([(t.dtype, t.device) for t in tensors])
        return (self.loops.get(key) or self._made(key, tensors, factors))(tensors, factors)

    def _made(self, key: Any, tensors: list[Tensor], factors: list[float]) -> Loop:
        """The loop for these dtypes: the eager one if no other can be had."""
        with _lock:
            if key not in self.loops:
                self.loops[key] = self._compiled([flat(t)[:SAMPLE] for t in tensors], factors)
            return self.loops[key]

    def _compiled(self, sample: list[Tensor], factors: list[float]) -> Loop:
        begin, name = time.perf_counter(), self.function.__name__.lstrip("_")
        dtypes = tuple(t.dtype for t in sample)
        try:
            loop = compiled(name, dtypes) if sample[0].device.type == "cpu" else by_inductor(self.function, dtypes)
            ours, theirs = ([t.clone() for t in sample] for _ in range(2))
            loop(ours, factors)
            self.eager(*theirs, *factors)
            if not all(map(torch.equal, ours, theirs)):
                raise RuntimeError("it gives other bits than the eager loop")
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            log.info("%s cannot be compiled (%s)", name, reason)
            if self.asked:
                warnings.warn(f"the arithmetic cannot be compiled ({reason}); the eager loops go on", MnetWarning, stacklevel=2)
            return lambda tensors, factors: self.eager(*tensors, *factors)
        log.info("compiled %s for %s in %.1f s", name, [str(dtype) for dtype in dtypes], time.perf_counter() - begin)
        return loop


def by_inductor(function: Callable[..., None], dtypes: Sequence[torch.dtype]) -> Loop:
    """A loop in torch, compiled by inductor when it is called first."""
    log.warning("compiling %s for %s (once; MNET_FX_FUSED=0 avoids it)", function.__name__, [str(dtype) for dtype in dtypes])
    copy = _copied(function)
    fast = torch.compile(copy, dynamic=True, fullgraph=True, options={"guard_filter_fn": _no_guards})

    def run(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        with _plain(tensors[0].device.type):
            fast(*map(flat, tensors), *(torch.tensor(factor, dtype=torch.float64, device="cpu") for factor in factors))

    return run


def _copied(function: Callable[..., None]) -> Callable[..., None]:
    """The function with a code object of its own, by which Dynamo tells what it compiled."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    """Keeps none of Dynamo's checks: dtypes and devices are our key, and all else that a caller can vary makes no difference to 1-d loops.

    With checks, a call under another grad mode or number of threads would compile again, and after some of these raise.
    """
    return [False] * len(guards)


@contextmanager
def _plain(device_type: str) -> Iterator[None]:
    """No gradients, no autocast."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext():
        yield


def _loops(asked: bool) -> Kernels:
    return Kernels(
        _Fused(_shear, EAGER.shear, asked),
        _Fused(_unshear_x, EAGER.unshear_x, asked),
        _Fused(_unshear_u, EAGER.unshear_u, asked, writes_no_x=True),
    )


AUTOMATIC = _loops(asked=False)
FUSED = _loops(asked=True)
