"""Measures the ways of one work for `compare.py`, in a process that has nothing else to do."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from compare_ways import WAYS, Task, Unfit, Way, plainly
from compare_works import Work
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnet_fx

__all__ = ["Options", "failure", "measured", "resident"]

MIB = 2.0**20
BLOCKS = "checkpoint per block"
SLACK = 10.0  # right: so many times as far from float64 as plain training in float32,
LEAST = 1e-3  # or this, as compilers round in other places
MOST = 1e-2  # where more than this would be right, float64 does not tell
STORED = 1e-3  # right, against stored activations
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        rounds: timed steps of each way.
        threads: of torch.
        batches: also the bytes of half the batch, but of what is compiled.
        limit: seconds between two signs of life, after which the process is given up.
    """

    rounds: int = 5
    threads: int = 2
    batches: bool = True
    limit: float = 1200.0


class Training:
    """A model and a batch of a work, and what a step with it gives."""

    def __init__(self, work: Work) -> None:
        torch.manual_seed(0)
        self.work, self.model = work, work.make()
        self.inputs = work.inputs(work.batch)
        self.clear()

    def clear(self) -> None:
        """Gradients are there, and zero."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def step(self, net: Callable[..., Any]) -> None:
        """Forward and backward, which add to `.grad`."""
        self.work.loss(net(*self.inputs)).backward()

    def gradients(self, net: Callable[..., Any]) -> list[Tensor]:
        self.clear()
        self.step(net)
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def memory(self, net: Callable[..., Any]) -> mnet_fx.Memory:
        gc.collect()
        return mnet_fx.measure(lambda: self.step(net))

    @property
    def static(self) -> int:
        """Bytes of parameters, gradients, buffers and inputs."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.inputs]
        return sum(t.nbytes + (0 if t.grad is None else t.grad.nbytes) for t in tensors)

    def of(self, batch: int) -> Training:
        """The same model with another batch."""
        twin = copy.copy(self)
        twin.inputs = self.work.inputs(batch)
        return twin

    def doubled(self) -> Training:
        """The same in float64."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).double()
        twin.inputs = tuple(t.double() if t.is_floating_point() else t for t in self.inputs)
        return twin


def apart(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest error of a parameter's gradient, relative to its norm, or to a thousandth of the largest; inf where it is not finite."""
    norms = [t.double().norm().item() for t in truth]
    floor = 1e-3 * max(norms)
    errors = [(a.double() - b.double()).norm().item() / max(n, floor) for a, b, n in zip(found, truth, norms, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("inf")


class Judge:
    """Says whether gradients are right, against float64 where the network can be had in plain autograd."""

    def __init__(self, training: Training) -> None:
        self.training, self.double = training, training.doubled()
        self.truths: dict[str, tuple[list[Tensor], str]] = {}
        truth, _ = self.truth(WAYS["plain"], None)
        self.plain = training.gradients(training.model)
        self.tolerance = max(LEAST, SLACK * apart(self.plain, truth))

    def truth(self, way: Way, task: Task | None) -> tuple[list[Tensor], str]:
        """The gradients a way should have, and how they were got."""
        double = Task(self.training.work, self.double.model, self.double.inputs)
        try:
            net, key = plainly(way.network, double), way.network
        except Unfit:
            assert way.stored is not None
            assert task is not None
            key = f"{way.package}, {way.network}, {way.compiles}"
            if key not in self.truths:
                self.truths[key] = self.training.gradients(way.stored(task)), "stored"
        else:
            if key not in self.truths:
                self.truths[key] = self.double.gradients(net), "float64"
        return self.truths[key]

    def verdict(self, way: Way, task: Task, net: Callable[..., Any]) -> Row:
        """ "right", "wrong" or "unclear", how far off, and what it was compared with."""
        found = self.training.gradients(net)
        if way.network == "original" and all(map(torch.equal, found, self.plain)):
            return {"result": "right", "error": 0.0, "tolerance": 0.0, "against": "plain, bit for bit"}
        truth, against = self.truth(way, task)
        error, tolerance = apart(found, truth), STORED if against == "stored" else self.tolerance
        result = "wrong" if error > tolerance else "right" if tolerance <= MOST else "unclear"
        return {"result": result, "error": error, "tolerance": tolerance, "against": against}


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@dataclass
class Bench:
    """The ways of one work, side by side."""

    work: Work
    options: Options
    say: Callable[[str, Any], None]  # "doing", way; "done", None: one more run of it
    training: Training = field(init=False)
    room: int | None = None

    def __post_init__(self) -> None:
        self.training = Training(self.work)
        self.judge = Judge(self.training)

    def task(self, room: int | None) -> Task:
        return Task(self.work, self.training.model, self.training.inputs, room, self.training.static)

    def prepared(self, way: Way) -> tuple[Callable[..., Any], Row]:
        """Something to call, warm, and what is known of it before it is timed."""
        task = self.task(self.room)
        began = time.perf_counter()
        net = way.build(task)
        self.training.step(net)
        first = time.perf_counter() - began
        self.training.step(net)
        memory = self.training.memory(net)
        if way.name == BLOCKS:
            self.room = memory.peak + self.training.static
        row = {"kept": memory.kept / MIB, "peak": memory.peak / MIB, "static": self.training.static / MIB, "first_s": first}
        return net, row | {"gradient": self.judge.verdict(way, task, net)}

    def half(self, net: Callable[..., Any]) -> Row:
        """Bytes of a step with half the batch, parameters and gradients included."""
        fewer = self.training.of(self.work.batch // 2)
        fewer.step(net)
        return {"half": {"batch": self.work.batch // 2, "total": (fewer.memory(net).peak + fewer.static) / MIB}}

    def rounds(self, nets: dict[str, Callable[..., Any]]) -> dict[str, list[float]]:
        """Seconds of each way's steps, in turns."""
        times: dict[str, list[float]] = {name: [] for name in nets}
        for _ in range(self.options.rounds):
            for name, net in nets.items():
                began = time.perf_counter()
                self.training.step(net)
                times[name].append(time.perf_counter() - began)
                self.say("done", None)
        return times


def measured(work: Work, ways: list[Way], options: Options, say: Callable[[str, Any], None]) -> Iterator[Row]:
    """One row for each way, and one for plain training, which the others are compared with."""
    torch.set_num_threads(options.threads)
    bench = Bench(work, options, say)
    nets: dict[str, Callable[..., Any]] = {}
    rows: dict[str, Row] = {}
    for way in ways:
        say("doing", way.name)
        try:
            nets[way.name], rows[way.name] = bench.prepared(way)
        except Unfit as reason:
            yield {"way": way.name, "unfit": str(reason)}
        except Exception as error:
            yield {"way": way.name, "error": failure(error)}
        say("done", None)
    say("doing", None)
    times = bench.rounds(nets)
    if options.batches and work.batch > 1:
        for way in ways:
            if way.name in nets and not (way.compiles or way.planned):
                rows[way.name] |= bench.half(nets[way.name])
    for name, row in rows.items():
        yield {"way": name, **row, **compared(times[name], times["plain"]), "threads": options.threads, "batch": work.batch}


def compared(taken: list[float], plain: list[float]) -> Row:
    """The ratio of medians, and the quartiles of the ratios of the single rounds."""
    ratios = [a / b for a, b in zip(taken, plain, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
    return {"seconds": taken, "ratio": median(taken) / median(plain), "low": low, "high": high}


def resident(work: Work, way: Way, room: int | None, threads: int) -> float:
    """MiB by which the resident size of this process grows at most in a step, beyond what it had before the first.

    What lies idle in malloc's heap would count too, so run this with MALLOC_MMAP_THRESHOLD_=65536.
    """
    torch.set_num_threads(threads)
    training = Training(work)
    net = way.build(Task(work, training.model, training.inputs, room, training.static))
    checkpoint(nn.Linear(1, 1), torch.ones(1, 1), use_reentrant=False).sum().backward()  # whose first call imports much
    before = _status("VmRSS")
    for _ in range(2):
        training.step(net)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest size so far is forgotten
    training.step(net)
    return (_status("VmHWM") - before) / MIB


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024
