"""What a step gives to others is computed inside the step, so that autograd does not keep what it is computed from.

before    step t: h = f(x);  x' = x + r(h)  -- h -->  s = k(h);  skip = skip + s        k keeps h, for each t
after     step t: h = f(x);  s = k(h);  x' = x + r(h)  -- s -->  skip = skip + s        a rerun of the step makes h and s again

A node moves in if the step has all that it needs: values of the step, its stream, its side inputs, inputs of the graph, and what is
computed from parameters alone. So nothing that has to run after the chain comes to stand before it. A node stays outside if it writes or
lies in memory that is written to, if it is a sum of a chain, and if side computations would become heavier than the step itself, since a
rerun costs them again: a whole decoder on a hidden state is left where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

import torch
import torch.fx as fx
from torch import Tensor

from passes.graphs.facts import Facts, bytes_of, recorded, shape_of
from passes.graphs.ops import MIXING
from passes.graphs.writes import is_hook
from passes.planning.nesting import Piece, nodes_of
from passes.planning.spans import Span, takes_from_list

__all__ = ["with_side_outputs"]

_KEEPING = MIXING | {"norm", "activation", "elementwise", "scale"}  # kinds whose gradients need what they are computed from
_LISTS = frozenset({"chunk", "split", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "meshgrid", "broadcast_tensors"})
_LARGEST = 4  # times the bytes of the stream


def with_side_outputs(pieces: Sequence[Piece], facts: Facts, sums: Iterable[fx.Node]) -> list[Piece]:
    """The pieces, whose steps compute what they can of what others make of their insides.

    Args:
        pieces: chains that lie in no other, in the order of the graph.
        facts: facts of its graph.
        sums: residual adds, which do not move.
    """
    taken = {node for piece in pieces for node in nodes_of(piece)} | set(sums)
    written = {memory for memories in facts.writes.values() for memory in memories}
    taken |= set(facts.nodes) - facts.graded()  # parameters that lead nowhere are to get no gradients, not zeros
    made: list[Piece] = []
    for piece in pieces:
        spans: list[Span] = []
        for t, span in enumerate(piece):
            found = _Side(span, t > 0, facts, taken, written).nodes()
            taken |= found
            spans.append(replace(span, nodes=tuple(sorted({*span.nodes, *found}, key=facts.index.__getitem__))) if found else span)
        made.append(tuple(spans))
    return made


@dataclass
class _Side:
    """The side computations of one step.

    Attributes:
        span: the step.
        later: whether it is not the first step, whose stream others may need before the chain.
        facts: facts of the graph.
        taken: nodes that do not move.
        written: memory that anything writes to.
    """

    span: Span
    later: bool
    facts: Facts
    taken: set[fx.Node]
    written: set[fx.Node]

    def nodes(self) -> set[fx.Node]:
        """All that moves in: what descends from the step's inside, in graph order, and what that needs."""
        own = {node for node in self.span.nodes if node is not self.span.target}
        known = own | {self.span.source, *self.span.inputs()}
        found, left = set[fx.Node](), self._weight(self.span.nodes)
        heap = [self.facts.index[user] for node in (own | {self.span.source} if self.later else own) for user in node.users]
        heapify(heap)
        while heap:
            node = self.facts.nodes[heappop(heap)]
            if node in known or (needed := self._needed(node, known)) is None or self._weight(needed) > left:
                continue
            left -= self._weight(needed)
            found |= needed
            known |= needed
            for user in node.users:
                heappush(heap, self.facts.index[user])
        return self._useful(self._tensors(found))

    def _needed(self, node: fx.Node, known: set[fx.Node]) -> set[fx.Node] | None:
        """The node and what it needs besides what is known, computed from parameters or shapes alone; None if it cannot move."""
        needed, stack = {node}, [node]
        while stack:
            node = stack.pop()
            if not self._may_move(node):
                return None
            for source in self.facts.order[node]:
                if source in known or source in needed or source.op in ("get_attr", "placeholder"):
                    continue
                if source in self.facts.varies:
                    return None
                needed.add(source)
                stack.append(source)
        return needed

    def _may_move(self, node: fx.Node) -> bool:
        facts, target = self.facts, node.target
        if node in self.taken or node in facts.unknown or node in facts.writes or is_hook(node):
            return False
        calls = node.op in ("call_function", "call_method") or type(facts.modules.get(str(target))).__module__.startswith("torch.nn")
        if not calls or isinstance(target, torch._ops.HigherOrderOperator) or -1 in (shape_of(node) or ()):
            return False
        size, stream = bytes_of(node), bytes_of(self.span.source)
        if size is not None and stream is not None and size > _LARGEST * stream:
            return False
        return self.written.isdisjoint(facts.shares[node])

    def _weight(self, nodes: Iterable[fx.Node]) -> int:
        return sum(self.facts.kinds[node] in MIXING for node in nodes)

    def _tensors(self, found: set[fx.Node]) -> set[fx.Node]:
        """Without the sizes and lists that others read, and what is computed from these: what leaves a step is a tensor."""
        inside, gone = found.union(self.span.nodes), set[fx.Node]()
        for node in sorted(found, key=self.facts.index.__getitem__):
            gives = self.facts.users_outside(node, inside) or any(user in gone for user in node.users)
            if (gives and not _is_tensor(node, self.facts)) or not gone.isdisjoint(node.all_input_nodes):
                gone.add(node)
        return self._tensors(found - gone) if gone else found

    def _useful(self, found: set[fx.Node]) -> set[fx.Node]:
        """Without what neither leads to nor comes from an operation whose gradient needs what it is computed from, nor is of a list."""
        useful: set[fx.Node] = set()
        in_order = sorted(found, key=self.facts.index.__getitem__)
        for node in in_order:
            if self.facts.kinds[node] in _KEEPING or takes_from_list(node) or not useful.isdisjoint(node.all_input_nodes):
                useful.add(node)
        for node in reversed(in_order):
            if any(user in useful for user in node.users):
                useful.add(node)
        return useful


def _is_tensor(node: fx.Node, facts: Facts) -> bool:
    value = recorded(node)
    if value is not None:
        return isinstance(value, Tensor) or hasattr(value, "stride")  # or the record of one
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return facts.kinds[node] != "shape" and name not in _LISTS
