"""In which order a graph can run once each region is a single call.

a --> [b c] --> d            units: a, region {b, c}, d
       \\--> e --^            e must run between b and c's reader: it moves behind the region, or there is no order
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import networkx
import torch.fx as fx

from passes.graphs.facts import Facts

__all__ = ["Unit", "schedule"]

Unit = fx.Node | int
"""A node outside all regions, or the index of a region."""


def schedule(
    facts: Facts, regions: Sequence[Set[fx.Node]], copied: Set[fx.Node] = frozenset(), ends: Sequence[fx.Node] = ()
) -> tuple[list[Unit], set[int]]:
    """Order the units of a graph, as near to the order of the graph as their dependencies allow.

    Args:
        facts: facts of the graph.
        regions: disjoint sets of nodes.
        copied: nodes that write in place in the graph but to fresh memory in the region, so that earlier readers need not run before.
        ends: the node that each region stands for, since what it computes for others may come much later; default its last one.

    Returns:
        The units in order, and no regions; or no units, and the regions that have to run both before and after something else.
    """
    unit: dict[fx.Node, Unit] = {node: node for node in facts.nodes}
    for i, nodes in enumerate(regions):
        unit |= dict.fromkeys(nodes, i)
    position = {unit[node]: facts.index[node] for node in facts.nodes}
    position |= {i: facts.index[node] for i, node in enumerate(ends)}
    needs = networkx.DiGraph()
    needs.add_nodes_from(position)
    for node in facts.nodes:
        before = facts.flow[node] if node in copied else facts.order[node]
        needs.add_edges_from((unit[other], unit[node]) for other in before if unit[other] != unit[node])
    try:
        return list(networkx.lexicographical_topological_sort(needs, key=position.__getitem__)), set()
    except networkx.NetworkXUnfeasible:
        cycles = (part for part in networkx.strongly_connected_components(needs) if len(part) > 1)
        return [], {u for part in cycles for u in part if isinstance(u, int)}
