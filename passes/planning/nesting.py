"""Chains within chains: which pieces can become regions together, and which of them lies in a step of which.

outer    x[0] -> [ norm -> (y[0] -> + -> + ) -> conv ] -> + = x[1] -> [ norm -> (y[0] -> + -> + ) -> conv ] -> + = x[2]
                           inner, in one step

An inner chain within one step becomes a region of that step's own code. One that runs across steps cannot: of the two, that with more adds
stays. An outer chain goes too if the chains inside of it are so long that they save more memory than it would.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch.fx as fx

from passes.planning.spans import Span

__all__ = ["Nest", "Piece", "adds_of", "nodes_of"]

Piece = tuple[Span, ...]


def adds_of(piece: Piece) -> list[fx.Node]:
    return [found.add for span in piece for found in span.sums]


def nodes_of(piece: Piece) -> set[fx.Node]:
    return {node for span in piece for node in span.nodes}


@dataclass
class Nest:
    """Which pieces are kept, and where.

    Attributes:
        pieces: all pieces.
        within: whether a piece may lie in a step of another.
        parent: for each kept piece the kept piece that it lies in, innermost, or None.
        lost: for each other piece why it goes.
    """

    pieces: list[Piece]
    within: bool
    parent: dict[int, int | None] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: list[Piece], within: bool) -> Nest:
        """Arrange pieces, the small ones first, in time linear in their size for each level of nesting."""
        nest = cls(pieces, within)
        owner: dict[fx.Node, int] = {}  # the outermost piece so far
        for i in sorted(range(len(pieces)), key=lambda i: sum(len(span.nodes) for span in pieces[i])):
            nodes, gone = nodes_of(pieces[i]), len(nest.lost)
            if nest._place(i, {owner[node] for node in nodes if node in owner}):
                owner = {node: j for node, j in owner.items() if j in nest.parent} if len(nest.lost) > gone else owner
                owner |= dict.fromkeys(nodes, i)
        return nest

    def levels(self) -> list[list[int]]:
        """The kept pieces that lie in no other, those that lie in one, and so on."""
        found: list[list[int]] = []
        above: set[int | None] = {None}
        while level := [i for i, parent in self.parent.items() if parent in above]:
            found.append(level)
            above = set(level)
        return found

    def drop(self, i: int) -> None:
        """Take a piece out; what lies in it moves to where it was."""
        above = self.parent.pop(i)
        self.parent |= {j: above for j, parent in self.parent.items() if parent == i}

    def shorten(self, i: int, part: Piece) -> None:
        """Leave of a piece only a part; what lies in the rest moves to where the piece is."""
        self.pieces[i] = part
        kept = nodes_of(part)
        self.parent |= {j: self.parent[i] for j, parent in self.parent.items() if parent == i and not nodes_of(self.pieces[j]) <= kept}

    def _place(self, i: int, met: set[int]) -> bool:
        """Keep piece i, together with or in place of those that it shares nodes with; or not."""
        inside, across, adds = self._sorted(i, met)
        most = max(adds.values(), default=0)
        if len(adds_of(self.pieces[i])) < most:
            self.lost[i] = f"around regions that rewrite {most} adds"
            return False
        for j in across:
            self._lose(j, f"inside a step of the chain that ends in %{adds_of(self.pieces[i])[-1].name}")
        self.parent |= {i: None} | dict.fromkeys(inside, i)
        return True

    def _lose(self, i: int, why: str) -> None:
        """Take out a piece and what lies in it."""
        for j in [j for j, parent in self.parent.items() if parent == i]:
            self._lose(j, why)
        del self.parent[i]
        self.lost[i] = why

    def _sorted(self, i: int, met: set[int]) -> tuple[list[int], list[int], Counter[int]]:
        """Of the pieces met, those within one step of piece i and those that are not; and how many adds lie in each step, or in none."""
        step_of = {node: t for t, span in enumerate(self.pieces[i]) for node in span.nodes}
        inside: list[int] = []
        across: list[int] = []
        adds: Counter[int] = Counter()
        for j in sorted(met):
            steps = {step_of.get(node, -1) for node in nodes_of(self.pieces[j])}
            step = steps.pop() if self.within and len(steps) == 1 else -1
            (across if step < 0 else inside).append(j)
            adds[step] += len(adds_of(self.pieces[j]))
        return inside, across, adds
