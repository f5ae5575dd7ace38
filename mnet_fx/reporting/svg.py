"""The model from input to output as a drawing in SVG, without matplotlib, for the page."""

from __future__ import annotations

from html import escape

from .findings import Findings
from .road import Road
from .text import size_text

__all__ = ["COLOURS", "road"]

COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#d55e00")
"""Of regions, in order: those of Okabe and Ito, which the colour-blind can tell apart."""

_WIDTH, _LEFT, _RIGHT, _TOP, _BASE = 1080, 8, 132, 14, 190


def road(findings: Findings, colour: dict[str, str]) -> str:
    """An SVG element; an empty text where the model was not read as a graph.

    Args:
        findings: what to draw.
        colour: of each region, by name.
    """
    line = Road.of(findings)
    if not line.length:
        return ""
    base = _BASE if line.saved else _TOP + 6
    parts = [_curves(line, base)] if line.saved else []
    parts += [_bands(line, base, colour), _marks(line, base)]
    height = base + 60
    label = "The model from input to output: regions, adds that were left, and bytes kept along the way"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" role="img" aria-label="{label}" font-family="system-ui, sans-serif" '
        f'font-size="12">\n' + "\n".join(parts) + "\n</svg>"
    )


def _x(line: Road, position: float) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * position / line.length, 1)


def _curves(line: Road, base: int) -> str:
    assert line.saved is not None
    assert line.kept is not None
    highest = max(line.saved[-1], line.kept[-1], 1)

    def points(sizes: tuple[int, ...]) -> str:
        at = [(_x(line, x), round(base - (base - _TOP) * size / highest, 1)) for x, size in zip((0, *line.ends), (0, *sizes), strict=True)]
        return " ".join(f"{x},{y}" for x, y in at)

    def label(size: int, other: int, name: str, fill: str) -> str:
        y = base - (base - _TOP) * size / highest
        if abs(size - other) / highest * (base - _TOP) < 30:  # the two would lie on each other
            y += 18 if size < other or (size == other and name == "after") else -14
        y = min(max(y, _TOP + 4), base - 10)
        at = _x(line, line.length) + 8
        return (
            f'<text x="{at}" y="{y:.1f}" fill="{fill}" font-weight="600">{name}</text>'
            f'<text x="{at}" y="{y + 15:.1f}" fill="{fill}">{size_text(size)}</text>'
        )

    end, start = _x(line, line.length), _x(line, 0)
    return (
        f'<polygon points="{start},{base} {points(line.saved)} {end},{base}" fill="#eceff1"/>'
        f'<polyline points="{points(line.saved)}" fill="none" stroke="#78848e" stroke-width="2" stroke-dasharray="6 3"/>'
        f'<polyline points="{points(line.kept)}" fill="none" stroke="#1c2126" stroke-width="2.5"/>'
        + label(line.saved[-1], line.kept[-1], "original", "#5a646e")
        + label(line.kept[-1], line.saved[-1], "after", "#1c2126")
    )


def _bands(line: Road, base: int, colour: dict[str, str]) -> str:
    """The strip under the curves: grey between regions, coloured in them."""
    start, end = _x(line, 0), _x(line, line.length)
    parts = [f'<rect x="{start}" y="{base + 4}" width="{end - start:.1f}" height="14" fill="#c9d0d6"/>']
    for name, first, last in line.spans:
        x, width = _x(line, first), _x(line, last) - _x(line, first)
        parts.append(
            f'<rect x="{x}" y="{base + 4}" width="{width:.1f}" height="14" fill="{colour.get(name, "#000")}">'
            f"<title>{escape(name)}</title></rect>"
        )
    return "".join(parts)


def _marks(line: Road, base: int) -> str:
    """A cross under each add that was left, and a legend."""
    y = base + 28
    parts = [f'<text x="{_LEFT}" y="{base + 52}" fill="#5a646e">input</text>']
    parts.append(f'<text x="{_x(line, line.length)}" y="{base + 52}" fill="#5a646e" text-anchor="end">output</text>')
    for at, code in line.left:
        x = _x(line, at)
        parts.append(
            f'<path d="M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8" stroke="#1c2126" stroke-width="1.6" fill="none">'
            f"<title>left: {escape(code)}</title></path>"
        )
    legend = "coloured: regions" + (f"; cross: {len(line.left)} add(s) left as they are" if line.left else "")
    middle = (_x(line, 0) + _x(line, line.length)) / 2
    parts.append(f'<text x="{middle:.1f}" y="{base + 52}" fill="#5a646e" text-anchor="middle">{legend}</text>')
    return "".join(parts)
