"""Pictures, by matplotlib (`pip install 'mnet-fx[plot]'`): a report as a road, an estimate as bars and curves.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; what a colour says, a dash, a hatch or a label says too, so that
prints in grey keep it. No global state of matplotlib is touched: figures are made without pyplot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..budget.estimates import PARTS, Estimate
from ..budget.sizes import shown
from ..errors import MnetError, SettingsError
from .findings import Findings
from .road import Road
from .svg import COLOURS
from .text import size_text, summary

__all__ = ["LINES", "bytes_axis", "figure", "plot_estimate", "plot_report", "written"]

INK, PALE = "#1c2126", "#78848e"
LINES = {"plain": ("#d55e00", "--", "o"), "checkpoint": ("#0072b2", "-.", "s"), "momentum": ("#009e73", "-", "^")}
"""Colour, dash and marker of each way to do a training step."""

_KINDS = {  # parts of an estimate: colour and hatch
    "parameters": ("#444c54", ""),
    "buffers": ("#6b7680", ""),
    "gradients": ("#98a2ab", ""),
    "optimizer state": ("#c3cad0", ""),
    "inputs": ("#e6e9ec", ""),
    "stream state": ("#009e73", ""),
    "spilled bits": ("#009e73", "////"),
    "kept for steps": ("#f0e442", ""),
    "outside of chains": ("#d55e00", ""),
    "one step's activations": ("#0072b2", ""),
    "temporaries": ("#56b4e9", "...."),
}


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure of that many inches, and its axes.

    Raises:
        MnetError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MnetError(f"pictures need matplotlib ({error}): pip install 'mnet-fx[plot]'") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def written(drawn: Any, path: str | Path | None) -> Any:
    """The figure, written to a file if there is a path.

    Raises:
        SettingsError: the suffix is not one that matplotlib can write, or the folder is not there.
    """
    if path is None:
        return drawn
    known = drawn.canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in known:
        raise SettingsError(f"path must end in one of .{', .'.join(sorted(known))}, got {str(path)!r}")
    if not Path(path).resolve().parent.is_dir():
        raise SettingsError(f"the folder of {str(path)!r} is not there")
    drawn.savefig(path, dpi=160, metadata={"Date": None} if suffix == "svg" else None)
    return drawn


def bytes_axis(axis: Any, highest: float) -> None:
    """Ticks at round numbers of a binary unit, with the unit in the labels."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit = 1024.0 ** max(0, min(4, (int(max(highest, 1)).bit_length() - 1) // 10))
    ticks = [tick * unit for tick in MaxNLocator(5).tick_values(0, highest / unit) if 0 <= tick * unit <= highest * 1.15]
    axis.set_ticks(ticks)
    name = shown(int(unit)).split()[1]
    axis.set_major_formatter(FuncFormatter(lambda size, _: "0" if size == 0 else f"{size / unit:g} {name}"))


def plot_report(findings: Findings, path: str | Path | None = None) -> Any:
    """See `Report.plot`."""
    line = Road.of(findings)
    if not line.length:
        raise MnetError("this report knows no order of operations to draw: momentumize the model with example_inputs, or call it once")
    drawn, axes = figure(9.0, 4.2 if line.saved else 1.8)
    names = dict.fromkeys(name for name, _, _ in line.spans)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for name, start, end in line.spans:
        axes.axvspan(start, end, color=colours[name], alpha=0.16, linewidth=0)
        axes.axvspan(start, end, 0, 0.04, color=colours[name], linewidth=0)
    if line.saved:
        _curves(axes, line)
    else:
        axes.set_yticks([])
    _labels(axes, line, findings)
    axes.set_xlim(0, line.length)
    axes.set_xlabel("operations from input to output")
    axes.set_title(summary(findings), loc="left", fontsize=11, color=INK)
    return written(drawn, path)


def _curves(axes: Any, line: Road) -> None:
    assert line.saved is not None
    assert line.kept is not None
    ends, highest = (0, *line.ends), max(line.saved[-1], line.kept[-1], 1)
    axes.plot(ends, (0, *line.saved), color=PALE, linestyle="--", linewidth=1.8, label=f"original: {size_text(line.saved[-1])}")
    axes.plot(ends, (0, *line.kept), color=INK, linewidth=2.2, label=f"after the rewrite: {size_text(line.kept[-1])}")
    axes.set_ylim(0, highest * 1.12)
    axes.set_ylabel("kept for the backward pass")
    bytes_axis(axes.yaxis, highest)
    axes.grid(axis="y", color="#dde2e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _labels(axes: Any, line: Road, findings: Findings) -> None:
    """Names of wide regions, crosses at adds that were left, and the legend."""
    steps = {region.name: region.steps for region in findings.regions}
    for name, start, end in line.spans:
        if end - start >= 0.05 * line.length:
            text = f"{steps[name]} steps"
            axes.annotate(
                text, ((start + end) / 2, 0.06), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9, color=INK
            )
    if line.left:
        at = [x for x, _ in line.left]
        label = f"{len(at)} add(s) left as they are"
        axes.plot(at, [0.02] * len(at), "x", color=INK, transform=axes.get_xaxis_transform(), label=label, markersize=6, clip_on=False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", framealpha=0.9, edgecolor="none", fontsize=9)


def plot_estimate(
    estimate: Estimate, path: str | Path | None = None, against: str | None = None, values: Sequence[float] | None = None
) -> Any:
    """See `Estimate.plot`."""
    if against is None:
        return written(_bars(estimate), path)
    if against not in _AGAINST:
        raise SettingsError(f"against must be None or one of {', '.join(map(repr, _AGAINST))}, got {against!r}")
    return written(_against(estimate, against, list(values) if values is not None else None), path)


def _bars(estimate: Estimate) -> Any:
    """Each way as one bar of its parts."""
    ways = estimate.ways
    drawn, axes = figure(9.0, 1.9 + 0.62 * len(ways))
    highest = max(way.total_bytes for way in ways)
    for row, way in enumerate(ways):
        left = 0
        for part in PARTS:
            colour, hatch = _KINDS[part]
            if size := way.parts[part]:
                axes.barh(row, size, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8, height=0.66)
                left += size
        axes.text(left + 0.01 * highest, row, shown(way.total_bytes), va="center", fontsize=10, color=INK)
    axes.set_yticks(range(len(ways)), [way.name for way in ways])
    axes.invert_yaxis()
    limit = estimate.memory if estimate.memory is not None and estimate.memory < 2.5 * highest else None
    axes.set_xlim(0, max(highest, limit or 0) * 1.14)
    if limit is not None:
        axes.axvline(limit, color=INK, linestyle=":", linewidth=1.6)
        axes.annotate(
            shown(limit), (limit, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points", va="top", fontsize=9
        )
    bytes_axis(axes.xaxis, max(highest, limit or 0))
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{estimate.model}: what a training step holds at its peak", loc="left", fontsize=11, color=INK)
    _legend(drawn, [part for part in PARTS if any(way.parts[part] for way in ways)])
    return drawn


def _legend(drawn: Any, parts: list[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_KINDS[part][0], hatch=_KINDS[part][1], edgecolor="white", label=part) for part in parts]
    drawn.legend(handles=patches, loc="outside lower left", ncols=5, frameon=False, fontsize=9)


_AGAINST = {
    "batch": ("batch", lambda estimate: [max(1, round((estimate.batch or 1) * factor)) for factor in (0.5, 1, 2, 4)]),
    "depth": ("times the depth", lambda estimate: [0.5, 1, 2, 4]),
    "gamma": ("gamma", lambda estimate: [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]),
}


def _against(estimate: Estimate, what: str, values: list[float] | None) -> Any:
    """The total of each way, as one quantity varies."""
    label, default = _AGAINST[what]
    at: list[Any] = sorted(dict.fromkeys(values or default(estimate)))
    found = [getattr(estimate, f"at_{what}")(value) for value in at]
    drawn, axes = figure(7.0, 4.4)
    highest = max(way.total_bytes for one in found for way in one.ways)
    for way in estimate.ways:
        colour, dash, marker = LINES[way.name]
        sizes = [next(w.total_bytes for w in one.ways if w.name == way.name) for one in found]
        axes.plot(
            at, sizes, color=colour, linestyle=dash, marker=marker, linewidth=2, label=f"{way.name}: {shown(sizes[-1])} at {at[-1]:g}"
        )
    if estimate.memory is not None:
        axes.axhline(estimate.memory, color=INK, linestyle=":", linewidth=1.6, label=f"memory: {shown(estimate.memory)}")
    axes.set_ylim(0, highest * 1.08)
    bytes_axis(axes.yaxis, highest)
    axes.set_xlabel(label)
    axes.grid(axis="y", color="#dde2e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"{estimate.model}: bytes of a training step at its peak", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9)
    return drawn
