"""The backend of `torch.compile`: residual chains of what Dynamo captures become momentum regions, the rest goes to an inner compiler.

    torch.compile(model, backend="mnet_fx", options={"gamma": 0.9, "inner": "inductor"})
    torch.compile(model, backend=mnet_fx.backend(gamma=0.9, inner="inductor"))

Dynamo's graph --unlift--> --level_layouts--> --plan--> --rewrite, with CompiledRegion--> --lift--> pieces and regions
                                     each piece compiled by the inner compiler; each distinct step once, see `artifacts`
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.utils import detect_fake_mode, to_fake_tensor
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import passes
from passes import LostContextError, Plan, Refusal, RegionCode, Unlifted, owner_stack

from ..arithmetic.kernels.choice import FUSED, fusing
from ..arithmetic.kernels.eager import Kernels
from ..errors import MnetError, MnetWarning, SettingsError
from ..inner import Compile, Inner, checked_inner, recurrent, sized_by_values
from ..reporting.build import add_reports, graph_report
from ..reporting.report import CapturedPart, Report
from ..settings import Settings
from .artifacts import Artifacts
from .bodies import Bodies, bodies, holders, refusals, with_bodies
from .compiler import Compiler
from .filling import Filler
from .head import ChunkedHead, Logits
from .keeping import Keeping
from .region import CompiledRegion, Reading, lies_under_no_grad
from .segment import CompiledSegment
from .within import with_reversed

__all__ = ["Backend", "Found", "backend", "mnet_fx", "reports", "reset_reports"]

log = logging.getLogger("mnet_fx")

_OPTIONS = tuple(field.name for field in dataclasses.fields(Settings))
_DDP = (
    "DistributedDataParallel had Dynamo cut the model at its buckets, which would cut its chains too: set "
    "torch._dynamo.config.optimize_ddp = False. Nothing is lost: a chain hands its gradients on step by step, so they are reduced "
    "while the backward pass runs"
)
_reports: list[Report] = []
_lock = threading.Lock()


def reports() -> list[Report]:
    """One report for each graph that the backend has compiled since the last `reset_reports`, in order."""
    with _lock:
        return list(_reports)


def reset_reports() -> None:
    """Forgets the reports so far."""
    with _lock:
        _reports.clear()


def backend(*, inner: str | Callable[..., Any] = "inductor", **options: Any) -> Backend:
    """A backend for `torch.compile`.

    Args:
        inner: what compiles the steps and everything between the chains: the name of a registered backend or a callable of its kind.
        options: those of `mnet_fx.momentumize` about the recurrence: gamma, initial_velocity, weights, granularity, backward, min_steps,
            on_drift, precision, offload; and rest.

    Returns:
        A callable `(graph_module, example_inputs) -> callable` to give to `torch.compile(model, backend=...)`.

    Raises:
        SettingsError: an option is unknown or cannot work.
    """
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise SettingsError(f"unknown option(s) {', '.join(unknown)} of the backend mnet_fx; known are inner, {', '.join(_OPTIONS)}")
    return Backend(Settings(**options), inner)


def mnet_fx(gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None) -> Any:
    """The backend by its registered name, `torch.compile(model, backend="mnet_fx", options={...})`; options are those of `backend`."""
    return backend(**(options or {}))(gm, example_inputs, mode=mode)


def check_compiled(model: nn.Module) -> None:
    """
    Raises:
        SettingsError: the model, or a part of it, is compiled by torch.compile with this backend.
    """
    for path, module in model.named_modules():
        callback: Any = module.dynamo_ctx.callback if isinstance(module, OptimizedModule) else None
        wrapper = innermost_backend(callback) if callable(callback) else None
        if getattr(getattr(wrapper, "compiler_fn", None), "__name__", None) == "mnet_fx":
            raise SettingsError(
                f"{path or 'the model'} is compiled by torch.compile(backend='mnet_fx'), which leaves no options in it: give the original "
                "model, or make the net by momentumize(model, inner='inductor'), which compiles the same way"
            )


def _check_call(mode: str | None, options: Any) -> None:
    """
    Raises:
        SettingsError: torch.compile was given what only inductor knows.
    """
    if mode is not None:
        graphs = ", whose CUDA graphs overwrite what a recomputed step has saved" if mode in ("reduce-overhead", "max-autotune") else ""
        raise SettingsError(
            f"mode={mode!r} is an option of inductor{graphs}: give options={{'inner': a callable}} with that mode set in "
            "torch._inductor.config (max_autotune, coordinate_descent_tuning; not triton.cudagraphs)"
        )
    if options:
        raise SettingsError(f"options={options!r} beside a backend made by mnet_fx.backend(...): give them to that function")


class Backend:
    """See `backend`."""

    def __init__(self, settings: Settings, inner: Inner) -> None:
        self.settings, self.inner = settings, checked_inner(inner)
        self.__name__ = "mnet_fx"

    def __call__(
        self, gm: fx.GraphModule, example_inputs: list[Any], *, options: Any = None, mode: str | None = None
    ) -> Callable[..., Any]:
        _check_call(mode, options)
        found = self.planned(gm)
        if _is_bucket(gm) and (isinstance(found, Refusal) or found.plan.residual_adds):
            raise MnetError(_DDP)
        report = self.report(gm, found)
        if isinstance(found, Found) and found.plan.regions:
            _warn_of_the_limit()
        run = self.compiled(gm, found, example_inputs)
        _announce(report)  # now, as Dynamo may call off a compilation and start anew
        return run

    def planned(self, gm: fx.GraphModule) -> Found | Refusal:
        """What can be rewritten of a graph; a refusal where it cannot be read."""
        return _plan(gm, self.settings)

    def report(self, gm: fx.GraphModule, found: Found | Refusal) -> Report:
        """The report of a planned graph; to be asked before it is compiled, as a compiler may change the graph."""
        return _report(gm, found, self.settings)

    def compiled(self, gm: fx.GraphModule, found: Found | Refusal, example_inputs: list[Any]) -> Callable[..., Any]:
        """A planned graph with its regions, and everything else compiled by the inner compiler."""
        inner: Compile = torch._dynamo.lookup_backend(self.inner)
        if isinstance(found, Refusal) or not found.plan.regions:
            return gm if recurrent(gm) or sized_by_values(gm) else inner(gm, example_inputs)
        return _compiled(gm, found, example_inputs, self.settings, inner, FUSED if self._fuses() else None)

    def _fuses(self) -> bool:
        return self.inner == "inductor" and fusing()


@dataclasses.dataclass(frozen=True)
class Found:
    """A graph of Dynamo as the passes read it, its plan, and what would be rewritten of its bodies."""

    unlifted: Unlifted
    plan: Plan
    bodies: Bodies

    def divided(self, settings: Settings, divided: Callable[[Sequence[Any]], Sequence[range]]) -> Found:
        """The same with other chains, see `passes.plan`."""
        return dataclasses.replace(self, plan=_chains(self.unlifted.graph_module, settings, divided=divided))


def _plan(gm: fx.GraphModule, settings: Settings) -> Found | Refusal:
    """What can be rewritten of a graph; a refusal where it cannot be read. Checkpoints around and in steps are written out."""
    names = passes.checkpoints(gm)
    if not names:
        return _planned(gm, settings)
    flat, made = passes.written_out(gm, names)
    found = _planned(flat, settings)
    if isinstance(found, Refusal):
        return _planned(gm, settings)
    inside = {name for region in found.plan.regions for step in region.steps for name in step.nodes}
    used = [name for name in names if not made[name].isdisjoint(inside)]
    return found if len(used) == len(names) else _planned(passes.written_out(gm, used)[0], settings)


def _planned(gm: fx.GraphModule, settings: Settings) -> Found | Refusal:
    try:
        unlifted = passes.unlift(gm)
    except LostContextError as error:
        return Refusal.of("lost_context", "", "", f"the graph is compiled as it is: {error}")
    passes.level_layouts(unlifted.graph_module)
    plans = bodies(unlifted.graph_module, partial(passes.plan, **_how(settings)))
    return Found(unlifted, _chains(unlifted.graph_module, settings), plans)


def _chains(gm: fx.GraphModule, settings: Settings, **more: Any) -> Plan:
    return with_reversed(gm, passes.plan(gm, **_how(settings), **more), settings)


def _how(settings: Settings) -> dict[str, Any]:
    return {"granularity": settings.granularity, "min_steps": settings.min_steps, "nested": True}


def _compiled(
    gm: fx.GraphModule, found: Found, example_inputs: list[Any], settings: Settings, inner: Compile, arithmetic: Kernels | None
) -> Callable[..., Any]:
    """The graph with regions, and everything else compiled."""
    unlifted = found.unlifted
    regions: dict[str, CompiledRegion] = {}
    reading = Reading(regions)

    def build_region(code: RegionCode) -> nn.Module:
        off = lies_under_no_grad(unlifted.graph_module, code, settings)
        regions[code.region.name] = CompiledRegion(reading.of(code), settings, arithmetic, unlifted.attributes, off)
        return regions[code.region.name]

    def static(path: str) -> Any:
        return regions[path] if path in regions else None if path in unlifted.attributes else getattr(unlifted.graph_module, path)

    rewritten = passes.rewrite(unlifted.graph_module, found.plan, build_region).graph_module
    lifted = passes.lift(rewritten, unlifted, {name: region.reads for name, region in regions.items()})
    cut, own = None, set(regions)
    if settings.rest == "checkpoint":
        own |= passes.chunked_heads(lifted, partial(ChunkedHead, on_drift=settings.on_drift), Logits).keys()
        cut = passes.cutting(lifted.graph, unlifted.attributes, passes.largest_step(unlifted.graph_module, found.plan))
    joined = passes.pieces(lifted, own, unlifted.sizes, cut)
    fake_mode = detect_fake_mode(example_inputs)
    assert fake_mode is not None  # Dynamo's
    recorded = {node.name: node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder"}
    inputs = [
        _faked(value, recorded[name] if name in unlifted.attributes else None, fake_mode)
        for name, value in zip(unlifted.inputs, example_inputs, strict=True)
    ]
    compiler = Compiler(inner, fake_mode)
    segment = partial(CompiledSegment, attributes=unlifted.attributes, on_drift=settings.on_drift)
    Filler(joined, compiler, Artifacts(compiler, static).fill, segment).run(*inputs)
    keeping = _keeping(found, regions, joined, settings)

    def run(*inputs: Any) -> Any:
        return joined.forward(*inputs)

    run.regions, run.keeping = list(regions.values()), keeping  # type: ignore[attr-defined]
    for name in ("named_parameters", "named_buffers", "zero_grad"):  # the minifier asks for these, as of every compiled function
        setattr(run, name, getattr(gm, name))
    return run


def _keeping(found: Found, regions: Mapping[str, CompiledRegion], joined: fx.GraphModule, settings: Settings) -> Keeping:
    """What may be kept of a compiled graph, with as much kept as the settings say."""
    costs = passes.costs_of_steps(found.unlifted.graph_module, found.plan) if settings.backward == "reversible" else {}
    segments = (module for module in joined.modules() if isinstance(module, (CompiledSegment, ChunkedHead)))
    keeping = Keeping([(regions[name], cost) for name, cost in costs.items()], segments)
    keeping.spend(settings.keep)
    return keeping


def _faked(value: Any, recorded: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor for an input: for a parameter the capture's own, if it is still like it, since making one takes a millisecond."""
    if not isinstance(value, Tensor):
        return value
    if (
        isinstance(recorded, FakeTensor)
        and recorded.fake_mode is mode
        and (recorded.shape, recorded.stride(), recorded.dtype, recorded.requires_grad)
        == (value.shape, value.stride(), value.dtype, value.requires_grad)
    ):
        return recorded
    return to_fake_tensor(value, mode)


def _is_bucket(gm: fx.GraphModule) -> bool:
    """Whether a graph is a part that Dynamo cut out for DistributedDataParallel."""
    return "DDPOptimizer" in str(getattr(gm, "compile_subgraph_reason", ""))


def _warn_of_the_limit() -> None:
    """Dynamo runs a function's Python, hence the original network, once it has compiled so many graphs for it."""
    at = CompileContext.current_compile_id()
    limit = torch._dynamo.config.recompile_limit
    if at is None or at.frame_compile_id is None or at.frame_compile_id + 1 < limit or torch._dynamo.config.fail_on_recompile_limit_hit:
        return
    warnings.warn(
        f"{at.frame_compile_id + 1} graphs were compiled for one function, and {limit} is Dynamo's limit: calls that need yet another one "
        "will run the original network, not the momentum network. Give torch.compile dynamic=True, or raise torch._dynamo.config."
        "recompile_limit; torch._dynamo.config.fail_on_recompile_limit_hit = True makes it an error",
        MnetWarning,
        stacklevel=2,
    )


def _announce(report: Report) -> None:
    """Adds the report of a graph to `reports`, and logs it."""
    with _lock:
        _reports.append(report)
    log.info("torch.compile: %s", str(report).splitlines()[0])
    log.debug("%s", report)


def _report(gm: fx.GraphModule, found: Found | Refusal, settings: Settings) -> Report:
    if isinstance(found, Refusal):
        return Report(0, 0, (), (found,), (CapturedPart("", "torch.compile", 0, 0),))
    graph = found.unlifted.graph_module
    plans = found.bodies
    plan = passes.with_stretches(graph, found.plan, holders(graph, plans))
    at_breaks = _at_breaks(gm, plan, {node.name: node for node in graph.graph.nodes})
    report = graph_report(plan, "torch.compile", settings)
    adds = with_bodies(graph, add_reports(plan, (*report.refusals, *at_breaks)), plans, plan.stretches)
    paths = found.unlifted.attributes
    return dataclasses.replace(
        report,
        residual_adds=len(adds),
        regions=tuple(dataclasses.replace(r, copied=tuple(paths.get(name, name) for name in r.copied)) for r in report.regions),
        refusals=(*report.refusals, *refusals(plans), *at_breaks),
        captured=(dataclasses.replace(report.captured[0], residual_adds=len(adds)),),
        adds=adds,
        heads=_heads(found) if settings.rest == "checkpoint" else (),
    )


def _heads(found: Found) -> tuple[str, ...]:
    """Paths of the linear layers whose cross entropy is computed in chunks."""
    graph = found.unlifted.graph_module.graph
    if not found.plan.regions:
        return ()
    inside = {name for region in found.plan.regions for step in region.steps for name in step.nodes}
    named = {node.name: node for node in graph.nodes}
    return tuple((owner_stack(named[head.linear]) or ["the root"])[-1] for head in passes.heads(graph, inside))


def _at_breaks(gm: fx.GraphModule, plan: Plan, nodes: dict[str, fx.Node]) -> list[Refusal]:
    """Chains that a graph break cuts: the graph ends in one, and returns the end of a chain."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return []
    returned = set(next(reversed(nodes.values())).all_input_nodes)
    ends = [(region.steps[-1].target, region.path) for region in plan.regions]
    ends += [(refusal.node, refusal.path) for refusal in plan.refusals if refusal.code == "too_short"]
    found = f"the graph ends here in a graph break ({' '.join(str(reason.reason).split())[:200]}), so a chain that goes on starts anew"
    return [Refusal.of("graph_break", name, path, found) for name, path in ends if nodes[name] in returned]
