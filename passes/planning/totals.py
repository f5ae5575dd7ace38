"""Running sums of what the steps of a chain give besides the stream: the region forms them as it goes, so that no term has to wait.

before    region --> s[0], s[1], ..., s[T-1] --> s[0] + s[1] --> ... + s[2] --> ...      all T of them are there at once
after     region: s[0] + s[1] after step 1, ... + s[2] after step 2, ... --> the last sum

These are the additions of the graph, of the same values in the same order, so their bits are those of the graph.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch.fx as fx

from passes.graphs.facts import Facts, dtype_of, shape_of
from passes.graphs.ops import is_add, operands
from passes.planning.nesting import Piece, nodes_of
from passes.regions import Total

__all__ = ["totals_of"]


def totals_of(piece: Piece, facts: Facts, taken: Container[fx.Node]) -> tuple[Total, ...]:
    """The sums that a region can form while it runs.

    Each of their terms is an output of a step that nothing else reads, in the order of the steps, and nothing but the next sum reads a sum
    before the last. What the first one begins with may be from before the region. A sum in place is one out of place here.

    Args:
        piece: the steps of the region.
        facts: facts of its graph.
        taken: nodes that do not move: residual adds, and those of regions.
    """
    step_of = {node: t for t, span in enumerate(piece) for node in span.nodes if node is not span.target and len(node.users) == 1}
    known = _descendants(nodes_of(piece), facts) - step_of.keys()
    sums: dict[fx.Node, _Sum] = {}  # by the last node so far
    for node in facts.nodes:
        if node in taken or not _is_plain(node, facts):
            continue
        left, right = operands(node)
        for total, term, is_left in ((left, right, True), (right, left, False)):
            so_far = sums.get(total, _Sum(total, step_of.get(total, -1)))
            is_later = so_far.step <= step_of.get(term, -2)
            if is_later and (total not in known if not so_far.nodes else len(total.users) == 1):
                sums.pop(total, None)
                sums[node] = so_far.and_term(term, step_of[term], is_left, node)
                break
    return tuple(found.named() for found in sums.values() if found.is_worth_it() and found.is_unseen(facts))


@dataclass(frozen=True)
class _Sum:
    """A running sum as far as it has been followed: what it begins with, its last step, its terms as in `Total`, and its nodes."""

    first: fx.Node | float
    step: int
    terms: tuple[tuple[int, fx.Node, bool], ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    begins: int | None = None

    def and_term(self, term: fx.Node, step: int, is_left: bool, node: fx.Node) -> _Sum:
        begins = self.step if self.begins is None else self.begins
        return _Sum(self.first, step, (*self.terms, (step, term, is_left)), (*self.nodes, node), begins)

    def is_worth_it(self) -> bool:
        """Whether two values of steps or more go into it."""
        return len(self.terms) + (self.begins != -1) > 1

    def is_unseen(self, facts: Facts) -> bool:
        """Whether only its own nodes, and what reads the last, see the memory that its sums in place write to."""
        written = {memory for node in self.nodes for memory in facts.writes.get(node, ())}
        own = {self.first, *self.nodes, *(term for _, term, _ in self.terms)}
        last = facts.index[self.nodes[-1]]
        if written and isinstance(self.first, fx.Node) and len(self.first.users) > 1:
            return False  # another name of it reads what is written
        return not any(
            facts.kinds[node] == "input" or (node not in own and facts.index[node] < last)
            for node in facts.nodes
            if written and not written.isdisjoint(facts.shares[node])
        )

    def named(self) -> Total:
        terms = tuple((step, term.name, is_left) for step, term, is_left in self.terms)
        first = self.first.name if isinstance(self.first, fx.Node) else self.first
        return Total(first, -1 if self.begins is None else self.begins, terms, tuple(node.name for node in self.nodes))


def _is_plain(node: fx.Node, facts: Facts) -> bool:
    """Whether a node is the sum of two values, or of one and a number; and the same out of place if it is in place."""
    if not is_add(node) or node.kwargs.get("alpha", 1) != 1 or len(operands(node)) != 2:
        return False
    left, right = operands(node)
    if not all(isinstance(term, fx.Node) for term in (left, right)):
        return node not in facts.writes and all(isinstance(term, (fx.Node, int, float)) for term in (left, right))
    shape, dtype = shape_of(left), dtype_of(left)
    alike = None not in (shape, dtype) and -1 not in (shape or ()) and (shape, dtype) == (shape_of(right), dtype_of(right))
    return alike or node not in facts.writes


def _descendants(nodes: Iterable[fx.Node], facts: Facts) -> set[fx.Node]:
    """The nodes, and all that is computed from them."""
    found = set(nodes)
    for node in facts.nodes:
        if not found.isdisjoint(facts.flow[node]):
            found.add(node)
    return found
