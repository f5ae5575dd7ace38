"""`momentumize`: the one file that calls both halves, the passes and the runtime.

model --copy--> net --capture (train, eval)--> graphs --plan--> --rewrite, with MomentumRegion--> programs --> net.forward
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import passes
from passes import Call, ExportError, RegionCode

from .copies import keep_forwards, release_forwards
from .errors import MnetError, MnetWarning, SettingsError
from .forward import Constants, ExportedForward, Forward, Variant
from .guard import Guard, hooked
from .named import NamedLayer, NamedRegion, name_region, paths_of
from .parts import Part, Parts, exported, parts_of
from .program import Program
from .region import MomentumRegion
from .report import REPORT, CapturedPart, Report, region_report, row
from .settings import Backward, Gamma, Granularity, OnDrift, Precision, Settings, Weights

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
    precision: Precision = "standard",
) -> nn.Module:
    """Rewrites the residual chains of a model into reversible momentum chains, which train without stored activations.

        x[t+1] = x[t] + f[t](x[t])   becomes   v[t+1] = g[t] * v[t] + b[t] * f[t](x[t]);  x[t+1] = x[t] + v[t+1]

    The result is another network that starts from the same weights, except with gamma=0, which computes the original one. Gradients are
    exact: bit for bit those that `backward="stored"` gives.

    Args:
        model: any module; left as it was. The result shares its parameters and buffers, and has the same `state_dict` keys.
        example_inputs: a call of the model, as a tuple of positional arguments or a dict (or other mapping) of keyword arguments, of which
            only structure, shapes, dtypes and constants count. With them, what a symbolic trace cannot read is captured by torch.export,
            and calls with other sizes or other arguments are captured again when they come, or are an error.
        gamma: momentum g[t] in [0, 1): a number, or a callable `(t, steps) -> number`. Near 1 a region keeps fewest bits; near 0 the
            network stays closest to the original.
        initial_velocity: "zero": v[0] = 0; "first": v[0] = 0 and g[0] = 0, so that the chain starts at the speed of its first residual; or
            a module that gives v[0] from x[0]. That module becomes `net.initial_velocity`; its parameters come last in the state_dict.
        weights: "momentum": b[t] = 1 - g[t], as in the paper; "matched": those with which the chain stays closest to the original network
            (needs v[0] = 0).
        granularity: "add": a step for each residual add; "module": a step for each repeated block (one for a transformer layer, not two).
        regions: paths of containers (ModuleList, Sequential) whose layers the model calls one after the other, such as
            ["encoder.layers"]. Then nothing is captured: each of those layers becomes a step of a chain, f(x) = layer(x) - x, whatever
            Python is in it and around it, and the rest of the model stays as it is. A layer takes the stream as its first tensor and
            returns it, alone or first in a tuple. Layers may be skipped; elsewhere a chain starts anew. Layers that join the container
            later stay as they are. example_inputs, granularity and min_steps have no meaning then.
        backward: "reversible"; or "stored": the same forward, bit for bit, with activations stored by autograd.
        min_steps: shorter chains are left alone.
        on_drift: what to do when a step does not repeat in the backward: "raise" InversionError, "warn", or "ignore" (no check is made).
        precision: "standard": the forward pass errs no more than one in the dtype of the stream, relative to its largest value; "high":
            also where elements never mix and small ones grow, for 16 bytes per element in place of 12 (8 for 16-bit streams).

    Returns:
        A module of the class of `model` whose `forward` is rewritten; `net.report`, or `mnet_fx.report(net)` where the model has an
        attribute of that name, says what was done. A model without residual chains comes back working, with a warning. The options are
        not in its state_dict: to use a checkpoint of it, momentumize the model with the same options, and load.

    Raises:
        SettingsError: an option cannot work, or example_inputs do not fit the model.
        MnetError: the model cannot be copied, is a ScriptModule, or has parameters without values (meta device, lazy modules).

    Source: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, eq. 2.
    """
    settings = Settings(gamma, initial_velocity, weights, granularity, backward, min_steps, on_drift, precision)
    if isinstance(example_inputs, (bool, int, float, str)):
        raise SettingsError(
            f"example_inputs must be a tuple of positional arguments or a dict of keyword arguments, got {example_inputs!r}; "
            "options are given by name, as in gamma=0.9 or regions=['layers']"
        )
    net = _copied(model)
    if regions is None:
        parts = parts_of(net, settings, example_inputs)
        _rewrite(net, parts, settings)
        report = _report(parts, settings, _stream_dtype(model))
    else:
        report = _named_report([name_region(net, path, settings) for path in paths_of(regions)], settings, _stream_dtype(model))
    if settings.velocity is not None:
        if hasattr(net, "initial_velocity"):
            raise SettingsError(f"{type(model).__name__} has an attribute initial_velocity, where the module for v[0] would go: rename it")
        if isinstance(net, nn.Sequential) and "forward" not in net.__dict__:
            raise SettingsError("the model is a Sequential, which would run the module for v[0] as a layer: put it in a module of its own")
        net.add_module("initial_velocity", settings.velocity)
    keep_forwards(net)
    net.__dict__[REPORT] = report
    if not hasattr(net, "report"):
        net.__dict__["report"] = report
    if not report.regions:
        warnings.warn(
            f"{type(model).__name__}: no residual chain was rewritten, the model is as before; print(net.report) says why",
            MnetWarning,
            stacklevel=2,
        )
    return net


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules that shares every parameter and buffer."""
    if not isinstance(model, nn.Module):
        raise SettingsError(f"momentumize takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise MnetError("the model is a ScriptModule, whose code torch.fx cannot read: momentumize the module that it was made from")
    tensors = [*chain(model.parameters(), model.buffers())]
    if any(t.is_meta for t in tensors):
        raise MnetError("the model has parameters on the meta device, which hold no values: load it first (to_empty, load_state_dict)")
    if any(map(is_lazy, tensors)):
        raise MnetError("the model has parameters of a lazy module, which have no shape yet: call the model once first")
    computed = [t for module in model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor) and not t.is_leaf]
    shared = {id(t): t for t in (*tensors, *computed)}  # computed: by a hook at each call, as pruning does; deepcopy refuses them
    try:
        net = copy.deepcopy(model, shared)
    except Exception as error:
        raise MnetError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); momentumize works on a copy"
        ) from error
    for original, twin in zip(model.modules(), net.modules(), strict=True):
        if isinstance(original, torch.jit.ScriptModule):  # copies its tensors whatever deepcopy is told to share
            for name, tensor in chain(original.named_parameters(recurse=False), original.named_buffers(recurse=False)):
                twin._c.setattr(name, tensor)  # type: ignore[union-attr, operator]
    release_forwards(net)
    if REPORT in net.__dict__:
        _restore(net)
    return net


def _restore(net: nn.Module) -> None:
    """Takes the result of an earlier momentumize out of a copy, so that a second one starts over."""
    if net.__dict__.pop(REPORT) is net.__dict__.get("report"):
        del net.__dict__["report"]
    rewritten = [module for module in net.modules() if isinstance(module.__dict__.get("forward"), (Forward, ExportedForward, NamedLayer))]
    for module in rewritten:
        del module.__dict__["forward"]
        for name, ours in [(name, value) for name, value in vars(module).items() if isinstance(value, (MomentumRegion, Constants))]:
            del module.__dict__[name]
            velocity = getattr(ours, "velocity", None)
            if velocity is not None and net._modules.get("initial_velocity") is velocity:
                del net.initial_velocity


def _rewrite(net: nn.Module, parts: Parts, settings: Settings) -> None:
    """Gives every captured module that has regions its new forward."""
    for path, both in parts.both.items():
        owner = net.get_submodule(path)
        if not (both[True].adds or both[False].adds):
            continue
        programs = _programs(owner, both, settings)
        captured, modes_differ = both[True].captured, _modes_differ(both)
        variants = [] if captured.interface is None else [_variant(both, programs)]
        live = frozenset(both[True].captured.live) & frozenset(both[False].captured.live)
        exported = ExportedForward(
            owner, variants, Guard(owner, live, one_mode=modes_differ or not variants, whole=True), _Again(both, settings)
        )
        if captured.interface is not None:
            owner.forward = exported
            if hooks := [inner for inner in hooked(owner) if not any(f"{inner}.".startswith(f"{top}.") for top in live)]:
                found = f"{', '.join(hooks[:3])}{' and more' * (len(hooks) > 3)} of an exported part have hooks"
                warnings.warn(f"{found}: what they did to tensors is kept, but they are not called any more", MnetWarning, stacklevel=3)
            continue
        leaves = {str(n.target) for part in both.values() for n in part.captured.graph_module.graph.nodes if n.op == "call_module"}
        owner.forward = Forward(owner, programs, captured.pinned, Guard(owner, leaves, one_mode=modes_differ), exported)


def _modes_differ(both: dict[bool, Part]) -> bool:
    return both[True].plan is not both[False].plan


def _programs(owner: nn.Module, both: dict[bool, Part], settings: Settings) -> dict[bool, Program]:
    """The program of each mode; its regions and constants become attributes of `owner`."""
    train = _program(owner, both[True], settings)
    return {True: train, False: _program(owner, both[False], settings) if _modes_differ(both) else train}


def _program(owner: nn.Module, part: Part, settings: Settings) -> Program:
    if part.captured.constants:
        holder = part.captured.holder
        owner.__dict__[holder] = Constants(part.captured.constants)

    def build_region(code: RegionCode) -> nn.Module:
        region = owner.__dict__[code.region.name] = MomentumRegion(code, settings, owner)
        return region  # no submodule: code that loops over the children must not meet it

    return Program(passes.rewrite(part.captured.graph_module, part.plan, build_region).graph_module.graph)


def _variant(both: dict[bool, Part], programs: dict[bool, Program]) -> Variant:
    return {mode: (programs[mode], both[mode].captured.interface) for mode in both}  # type: ignore[misc]


class _Again:
    """Captures an exported module for another kind of call, and sees that it is the same momentum network."""

    def __init__(self, both: dict[bool, Part], settings: Settings) -> None:
        self.chains, self.settings = {mode: _chains(part) for mode, part in both.items()}, settings
        self.live = set(both[True].captured.live) & set(both[False].captured.live)

    def __call__(self, owner: nn.Module, call: Call, number: int) -> Variant:
        forward = owner.__dict__.pop("forward")
        try:
            both = exported(owner, call, self.settings, number=number)
        finally:
            owner.__dict__["forward"] = forward
        for mode, part in both.items():
            if traced := self.live - set(part.captured.live):  # these, the guard does not watch
                raise ExportError(f"its graph would hold {', '.join(sorted(traced))}, which the first one calls as it is")
            if _chains(part) != self.chains[mode]:
                raise ExportError(
                    f"its residual chains would have {_chains(part)} steps, not {self.chains[mode]}, which is another momentum network"
                )
        return _variant(both, _programs(owner, both, self.settings))


def _chains(part: Part) -> list[int]:
    return [len(region.steps) for region in part.plan.regions]


def _stream_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _report(parts: Parts, settings: Settings, dtype: torch.dtype) -> Report:
    def under(path: str, inner: str) -> str:
        return ".".join(p for p in (path, inner) if p)

    captured, regions, refusals = [], [], list(parts.refusals)
    for path, both in parts.both.items():
        plan = both[True].plan
        regions += [region_report(r, under(path, r.path), settings, dtype) for r in plan.regions]
        refusals += [dataclasses.replace(r, path=under(path, r.path)) for r in plan.refusals]
        front_end = "symbolic trace" if both[True].captured.interface is None else "torch.export"
        captured.append(CapturedPart(path, front_end, len(plan.residual_adds), len(plan.rewritten_adds)))
    return Report(
        sum(part.residual_adds for part in captured),
        sum(part.rewritten_adds for part in captured),
        tuple(regions),
        tuple(refusals),
        tuple(captured),
    )


def _named_report(named: list[NamedRegion], settings: Settings, dtype: torch.dtype) -> Report:
    rows = [row(f"named_region_{i}", r.path, len(r.layers), len(r.layers), "named", None, settings, dtype) for i, r in enumerate(named)]
    layers = sum(found.steps for found in rows)
    return Report(layers, layers, tuple(rows), (), tuple(CapturedPart(r.path, "named", len(r.layers), len(r.layers)) for r in named))
