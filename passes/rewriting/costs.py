"""What it takes to keep the steps of chains, which could be run again."""

from __future__ import annotations

import torch.fx as fx

from passes.graphs.effects import is_measured, work_of
from passes.graphs.facts import bytes_of
from passes.graphs.work import FLOPS_PER_BYTE
from passes.regions import Plan, PlannedRegion
from passes.rewriting.segments import Cost, Memory, saved_by

__all__ = ["costs_of_steps"]

_PASSES = 12  # over the bytes of a stream, that a step back takes besides its function


def costs_of_steps(gm: fx.GraphModule, plan: Plan) -> dict[str, list[Cost]]:
    """For each region of a plan that is in no other's step, by name, the costs of its steps, the last one first; as
    far as they are known.

    Args:
        gm: the planned graph, whose nodes' effects have been noted.
        plan: its regions.
    """
    named, memory = {node.name: node for node in gm.graph.nodes}, Memory.of(gm.graph, ())
    return {region.name: _of_steps(region, named, memory) for region in plan.regions if not region.within}


def _of_steps(region: PlannedRegion, named: dict[str, fx.Node], memory: Memory) -> list[Cost]:
    found, known = list[Cost](), set[int]()
    for step in reversed(region.steps):
        nodes = [named[name] for name in step.nodes]
        if not is_measured(nodes):
            break
        sizes = saved_by(nodes, memory)
        size = sum(size for number, size in sizes.items() if number not in known)
        known |= sizes.keys()
        found.append(Cost(size, sum(map(work_of, nodes)) + _PASSES * FLOPS_PER_BYTE * (bytes_of(named[step.target]) or 0)))
    return found
