"""Plan -> new graph, in which each region is one call.

before    x0 -> n1 -> conv -> add -> n2 -> conv_1 -> add_1 -> head
after     x0 -> momentum_region_0 --------------------------> head

step      body(self, x, *sides): n = self.m0(x); y = self.m1(n); return (y,)      shared by all steps of the same structure
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn

from passes.graphs.effects import forget_effect
from passes.graphs.facts import Facts
from passes.graphs.schedule import schedule
from passes.regions import Plan, PlannedRegion, RegionCode
from passes.rewriting.invariants import verify_plan, verify_rewrite
from passes.rewriting.step_code import call_region, outputs_of, region_code

__all__ = ["PassResult", "rewrite"]


@dataclass(frozen=True)
class PassResult:
    """A graph module, and whether it differs from the one given."""

    graph_module: fx.GraphModule
    modified: bool


def rewrite(gm: fx.GraphModule, plan: Plan, build_region: Callable[[RegionCode], nn.Module]) -> PassResult:
    """Replace each region of a plan by one call of the module that `build_region` makes of its code.

    Args:
        gm: the graph that was planned; neither it nor its graph is changed.
        plan: the plan of this graph.
        build_region: makes the module of a region, see `RegionCode`; called in the order of the regions, for those within others first.

    Returns:
        A new graph module over the same submodules and parameters; `gm` itself if the plan has no regions.

    Raises:
        InvariantError: if the plan is not a plan of this graph.
    """
    verify_plan(gm, plan)
    if not plan.regions:
        return PassResult(gm, False)
    facts = Facts.of(gm)
    modules = {code.region.name: build_region(code) for code in _codes(plan, facts)}
    graph = _Rewriter(gm, facts, [region for region in plan.regions if not region.within]).graph()
    result = fx.GraphModule(_attributes(gm, graph, modules), graph, class_name=gm._get_name())
    result.training = gm.training
    result.meta.update(gm.meta)
    verify_rewrite(gm, result, plan)
    return PassResult(result, True)


def _attributes(gm: fx.GraphModule, graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """What the new graph refers to, by target."""
    targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return {target: modules[target] if target in modules else operator.attrgetter(target)(gm) for target in targets}


def _codes(plan: Plan, facts: Facts) -> list[RegionCode]:
    """The code of all regions, of those within others first."""
    bodies: dict[Any, fx.Graph] = {}
    levels = [[region for region in plan.regions if not region.within]]
    while levels[-1]:
        names = {region.name for region in levels[-1]}
        levels.append([region for region in plan.regions if region.within in names])
    codes: list[RegionCode] = []
    for level, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        inner: dict[str, list[PlannedRegion]] = {}
        for region in below:
            inner.setdefault(region.within, []).append(region)
        position = {unit.name: i for i, unit in enumerate(_order(below, facts))} if below else {}
        codes += [region_code(region, facts, bodies, inner.get(region.name, ()), position) for region in level]
    return codes


def _order(regions: Sequence[PlannedRegion], facts: Facts) -> list[fx.Node | PlannedRegion]:
    """The nodes outside of some disjoint regions, and these, in an order in which the graph can run."""
    named = facts.named
    steps = [(named[step.source], [named[name] for name in step.nodes]) for region in regions for step in region.steps]
    inside, ends = [{named[name] for name in region.nodes} for region in regions], [named[region.steps[-1].target] for region in regions]
    order, _ = schedule(facts, inside, {node for source, nodes in steps for node in facts.copied_adds(source, nodes)}, ends)
    return [regions[unit] if isinstance(unit, int) else unit for unit in order]


class _Rewriter:
    """Copies a graph unit by unit, in an order that suits the regions."""

    def __init__(self, gm: fx.GraphModule, facts: Facts, regions: list[PlannedRegion]) -> None:
        self.facts, self.regions, self.named = facts, regions, facts.named
        self.new = fx.Graph(tracer_cls=gm.graph._tracer_cls)
        self.new.set_codegen(gm.graph._codegen)
        self.values: dict[fx.Node, fx.Node] = {}

    def graph(self) -> fx.Graph:
        gone = {self.named[name] for region in self.regions for name in region.nodes}
        handed = {self.named[name] for region in self.regions for name in region.sides}
        for unit in _order(self.regions, self.facts):
            if isinstance(unit, PlannedRegion):
                self._call(unit)
            elif not (unit.op == "get_attr" and unit.users and all(user in gone for user in unit.users)) or unit in handed:
                self.values[unit] = self.new.node_copy(unit, self.values.__getitem__)
        return self.new

    def _call(self, region: PlannedRegion) -> None:
        copies: dict[Any, fx.Node] = {}
        sides = [self._copy(name, copies) if name in region.copied else self.values[self.named[name]] for name in region.sides]
        args = (self.values[self.named[region.steps[0].source]], *sides)
        values = call_region(self.new, region.name, region, args, self.named)
        for old, new in zip(outputs_of(region, self.named), values, strict=True):
            self.values[old] = new
            if old.name in region.copied:
                self.values[old] = self._copy(old.name, copies)

    def _copy(self, name: str, copies: dict[Any, fx.Node]) -> fx.Node:
        """A copy of a value, made now; of an attribute that several nodes read, one copy."""
        old = self.named[name]
        key = old.target if old.op == "get_attr" else old
        if key not in copies:
            copies[key] = self.new.call_method("clone", (self.values[old],))
            copies[key].meta = dict(old.meta)
            forget_effect(copies[key])
        return copies[key]
