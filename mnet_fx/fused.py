"""The shears of `loops`, each compiled by inductor into one pass over the elements. Same bits, about half the time.

Opt-in, since the first use compiles for some seconds (announced in the log "mnet_fx", and cached on disk by inductor for the next process):
set the environment variable MNET_FX_FUSED=1. Where inductor has no compiler to work with, a warning says so and the eager loops go on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .errors import MnetWarning
from .loops import EAGER, Kernels, flat, is_normal

__all__ = ["FUSED", "fusing", "kernels"]

log = logging.getLogger("mnet_fx")
SMALLEST = 1 << 17  # elements; below, calling a compiled function costs more than the loop
_lock = threading.Lock()


def kernels() -> Kernels:
    """The fused loops if MNET_FX_FUSED=1 in the environment, else the eager ones."""
    return FUSED if os.environ.get("MNET_FX_FUSED", "0") == "1" else EAGER


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
    """One loop: compiled on first use for each combination of dtypes, and eager where it cannot be or need not be."""

    def __init__(self, function: Callable[..., None], eager: Callable[..., None], writes_no_x: bool = False) -> None:
        self.function, self.eager, self.writes_no_x = function, eager, writes_no_x
        self.compiled: dict[Any, Callable[..., None]] = {}

    def __call__(self, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        factors = [a for a in arguments if isinstance(a, float)]
        if tensors[0].numel() < SMALLEST or self.function is self.eager or not (self.writes_no_x or is_normal(factors[-1])):
            return self.eager(*arguments)
        key = tuple((t.dtype, t.device) for t in tensors)
        inputs = [flat(t) for t in tensors]
        inputs += [torch.tensor(a, dtype=torch.float64) for a in factors]
        if key not in self.compiled and not self._compile(key, inputs):
            return self.eager(*arguments)
        with _plain(inputs[0].device.type):
            return self.compiled[key](*inputs)

    def _compile(self, key: Any, inputs: list[Tensor]) -> bool:
        """Compiles for these dtypes by a call on copies; False if that cannot be done."""
        with _lock, _plain(inputs[0].device.type):
            log.warning("compiling %s for %s (once; MNET_FX_FUSED=0 avoids it)", self.function.__name__, [str(k[0]) for k in key])
            begin = time.perf_counter()
            try:
                compiled = torch.compile(_copied(self.function), dynamic=True, fullgraph=True, options={"guard_filter_fn": _no_guards})
                compiled(*[t.clone() for t in inputs])
            except Exception as error:
                self.function = self.eager
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                warnings.warn(f"inductor cannot compile the arithmetic ({reason}); the eager loops go on", MnetWarning, stacklevel=2)
                return False
            self.compiled[key] = compiled
            log.warning("compiled %s in %.1f s", self.function.__name__, time.perf_counter() - begin)
            return True


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
    """No gradients, no autocast; entered only where needed, since that takes longer than the loop over a small tensor."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext():
        yield


FUSED = Kernels(_Fused(_shear, EAGER.shear), _Fused(_unshear_x, EAGER.unshear_x), _Fused(_unshear_u, EAGER.unshear_u, writes_no_x=True))
