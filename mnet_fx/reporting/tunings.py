"""What `tune` found as a picture: fidelity against the bytes of a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plots import INK, bytes_axis, figure, written

__all__ = ["plot_tuning"]

_CUTS = {"named layers": ("-", "o"), "each block": ("--", "s"), "each add": (":", "^")}  # dash and marker; others are of several blocks
_KINDS = {"momentum": "#d55e00", "matched": "#0072b2", "signed": "#cc79a7", "calibrated": "#009e73", "rotated": "#e69f00"}


def plot_tuning(tuning: Any, path: str | Path | None = None) -> Any:
    """See `Tuning.plot`."""
    drawn, axes = figure(7.5, 4.8)
    for cut in dict.fromkeys(row.cut for row in tuning.rows):
        dash, marker = _CUTS.get(cut, ("-.", "v"))
        for kind, colour in _KINDS.items():
            rows = [row for row in tuning.rows if (row.cut, row.kind) == (cut, kind)]
            if rows:
                at, height = [row.total_bytes for row in rows], [row.fidelity for row in rows]
                label = f"{cut}, {kind}, gamma {rows[0].gamma:g} to {rows[-1].gamma:g}"
                axes.plot(at, height, color=colour, linestyle=dash, marker=marker, markersize=5, label=label)
    _limits(axes, tuning)
    axes.set_xlabel("a training step at its peak")
    axes.set_ylabel("fidelity")
    bytes_axis(axes.xaxis, axes.get_xlim()[1])
    axes.grid(color="#dde2e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"{tuning.model}: how close, for how many bytes", loc="left", fontsize=11, color=INK)
    drawn.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return written(drawn, path)


def _limits(axes: Any, tuning: Any) -> None:
    """The axes, with what was asked for, and a ring around what was chosen."""
    highest = max(row.total_bytes for row in tuning.rows)
    axes.set_xlim(0, 1.1 * highest)
    if tuning.memory is not None and tuning.memory <= 1.1 * highest:
        axes.axvline(tuning.memory, color=INK, linestyle=":", linewidth=1.4)
    if tuning.fidelity is not None:
        axes.axhline(tuning.fidelity, color=INK, linestyle=":", linewidth=1.4)
    if tuning.best is not None:
        axes.plot(tuning.best.total_bytes, tuning.best.fidelity, "o", markersize=13, markerfacecolor="none", color=INK, label="chosen")
