"""The model from input to output as a line: where it runs through regions, where adds were left, and bytes kept so far."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from .findings import Findings

__all__ = ["Road"]


@dataclass(frozen=True)
class Road:
    """What a picture of a model shows; positions are numbers of operations since the input.

    Attributes:
        ends: position where each stretch ends, in the order in which the model runs.
        saved, kept: bytes that are kept for the backward pass where each stretch ends, in the original and after the rewrite; None where
            they are not known.
        spans: name, start and end of each part of a region.
        left: position and refusal code of each add that was left.
    """

    ends: tuple[int, ...]
    saved: tuple[int, ...] | None
    kept: tuple[int, ...] | None
    spans: tuple[tuple[str, int, int], ...]
    left: tuple[tuple[float, str], ...]

    @property
    def length(self) -> int:
        return self.ends[-1] if self.ends else 0

    @staticmethod
    def of(findings: Findings) -> Road:
        stretches = findings.stretches
        ends = tuple(accumulate(stretch.operations for stretch in stretches))
        spans: list[tuple[str, int, int]] = []
        for stretch, end in zip(stretches, ends, strict=True):
            start = end - stretch.operations
            if stretch.region and spans and spans[-1][0] == stretch.region and spans[-1][2] == start:
                spans[-1] = (stretch.region, spans[-1][1], end)
            elif stretch.region:
                spans.append((stretch.region, start, end))
        known = findings.saved is not None and findings.kept is not None
        return Road(
            ends,
            tuple(accumulate(s.saved or 0 for s in stretches)) if known else None,
            tuple(accumulate(s.kept or 0 for s in stretches)) if known else None,
            tuple(spans),
            _left(findings, ends),
        )


def _left(findings: Findings, ends: tuple[int, ...]) -> tuple[tuple[float, str], ...]:
    """Adds that were left, evenly spaced over the stretch that they lie in."""
    within: dict[int, list[str]] = {}
    for add in findings.adds:
        if not add.rewritten and add.stretch is not None:
            within.setdefault(add.stretch, []).append(add.code)
    found = []
    for number, codes in within.items():
        size = findings.stretches[number].operations
        found += [(ends[number] - size + size * (i + 1) / (len(codes) + 1), code) for i, code in enumerate(codes)]
    return tuple(found)
