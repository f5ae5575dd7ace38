"""Which side inputs of a chain the graph overwrites after the chain has read them: a rerun of its steps would read the new values.

side, x -> [ x = x + f(x, side) ] ... -> x           side.mul_(2) after the chain: it is given side.clone() instead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.fx as fx

from passes.facts import Facts
from passes.nesting import Piece, nodes_of

__all__ = ["overwritten_sides", "with_attributes_handed"]


def overwritten_sides(piece: Piece, facts: Facts) -> list[fx.Node]:
    """The nodes outside of a piece, attributes of modules included, that it reads and that are overwritten after that.

    Args:
        piece: a chain, all of whose steps run before such a write, or there would be no order for them.
        facts: facts of its graph.
    """
    if not facts.writes:
        return []
    inside, source = nodes_of(piece), piece[0].source
    first: dict[fx.Node, int] = {}
    for node in sorted(inside, key=facts.index.__getitem__):
        for read in node.all_input_nodes:
            if read not in inside and read is not source:
                first.setdefault(read, facts.index[node])
    writes = [(facts.index[node], memory) for node, memories in facts.writes.items() if node not in inside for memory in memories]
    return [read for read, when in first.items() if any(i > when and memory in facts.shares[read] for i, memory in writes)]


def with_attributes_handed(pieces: Sequence[Piece], nodes: set[fx.Node]) -> list[Piece]:
    """The pieces, with those of the nodes that are attributes of modules as side inputs."""
    handed = frozenset(node for node in nodes if node.op == "get_attr")
    return [tuple(replace(span, handed=handed) for span in piece) for piece in pieces] if handed else list(pieces)
