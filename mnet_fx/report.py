"""What was rewritten, what was not, and why: as data, and as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from passes import Plan, PlannedRegion, Refusal, joined

from .cost import storage
from .errors import MnetError
from .settings import Settings

REPORT = "_mnet_fx_report"  # where a model that momentumize rewrote keeps its report
TRANSFORMED = "_mnet_fx_transform_report"  # where one that transform_to_momentumnet changed does

Named = tuple[str, int, Mapping[str, int]]

__all__ = [
    "REPORT",
    "CapturedPart",
    "Pending",
    "RegionReport",
    "Report",
    "graph_report",
    "named_report",
    "note_transform",
    "region_report",
    "report",
    "row",
]


@dataclass(frozen=True)
class RegionReport:
    """One rewritten chain.

    Attributes:
        name: attribute of the region in the module it was rewritten in.
        path: path of the module that contains the chain, "" for the whole model.
        steps: number of steps T.
        adds: number of residual adds in them.
        kind: "pre-activation", "post-activation", "post-norm", "block", or "named" (a layer of a named container is a step, and is
            counted as one add).
        gamma: the momentum where it is the same for all steps but perhaps the first, else the (smallest, largest).
        shape: shape of the stream, None where the capture recorded none.
        storage: "reverse" (the state X, U is kept), "inputs" (x[t] of each step is kept, fewer bytes for a short chain), "autograd"
            (backward="stored"), or "nested" (nothing is kept: it lies within a step of another region, which runs it again).
        state_bytes_per_element: bytes that the region keeps per element of the stream between forward and backward, by theory, for a
            stream of the model's parameter dtype; None for "autograd", which depends on what the steps save, and for "nested".
        copied: side inputs and buffers that the model overwrites after the chain has read them, of which the chain keeps copies.
        copied_bytes: bytes of these copies, None where sizes are not known.
        copied_later: of a named region, the side inputs and buffers that backward passes have found overwritten, with their bytes; calls
            after that keep copies of them. Empty until then.
    """

    name: str
    path: str
    steps: int
    adds: int
    kind: str
    gamma: float | tuple[float, float]
    shape: tuple[int, ...] | None
    storage: str
    state_bytes_per_element: float | None
    copied: tuple[str, ...] = ()
    copied_bytes: int | None = 0
    copied_later: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CapturedPart:
    """One part of the model that was captured.

    Attributes:
        path: path of the module, "" for the whole model.
        front_end: "Dynamo" (a graph that it captured, and will capture again after any change), "preview" (read without inputs; the first
            call decides), "GraphModule" (the graph that was given), "named" (layers of a named container), or "torch.compile" (a graph
            of the backend).
        residual_adds, rewritten_adds: number of residual-looking adds found in it, and of those rewritten.
    """

    path: str
    front_end: str
    residual_adds: int
    rewritten_adds: int


@dataclass(frozen=True)
class Report:
    """What `momentumize` did; `str(report)` prints it.

    Attributes:
        residual_adds: number of residual-looking adds that were found.
        rewritten_adds: number of those that lie in a region.
        regions: the regions, in order.
        refusals: why each other add, or a whole module, was left as it was.
        captured: which parts of the model were captured, and how.
        kept_outside: bytes that ordinary autograd saves for what lies outside of all chains, for the inputs of the capture: see
            `passes.kept` for what is counted. None where that is not known, as in a preview and for named containers.
    """

    residual_adds: int
    rewritten_adds: int
    regions: tuple[RegionReport, ...]
    refusals: tuple[Refusal, ...]
    captured: tuple[CapturedPart, ...] = field(default_factory=tuple)
    kept_outside: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.rewritten_adds} of {self.residual_adds} residual adds rewritten, in {len(self.regions)} region(s)"]
        if self.regions:
            parts.append(_table("region path steps adds kind gamma shape storage bytes/element", map(_region_row, self.regions)))
        parts += [_copies(region) for region in self.regions if region.copied or region.copied_later]
        if self.kept_outside:
            parts.append(f"Outside of chains, autograd keeps {self.kept_outside:,} bytes for the backward pass (inputs as at the capture).")
        if any(part.front_end == "preview" for part in self.captured):
            parts.append("A preview, read without inputs; the first call, or example_inputs, makes it final.")
        if len(self.captured) > 1 or any(part.front_end == "named" for part in self.captured):
            parts.append(_table("path captured-by adds rewritten", map(_captured_row, self.captured)))
        if self.refusals:
            alike: dict[tuple[str, str], list[Refusal]] = {}
            for refusal in self.refusals:
                alike.setdefault((refusal.code, refusal.explanation), []).append(refusal)
            hints = dict.fromkeys(f"{refusal.code}: {refusal.hint}" for refusal in self.refusals)
            parts.append("Not rewritten")
            parts.append(_table("path node code explanation", map(_refusal_row, alike.values())))
            parts.append("\n".join(hints))
        return "\n\n".join(parts)


class Pending(Report):
    """A report that is worked out when somebody looks at it.

    Args:
        work: gives the report.
    """

    def __init__(self, work: Callable[[], Report]) -> None:
        self.__dict__["_work"] = work

    def __getattr__(self, name: str) -> Any:
        """A field that is not there yet."""
        if name not in Report.__dataclass_fields__ or "_work" not in self.__dict__:
            raise AttributeError(name)
        self.__dict__.update(vars(self.__dict__["_work"]()))  # that may fail, and then fails at the next look too
        self.__dict__.pop("_work", None)
        return self.__dict__[name]


def _table(headers: str, rows: object) -> str:
    return tabulate(list(rows), headers=headers.split(), tablefmt="simple", disable_numparse=True, maxcolwidths=60)  # type: ignore[call-overload]


def _captured_row(part: CapturedPart) -> tuple[str, ...]:
    return part.path or "(root)", part.front_end, str(part.residual_adds), str(part.rewritten_adds)


def _region_row(r: RegionReport) -> tuple[str, ...]:
    gamma = f"{r.gamma:g}" if isinstance(r.gamma, float) else "{:g} to {:g}".format(*r.gamma)
    shape = "-" if r.shape is None else " x ".join("?" if n < 0 else str(n) for n in r.shape)
    kept = "-" if r.state_bytes_per_element is None else f"{r.state_bytes_per_element:g}"
    return r.name, r.path or "(root)", str(r.steps), str(r.adds), r.kind, gamma, shape, r.storage, kept


def _copies(r: RegionReport) -> str:
    known = None if r.copied_bytes is None else r.copied_bytes + sum(r.copied_later.values())
    size = "" if known is None else f" ({known:,} bytes)"
    return f"{r.name} keeps copies of what is overwritten after the chain has read it{size}: {', '.join([*r.copied, *r.copied_later])}"


def _refusal_row(alike: list[Refusal]) -> tuple[str, ...]:
    """The row of refusals with the same explanation, under the path of the first."""
    first, more = alike[0], f" and {len(alike) - 1} more" * (len(alike) > 1)
    return f"{first.path or '(root)'}{more}", first.node, first.code, first.explanation


def region_report(region: PlannedRegion, path: str, settings: Settings, dtype: torch.dtype) -> RegionReport:
    """The row of a planned region in the module at `path`, for a stream of that dtype."""
    found = row(region.name, path, len(region.steps), len(region.adds), region.kind, region.shape, settings, dtype)
    found = replace(found, copied=region.copied, copied_bytes=region.copied_bytes)
    return replace(found, storage="nested", state_bytes_per_element=None) if region.within else found


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


def graph_report(plan: Plan, front_end: str, settings: Settings, path: str = "", dtype: torch.dtype | None = None) -> Report:
    """The report of one planned graph.

    Args:
        plan: its plan.
        front_end: as in `CapturedPart`.
        settings: the recurrence.
        path: of the module whose graph it is.
        dtype: of streams where the graph recorded none, by default torch's default.
    """
    known = [getattr(torch, region.dtype) if region.dtype else dtype or torch.get_default_dtype() for region in plan.regions]
    rows = tuple(region_report(r, joined(path, r.path), settings, dtype) for r, dtype in zip(plan.regions, known, strict=True))
    refusals = tuple(replace(refusal, path=joined(path, refusal.path)) for refusal in plan.refusals)
    adds, rewritten = len(plan.residual_adds), len(plan.rewritten_adds)
    return Report(adds, rewritten, rows, refusals, (CapturedPart(path, front_end, adds, rewritten),), plan.kept_outside)


def named_report(containers: Sequence[Named], settings: Settings, dtype: torch.dtype, before: Report | None = None) -> Report:
    """The report on named containers.

    Args:
        containers: for each its path, the number of its layers that are steps, and what turns out to be copied.
        settings: the recurrence.
        dtype: of the stream.
        before: the report on others, which are counted too.
    """
    start = 0 if before is None else len(before.regions)
    rows = [
        replace(row(f"named_region_{i}", path, n, n, "named", None, settings, dtype), copied_later=later)
        for i, (path, n, later) in enumerate(containers, start)
    ]
    captured = [CapturedPart(path, "named", n, n) for path, n, _ in containers]
    if before is not None:
        rows, captured = [*before.regions, *rows], [*before.captured, *captured]
    layers = sum(found.steps for found in rows)
    return Report(layers, layers, tuple(rows), (), tuple(captured))


def note_transform(net: nn.Module, containers: Sequence[Named], settings: Settings) -> None:
    """Gives a model that was transformed the report on that, and on the transforms before."""
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    before = net.__dict__.get(TRANSFORMED)
    found = named_report(containers, settings, dtype, before)
    if not hasattr(net, "report") or (before is not None and net.__dict__.get("report") is before):
        net.__dict__["report"] = found
    net.__dict__[TRANSFORMED] = found


def report(net: nn.Module) -> Report:
    """The report of a model that `momentumize` or `transform_to_momentumnet` returned; the same object as `net.report`.

    Raises:
        MnetError: `net` is not such a model.
    """
    found = net.__dict__.get(REPORT, net.__dict__.get(TRANSFORMED)) if isinstance(net, nn.Module) else None
    if found is None:
        raise MnetError(f"{type(net).__name__} has no report: it is not the result of mnet_fx.momentumize")
    return found
