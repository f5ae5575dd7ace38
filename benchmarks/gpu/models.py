"""A training step of whole models: peak bytes, time, host reads and launches, of each way to train them, in rounds that interleave."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from .measuring import allocate_gradients, clocked, deterministic, equal_bits, gradients, host_reads, hosted, kernels, peak
from .session import GIB, Session, failure
from .subjects import SUBJECTS, Subject
from .ways import COMPILED, EAGER, Way, by_layer, momentum, momentum_compiled, rest_again

__all__ = ["compiled", "eager", "exactness", "measured", "rounds"]

ROUNDS = 7
SECONDS = {"models": 60.0, "inductor": 120.0}  # for each model; what does not fit is skipped, and its row says so
SPARE = {"models": 15.0, "inductor": 70.0}  # seconds that must be left of the run to begin with another way
LATE = 20.0  # seconds that the rounds of a model may take longer
Step = Callable[[], Any]
Rows = dict[str, dict[str, Any]]


def eager(session: Session, only: list[str] | None = None) -> None:
    """All models, nothing compiled."""
    for name in only or list(SUBJECTS):
        extra: dict[str, Way] = {"momentum, a step per layer": by_layer} if name.startswith("encoder") else {}
        if not name.startswith("encoder"):
            extra = {"momentum, rest under checkpoint": rest_again}
        run(session, "models", name, EAGER | extra, {"momentum": momentum, "momentum, rest under checkpoint": momentum})


def compiled(session: Session, only: list[str] | None = None) -> None:
    """Inductor takes up to 90 seconds to compile a model, so only two."""
    for name in only or ["encoder_autocast", "gpt2"][: 1 if session.tiny else 2]:
        run(session, "inductor", name, COMPILED, {})


def run(session: Session, part: str, name: str, ways: dict[str, Way], exact: dict[str, Way]) -> None:
    """One model, whatever becomes of it."""
    if session.left() < SPARE[part]:
        session.add(part, model=name, skipped="no time was left of the run")
        return
    try:
        subject = SUBJECTS[name](session)
        allocate_gradients(subject.model)
        rows = measured(session, part, subject, ways, exact, SECONDS[part])
        if "momentum, inductor" in rows:
            compiled_exactness(session, subject, rows["momentum, inductor"])
    except Exception as error:
        session.add(part, model=name, error=failure(error))
    subject = None
    torch._dynamo.reset()
    session.clear()


def measured(session: Session, part: str, subject: Subject, ways: dict[str, Way], exact: dict[str, Way], seconds: float) -> Rows:
    """One row for each way; those in `exact` are first compared with their stored form. Returns the rows that have no error, by way."""
    until = time.monotonic() + seconds
    rows: Rows = {}
    steps: dict[str, Step] = {}
    for way, build in ways.items():
        about = {"model": subject.name, "way": way, "unit": subject.unit, "units": subject.units}
        if time.monotonic() > until or session.left() < SPARE[part]:
            session.add(part, **about, skipped=f"the {seconds:.0f} s of this model, or those of the run, were used up")
            continue
        try:
            call = build(session, subject)
            found = once(session, partial(subject.step, call))
            if way in exact:
                found |= exactness(session, subject, call, partial(exact[way], session, subject))
            rows[way], steps[way] = session.add(part, **about, **found), partial(subject.step, call)
        except Exception as error:
            session.add(part, **about, error=failure(error))
            session.clear()
    for way, taken in rounds(session, steps, rows, until).items():
        if taken:
            rows[way] |= {"ms": median(taken), "rounds": len(taken), "per_second": subject.units / median(taken) * 1e3}
            session.say(way=way, ms=median(taken))
    session.save()
    return rows


def once(session: Session, step: Step) -> dict[str, Any]:
    """Two steps to warm up, then one for each count."""
    begin = time.monotonic()
    step()
    first = time.monotonic() - begin
    step()
    above, absolute = peak(session, step)
    whole = None if absolute is None else absolute / GIB
    found: dict[str, Any] = {"peak_gib": above / GIB, "absolute_peak_gib": whole, "first_step_s": first}
    found["host_ms"] = median(hosted(session, step) for _ in range(3)) if session.cuda else None
    try:
        found["host_reads"] = host_reads(session, step)
        found["launches"], found["device_ms"] = kernels(session, step)
    except Exception as error:  # of the profiler; those of the step come up in the rounds
        found["profile_error"] = failure(error)
    return found


def exactness(session: Session, subject: Subject, call: Callable, build: Callable[..., Callable]) -> dict[str, Any]:
    """Whether the gradients are those of stored activations, bit for bit; and whether the original's repeat, or else that says little.

    On the very call that is timed: another batch would have to be captured apart.
    """
    try:
        ours = gradients(subject.model, partial(subject.forward, call))
        stored = gradients(subject.model, partial(subject.forward, build(backward="stored")))
        found: dict[str, Any] = {"exact": equal_bits(ours, stored), "finite": all(bool(torch.isfinite(g).all()) for g in ours)}
        del stored
        some, others = (gradients(subject.model, partial(subject.forward, subject.model)) for _ in range(2))
        return found | {"plain_repeats": equal_bits(some, others)}
    except Exception as error:
        return {"exact": None, "exact_error": failure(error)}
    finally:
        session.clear()


def compiled_exactness(session: Session, subject: Subject, row: dict[str, Any]) -> None:
    """The same of a compiled model, once it is timed: compiled code wants the switch in both passes, so this is compiled anew."""
    if session.left() < 2 * row["first_step_s"] + LATE:
        row["exact_error"] = "no time was left of the run"
        return
    call = momentum_compiled(session, subject)
    with deterministic():
        row |= exactness(session, subject, call, partial(momentum_compiled, session, subject))
    session.say(way=row["way"], exact=row["exact"], exact_error=row.get("exact_error"))
    session.save()


def rounds(session: Session, steps: dict[str, Step], rows: Rows, until: float) -> dict[str, list[float]]:
    """Milliseconds of each step, round by round; the first warms up, and the rest end when time is up. A step that fails is left out."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for round_ in range((2 if session.tiny else ROUNDS) + 1):
        if round_ > 1 and (time.monotonic() > until + LATE or session.left() < 0):
            break
        for way in [way for way in steps if "error" not in rows[way]]:
            try:
                taken = clocked(session, steps[way])
            except Exception as error:
                rows[way]["error"] = failure(error)
                continue
            if round_:
                times[way].append(taken)
    return times
