"""The largest batch and the largest depth of an encoder that a training step fits with, in the memory of a common card."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .measuring import allocate_gradients, peak
from .session import GIB, Session, failure
from .subjects import Subject, encoder
from .ways import Way, by_layer, checkpointed, plain

__all__ = ["largest", "run"]

CAP_GIB = 24.0
TINY_CAP_GIB = 0.5 / 1024
SPARE = 10.0  # seconds that a probe may take
SECONDS = 25.0  # for each search; one that is not done by then says so
WAYS: dict[str, Way] = {"plain": plain, "checkpoint": checkpointed, "momentum": by_layer}


class TimeIsUp(Exception):
    """Of the search, or of the run."""


def run(session: Session) -> None:
    """Weights in bfloat16, with gradients, without an optimiser. The layers are named for momentumize: to capture 400 takes minutes."""
    layers, batch = (2, 2) if session.tiny else (24, 8)
    search = {
        "batch": (lambda n: encoder(session, layers, n, torch.bfloat16), 8),
        "layers": (lambda n: encoder(session, n, batch, torch.bfloat16), 4 if session.tiny else 64),
    }
    for what, (make, first) in search.items():
        for way, build in WAYS.items():
            about = {
                "what": what,
                "way": way,
                "cap_gib": TINY_CAP_GIB if session.tiny else CAP_GIB,
                "fixed": layers if what == "batch" else batch,
            }
            fit = partial(fits, session, make, build, about["cap_gib"], time.monotonic() + SECONDS)
            with_cap(session, about, partial(largest, fit, first, 1 if session.tiny else 16))


def with_cap(session: Session, about: dict[str, Any], search: Callable[[], dict[str, Any]]) -> None:
    """One row, found while the allocator may reserve no more than the cap."""
    session.clear()
    if session.cuda:
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, about["cap_gib"] / total))
    try:
        session.add("largest", **about, **search())
    except Exception as error:
        session.add("largest", **about, error=failure(error))
    finally:
        if session.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def largest(fits: Callable[[int], bool], first: int, parts: int) -> dict[str, Any]:
    """Doubles until it does not fit, then halves what is between, to 1 / parts: the largest that fits, and the least seen not to."""
    low, high, probes = 0, first, 0
    try:
        while fits(high):
            low, high, probes = high, 2 * high, probes + 1
        probes += 1
        while high - low > max(1, low // parts):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
            probes += 1
    except TimeIsUp:
        return {"fits": low, "fails": None, "probes": probes, "stopped": "time was up"}
    return {"fits": low, "fails": high, "probes": probes}


def fits(session: Session, make: Callable[[int], Subject], build: Way, cap_gib: float, until: float, n: int) -> bool:
    """Whether one training step of size n goes through; gradients are allocated before it."""
    if session.left() < SPARE or time.monotonic() > until:
        raise TimeIsUp
    try:
        return trained(session, make(n), build, cap_gib)
    except torch.OutOfMemoryError as error:
        failure(error)
        return False
    finally:
        session.clear()


def trained(session: Session, subject: Subject, build: Way, cap_gib: float) -> bool:
    allocate_gradients(subject.model)
    step = partial(subject.step, build(session, subject))
    if session.cuda:
        step()
        torch.cuda.synchronize()
        return True
    parameters = sum(2 * p.numel() * p.element_size() for p in subject.model.parameters())
    return parameters + peak(session, step)[0] <= cap_gib * GIB
