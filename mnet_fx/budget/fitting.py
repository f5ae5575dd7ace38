"""The largest batch and the greatest depth that fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from ..errors import MnetError
from .estimates import Limits

__all__ = ["largest_batch", "limits"]

_LARGEST = 1 << 24  # rows; beyond, memory is no limit
_DEEPEST = 1e9


def limits(
    total: Callable[[int], int],
    batch: int | None,
    now: int,
    deeper: Callable[[float], float] | None,
    memory: int,
    said: list[str],
) -> Limits:
    """What fits in a number of bytes.

    Args:
        total: bytes of a training step with another batch.
        batch: the batch of the estimate; None where there is none.
        now: bytes of a step with it.
        deeper: bytes of a step if chains were so many times as long; None without chains.
        memory: bytes that there are.
        said: gets a sentence for each batch that the model itself does not bear.
    """
    depth = None if deeper is None else _deepest(deeper, memory)
    return Limits(0 if batch is None else largest_batch(total, {batch: now}, memory, said), depth)


def _deepest(deeper: Callable[[float], float], memory: int) -> float:
    """The largest factor with which chains fit, by bisection; 0 where not even none do, inf where all do."""
    low, high = 0.0, 1.0
    while deeper(high) <= memory:
        low, high = high, 2 * high
        if high > _DEEPEST:
            return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if deeper(middle) <= memory else (low, middle)
    return low


def largest_batch(total: Callable[[int], int], known: dict[int, int], memory: int, said: list[str]) -> int:
    """The largest batch that fits, by secants: bytes grow almost in proportion to it.

    Where they are no monotonous function of the batch, a larger one may fit too.

    Args:
        total: bytes of a training step with a batch; where the model raises, as batch norm for a single row, it counts as too large.
        known: what is known of it already, for one batch.
        memory: bytes that there are.
        said: gets a sentence for each batch for which the model raised.
    """
    known = dict(known)

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = _or_too_large(total, batch, said)
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


def _or_too_large(total: Callable[[int], int], batch: int, said: list[str]) -> int:
    try:
        return total(batch)
    except MnetError:
        raise
    except Exception as error:  # the model's own
        text = f"{type(error).__name__}: {str(error)[:100]}"
        said.append(f"With a batch of {batch} the model fails ({text}); so it counts as too large.")
        return sys.maxsize


def _secant(known: dict[int, int], memory: int) -> int:
    """Where the line through the two known points nearest to the answer meets `memory`."""
    (a, at_a), (b, at_b) = sorted(known.items(), key=lambda item: abs(item[1] - memory))[:2]
    slope = (at_b - at_a) / (b - a)
    return _LARGEST if slope <= 0 else int(a + (memory - at_a) // slope)
