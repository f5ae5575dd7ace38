"""Read maps: step t of a chain reads x[t] + m + x[t] W in place of x[t], a prediction of where the original network would.

The stream itself is left alone, so the recurrence is undone as ever: f[t] is another function of x[t], no more. A map is frozen, and is a
parameter of its step: a rerun pins and proves it as any other. What a map says of the velocity, or signs that are drawn, becomes the
`Rotation` of the step.
"""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arithmetic.rotations import Rotation
from ..arithmetic.valueless import valueless
from ..errors import MnetWarning, StreamError
from ..read_maps import Maps, Place, ReadMap
from .surroundings import exported

__all__ = ["Observer", "Read", "Reads", "channel_axis", "is_observed", "observed"]


class Observer:
    """What is told of each step that a thread runs.

    Attributes:
        rotates: whether it may say, by the maps, how the velocity is rotated after the step that it was told of.
    """

    rotates = False

    def before(self, place: Place, t: int, reach: float, x: Tensor) -> None:
        """Called before a step, with the chain's place, t, the reach c[t] of its map, and x[t]."""

    def reading(self, place: Place, t: int, step: nn.Module, x: Tensor) -> nn.Module:
        """What runs in the place of the step, which may read elsewhere."""
        return step

    def after(self, place: Place, t: int, reach: float, y: Tensor, frame: Tensor | None) -> None:
        """Called with c[t+1], f[t](x[t]), before that is added, and the frame of v; the rotation that follows is looked up afterwards."""


class _Observers(threading.local):
    """Those of one thread."""

    def __init__(self) -> None:
        self.all: list[Observer] = []


_OBSERVERS = _Observers()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Has an observer told of each step that this thread runs, for a time."""
    _OBSERVERS.all.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.all.remove(observer)


def _is_counted(x: Tensor) -> bool:
    """Whether the chain runs without values, so that maps would only stand in the way: what is exported runs so too, and has them."""
    return valueless(x) and not exported()


def is_observed() -> bool:
    """Whether anybody is told of the steps that this thread runs."""
    return bool(_OBSERVERS.all)


def channel_axis(x: Tensor) -> int:
    """The dimension of channels: 1 of images and volumes (N, C, H, W[, D]), else the last."""
    return 1 if x.dim() in (4, 5) else x.dim() - 1


@dataclass(frozen=True)
class Reads:
    """The read maps of one chain, as they are by the time it runs.

    Attributes:
        maps: those of the whole network, by place; for each step one, or None.
        place: of the chain.
        signed: whether v gets signs after each step where no map says how it is to be rotated.
    """

    maps: Maps
    place: Place
    signed: bool = False

    @property
    def may_rotate(self) -> bool:
        """Whether the velocity may be rotated, in a chain that has values."""
        known = any(read is not None and read.rotates for read in self.maps.get(self.place, ()))
        return self.signed or known or any(observer.rotates for observer in _OBSERVERS.all)

    def rotates(self, x: Tensor) -> bool:
        """Whether that of a chain that starts at x may be."""
        return self.may_rotate and x.dim() > 0 and not _is_counted(x)

    def rotation(self, index: int, reach: float, before: Tensor | None, y: Tensor) -> Rotation | None:
        """How the velocity is rotated after step `index`, which gave y; None if it is not.

        Args:
            reach: c[t+1]; 0 where v is forgotten, or read no more: then it is in no frame.
            before: the frame that it is in.
        """
        for observer in _OBSERVERS.all:
            observer.after(self.place, index, reach, y, before)
        found, axis = self.maps.get(self.place, ()), channel_axis(y)
        read, after = found[index] if index < len(found) else None, before
        if not reach:
            after = None
        elif read is not None and read.rotates:
            self._check(read, y)
            after = read.frame(y.device)
        elif self.signed:
            self._check(None, y)
            after = _signs(index, int(y.shape[axis]), y.device)
        return None if before is after is None else Rotation(axis, before, after, reach)

    def of(self, module: nn.Module, index: int, reach: float, x: Tensor) -> nn.Module:
        """The step `module`, which is number `index`, reading where its map says; as it is where it has none.

        Args:
            reach: c[t] of `settings.matched_weights`, by which v[t] counts; 0 where v[t] = 0, at the start of a chain. There no map acts.
        """
        for observer in _OBSERVERS.all:
            observer.before(self.place, index, reach, x)
            module = observer.reading(self.place, index, module, x)
        if not self.maps or not reach:
            return module
        found = self.maps.get(self.place, ())
        if not found:
            self._uncalibrated()
        read = found[index] if index < len(found) else None
        if read is None or not read.reads or _is_counted(x):
            return module
        self._check(read, x)
        return Read(module, read, x)

    def _check(self, read: ReadMap | None, x: Tensor) -> None:
        """Sees that the channels of x are those that the map, if there is one, and the signs are for.

        Raises:
            StreamError: they are others, or the stream has another number of dimensions than it had, by which channels are told.
        """
        width = int(x.shape[channel_axis(x)])
        dims, channels = self.maps.streams.setdefault(self.place, (x.dim(), width))
        if x.dim() == dims and width == (channels if read is None else read.width):
            return
        raise StreamError(
            f"the chain from {self.place[0] or 'the root'} was calibrated, or got its signs, for a stream of {dims} dimensions, by which "
            f"its channels are told, and {channels if read is None else read.width} channels, and got one of shape {tuple(x.shape)}: give "
            "the model whole batches, under torch.func.vmap too (x[None]); or calibrate anew, or momentumize with other weights"
        )

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


def _signs(index: int, width: int, device: torch.device | None = None) -> Tensor:
    """Signs of the channels of v after step `index`: a fair coin each, the same ones for every chain, on every machine."""
    bits = random.Random(index * 2**32 + width).getrandbits(width)
    return torch.tensor([1.0 if bits >> i & 1 else -1.0 for i in range(width)], dtype=torch.float32, device=device)


class Read(nn.Module):
    """A step that reads x + m + x W.

    Args:
        inner: the step, `(x, *sides) -> (y, *extras)`.
        read: the map.
        x: the stream, for its dtype, device and number of dimensions.

    Raises:
        StreamError: when called, the step writes to its input.
    """

    inner: nn.Module
    shift: Tensor

    def __init__(self, inner: nn.Module, read: ReadMap, x: Tensor) -> None:
        super().__init__()
        self.axis, self.stateless, self.is_pure = channel_axis(x), getattr(inner, "stateless", False), getattr(inner, "is_pure", False)
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
        moved, factors = x.movedim(self.axis, -1), [t for name, t in self._parameters.items() if name != "shift" and t is not None]
        ahead = self.shift.expand_as(moved)
        for i, factor in enumerate(factors):
            bias = self.shift if i + 1 == len(factors) else None
            ahead = moved = torch.addcmul(self.shift, moved, factor) if factor.dim() == 1 else functional.linear(moved, factor.mT, bias)
        return (x + ahead.movedim(-1, self.axis)).to(x.dtype)
