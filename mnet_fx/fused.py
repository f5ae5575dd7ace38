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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import MnetWarning
from .loops import EAGER, Kernels, flat

__all__ = ["FUSED", "fusing", "kernels"]

log = logging.getLogger("mnet_fx")
SMALLEST = 1 << 14  # elements; below, calling a compiled function costs more than the loop
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
    out.copy_(X.double() * unit)


def _unshear_x(X: Tensor, U: Tensor, out: Tensor, ratio: Tensor, unit: Tensor) -> None:
    X.sub_((U.double() * ratio).round().to(X.dtype))
    out.copy_(X.double() * unit)


def _unshear_u(U: Tensor, y: Tensor, scale: Tensor) -> None:
    U.sub_((y.double() * scale).round().to(U.dtype))


class _Fused:
    """One loop: compiled on first use, and eager where it cannot be or need not be."""

    def __init__(self, function: Callable[..., None], eager: Callable[..., None]) -> None:
        self.function, self.eager = function, eager
        self.compiled: Callable[..., None] | None = None
        self.known: set[Any] = set()

    def __call__(self, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if tensors[0].numel() < SMALLEST or self.function is self.eager:
            return self.eager(*arguments)
        key = tuple((t.dtype, t.device) for t in tensors)
        inputs = [flat(t) for t in tensors]
        inputs += [torch.tensor(a, dtype=torch.float64) for a in arguments if isinstance(a, float)]
        if key not in self.known and not self._compile(key, inputs):
            return self.eager(*arguments)
        assert self.compiled is not None
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            return self.compiled(*inputs)

    def _compile(self, key: Any, inputs: list[Tensor]) -> bool:
        """Compiles for these dtypes by a call on copies; False if that cannot be done."""
        with _lock, torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            log.warning("compiling %s for %s (once; MNET_FX_FUSED=0 avoids it)", self.function.__name__, [str(k[0]) for k in key])
            begin = time.perf_counter()
            try:
                self.compiled = self.compiled or torch.compile(self.function, dynamic=True, fullgraph=True)
                self.compiled(*[t.clone() for t in inputs])
            except Exception as error:
                self.function = self.eager
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                warnings.warn(f"inductor cannot compile the arithmetic ({reason}); the eager loops go on", MnetWarning, stacklevel=2)
                return False
            self.known.add(key)
            log.warning("compiled %s in %.1f s", self.function.__name__, time.perf_counter() - begin)
            return True

    def _give_up(self, error: Exception) -> None:
        self.function = self.eager
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        warnings.warn(
            f"inductor cannot compile the arithmetic here ({reason}); the eager loops give the same bits", MnetWarning, stacklevel=2
        )


FUSED = Kernels(_Fused(_shear, EAGER.shear), _Fused(_unshear_x, EAGER.unshear_x), _Fused(_unshear_u, EAGER.unshear_u))
