"""In which order a graph can run once each region is a single call.

a --> [b c] --> d            units: a, region {b, c}, d
       \\--> e --^            e must run between b and c's reader: it moves behind the region, or there is no order
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence, Set
from itertools import count

import torch.fx as fx

from passes.facts import Facts

__all__ = ["Unit", "schedule"]

Unit = fx.Node | int
"""A node outside all regions, or the index of a region."""


def schedule(facts: Facts, regions: Sequence[Set[fx.Node]], copied: Set[fx.Node] = frozenset()) -> tuple[list[Unit], set[int]]:
    """Order the units of a graph, as near to the order of the graph as their dependencies allow; a region stands for its last node.

    Args:
        facts: facts of the graph.
        regions: disjoint sets of nodes.
        copied: nodes that write in place in the graph but to fresh memory in the region, so that earlier readers need not run before.

    Returns:
        The units in order, and the regions that have no place in it because something must run both after and before them.
    """
    unit: dict[fx.Node, Unit] = {node: node for node in facts.nodes}
    for i, nodes in enumerate(regions):
        unit |= dict.fromkeys(nodes, i)
    position: dict[Unit, int] = {unit[node]: facts.index[node] for node in facts.nodes}
    after: dict[Unit, set[Unit]] = {u: set() for u in position}
    missing: dict[Unit, int] = dict.fromkeys(position, 0)
    for node in facts.nodes:
        for before in facts.flow[node] if node in copied else facts.order[node]:
            if unit[before] != unit[node] and unit[node] not in after[unit[before]]:
                after[unit[before]].add(unit[node])
                missing[unit[node]] += 1
    order = _in_order(position, after, missing)
    return order, {u for u in _on_cycles(set(position) - set(order), after) if isinstance(u, int)}


def _in_order(position: dict[Unit, int], after: dict[Unit, set[Unit]], missing: dict[Unit, int]) -> list[Unit]:
    """Topological order that takes the earliest position first; what lies on or behind a cycle is left out."""
    tie = count()
    ready = [(position[u], next(tie), u) for u, number in missing.items() if number == 0]
    heapq.heapify(ready)
    order: list[Unit] = []
    while ready:
        _, _, done = heapq.heappop(ready)
        order.append(done)
        for u in after[done]:
            missing[u] -= 1
            if missing[u] == 0:
                heapq.heappush(ready, (position[u], next(tie), u))
    return order


def _on_cycles(stuck: set[Unit], after: dict[Unit, set[Unit]]) -> set[Unit]:
    """What is left of the stuck units without those that merely wait for a cycle."""
    left = set(stuck)
    waits = {u: sum(v in stuck for v in after[u]) for u in stuck}
    before: dict[Unit, list[Unit]] = {u: [] for u in stuck}
    for u in stuck:
        for v in after[u] & stuck:
            before[v].append(u)
    ends = [u for u, number in waits.items() if number == 0]
    while ends:
        u = ends.pop()
        left.discard(u)
        for v in before[u]:
            waits[v] -= 1
            if waits[v] == 0:
                ends.append(v)
    return left
