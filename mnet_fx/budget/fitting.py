"""The largest batch and the greatest depth that fit."""

from __future__ import annotations

import math
from collections.abc import Callable

from .estimates import Limits

__all__ = ["limits"]

_LARGEST = 1 << 24  # rows; beyond, memory is no limit


def limits(total: Callable[[int], int], batch: int | None, now: int, growing: int | None, memory: int) -> Limits:
    """What fits in a number of bytes.

    Args:
        total: bytes of a training step with another batch.
        batch: the batch of the estimate; None where there is none.
        now: bytes of a step with it.
        growing: of these, bytes that grow with depth; None without chains.
        memory: bytes that there are.
    """
    depth = None if growing is None else math.inf if growing == 0 else max(0.0, 1 + (memory - now) / growing)
    return Limits(0 if batch is None else _largest(total, {batch: now}, memory), depth)


def _largest(total: Callable[[int], int], known: dict[int, int], memory: int) -> int:
    """The largest batch that fits, by secants: bytes grow almost in proportion to it.

    Where they are no monotonous function of the batch, a larger one may fit too.
    """
    known = dict(known)

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = total(batch)
        return known[batch] <= memory

    (first,) = known
    fits(2 * first)
    low, high = 0, _LARGEST  # low fits, high does not
    for batch in sorted(known):
        low, high = (max(low, batch), high) if fits(batch) else (low, min(high, batch))
    while high - low > 1:
        guess = _secant(known, memory)
        tried = min(max(guess, low + 1), high - 1)
        if fits(tried):
            low = tried
            if tried + 1 < high and tried >= guess and not fits(tried + 1):
                high = tried + 1
        else:
            high = tried
        if low + 1 >= _LARGEST:
            break
    return low


def _secant(known: dict[int, int], memory: int) -> int:
    """Where the line through the two known points nearest to the answer meets `memory`."""
    (a, at_a), (b, at_b) = sorted(known.items(), key=lambda item: abs(item[1] - memory))[:2]
    slope = (at_b - at_a) / (b - a)
    return _LARGEST if slope <= 0 else int(a + (memory - at_a) // slope)
