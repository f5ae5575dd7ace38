"""Pictures, by matplotlib (`pip install 'mnet-fx[plot]'`): what all share, and a report as a road.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; what a colour says, a dash, a hatch or a label says too, so that
prints in grey keep it. No global state of matplotlib is touched: figures are made without pyplot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..budget.sizes import shown
from ..errors import MnetError, SettingsError
from .findings import Findings
from .road import Road
from .svg import COLOURS
from .text import size_text, summary

__all__ = ["LINES", "bytes_axis", "figure", "plot_report", "written"]

INK, PALE = "#1c2126", "#78848e"
LINES = {"plain": ("#d55e00", "--", "o"), "checkpoint": ("#0072b2", "-.", "s"), "momentum": ("#009e73", "-", "^")}
"""Colour, dash and marker of each way to do a training step."""


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
