"""Live bytes over one training step, as a picture."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..budget.sizes import shown
from ..errors import SettingsError
from .plots import LINES, bytes_axis, figure, written

__all__ = ["plot_step", "timeline"]

Step = Callable[[], Any]


def timeline(step: Step) -> list[tuple[float, int]]:
    """Live bytes during `step()`, beyond what was allocated before.

    Args:
        step: runs a training step; it is run once before, so that gradients and lazily made buffers exist.

    Returns:
        Milliseconds since the first allocation, and bytes from then on; one pair for each allocation and each free. They are those of
        the accelerator's allocator if the step uses one, else of the CPU's.
    """
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's library else writes to stderr at every start and stop
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() and torch.cuda.is_initialized() else [])]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    elsewhere = [event for event in events if event.device_type() != torch._C._autograd.DeviceType.CPU]
    events = sorted(elsewhere or events, key=lambda event: event.start_ns())
    found, live = [], 0
    for event in events:
        live += event.nbytes()
        found.append(((event.start_ns() - events[0].start_ns()) / 1e6, live))
    return found


def plot_step(step: Step | Mapping[str, Step], path: str | Path | None = None) -> Any:
    """Live bytes over one training step, of one or of several ways to do it.

        mnet_fx.plot_step({"plain": lambda: model(x).sum().backward(), "momentum": lambda: net(x).sum().backward()}, "step.png")

    Args:
        step: a callable that runs forward and backward; or one for each name, such as "plain", "checkpoint", "momentum". Each is run twice.
        path: where to write the picture; the suffix (.png, .svg, .pdf) decides how. None: nowhere.

    Returns:
        The matplotlib Figure.

    Raises:
        SettingsError: `step` is neither a callable nor a mapping of names to callables, or the path cannot be written.
        MnetError: matplotlib is not installed (`pip install 'mnet-fx[plot]'`).
    """
    steps = step if isinstance(step, Mapping) else {"": step}
    if not steps or not all(callable(run) for run in steps.values()):
        raise SettingsError(f"step must be a callable that runs a training step, or a mapping of names to such, got {step!r}")
    drawn, axes = figure(8.0, 4.4)
    lines = [timeline(run) for run in steps.values()]
    spare = [style for name, style in LINES.items() if name not in steps] + [("#cc79a7", "", "v"), ("#e69f00", "", "D")]
    for name, line in zip(steps, lines, strict=True):
        colour, _, marker = LINES[name] if name in LINES else spare.pop(0) if spare else ("#444c54", "", "d")
        peak = max((size for _, size in line), default=0)
        label = f"{name}: peak {shown(peak)}" if name else f"peak {shown(peak)}"
        corners = _corners(line)
        style = {"drawstyle": "steps-post", "marker": marker, "markersize": 6, "markevery": _marked(corners)}
        axes.plot(*zip(*corners, strict=True), color=colour, linewidth=1.3, label=label, **style)
    highest = max((size for line in lines for _, size in line), default=1)
    axes.set_ylim(0, highest * 1.12)
    bytes_axis(axes.yaxis, highest)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds since the first allocation")
    axes.set_ylabel("live bytes")
    axes.grid(axis="y", color="#dde2e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Live bytes over one training step", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    return written(drawn, path)


def _corners(line: list[tuple[float, int]], most: int = 4000) -> list[tuple[float, int]]:
    """The line; where it has many points, of each few its highest."""
    size = max(1, len(line) // most)
    return [max(line[i : i + size], key=lambda pair: pair[1]) for i in range(0, len(line), size)] or [(0.0, 0)]


def _marked(corners: list[tuple[float, int]], marks: int = 12) -> list[int]:
    """Indices of corners that are evenly spread over the time."""
    last = corners[-1][0]
    times = [at for at, _ in corners]
    return sorted({bisect_left(times, last * (i + 0.5) / marks) for i in range(marks)})
