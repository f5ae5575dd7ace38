"""A rewritten model as a graph: steps and what lies between regions are boxes, regions are clusters, arrows say who reads whose values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import MnetError
from .build import report_of
from .findings import Findings, RegionReport
from .plots import INK, PALE, figure, written
from .svg import COLOURS
from .text import gamma_text, shape_text, size_text

__all__ = ["Box", "boxes", "draw"]

_MOST = 8  # steps of a region that are drawn one by one
_WIDE, _HIGH, _GAP = 5.6, 0.42, 0.22  # of a box and between two, in inches
_TITLE = 0.28  # of a cluster
_TOUCHING: dict[str, Any] = {"shrinkA": 0, "shrinkB": 0}  # arrows end at what they point at


@dataclass
class Box:
    """One box of the drawing.

    Attributes:
        text: what stands in it.
        region: name of the region it is a step of; empty between regions.
        numbers: indices of its stretches.
        left: refusal codes of the adds in it that were left.
        reads: indices of the boxes before whose values it reads.
    """

    text: str
    region: str
    numbers: list[int]
    left: list[str]
    reads: list[int] = field(default_factory=list)


def boxes(findings: Findings) -> list[Box]:
    """The boxes of a drawing, in the order in which the model runs."""
    codes: dict[int, list[str]] = {}
    for add in findings.adds:
        if not add.rewritten and add.stretch is not None:
            codes.setdefault(add.stretch, []).append(add.code)
    found = [Box("input", "", [-1], [])]
    for numbers in _grouped(findings):
        left = [code for number in numbers for code in codes.get(number, [])]
        found.append(Box(_text(findings, numbers), findings.stretches[numbers[0]].region, numbers, left))
    where = {number: i for i, box in enumerate(found) for number in box.numbers}
    for i, box in enumerate(found[1:], 1):
        sources = {where[source] for number in box.numbers for source in findings.stretches[number].reads}
        box.reads = sorted(sources - {i})
    return found


def _grouped(findings: Findings) -> Iterator[list[int]]:
    """Indices of the stretches of each box: one step, the steps in the middle of a long region, or all between two regions."""
    steps = {region.name: region.steps for region in findings.regions}
    group: list[int] = []
    before: Any = None
    for number, stretch in enumerate(findings.stretches):
        key: Any = stretch.region
        if stretch.step is not None and steps[stretch.region] > _MOST and 2 < stretch.step < steps[stretch.region] - 2:
            key = (stretch.region, "middle")
        elif stretch.step is not None:
            key = (stretch.region, stretch.step)
        if group and key != before:
            yield group
            group = []
        group.append(number)
        before = key
    if group:
        yield group


def _text(findings: Findings, numbers: list[int]) -> str:
    first, last = findings.stretches[numbers[0]], findings.stretches[numbers[-1]]
    names = first.path or "(root)", last.path or "(root)"
    modules = names[0] if names[0] == names[1] else f"{names[0]} to {names[1]}"
    if first.step is None:
        operations = sum(findings.stretches[number].operations for number in numbers)
        return f"{modules}  ({operations} operation{'s' * (operations != 1)})"
    steps = f"step {first.step}" if first.step == last.step else f"steps {first.step} to {last.step}"
    return f"{steps}  {modules}"


def draw(net: nn.Module, path: str | Path | None = None) -> Any:
    """Draws a rewritten model as a graph from input (above) to output, with regions as clusters.

    Arrows are flows of values between steps, and between them and what lies between regions; the middle of regions of more than eight
    steps is one box. A cross marks what holds adds that were left as they are, with the reason. What a graph takes in after a graph break
    is drawn as if it came from what ran before.

    Args:
        net: a model that `momentumize` returned (after its first call, or made with example_inputs, as it was captured; else, as a
            preview reads it), or that `transform_to_momentumnet` returned.
        path: where to write the drawing; the suffix (.svg, .png, .pdf) decides how. None: nowhere.

    Returns:
        The matplotlib Figure.

    Raises:
        MnetError: `net` is not rewritten, or matplotlib is not installed (`pip install 'mnet-fx[plot]'`).
        SettingsError: the path cannot be written.
    """
    report = report_of(net)
    if not report.stretches:
        raise MnetError(f"nothing of {type(net).__name__} was read as a graph: call it once, or momentumize it with example_inputs")
    found = boxes(report)
    tops = _tops(found)
    right = _WIDE + (3.0 if any(box.left for box in found) else 0.9)
    low, high = tops[-1] - _HIGH - 0.2, 0.2
    drawn, axes = figure(right + 0.3, high - low)
    axes.set_axis_off()
    axes.set_xlim(-0.3, right)
    axes.set_ylim(low, high)
    colours = {region.name: COLOURS[i % len(COLOURS)] for i, region in enumerate(report.regions)}
    _clusters(axes, report, found, tops, colours)
    for box, top in zip(found, tops, strict=True):
        _box(axes, box, top, colours)
    _arrows(axes, found, tops)
    return written(drawn, path)


def _tops(found: list[Box]) -> list[float]:
    """The upper edge of each box; regions have some room around them."""
    tops, y = [0.0], 0.0
    for before, box in pairwise(found):
        y -= _HIGH + _GAP + (0.42 if box.region and box.region != before.region else 0.16 if before.region != box.region else 0.0)
        tops.append(y)
    return tops


def _clusters(axes: Any, findings: Findings, found: list[Box], tops: list[float], colours: dict[str, str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    for region in findings.regions:
        inside = [top for box, top in zip(found, tops, strict=True) if box.region == region.name]
        if not inside:
            continue  # it lies in a step of another
        low, high = min(inside) - _HIGH - 0.07, max(inside) + _TITLE
        colour = colours[region.name]
        shape = FancyBboxPatch((-0.14, low), _WIDE + 0.28, high - low, boxstyle="round,pad=0.03,rounding_size=0.1")
        shape.set(facecolor=colour, alpha=0.14, edgecolor="none")
        axes.add_patch(shape)
        axes.text(-0.06, high - 0.03, _title(region), va="top", fontsize=8.5, color=INK, weight="bold")


def _title(region: RegionReport) -> str:
    kept = "" if region.state_bytes is None else f", keeps {size_text(region.state_bytes)}"
    return f"{region.name}: {region.steps} steps, gamma {gamma_text(region)}, {shape_text(region)}, {region.storage}{kept}"


def _box(axes: Any, box: Box, top: float, colours: dict[str, str]) -> None:
    from matplotlib.patches import Rectangle

    edge = colours.get(box.region, PALE)
    axes.add_patch(Rectangle((0, top - _HIGH), _WIDE, _HIGH, facecolor="white", edgecolor=edge, linewidth=1.4))
    text = textwrap.shorten(box.text, 84, placeholder=" ...")
    axes.text(0.12, top - _HIGH / 2, text, va="center", fontsize=8.5, color=INK)
    if box.left:
        codes = dict.fromkeys(box.left)
        note = ", ".join(f"{box.left.count(code)} left: {code}" for code in codes)
        axes.plot([_WIDE - 0.16], [top - _HIGH / 2], "x", color=INK, markersize=7)
        axes.text(_WIDE + 0.5, top - _HIGH / 2, note, va="center", fontsize=8, color=INK)


def _arrows(axes: Any, found: list[Box], tops: list[float]) -> None:
    """From each box to those that read its values: straight to the next one, along the left side to others."""
    from matplotlib.patches import FancyArrowPatch

    for i, box in enumerate(found):
        for source in box.reads:
            if source == i - 1:
                enters = box.region != "" and box.region != found[source].region
                start, end = (_WIDE / 2, tops[source] - _HIGH), (_WIDE / 2, tops[i] + (_TITLE + 0.03 if enters else 0))
                axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, **_TOUCHING, color=INK, linewidth=1.1))
            else:
                start, end = (_WIDE, tops[source] - 0.7 * _HIGH), (_WIDE, tops[i] - 0.3 * _HIGH)
                bow = min(0.45, 0.9 / max(0.5, start[1] - end[1]))
                style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, **_TOUCHING, "connectionstyle": f"arc3,rad={-bow}"}
                axes.add_patch(FancyArrowPatch(start, end, color=PALE, linewidth=1.0, **style))
