"""Plan -> new graph, in which each region is one call.

before    x0 -> n1 -> conv -> add -> n2 -> conv_1 -> add_1 -> head
after     x0 -> momentum_region_0 --------------------------> head

step      body(self, x, *sides): n = self.m0(x); y = self.m1(n); return (y,)      shared by all steps of the same structure
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn

from passes.body import region_code
from passes.facts import Facts
from passes.regions import Plan, PlannedRegion, RegionCode
from passes.schedule import schedule
from passes.steps import copied_adds
from passes.verify import verify_plan, verify_rewrite

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
        build_region: makes the module of a region, see `RegionCode`; called in the order of the regions.

    Returns:
        A new graph module over the same submodules and parameters; `gm` itself if the plan has no regions.

    Raises:
        InvariantError: if the plan is not a plan of this graph.
    """
    verify_plan(gm, plan)
    if not plan.regions:
        return PassResult(gm, False)
    facts = Facts.of(gm)
    bodies: dict[Any, fx.Graph] = {}
    codes = [region_code(region, facts, bodies) for region in plan.regions]
    modules = {code.region.name: build_region(code) for code in codes}
    graph = _Rewriter(gm, facts, codes).graph()
    result = fx.GraphModule(_attributes(gm, graph, modules), graph, class_name=gm._get_name())
    result.training = gm.training
    result.meta.update(gm.meta)
    verify_rewrite(gm, result, plan)
    return PassResult(result, True)


def _attributes(gm: fx.GraphModule, graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, Any]:
    """What the new graph refers to, by target."""
    targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return {target: modules[target] if target in modules else operator.attrgetter(target)(gm) for target in targets}


class _Rewriter:
    """Copies a graph unit by unit, in an order that suits the regions."""

    def __init__(self, gm: fx.GraphModule, facts: Facts, codes: list[RegionCode]) -> None:
        self.facts, self.codes = facts, codes
        self.named = {node.name: node for node in facts.nodes}
        self.inside = [{self.named[name] for step in code.region.steps for name in step.nodes} for code in codes]
        self.new = fx.Graph(tracer_cls=gm.graph._tracer_cls)
        self.new.set_codegen(gm.graph._codegen)
        self.values: dict[fx.Node, fx.Node] = {}

    def graph(self) -> fx.Graph:
        steps = [step for code in self.codes for step in code.region.steps]
        copied = {
            node for step in steps for node in copied_adds(self.named[step.source], map(self.named.__getitem__, step.nodes), self.facts)
        }
        order, _ = schedule(self.facts, self.inside, copied)
        gone: set[fx.Node] = set().union(*self.inside)
        for unit in order:
            if isinstance(unit, int):
                self._call(self.codes[unit].region)
            elif not (unit.op == "get_attr" and unit.users and all(user in gone for user in unit.users)):
                self.values[unit] = self.new.node_copy(unit, self.values.__getitem__)
        return self.new

    def _call(self, region: PlannedRegion) -> None:
        """Emit the call of a region, and one getitem for each value that it returns."""
        args = tuple(self.values[self.named[name]] for name in (region.steps[0].source, *region.sides))
        last = self.named[region.steps[-1].target]
        call = self.new.create_node("call_module", region.name, args, name=region.name)
        outputs = [last, *(self.named[region.steps[t].source] for t in region.escapes)]
        outputs += [self.named[name] for step in region.steps for name in step.extras]
        if len(outputs) == 1:
            self.values[last] = call
            call.meta = dict(last.meta)
            return
        for i, old in enumerate(outputs):
            new = self.new.create_node("call_function", operator.getitem, (call, i), name=old.name)
            new.meta = dict(old.meta)
            self.values[old] = new
