"""Which inputs or streams of a chain the graph overwrites after the chain has run: a rerun of its steps would read the new values.

side, x -> [ x = x + f(x, side) ] ... -> x           side.mul_(2) after the chain: it is given side.clone() instead
x -> [ ... x[t] ... ] -> x[T], x[t]                  x[t].mul_(2) after the chain: x[t].clone() is written to instead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.fx as fx

from passes.graphs.facts import Facts
from passes.planning.nesting import Piece, nodes_of

__all__ = ["overwritten", "with_attributes_handed"]


def overwritten(piece: Piece, facts: Facts) -> list[fx.Node]:
    """What something outside of a piece overwrites after the piece has read it, in time linear in the size of the graph.

    Args:
        piece: a chain, all of whose steps run before such a write, or there would be no order for them.
        facts: facts of its graph.

    Returns:
        Nodes outside that it reads, attributes of modules included; then those x[t] between its steps.
    """
    inside, source = nodes_of(piece), piece[0].source
    read: dict[fx.Node, int] = {}  # since when
    for node in sorted(inside, key=facts.index.__getitem__):
        for side in node.all_input_nodes:
            if side not in inside and side is not source:
                read.setdefault(side, facts.index[node])
    read |= {span.source: facts.index[span.target] for span in piece[1:]}
    last = {memory: facts.index[node] for node, memories in facts.writes.items() if node not in inside for memory in memories}
    return [node for node, when in read.items() if any(last.get(memory, -1) > when for memory in facts.shares[node])]


def with_attributes_handed(pieces: Sequence[Piece], nodes: set[fx.Node]) -> list[Piece]:
    """The pieces, with those of the nodes that are attributes of modules as side inputs."""
    handed = frozenset(node for node in nodes if node.op == "get_attr")
    return [tuple(replace(span, handed=handed) for span in piece) for piece in pieces] if handed else list(pieces)
