"""The table of an independent study of reversible transformers, run again on this card.

Theirs, on a T4: 9 pre-LN blocks, d = 384, 6 heads, FFN 1536, context 512, vocabulary 10,000, tied head, AdamW, float16 autocast with
GradScaler. The batch is not told, so it is the one with which stored activations take the peak that they report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Decoder
from .measuring import allocate_gradients, peak
from .models import exactness, rounds
from .session import GIB, Session, failure
from .subjects import Subject
from .ways import Way, checkpointed, momentum, plain

__all__ = ["THEIRS", "run"]

THEIRS: dict[str, dict[str, float | None]] = {
    "plain": {"peak_gib": 13.28, "per_second": 64_100.0},
    "checkpoint": {"peak_gib": 7.39, "per_second": 51_500.0},
    "momentum": {"peak_gib": 6.83, "per_second": None},  # their reversible form is the midpoint rule
}
WAYS: dict[str, Way] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "momentum": momentum,
    "momentum, unproved": partial(momentum, on_drift="ignore"),
}
SPARE = 15.0  # seconds that must be left of the run to begin with another way
SECONDS = 20.0  # of all rounds


def decoder(session: Session) -> tuple[nn.Module, int, int]:
    """The model, its context and its vocabulary."""
    layers, d, heads, context, vocabulary = (2, 32, 2, 16, 100) if session.tiny else (9, 384, 6, 512, 10_000)
    with torch.device(session.device):
        return Decoder(layers, d, heads, context, vocabulary), context, vocabulary


def subject_of(session: Session, made: tuple[nn.Module, int, int], batch: int) -> Subject:
    model, context, vocabulary = made
    ids = torch.randint(vocabulary, (batch, context + 1), device=session.device)

    def loss(f: Callable[..., Tensor]) -> Tensor:
        return nn.functional.cross_entropy(f(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    paths = [f"encoder.layers.{i}" for i in range(len(model.encoder.layers))]
    units = batch * context
    return Subject(f"study, batch {batch}", model, loss, paths, units, "tokens", torch.float16, scale=2.0**12)


class Training:
    """Steps of AdamW with one GradScaler, for all forms of a model."""

    def __init__(self, session: Session, model: nn.Module) -> None:
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.scaler = torch.amp.GradScaler(session.device, init_scale=2.0**12)

    def step(self, subject: Subject, call: Callable[..., Any]) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(subject.forward(call) / subject.scale).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def run(session: Session) -> None:
    """One row for each way; peaks are all bytes allocated, weights and optimiser with them."""
    if session.left() < SPARE:
        session.add("study", skipped="no time was left of the run")
        return
    made = decoder(session)
    training = Training(session, made[0])
    try:
        subject = subject_of(session, made, nearest(session, made, training))
        measured(session, subject, training)
    except Exception as error:
        session.add("study", error=failure(error))
    torch._dynamo.reset()
    session.clear()


def whole_peak(session: Session, subject: Subject, training: Training, call: Callable[..., Any]) -> int:
    """All bytes allocated at the peak of a training step, after two that warm up."""
    for _ in range(2):
        training.step(subject, call)
    above, absolute = peak(session, partial(training.step, subject, call))
    return above if absolute is None else absolute


def nearest(session: Session, made: tuple[nn.Module, int, int], training: Training) -> int:
    """The batch whose stored peak is nearest to theirs: the peak is a line in the batch, drawn through two of them."""
    few, more = (2, 4) if session.tiny else (16, 32)
    low, high = (whole_peak(session, subject_of(session, made, n), training, made[0]) for n in (few, more))
    target = 2 * high if session.tiny else THEIRS["plain"]["peak_gib"] * GIB
    return max(1, round(few + (target - low) / (high - low) * (more - few)))


def measured(session: Session, subject: Subject, training: Training) -> None:
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    batch = subject.name.rpartition(" ")[2]
    for way, build in WAYS.items():
        about = {"way": way, "batch": int(batch), "theirs": THEIRS.get(way)}
        if session.left() < SPARE:
            session.add("study", **about, skipped="no time was left of the run")
            continue
        try:
            call = build(session, subject)
            found = {"peak_gib": whole_peak(session, subject, training, call) / GIB}
            if way == "momentum":
                allocate_gradients(subject.model)
                found |= exactness(session, subject, call, partial(build, session, subject))
            rows[way], steps[way] = session.add("study", **about, **found), partial(training.step, subject, call)
        except Exception as error:
            session.add("study", **about, error=failure(error))
    for way, taken in rounds(session, steps, rows, time.monotonic() + SECONDS).items():
        if taken:
            rows[way] |= {"ms": median(taken), "per_second": subject.units / median(taken) * 1e3}
            session.say(way=way, ms=median(taken))
    session.save()
