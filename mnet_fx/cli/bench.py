"""A training step of a model in three ways, timed and measured."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from ..api import momentumize
from ..budget.blocks import block_paths, checkpointed
from ..budget.measured import measure
from ..budget.sizes import shown
from ..budget.ways import default_loss
from ..progress import shown_progress
from ..reporting.build import report_of
from ..reporting.steps import plot_step
from .inputs import Call

__all__ = ["Bench", "benched"]


@dataclass(frozen=True)
class Row:
    """One way to do a training step.

    Attributes:
        way: "plain", "checkpoint" (`torch.utils.checkpoint` around each block), or "momentum".
        kept_bytes, peak_bytes: as `mnet_fx.measure` counts them.
        seconds: of forward and backward, the median.
        ratio: of the seconds to plain's.
    """

    way: str
    kept_bytes: int
    peak_bytes: int
    seconds: float
    ratio: float


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        rows: the ways.
        steps: number of residual steps in the chains of the momentum network.
        threads, device, rounds: under which it ran.
        runs: the training steps, by way.
    """

    rows: tuple[Row, ...]
    steps: int
    threads: int
    device: str
    rounds: int
    runs: dict[str, Callable[[], Any]] = field(repr=False, default_factory=dict)

    def said(self, fmt: str) -> str:
        """As "text", "markdown", "csv" or "json"."""
        if fmt == "json":
            about = {"schema": "mnet_fx.bench", "version": 1, "steps": self.steps, "threads": self.threads, "device": self.device}
            return json.dumps({**about, "rounds": self.rounds, "rows": [asdict(row) for row in self.rows]}, indent=2)
        if fmt == "csv":
            written = io.StringIO()
            writer = csv.DictWriter(written, list(asdict(self.rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
            return written.getvalue()
        lines = [(r.way, shown(r.kept_bytes), shown(r.peak_bytes), f"{r.seconds:.3g}", f"{r.ratio:.2f}") for r in self.rows]
        headers = ("way", "kept after forward", "peak of the step", "seconds", "time / plain")
        table = tabulate(
            lines,
            headers=headers,
            tablefmt="github" if fmt == "markdown" else "simple",
            disable_numparse=True,
            colalign=("left", *["right"] * 4),
        )
        where = f"{self.steps} residual steps, {self.device}, {self.threads} thread(s), median of {self.rounds} round(s)"
        without = "" if any(r.way == "checkpoint" for r in self.rows) else "; no list of blocks was found to put checkpoints around"
        return f"{table}\n\n{where}{without}"

    def plot(self, path: str) -> Any:
        """Live bytes over one step of each way."""
        return plot_step(self.runs, path)


def benched(model: nn.Module, call: Call, options: dict[str, Any], loss: Callable[[Any], Tensor] | None, rounds: int) -> Bench:
    """Runs training steps of a model in turns: a round of all ways to warm up, `rounds` to be timed, one to be measured.

    Args:
        model: the original, in train mode.
        call: its arguments.
        options: of `momentumize`.
        loss: function (output) -> scalar; default as of `estimate`.
        rounds: timed steps of each way.
    """
    net = momentumize(model, call.example_inputs, **options)
    paths = block_paths(model, [add.path for add in report_of(net).adds if add.rewritten])
    nets = {"plain": model, "checkpoint": checkpointed(model, paths) if paths else None, "momentum": net}
    evaluate = loss or default_loss
    forwards = {way: _forward(one, call, evaluate) for way, one in nets.items() if one is not None}
    times: dict[str, list[float]] = {way: [] for way in forwards}
    memory = {}
    with tqdm(total=len(forwards) * (rounds + 2), leave=False, delay=2.0, disable=not shown_progress()) as bar:
        for round_ in range(rounds + 1):
            for way, forward in forwards.items():
                bar.set_description(f"{way}, {f'round {round_}' if round_ else 'warming up'}")
                seconds = _seconds(forward)
                times[way] += [seconds] * (round_ > 0)  # the first makes .grad and warms up
                bar.update()
        for way, forward in forwards.items():
            bar.set_description(f"{way}, counting bytes")
            memory[way] = measure(forward, Tensor.backward)
            bar.update()
    taken = {way: median(seconds) for way, seconds in times.items()}
    rows = [Row(way, memory[way].kept, memory[way].peak, taken[way], taken[way] / taken["plain"]) for way in forwards]
    device = next((str(p.device) for p in model.parameters()), "cpu")
    runs = {way: _step(forward) for way, forward in forwards.items()}
    return Bench(tuple(rows), sum(r.steps for r in report_of(net).regions), torch.get_num_threads(), device, rounds, runs)


def _forward(net: nn.Module, call: Call, loss: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    return lambda: loss(net(*call.args, **call.kwargs))


def _step(forward: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: forward().backward()


def _seconds(forward: Callable[[], Tensor]) -> float:
    begin = time.perf_counter()
    result = forward()
    result.backward()
    if result.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin
