"""What a capture will probably make of a model, told before there is one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import passes
from passes import Refusal

from ..reporting.build import graph_report, relabelled
from ..reporting.report import Report
from ..settings import Settings
from .copies import copied
from .graphs import graph_of
from .merging import merged

__all__ = ["Previewed", "behind_a_break", "previewed"]


@dataclass(frozen=True)
class Previewed:
    """What was read of a model without inputs.

    Attributes:
        report: the report, whose parts say that it is a preview.
        closed: paths of the modules that probably own steps, and of those that could not be read.
    """

    report: Report
    closed: frozenset[str]


def behind_a_break(report: Report, where: str) -> Report:
    """The preview of a model whose capture ended in a graph break, at `where` (nothing if there was none, or none yet)."""
    if not where:
        return report
    why = f"not seen before the model runs: Dynamo breaks its graph{where}"
    return relabelled(report, untraceable=("graph_break", why), too_short=("graph_break", why))


def previewed(model: nn.Module, settings: Settings) -> Previewed:
    """Reads a model, rewritten or not, in its current mode. Nothing of it changes."""
    seen = passes.preview(copied(model))
    graphs = []
    for path, gm in seen.parts.items():
        plan = passes.plan(gm, granularity=settings.granularity, min_steps=settings.min_steps, nested=True)
        report = graph_report(passes.with_stretches(gm, plan), "preview", settings, path)
        if path:  # what calls it could not be read, and may call more of its kind
            report = relabelled(report, too_short=("untraceable", "read by itself, as a single step"))
        graphs.append(graph_of(gm, plan, report, path))
    opaque = tuple(Refusal.of("untraceable", "", path, f"not read: {reason}") for path, reason in seen.opaque.items())
    report = merged([*(graph.report for graph in graphs), Report(0, 0, (), opaque)])
    return Previewed(report, frozenset(seen.opaque).union(*(graph.closed for graph in graphs)) - {""})
