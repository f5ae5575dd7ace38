"""Read maps: step t of a chain reads x[t] + m + x[t] W in place of x[t], a prediction of where the original network would.

The stream itself is left alone, so the recurrence is undone as ever: f[t] is another function of x[t], no more. A map is frozen, and is a
parameter of its step: a rerun pins and proves it as any other.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arithmetic.valueless import valueless
from ..errors import MnetWarning, StreamError
from ..read_maps import Maps, Place, ReadMap

__all__ = ["Read", "Reads", "channel_axis", "observed"]


class _Observers(threading.local):
    """Those of one thread."""

    def __init__(self) -> None:
        self.all: list[Callable[[Place, int, float, Tensor], None]] = []


_OBSERVERS = _Observers()


@contextmanager
def observed(see: Callable[[Place, int, float, Tensor], None]) -> Iterator[None]:
    """Has `see` called before each step that this thread runs, for a time: with the chain's place, t, the reach of its map, and x[t]."""
    _OBSERVERS.all.append(see)
    try:
        yield
    finally:
        _OBSERVERS.all.remove(see)


def channel_axis(x: Tensor) -> int:
    """The dimension of channels: 1 of images and volumes (N, C, H, W[, D]), else the last."""
    return 1 if x.dim() in (4, 5) else x.dim() - 1


@dataclass(frozen=True)
class Reads:
    """The read maps of one chain, as they are by the time it runs.

    Attributes:
        maps: those of the whole network, by place; for each step one, or None.
        place: of the chain.
    """

    maps: Maps
    place: Place

    def of(self, module: nn.Module, index: int, reach: float, x: Tensor) -> nn.Module:
        """The step `module`, which is number `index`, reading where its map says; as it is where it has none.

        Args:
            reach: c[t] of `settings.matched_weights`, by which v[t] counts; 0 where v[t] = 0, at the start of a chain. There no map acts.
        """
        for see in _OBSERVERS.all:
            see(self.place, index, reach, x)
        if not self.maps or not reach:
            return module
        found = self.maps.get(self.place, ())
        if not found:
            self._uncalibrated()
        read = found[index] if index < len(found) else None
        return module if read is None or valueless(x) else Read(module, read, x)

    def _uncalibrated(self) -> None:
        """Warns, once for each chain."""
        self.maps[self.place] = (None,) * len(self.place)
        others = ", ".join(sorted({place[0] or "the root" for place, found in self.maps.items() if any(found)}))
        warnings.warn(
            f"the chain from {self.place[0] or 'the root'} reads uncalibrated: the network was calibrated for those from {others}, as its "
            "model and options were then. Calibrate anew, or momentumize as then",
            MnetWarning,
            stacklevel=2,
        )


class Read(nn.Module):
    """A step that reads x + m + x W.

    Args:
        inner: the step, `(x, *sides) -> (y, *extras)`.
        read: the map.
        x: the stream, for its dtype, device and number of dimensions.

    Raises:
        StreamError: the map is of another width than the stream; or, when called, the step writes to its input.
    """

    inner: nn.Module
    shift: Tensor

    def __init__(self, inner: nn.Module, read: ReadMap, x: Tensor) -> None:
        super().__init__()
        self.axis, self.stateless, self.is_pure = channel_axis(x), getattr(inner, "stateless", False), getattr(inner, "is_pure", False)
        if x.shape[self.axis] != read.width:
            raise StreamError(
                f"a chain was calibrated for a stream of {read.width} channels, and got one of shape {tuple(x.shape)}: calibrate anew"
            )
        self._modules["inner"] = inner
        self._parameters.update(read.parameters(x.dtype, x.device))

    def path_of(self, name: str) -> str:
        """Path in the model of a parameter or buffer of this step."""
        if name in self._parameters:
            return f"{name} of the read map"
        own: Callable[[str], str] = getattr(self._modules["inner"], "path_of", str)
        return own(name.removeprefix("inner."))

    def forward(self, x: Tensor, *sides: Any) -> tuple[Any, ...]:
        at = self.point(x)
        version = None if at.is_inference() or torch._C._are_functorch_transforms_active() else at._version
        outputs = self.inner.forward(at, *sides)
        if version is not None and at._version != version:
            raise StreamError(
                "the step writes to the stream in place (an in-place activation or x += ... on its input): make that out of place"
            )
        return outputs

    def point(self, x: Tensor) -> Tensor:
        """Where the step reads, in the shape, strides and dtype of x."""
        moved = x.movedim(self.axis, -1)
        for name, factor in self._parameters.items():
            if name != "shift" and factor is not None:
                moved = moved * factor if factor.dim() == 1 else moved @ factor
        return (x + (moved + self.shift).movedim(-1, self.axis)).to(x.dtype)
