"""The state of a chain on fake tensors: keeps what a real one keeps, for a stream of supposed magnitude, or of one that was seen before."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from .fixed_point import State

__all__ = ["RESIDUAL", "SEEN", "FakeState", "Seen", "SeenState"]

RESIDUAL = 1.0  # supposed: the largest |f(x)| and |v|, relative to the largest |x|


class Seen:
    """The numbers that chains of real tensors took their decisions by, for the same chains of fake tensors.

    A chain is known by its region, and by how many times that was run before in the pass. What is started more often is so by reruns in the
    backward pass, the last one first.

    Attributes:
        supposed: whether a chain was started whose numbers nobody had noted.
        rotated: whether one would have been rotated, which fake tensors are not, and whose numbers are not noted either.
    """

    def __init__(self) -> None:
        self.supposed = self.rotated = False
        self._chains: defaultdict[str, list[list[float]]] = defaultdict(list)
        self._started: Counter[str] = Counter()

    def new(self, region: str) -> list[float]:
        """Of a chain that starts: where it puts its numbers, in the order in which it asks for them."""
        self._chains[region].append([])
        return self._chains[region][-1]

    @contextmanager
    def told(self) -> Iterator[None]:
        """For a pass on fake tensors, whose chains are to find these."""
        self._started.clear()
        with self.set():
            yield

    @contextmanager
    def set(self) -> Iterator[None]:
        """For a time, chains note here what they see, and those of fake tensors find it."""
        token = SEEN.set(self)
        try:
            yield
        finally:
            SEEN.reset(token)

    def again(self, region: str) -> Iterable[float]:
        """Those of the chain that is started on fake tensors now; none where there was no such chain."""
        chains = self._chains.get(region)
        if not chains:
            self.supposed = True
            return ()
        rounds, place = divmod(self._started[region], len(chains))
        self._started[region] += 1
        return chains[-1 - place if rounds else place]


SEEN: ContextVar[Seen | None] = ContextVar("mnet_fx_seen", default=None)
"""Where chains note what they see, and chains of fake tensors find it: for `mnet_fx.estimate` with values."""


class SeenState(State):
    """A state that notes the numbers by which it decides."""

    def __init__(self, noted: list[float], *args: Any) -> None:
        self.noted = noted
        super().__init__(*args)

    def _largest(self, t: Tensor) -> float:
        self.noted.append(super()._largest(t))
        return self.noted[-1]

    def _is_any(self, where: Tensor) -> bool:
        found = super()._is_any(where)
        self.noted.append(float(found))
        return found


class FakeState(State):
    """A state of fake integers. All decisions are those of `State` for the numbers that were seen; without them, for a stream whose
    largest element stays 1, with residuals of at most `RESIDUAL`, where a real one spills a byte earlier or later if it differs.
    """

    def __init__(self, seen: Iterable[float], *args: Any) -> None:
        self.seen = iter(seen)
        super().__init__(*args)

    def _largest(self, t: Tensor) -> float:
        if not hasattr(self, "unit"):
            supposed = 1.0
        elif t is self.X:
            supposed = 1.0 / self.unit
        else:
            supposed = RESIDUAL / (self.ratio * self.unit) if t is self.U else RESIDUAL
        return next(self.seen, supposed)

    def _is_any(self, where: Tensor) -> bool:
        return bool(next(self.seen, 0.0))
