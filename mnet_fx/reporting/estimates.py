"""An estimate as a picture: each way as a bar of its parts, or the total of each as batch, depth or gamma vary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..budget.sizes import shown
from ..errors import SettingsError
from .plots import INK, LINES, bytes_axis, figure, written

__all__ = ["plot_estimate"]

_KINDS = {  # parts of an estimate: colour and hatch
    "parameters": ("#444c54", ""),
    "buffers": ("#6b7680", ""),
    "gradients": ("#98a2ab", ""),
    "optimizer state": ("#c3cad0", ""),
    "inputs": ("#e6e9ec", ""),
    "stream state": ("#009e73", ""),
    "spilled bits": ("#009e73", "////"),
    "kept for steps": ("#f0e442", ""),
    "outside of chains": ("#d55e00", "\\\\\\"),
    "one step's activations": ("#0072b2", "xxx"),
    "temporaries": ("#56b4e9", "...."),
}


def plot_estimate(estimate: Any, path: str | Path | None = None, against: str | None = None, values: Sequence[float] | None = None) -> Any:
    """See `Estimate.plot`."""
    if against is None:
        return written(_bars(estimate), path)
    if against not in _AGAINST:
        raise SettingsError(f"against must be None or one of {', '.join(map(repr, _AGAINST))}, got {against!r}")
    return written(_against(estimate, against, list(values) if values is not None else None), path)


def _bars(estimate: Any) -> Any:
    """Each way as one bar of its parts."""
    ways = estimate.ways
    drawn, axes = figure(9.0, 1.9 + 0.62 * len(ways))
    highest = max(way.total_bytes for way in ways)
    for row, way in enumerate(ways):
        left = 0
        for part in way.parts:
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
    _legend(drawn, [part for part in ways[0].parts if any(way.parts[part] for way in ways)])
    return drawn


def _legend(drawn: Any, parts: list[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=_KINDS[part][0], hatch=_KINDS[part][1], edgecolor="white", label=part) for part in parts]
    drawn.legend(handles=patches, loc="outside lower left", ncols=5, frameon=False, fontsize=9)


_AGAINST = {
    "batch": "batch",
    "depth": "length of the chains, in times that of the model",
    "gamma": "gamma",
}


def _values(estimate: Any, what: str) -> list[Any]:
    """Those that are shown where none are given."""
    if what == "batch":
        return [max(1, round((estimate.batch or 1) * factor)) for factor in (0.5, 1, 2, 4)]
    return [0.5, 1, 2, 4] if what == "depth" else [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]


def _totals(estimate: Any, what: str, value: Any) -> dict[str, int]:
    """The total of each way at one value."""
    if what == "depth":
        return dict(estimate.total_at_depth(value))
    return {way.name: way.total_bytes for way in getattr(estimate, f"at_{what}")(value).ways}


def _against(estimate: Any, what: str, values: list[Any] | None) -> Any:
    """The total of each way, as one quantity varies."""
    at = sorted(dict.fromkeys(values or _values(estimate, what)))
    found = [_totals(estimate, what, value) for value in at]
    drawn, axes = figure(7.0, 4.4)
    highest = max(size for totals in found for size in totals.values())
    for name in found[0]:
        colour, dash, marker = LINES[name]
        sizes = [totals[name] for totals in found]
        label = f"{name}: {shown(sizes[-1])} at {at[-1]:g}"
        axes.plot(at, sizes, color=colour, linestyle=dash, marker=marker, linewidth=2, label=label)
    if estimate.memory is not None and estimate.memory < 2.5 * highest:
        axes.axhline(estimate.memory, color=INK, linestyle=":", linewidth=1.6, label=f"memory: {shown(estimate.memory)}")
        highest = max(highest, estimate.memory)
    axes.set_ylim(0, highest * 1.3)
    bytes_axis(axes.yaxis, highest)
    axes.set_xlabel(_AGAINST[what])
    axes.grid(axis="y", color="#dde2e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"{estimate.model}: bytes of a training step at its peak", loc="left", fontsize=11, color=INK)
    axes.legend(loc="upper left", framealpha=0.9, edgecolor="none", fontsize=9, ncols=2)
    return drawn
