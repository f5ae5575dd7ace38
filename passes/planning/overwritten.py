"""What of a chain's the graph overwrites after the chain has run: a rerun of its steps would read the new values.

side, x -> [ x = x + f(x, side) ] ... -> x           side.mul_(2) after the chain: it is given side.clone() instead
x -> [ ... x[t] ... ] -> x[T], x[t]                  x[t].mul_(2) after the chain: x[t].clone() is written to instead
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import torch.fx as fx

from passes.graphs.facts import Facts
from passes.planning.nesting import Piece, nodes_of

__all__ = ["overwritten_sides", "overwritten_streams", "with_attributes_handed"]


def overwritten_sides(piece: Piece, facts: Facts) -> list[fx.Node]:
    """The nodes outside of a piece, attributes of modules included, that it reads and that are overwritten after that.

    Args:
        piece: a chain, all of whose steps run before such a write, or there would be no order for them.
        facts: facts of its graph.
    """
    inside, source = nodes_of(piece), piece[0].source
    first: dict[fx.Node, int] = {}
    for node in sorted(inside, key=facts.index.__getitem__):
        for read in node.all_input_nodes:
            if read not in inside and read is not source:
                first.setdefault(read, facts.index[node])
    return [read for read, when in first.items() if _overwritten(read, when, inside, facts)]


def overwritten_streams(piece: Piece, facts: Facts) -> list[fx.Node]:
    """Those x[t] between the steps of a piece that are overwritten after their steps."""
    inside = nodes_of(piece)
    return [span.source for span in piece[1:] if _overwritten(span.source, facts.index[span.target], inside, facts)]


def _overwritten(node: fx.Node, when: int, inside: Set[fx.Node], facts: Facts) -> bool:
    """Whether a node outside of a piece writes to the memory of that node, later than at a time."""
    return any(
        memory in facts.shares[node]
        for writer, memories in facts.writes.items()
        if writer not in inside and facts.index[writer] > when
        for memory in memories
    )


def with_attributes_handed(pieces: Sequence[Piece], nodes: set[fx.Node]) -> list[Piece]:
    """The pieces, with those of the nodes that are attributes of modules as side inputs."""
    handed = frozenset(node for node in nodes if node.op == "get_attr")
    return [tuple(replace(span, handed=handed) for span in piece) for piece in pieces] if handed else list(pieces)
