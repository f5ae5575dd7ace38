"""A torch.fx.GraphModule is a program of its own, so it is rewritten as one: into a GraphModule whose graph calls the chains.

    before    x -> conv -> add -> conv_1 -> add_1 -> output             whoever made the graph
    after     x -> momentum_region_0 ----------------> output           same tensors under the same keys

torch.fx copies a GraphModule by making it again from its graph, and pickles it as source text that it traces again; both lose what the
graph does not say, such as who owns a region. Here a copy copies the instance, and a pickle lists the nodes. A pickle leaves out the
checks that torch.export puts around an exported module, as local functions: those of the inputs, and that forbid train() and eval().
"""

from __future__ import annotations

import copy
import pkgutil
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.node import _get_qualified_name

import passes
from passes import Plan, Refusal, RegionCode
from passes.capturing.layouts import level_layouts

from ..regions.region import MomentumRegion
from ..settings import Settings

__all__ = ["original", "rewritten"]

_EXPORT = "torch.export"
_ORIGINAL = "_mnet_fx_original"  # the graph before the rewrite


def rewritten(gm: fx.GraphModule, settings: Settings) -> tuple[fx.GraphModule, Plan]:
    """Rewrite the residual chains of a GraphModule into momentum chains.

    Args:
        gm: from any tracer; left as it is. One that was rewritten before starts over from its original.
        settings: the recurrence, and options of the plan.

    Returns:
        A GraphModule that shares every tensor, in which each region is a submodule without tensors of its own; and the plan of the graph,
        with which changes of layout may have been moved. Submodules are copies, live in the new module.
    """
    net = _twin(original(gm), momentum=True)
    before = copy.deepcopy(net.graph)
    if any("val" in node.meta for node in net.graph.nodes):
        level_layouts(net)
    plan = passes.plan(net, granularity=settings.granularity, min_steps=settings.min_steps, nested=True)
    if plan.regions and (call := passes.state_change(net.graph)) is not None:
        plan = _refused(plan, f"the graph calls {call}, which changes a state of torch's, so its order must stay as it is")
    plan = passes.with_stretches(net, plan)
    if not plan.regions:
        return _twin(original(gm)), plan

    def build_region(code: RegionCode) -> nn.Module:
        region = MomentumRegion(code, settings, net)
        net.add_module(code.region.name, region)
        return region

    net.graph = passes.rewrite(net, plan, build_region).graph_module.graph
    net.__dict__[_ORIGINAL] = before
    return net, plan


def _refused(plan: Plan, explanation: str) -> Plan:
    """The plan that leaves every add as it is."""
    return Plan(plan.residual_adds, (), tuple(Refusal.of("lost_context", add, "", explanation) for add in plan.residual_adds))


def original(gm: fx.GraphModule) -> fx.GraphModule:
    """The GraphModule before it was rewritten, over copies of the modules that share every tensor; `gm` itself if it never was."""
    if not isinstance(gm, _Momentum):
        return gm
    twin = _twin(gm)
    twin.graph = twin.__dict__.pop(_ORIGINAL)
    regions = [(name, child) for name, child in twin.named_children() if isinstance(child, MomentumRegion)]
    for name, region in regions:
        delattr(twin, name)
        if region.velocity is not None and twin._modules.get("initial_velocity") is region.velocity:
            del twin.initial_velocity
    return twin


def _is_check(value: Any) -> bool:
    """True for a function that torch.export made for one exported module."""
    function = getattr(value, "__func__", value)
    return "<locals>" in getattr(function, "__qualname__", "") and str(function.__module__).startswith(_EXPORT)


class _Momentum(fx.GraphModule):
    """A rewritten GraphModule."""

    made_from: type[fx.GraphModule] = fx.GraphModule

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        return _twin(self, momentum=True, memo=memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        checks = {name for name, child in self.named_children() if type(child).__module__.startswith(_EXPORT)}
        state = {name: value for name, value in vars(self).items() if not _is_check(value)} | {"shape_env": None}
        for name in [name for name in state if name.endswith("_hooks") and isinstance(state[name], dict)]:
            state[name] = type(state[name])((key, hook) for key, hook in state[name].items() if not _is_check(hook))
        state["_modules"] = {name: child for name, child in self._modules.items() if name not in checks}
        state |= {name: _listed(state[name], checks) for name in ("_graph", _ORIGINAL)}
        return _empty, (self.made_from, type(self).__name__, True), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        vars(self)[_ORIGINAL] = state[_ORIGINAL].graph()
        self.graph = state["_graph"].graph()


@cache
def _momentum_class(base: Any) -> Any:
    return _Momentum if base is fx.GraphModule else type(base.__name__, (_Momentum, base), {"made_from": base})


def _empty(base: Any, name: str, momentum: bool) -> fx.GraphModule:
    """A GraphModule without contents, of a class of its own with that name, as each has one for its forward."""
    cls = _momentum_class(base) if momentum else base
    made = cls.__new__(cls)
    type(made).__name__ = name
    return made


def _twin(gm: fx.GraphModule, momentum: bool = False, memo: dict[int, Any] | None = None) -> fx.GraphModule:
    """A copy of everything that the instance holds, its graph included.

    Args:
        gm: the GraphModule.
        momentum: whether the copy is a rewritten one.
        memo: of a deepcopy; None for a copy that shares every tensor.
    """
    base = next(cls for cls in type(gm).__mro__ if cls.__qualname__.rpartition(".")[2] != "GraphModuleImpl")
    made = _empty(getattr(base, "made_from", base), type(gm).__name__, momentum)
    if memo is None:
        held = (value for module in gm.modules() for value in vars(module).values() if isinstance(value, Tensor))
        memo = {id(tensor): tensor for tensor in chain(gm.parameters(), gm.buffers(), held)}
    memo[id(gm)] = made
    vars(made).update(copy.deepcopy(vars(gm), memo))
    made.graph = vars(made)["_graph"]
    return made


@dataclass(frozen=True)
class _Name:
    """A function, by its name."""

    name: str


@dataclass(frozen=True)
class _Value:
    """The result of a node, by its position."""

    position: int


@dataclass(frozen=True)
class _Listed:
    """A graph that pickles: without what its capture recorded, but for the paths of the modules that each node is from."""

    nodes: list[tuple[str, str, Any, Any, Any, Any, list[tuple[str, str]]]]
    codegen: Any

    def graph(self) -> fx.Graph:
        graph, made = fx.Graph(), list[fx.Node]()
        for op, name, target, args, kwargs, type_expr, owners in self.nodes:
            found = pkgutil.resolve_name(target.name) if isinstance(target, _Name) else target
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: made[a.position] if isinstance(a, _Value) else a)
            made.append(graph.create_node(op, found, args, kwargs, name, type_expr))
            if owners:
                made[-1].meta["nn_module_stack"] = {key: (path, "") for key, path in owners}
        graph.set_codegen(self.codegen)
        return graph


def _listed(graph: fx.Graph, left_out: set[str]) -> _Listed:
    kept = [node for node in graph.nodes if node.op != "call_module" or node.target not in left_out]
    position: dict[Any, Any] = {node: _Value(i) for i, node in enumerate(kept)}
    nodes: list[Any] = []
    for node in kept:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), position.__getitem__)
        owners = [(key, str(value[0])) for key, value in (node.meta.get("nn_module_stack") or {}).items()]
        nodes.append((node.op, node.name, _named(node.target), args, kwargs, node.type, owners))
    return _Listed(nodes, graph._codegen)


def _named(target: Any) -> Any:
    """A function by its name if that leads back to it; anything else as it is."""
    if isinstance(target, str):
        return target
    is_operation = isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    try:
        name = f"torch.ops.{target}" if is_operation else _get_qualified_name(target)
        return _Name(name) if pkgutil.resolve_name(name) is target else target
    except Exception:
        return target
