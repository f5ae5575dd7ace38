"""`momentumize`: the one file that calls both halves, the passes and the runtime.

model --copy--> net --capture (train, eval)--> graphs --plan--> --rewrite, with MomentumRegion--> programs --> net.forward
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

import passes
from passes import Captured, Plan, PlannedRegion, Refusal, RegionCode

from .cost import storage
from .errors import MnetError, MnetWarning, SettingsError
from .guard import Guard
from .program import Program
from .region import MomentumRegion
from .report import REPORT, RegionReport, Report
from .settings import Backward, Gamma, Granularity, OnDrift, Settings, Weights

__all__ = ["momentumize"]


def momentumize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    gamma: Gamma = 0.9,
    initial_velocity: str | nn.Module = "zero",
    weights: Weights = "momentum",
    granularity: Granularity = "add",
    regions: Sequence[str] | None = None,
    backward: Backward = "reversible",
    min_steps: int = 2,
    on_drift: OnDrift = "raise",
) -> nn.Module:
    """Rewrites the residual chains of a model into reversible momentum chains, which train without stored activations.

        x[t+1] = x[t] + f[t](x[t])   becomes   v[t+1] = g[t] * v[t] + b[t] * f[t](x[t]);  x[t+1] = x[t] + v[t+1]

    The result is another network that starts from the same weights, except with gamma=0, which computes the original one. Gradients are
    exact: bit for bit those that `backward="stored"` gives.

    Args:
        model: any module; left as it was. The result shares its parameters and buffers, and has the same `state_dict` keys.
        example_inputs: not used yet.
        gamma: momentum g[t] in [0, 1): a number, or a callable `(t, steps) -> number`. Near 1 a region keeps fewest bits; near 0 the
            network stays closest to the original.
        initial_velocity: "zero": v[0] = 0; "first": v[0] = 0 and g[0] = 0, so that the chain starts at the speed of its first residual; or
            a module that gives v[0] from x[0]. That module becomes `net.initial_velocity`; its parameters come last in the state_dict.
        weights: "momentum": b[t] = 1 - g[t], as in the paper; "matched": those with which the chain stays closest to the original network
            (needs v[0] = 0).
        granularity: "add": a step for each residual add; "module": a step for each repeated block (one for a transformer layer, not two).
        regions: not built yet.
        backward: "reversible"; or "stored": the same forward, bit for bit, with activations stored by autograd.
        min_steps: shorter chains are left alone.
        on_drift: what to do when a step does not repeat in the backward: "raise" InversionError, "warn", or "ignore" (no check is made).

    Returns:
        A module of the class of `model` whose `forward` is rewritten; `net.report`, or `mnet_fx.report(net)` where the model has an
        attribute of that name, says what was done. A model without residual chains
        comes back working, with a warning.

    Raises:
        SettingsError: an option cannot work.
        MnetError: the model cannot be copied, is a ScriptModule, or has parameters on the meta device.
        NotImplementedError: an option that is not built yet.

    Source: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, eq. 2.
    """
    settings = Settings(gamma, initial_velocity, weights, granularity, backward, min_steps, on_drift)
    if example_inputs is not None:
        raise NotImplementedError(
            "example_inputs is not built yet: models are captured by symbolic trace, which needs no inputs; leave it out"
        )
    if regions is not None:
        raise NotImplementedError("regions is not built yet: leave it out, and residual chains are found by dataflow")
    net = _copied(model)
    parts = _rewritten_parts(net, settings)
    if settings.velocity is not None:
        if hasattr(net, "initial_velocity"):
            raise SettingsError(f"{type(model).__name__} has an attribute initial_velocity, where the module for v[0] would go: rename it")
        net.add_module("initial_velocity", settings.velocity)
    report = _report(parts, settings, _stream_dtype(model))
    net.__dict__[REPORT] = report
    if not hasattr(net, "report"):
        net.__dict__["report"] = report
    if not report.regions:
        warnings.warn(
            f"{type(model).__name__}: no residual chain was rewritten, the model is as before; see net.report", MnetWarning, stacklevel=2
        )
    return net


class Forward:
    """The `forward` of a rewritten module: one program for train mode, one for eval mode.

    Args:
        owner: the module whose forward this is.
        programs: by training flag.
        pinned: arguments that the graphs were captured for one value of, by name.
        guard: what the programs take for granted.
    """

    def __init__(self, owner: nn.Module, programs: dict[bool, Program], pinned: dict[str, Any], guard: Guard) -> None:
        self.owner, self.programs, self.pinned, self.guard = owner, programs, pinned, guard

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        for name, value in self.pinned.items():
            if not _same(given := bound.arguments.pop(name, value), value):
                raise MnetError(
                    f"{type(self.owner).__name__}.forward was captured with {name}={value!r} and cannot take {name}={_brief(given)}: "
                    "leave that argument out, or momentumize the submodules that do not depend on it"
                )
        self.guard.check(self.owner)
        return self.programs[self.owner.training](self.owner, *bound.args, **bound.kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(inspect.signature(type(self.owner).forward).parameters.values())[1:]
        return inspect.Signature(parameters)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules that shares every parameter and buffer."""
    if not isinstance(model, nn.Module):
        raise SettingsError(f"momentumize takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise MnetError("the model is a ScriptModule, whose code torch.fx cannot read: momentumize it before torch.jit.script or trace")
    tensors = [*chain(model.parameters(), model.buffers())]
    if any(t.is_meta for t in tensors):
        raise MnetError("the model has parameters on the meta device, which hold no values: load it first (to_empty, load_state_dict)")
    shared = {id(t): t for t in tensors}
    try:
        net = copy.deepcopy(model, shared)
    except Exception as error:
        raise MnetError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); momentumize works on a copy"
        ) from error
    if REPORT in net.__dict__:
        _restore(net)
    return net


def _restore(net: nn.Module) -> None:
    """Takes the result of an earlier momentumize out of a copy, so that a second one starts over."""
    if net.__dict__.pop(REPORT) is net.__dict__.get("report"):
        del net.__dict__["report"]
    rewritten = [module for module in net.modules() if isinstance(module.__dict__.get("forward"), Forward)]
    for module in rewritten:
        del module.__dict__["forward"]
        for name, region in [(name, value) for name, value in vars(module).items() if isinstance(value, MomentumRegion)]:
            del module.__dict__[name]
            if region.velocity is not None and net._modules.get("initial_velocity") is region.velocity:
                del net.initial_velocity


@dataclasses.dataclass(frozen=True)
class _Part:
    """One captured module after rewriting, in one mode."""

    captured: Captured
    plan: Plan
    program: Program
    regions: tuple[MomentumRegion, ...]


def _rewritten_parts(net: nn.Module, settings: Settings) -> tuple[list[_Part], tuple[Refusal, ...]]:
    """Captures `net` in both modes and rewrites in place what both captured; returns train mode's parts and refusals."""
    captures = {mode: _captured(net, mode) for mode in (True, False)}
    both = [{part.path: part for part in captures[mode].parts} for mode in (True, False)]
    parts = []
    for path, in_train in both[0].items():
        if path not in both[1]:
            continue
        owner = net.get_submodule(path)
        train = _rewritten(in_train, owner, settings, "")
        in_eval = both[1][path]
        same = in_eval.graph_module.code == in_train.graph_module.code
        evaluate = train if same else _rewritten(in_eval, owner, settings, "_eval")
        if train.regions or evaluate.regions:
            for region in dict.fromkeys([*train.regions, *evaluate.regions]):
                owner.__dict__[region.name] = region  # no submodule: code that loops over the children must not meet it
            programs = {True: train.program, False: evaluate.program}
            graphs = [in_train.graph_module] if same else [in_train.graph_module, in_eval.graph_module]
            owner.forward = Forward(owner, programs, in_train.pinned, _guard(owner, graphs))
        parts.append(train)
    return parts, captures[True].refusals


def _guard(owner: nn.Module, graphs: Sequence[fx.GraphModule]) -> Guard:
    leaves = {str(node.target) for gm in graphs for node in gm.graph.nodes if node.op == "call_module"}
    return Guard(owner, leaves, one_mode=len(graphs) > 1)


def _captured(net: nn.Module, training: bool) -> passes.Capture:
    flags = {module: module.training for module in net.modules()}
    try:
        net.train(training)  # not passed on: people's own train() may return nothing
        return passes.capture(net)
    finally:
        for module, flag in flags.items():
            module.training = flag


def _rewritten(captured: Captured, owner: nn.Module, settings: Settings, suffix: str) -> _Part:
    plan = passes.plan(captured.graph_module, granularity=settings.granularity, min_steps=settings.min_steps)
    named = tuple(dataclasses.replace(region, name=region.name + suffix) for region in plan.regions)
    plan = dataclasses.replace(plan, regions=named)
    regions: list[MomentumRegion] = []

    def build_region(code: RegionCode) -> nn.Module:
        regions.append(MomentumRegion(code, settings, owner))
        return regions[-1]

    graph: fx.Graph = passes.rewrite(captured.graph_module, plan, build_region).graph_module.graph
    return _Part(captured, plan, Program(graph), tuple(regions))


def _stream_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _report(found: tuple[list[_Part], tuple[Refusal, ...]], settings: Settings, dtype: torch.dtype) -> Report:
    parts, refused = found

    def under(path: str, inner: str) -> str:
        return ".".join(p for p in (path, inner) if p)

    regions, refusals = [], list(refused)
    for part in parts:
        prefix = part.captured.path
        regions += [_region_report(r, under(prefix, r.path), settings, dtype) for r in part.plan.regions]
        refusals += [dataclasses.replace(r, path=under(prefix, r.path)) for r in part.plan.refusals]
    found_adds = sum(len(part.plan.residual_adds) for part in parts)
    return Report(found_adds, sum(len(part.plan.rewritten_adds) for part in parts), tuple(regions), tuple(refusals))


def _region_report(region: PlannedRegion, path: str, settings: Settings, dtype: torch.dtype) -> RegionReport:
    gammas = settings.gammas(len(region.steps))
    later = gammas[1:] or gammas
    gamma: Any = later[0] if min(later) == max(later) else (min(later), max(later))
    kept, kept_bytes = storage(gammas, dtype, settings.velocity is None)
    if settings.backward == "stored":
        kept, kept_bytes = "autograd", None  # type: ignore[assignment]
    return RegionReport(region.name, path, len(region.steps), len(region.adds), region.kind, gamma, region.shape, kept, kept_bytes)
