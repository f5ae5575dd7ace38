"""What it takes to keep the steps of chains, which could be run again."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.fx as fx

from passes.graphs.effects import is_measured, work_of
from passes.graphs.facts import bytes_of, recorded
from passes.graphs.work import FLOPS_PER_BYTE, hint
from passes.regions import Plan, PlannedRegion
from passes.rewriting.segments import Cost, Memory, saved_by

__all__ = ["costs_of_steps", "elements", "largest_step", "saved_by_own"]

_PASSES = 12  # over the bytes of a stream, that a step back takes besides its function


def costs_of_steps(gm: fx.GraphModule, plan: Plan) -> dict[str, list[Cost]]:
    """For each region of a plan that is in no other's step, by name, the costs of its steps, the last one first; as
    far as they are known.

    Args:
        gm: the planned graph, whose nodes' effects have been noted.
        plan: its regions.
    """
    named, memory = {node.name: node for node in gm.graph.nodes}, Memory.of(gm.graph, ())
    reversible = {region.name for region in plan.regions if region.backward == "reversible"}
    outermost = [region for region in plan.regions if not region.within]
    return {region.name: _of_steps(region, named, memory, _inside(plan, region, reversible)) for region in outermost}


def largest_step(gm: fx.GraphModule, plan: Plan) -> int:
    """The most bytes that autograd saves for one step of the reversible regions of a graph."""
    reversible = {region.name for region in plan.regions if region.backward == "reversible"}
    return max((size or 0 for (name, _), size in saved_by_own(gm, plan, reversible).items()), default=0)


def saved_by_own(gm: fx.GraphModule, plan: Plan, reversible: Collection[str]) -> dict[tuple[str, int], int | None]:
    """For each step of some regions, by the region's name and its index, the bytes that autograd saves for it, without what lies in others
    of these regions; None where they are not known.

    Args:
        gm: the planned graph, whose nodes' effects have been noted.
        plan: its regions.
        reversible: names of those that go backwards by themselves.
    """
    named, memory = {node.name: node for node in gm.graph.nodes}, Memory.of(gm.graph, ())
    found: dict[tuple[str, int], int | None] = {}
    for region in plan.regions:
        if region.name in reversible:
            hidden = _inside(plan, region, reversible)
            for t, step in enumerate(region.steps):
                nodes = [named[name] for name in step.nodes if name not in hidden]
                found[region.name, t] = sum(saved_by(nodes, memory).values()) if is_measured(nodes) else None
    return found


def elements(gm: fx.GraphModule, region: PlannedRegion) -> int | None:
    """Of the stream of a region, with sizes as they were at the capture; None where they are not known."""
    value = recorded(next(node for node in gm.graph.nodes if node.name == region.steps[0].source))
    count = value.numel() if isinstance(value, torch.Tensor) else None
    return hint(count) if isinstance(count, torch.SymInt) else count


def _inside(plan: Plan, region: PlannedRegion, reversible: Collection[str]) -> set[str]:
    """Names of the nodes of some regions that lie within the steps of one."""
    within = {other.name: other.within for other in plan.regions}

    def lies_within(name: str) -> bool:
        return within[name] == region.name or (within[name] != "" and lies_within(within[name]))

    inner = [other for other in plan.regions if other.name in reversible and lies_within(other.name)]
    return {name for other in inner for step in other.steps for name in step.nodes}


def _of_steps(region: PlannedRegion, named: dict[str, fx.Node], memory: Memory, hidden: set[str]) -> list[Cost]:
    found, known = list[Cost](), set[int]()
    for step in reversed(region.steps):
        nodes = [named[name] for name in step.nodes]
        if not is_measured(nodes):
            break
        sizes = saved_by((node for node in nodes if node.name not in hidden), memory)
        size = sum(size for number, size in sizes.items() if number not in known)
        known |= sizes.keys()
        found.append(Cost(size, sum(map(work_of, nodes)) + _PASSES * FLOPS_PER_BYTE * (bytes_of(named[step.target]) or 0)))
    return found
