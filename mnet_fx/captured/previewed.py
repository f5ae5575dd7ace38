"""What a capture will probably make of a model, told before there is one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import passes
from passes import Refusal

from ..reporting.build import graph_report
from ..reporting.report import Report
from ..settings import Settings
from .copies import copied
from .network import graph_of, merged

__all__ = ["Previewed", "previewed"]


@dataclass(frozen=True)
class Previewed:
    """What was read of a model without inputs.

    Attributes:
        report: the report, whose parts say that it is a preview.
        closed: paths of the modules that probably own steps, and of those that could not be read.
    """

    report: Report
    closed: frozenset[str]


def previewed(model: nn.Module, settings: Settings) -> Previewed:
    """Reads a model, rewritten or not, in its current mode. Nothing of it changes."""
    seen = passes.preview(copied(model))
    graphs = []
    for path, gm in seen.parts.items():
        plan = passes.plan(gm, granularity=settings.granularity, min_steps=settings.min_steps, nested=True)
        report = graph_report(passes.with_stretches(gm, plan), "preview", settings, path)
        graphs.append(graph_of(gm, plan, report, path))
    hint = passes.CODES["untraceable"].hint
    opaque = tuple(Refusal("untraceable", "", path, f"not read: {reason}", hint) for path, reason in seen.opaque.items())
    report = merged([*(graph.report for graph in graphs), Report(0, 0, (), opaque)])
    return Previewed(report, frozenset(seen.opaque).union(*(graph.closed for graph in graphs)) - {""})
