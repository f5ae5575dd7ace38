"""What others need of a first step, before its chain can run: computed outside, from the value that the chain starts with.

a -> a1 = a + f(p(a), q(b)) -> a2 ...        p(a) and q(b) are each inside one chain and read by the other, so neither could run first;
b -> b1 = b + g(p(a), q(b)) -> b2 ...        outside, both are side inputs of both
"""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from passes.graphs.facts import Facts
from passes.planning.nesting import Piece, nodes_of
from passes.planning.rules import check

__all__ = ["hoisted"]


def hoisted(piece: Piece, facts: Facts) -> Piece | None:
    """The piece without what others read of its first step, or None where that cannot be computed outside of it.

    Only for a piece that otherwise would be given up: autograd stores the activations of what is outside.
    """
    first, early = piece[0], _read_by_others(piece, facts)
    ends = {first.target, *(node for found in first.sums for node in (found.add, found.branch))}
    if not early or early & ends or any(node in facts.writes for node in early):
        return None
    rest = replace(first, nodes=tuple(node for node in first.nodes if node not in early))
    return None if check(rest, facts) is not None else (rest, *piece[1:])


def _read_by_others(piece: Piece, facts: Facts) -> set[fx.Node]:
    """Nodes of the first step that are read outside of the piece, and all that these are computed from within it."""
    first, inside = piece[0], nodes_of(piece)
    early: set[fx.Node] = set()
    for node in reversed(first.nodes):
        if node in early or (node is not first.target and facts.users_outside(node, inside)):
            early |= {node} | (set(facts.flow[node]) & set(first.nodes))
    return early
