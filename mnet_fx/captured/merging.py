"""Reports of several graphs as one, and with other paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..reporting.report import AddReport, Report, Stretch

__all__ = ["merged", "with_paths"]


def merged(reports: Iterable[Report]) -> Report:
    """The report of several graphs of one call."""
    found = list(reports)
    return Report(
        sum(report.residual_adds for report in found),
        sum(report.rewritten_adds for report in found),
        tuple(region for report in found for region in report.regions),
        tuple(dict.fromkeys(refusal for report in found for refusal in report.refusals)),
        tuple(part for report in found for part in report.captured),
        None if None in (kept := [report.kept_outside for report in found]) else sum(size or 0 for size in kept),
        _numbered(found),
        _renumbered(found),
        "checkpoint" if any(report.rest == "checkpoint" for report in found) else "store",
        tuple(head for report in found for head in report.heads),
    )


def with_paths(report: Report, renamed: Callable[[str], str]) -> Report:
    """A report with other paths."""
    parts = ("regions", "refusals", "adds", "stretches", "captured")
    found: dict[str, Any] = {part: tuple(replace(row, path=renamed(row.path)) for row in getattr(report, part)) for part in parts}
    return replace(report, **found)


def _numbered(reports: Sequence[Report]) -> tuple[AddReport, ...]:
    """The adds of several graphs, each with the number of its stretch among those of all."""
    adds, before = [], 0
    for report in reports:
        adds += [add if add.stretch is None else replace(add, stretch=add.stretch + before) for add in report.adds]
        before += len(report.stretches)
    return tuple(adds)


def _renumbered(reports: Sequence[Report]) -> tuple[Stretch, ...]:
    """The stretches of several graphs; what one reads of its graph's inputs is taken to come from the graph before."""
    found: list[Stretch] = []
    for report in reports:
        before = len(found)
        found += [replace(s, reads=tuple(max(n, -1) + before for n in s.reads)) for s in report.stretches]
    return tuple(found)
