"""From plans to reports, and where a model keeps its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from passes import CODES, Plan, PlannedRegion, Refusal, Stretch, joined

from ..arithmetic.cost import storage
from ..arithmetic.formats import Format
from ..errors import MnetError
from ..settings import Settings
from .findings import AddReport, CapturedPart, RegionReport
from .report import Report

REPORT = "_mnet_fx_report"  # where a model that momentumize rewrote keeps its report
TRANSFORMED = "_mnet_fx_transform_report"  # where one that transform_to_momentumnet changed does

Named = tuple[str, int, Mapping[str, int]]

__all__ = ["REPORT", "add_reports", "graph_report", "named_report", "note_transform", "region_report", "relabelled", "report_of", "row"]


def region_report(region: PlannedRegion, path: str, settings: Settings, dtype: torch.dtype) -> RegionReport:
    """The row of a planned region in the module at `path`, for a stream of that dtype."""
    found = row(region.name, path, len(region.steps), len(region.adds), region.kind, region.shape, settings, dtype)
    found = replace(found, copied=region.copied, copied_bytes=region.copied_bytes)
    return replace(found, storage="nested", state_bytes_per_element=None) if region.backward == "stored" else found


def row(
    name: str, path: str, steps: int, adds: int, kind: str, shape: tuple[int, ...] | None, settings: Settings, dtype: torch.dtype
) -> RegionReport:
    """The row of a chain; see `RegionReport` for the fields."""
    gammas = settings.gammas(steps)
    later = gammas[1:] or gammas
    gamma: Any = later[0] if min(later) == max(later) else (min(later), max(later))
    kept, kept_bytes = storage(gammas, dtype, settings.velocity is None, settings.held)
    if settings.backward == "stored":
        kept, kept_bytes = "autograd", None  # type: ignore[assignment]
    return RegionReport(name, path, steps, adds, kind, gamma, shape, kept, kept_bytes)


def graph_report(
    plan: Plan,
    front_end: str,
    settings: Settings,
    path: str = "",
    dtype: torch.dtype | None = None,
) -> Report:
    """The report of one planned graph.

    Args:
        plan: its plan, with stretches.
        front_end: as in `CapturedPart`.
        settings: the recurrence.
        path: of the module whose graph it is.
        dtype: of streams where the graph recorded none, by default torch's default.
    """
    known = [getattr(torch, region.dtype) if region.dtype else dtype or torch.get_default_dtype() for region in plan.regions]
    rows = tuple(region_report(r, joined(path, r.path), settings, dtype) for r, dtype in zip(plan.regions, known, strict=True))
    refusals = tuple(replace(refusal, path=joined(path, refusal.path)) for refusal in plan.refusals)
    adds, rewritten = len(plan.residual_adds), len(plan.rewritten_adds)
    shares = {r.name: _shares(r, settings.held or dtype) for r, dtype in zip(rows, known, strict=True) if r.storage != "autograd"}
    return Report(
        adds,
        rewritten,
        rows,
        refusals,
        (CapturedPart(path, front_end, adds, rewritten),),
        plan.kept_outside if settings.rest == "store" else None,
        add_reports(plan, refusals, path),
        tuple(_with_state(replace(s, path=joined(path, s.path)), shares, settings.rest) for s in plan.stretches),
        settings.rest,
    )


def add_reports(plan: Plan, refusals: Sequence[Refusal], path: str = "") -> tuple[AddReport, ...]:
    """Each residual-looking add of a planned graph, in graph order; of two refusals of one add, the later one counts."""
    rewritten = {
        add: AddReport(add, joined(path, step.path), region.name, t)
        for region in plan.regions
        for t, step in enumerate(region.steps)
        for add in step.adds
    }
    left = {r.node: AddReport.left(r) for r in refusals}
    at = {add: i for i, stretch in enumerate(plan.stretches) for add in stretch.adds}
    return tuple(replace(rewritten.get(add) or left[add], stretch=at.get(add)) for add in plan.residual_adds)


def relabelled(report: Report, which: Callable[[str], bool] = lambda path: True, **codes: tuple[str, str]) -> Report:
    """A report with other reasons.

    Args:
        report: it.
        which: tells of a path whether its refusals change.
        codes: for each code that changes, the new one and the explanation; the hint is that of the new code.
    """

    def relabel(found: Any) -> Any:
        if found.code not in codes or not which(found.path):
            return found
        code, explanation = codes[found.code]
        return replace(found, code=code, explanation=explanation, hint=CODES[code].hint)

    return replace(report, refusals=tuple(map(relabel, report.refusals)), adds=tuple(map(relabel, report.adds)))


def _shares(region: RegionReport, dtype: torch.dtype) -> list[int | None]:
    """The bytes of a region's state by the step that first needs them."""
    total = region.state_bytes
    if total is None or region.storage == "nested":
        return [None] * region.steps
    first = total // region.steps
    if region.storage == "reverse":  # X and U at once, and a part of what U spills at each step
        first = round(Format.of(dtype).state_bytes * (total - (region.all_copied_bytes or 0)) / (region.state_bytes_per_element or 1))
    later = (total - first) // max(1, region.steps - 1)
    return [total - later * (region.steps - 1), *[later] * (region.steps - 1)]


def _with_state(stretch: Stretch, shares: dict[str, list[int | None]], rest: str) -> Stretch:
    if stretch.step is None:
        return stretch if rest == "store" else replace(stretch, kept=None)
    share = shares[stretch.region][stretch.step] if stretch.region in shares else stretch.saved
    return replace(stretch, kept=share if share is not None and stretch.saved is not None else None)


def named_report(
    containers: Sequence[Named],
    settings: Settings,
    dtype: torch.dtype,
    before: Report | None = None,
    again: tuple[str, ...] = (),
    left: Mapping[str, str] | None = None,
) -> Report:
    """The report on named containers.

    Args:
        containers: for each its path, the number of its layers that are steps, and what turns out to be copied.
        settings: the recurrence.
        dtype: of the stream.
        before: the report on others, which are counted too.
        again: paths of the modules that run again in the backward pass.
        left: why other lists of layers stay as they are, by their paths.
    """
    start = 0 if before is None else len(before.regions)
    rows = [
        replace(row(f"named_region_{i}", path, n, n, "named", None, settings, dtype), copied_later=later)
        for i, (path, n, later) in enumerate(containers, start)
    ]
    captured = [CapturedPart(path, "named", n, n) for path, n, _ in containers]
    if before is not None:
        rows, captured = [*before.regions, *rows], [*before.captured, *captured]
    steps = [(region, t) for region in rows for t in range(region.steps)]
    adds = [AddReport("", region.path, region.name, t, stretch=i) for i, (region, t) in enumerate(steps)]
    stretches = tuple(Stretch(region.path, region.name, t, 1, ("",), None, None, (i - 1,)) for i, (region, t) in enumerate(steps))
    layers = sum(found.steps for found in rows)
    refusals = tuple(Refusal.of("list_left", "", path, reason) for path, reason in (left or {}).items())
    return Report(layers, layers, tuple(rows), refusals, tuple(captured), None, tuple(adds), stretches, settings.rest, again=again)


def note_transform(net: nn.Module, containers: Sequence[Named], settings: Settings) -> None:
    """Gives a model that was transformed the report on that, and on the transforms before."""
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    before = net.__dict__.get(TRANSFORMED)
    found = named_report(containers, settings, dtype, before)
    if not hasattr(net, "report") or (before is not None and net.__dict__.get("report") is before):
        net.__dict__["report"] = found
    net.__dict__[TRANSFORMED] = found


def report_of(net: nn.Module) -> Report:
    """The report of a model that `momentumize` or `transform_to_momentumnet` returned; the same object as `net.report`.

    Raises:
        MnetError: `net` is not such a model.
    """
    found = net.__dict__.get(REPORT, net.__dict__.get(TRANSFORMED)) if isinstance(net, nn.Module) else None
    if found is None:
        raise MnetError(f"{type(net).__name__} has no report: it is not the result of mnet_fx.momentumize")
    return found
