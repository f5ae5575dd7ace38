"""Bandwidth of the exact arithmetic, beside a copy on the device of as many bytes.

A state is got as the package gets it, from a chain that starts (`runtime.start`), so what is measured is what runs. Each call takes the
next of several states, and one of them alone is many times larger than the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mnet_fx.arithmetic.formats import Format
from mnet_fx.runtime.start import Recurrence

from .measuring import clocked, equal_bits, host_reads, kernels
from .session import Session, failure

__all__ = ["run"]

GAMMA, WEIGHT = 0.9, 0.1
STATES = 3
STEPS = 24
PASSES = 10  # there and back; each gives a time of every loop for every state


def run(session: Session) -> None:
    """Rows for streams in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        try:
            measured(session, dtype)
        except Exception as error:
            session.add("arithmetic", stream=str(dtype), error=failure(error))
        session.clear()


def started(x: Tensor) -> Any:
    """The state of a chain at its start."""
    recurrence = Recurrence("benchmark", ((GAMMA, WEIGHT),) * STEPS)
    return recurrence.start(x.detach().requires_grad_(), reversing=True).tape.state


def measured(session: Session, dtype: torch.dtype) -> None:
    elements = 1 << (14 if session.tiny else 25)
    with torch.device(session.device):
        states = [started(torch.randn(elements, dtype=dtype)) for _ in range(STATES)]
        ys = [torch.randn(elements, dtype=dtype) for _ in range(STATES)]
    sizes = Format.of(dtype)
    element, state, u = dtype.itemsize, sizes.state_bytes, sizes.u_dtype.itemsize
    about = {"stream": str(dtype).removeprefix("torch."), "elements": elements}
    before = held(states[0])
    times = there_and_back(session, states, ys)
    exact = equal_bits(before, held(states[0]))
    del before
    # What each reads and writes: (X, U, y) and (X, U, x); (X, U) and (X, x); (U, y) and (U).
    moved = {"step": 2 * (state + element), "unstep_x": 2 * state - u + element, "unstep_u": 2 * u + element}
    rows = {}
    for name, bytes_ in moved.items():
        copied = copy_milliseconds(session, bytes_ * elements)
        rows[name] = add(session, f"state.{name}", bytes_, times[name], copied, exact=exact, **about)
    through(session, states[0], ys[0], moved, about)
    floats(session, ys, about)
    proof(session, states[0], state, about)
    for name, counts in counted(session, states[1], ys[1]).items():
        rows[name] |= counts
    session.save()


def held(state: Any) -> list[Tensor]:
    """What a state holds, copied."""
    return [t.clone() for t in ((state.X, state.U) if hasattr(state, "X") else (state.read(),))]


def through(session: Session, state: Any, y: Tensor, moved: dict[str, int], about: dict[str, Any]) -> None:
    """A chain of 24 steps forward, then back: with what only some steps do, such as to put low bits aside; milliseconds per step."""
    records: list[Any] = []

    def forward() -> None:
        records.extend(state.step(y, GAMMA, WEIGHT)[0] for _ in range(STEPS))

    def back() -> None:
        while records:
            record = records.pop()
            state.unstep_x(record)
            state.unstep_u(record, y)

    before, times = held(state), {"forward": [], "back": []}
    for _ in range(4):
        times["forward"].append(timed(session, forward) / STEPS)
        times["back"].append(timed(session, back) / STEPS)
    exact = equal_bits(before, held(state))
    sizes = {"forward": moved["step"], "back": moved["unstep_x"] + moved["unstep_u"]}
    for way, bytes_ in sizes.items():
        copied = copy_milliseconds(session, bytes_ * about["elements"])
        add(session, f"{STEPS} steps {way}", bytes_, times[way][1:], copied, exact=exact, **about)


def there_and_back(session: Session, states: list[Any], ys: list[Tensor]) -> dict[str, list[float]]:
    """Milliseconds of each loop: all states go forward, then all come back. The first pass compiles and warms up."""
    times: dict[str, list[float]] = {"step": [], "unstep_x": [], "unstep_u": []}
    for _ in range(PASSES + 1):
        records: list[Any] = []
        pairs = list(zip(states, ys, strict=True))
        times["step"] += [timed(session, lambda s=s, y=y, records=records: records.append(s.step(y, GAMMA, WEIGHT)[0])) for s, y in pairs]
        times["unstep_x"] += [timed(session, lambda s=s, r=r: s.unstep_x(r)) for s, r in zip(states, records, strict=True)]
        times["unstep_u"] += [timed(session, lambda s=s, r=r, y=y: s.unstep_u(r, y)) for (s, y), r in zip(pairs, records, strict=True)]
    return {name: taken[STATES:] for name, taken in times.items()}


def timed(session: Session, work: Callable[[], Any]) -> float:
    with torch.no_grad():
        return clocked(session, work)


def counted(session: Session, state: Any, y: Tensor) -> dict[str, dict[str, int | None]]:
    """Host reads and launches of each loop; the last thing that is done, as the profiler may fail in the middle of a step."""
    found: dict[str, dict[str, int | None]] = {"step": {}, "unstep_x": {}, "unstep_u": {}}
    for key, count in {"host_reads": host_reads, "launches": lambda *of: kernels(*of)[0]}.items():
        records: list[Any] = []
        with torch.no_grad():
            found["step"][key] = count(session, lambda records=records: records.append(state.step(y, GAMMA, WEIGHT)[0]))
            if not records:  # on a CPU nothing is run to be counted
                continue
            found["unstep_x"][key] = count(session, lambda record=records[0]: state.unstep_x(record))
            found["unstep_u"][key] = count(session, lambda record=records[0]: state.unstep_u(record, y))
    return found


def copy_milliseconds(session: Session, bytes_: int) -> list[float]:
    """Copies that read and write `bytes_` together."""
    half = bytes_ // 2
    with torch.device(session.device):
        pairs = [(torch.randint(255, (half,), dtype=torch.uint8), torch.empty(half, dtype=torch.uint8)) for _ in range(STATES)]
    turns = cycle(pairs)
    return [timed(session, lambda: torch.Tensor.copy_(*reversed(next(turns)))) for _ in range((PASSES + 1) * STATES)][STATES:]


def floats(session: Session, ys: list[Tensor], about: dict[str, Any]) -> None:
    """The momentum update of floats that the exact one stands for: three operations of torch."""
    y = ys[0]
    x, v = torch.randn_like(y), torch.randn_like(y)

    def update() -> None:
        v.mul_(GAMMA).add_(y, alpha=WEIGHT)
        x.add_(v)

    bytes_ = 8 * y.element_size()  # v read and written, v and y read and v written, x and v read and x written
    taken = [timed(session, update) for _ in range(PASSES + 1)][1:]
    add(session, "float update", bytes_, taken, copy_milliseconds(session, bytes_ * y.numel()), **about)


def proof(session: Session, state: Any, bytes_: int, about: dict[str, Any]) -> None:
    """The fingerprint of a state, which reads it once; left out where a state has none of its own."""
    if not hasattr(state, "fingerprint"):
        return
    taken = [timed(session, state.fingerprint) for _ in range(PASSES + 1)][1:]
    add(session, "state.fingerprint", bytes_, taken, copy_milliseconds(session, bytes_ * about["elements"]), **about)


def add(session: Session, loop: str, bytes_: int, taken: list[float], copied: list[float], **about: Any) -> dict[str, Any]:
    """One row; `bytes_` per element, `taken` and `copied` in milliseconds."""
    speed = {key: bytes_ * about["elements"] / median(ms) / 1e6 for key, ms in {"gb_s": taken, "copy_gb_s": copied}.items()}
    of_copy = speed["gb_s"] / speed["copy_gb_s"]
    return session.add("arithmetic", loop=loop, bytes_per_element=bytes_, ms=median(taken), of_copy=of_copy, **speed, **about)
