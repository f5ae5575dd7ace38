"""Links: what may stand between a residual sum s and the skip of the next one.

relu(s), norm(s), s * 0.5                           operations on one value, one after the other
s / s.square().mean().sqrt(), norm(s.mT).mT         single operations that branch, or between changes of layout
s * mask, s.masked_fill(mask, 0), s + positions     with side inputs, which no residual sum goes into
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

import torch.fx as fx

from passes.graphs.facts import Facts, shape_of
from passes.graphs.ops import LINKS, operands, word_of

__all__ = ["Link", "link_of", "made_of", "tail_of"]

Link = tuple[fx.Node, ...]
_WIDE = LINKS | {"scale", "add", "elementwise", "reduce", "layout"}
_WIDEST = 40  # most nodes of a link that branches


def made_of(sums: Collection[fx.Node], facts: Facts) -> Set[fx.Node]:
    """The nodes whose values depend on a residual sum, the sums included."""
    found: set[fx.Node] = set()
    for node in facts.nodes:
        if node in sums or (node in facts.varies and not found.isdisjoint(facts.flow[node])):
            found.add(node)
    return found


def link_of(start: fx.Node, sums: Collection[fx.Node], descended: Set[fx.Node], facts: Facts) -> tuple[fx.Node, Link] | None:
    """Follow a skip back to a residual sum.

    Args:
        start: the skip.
        sums: the residual sums.
        descended: what `made_of` finds for them.
        facts: facts of the graph.

    Returns:
        The sum and the nodes between it and the skip, the skip included, in graph order; None if the skip starts a chain.
    """
    path: list[fx.Node] = []
    node = start
    while node not in sums:
        if not _is_plain(node, facts):
            return _wide_link(start, sums, descended, facts)
        path.append(node)
        node = next(source for source in facts.flow[node] if source in facts.varies)
    return node, tuple(reversed(path))


def _is_plain(node: fx.Node, facts: Facts) -> bool:
    """True for an operation on one varying value that keeps its shape, and through which gradients pass."""
    if word_of(node.target) == "detach":  # gradients end there
        return False
    scales = facts.kinds[node] == "scale" and len(node.all_input_nodes) == 1
    varying = {source for source in facts.flow[node] if source in facts.varies}
    if len(varying) != 1 or (not scales and varying != {(operands(node) or (None,))[0]}):
        return False
    return facts.kinds[node] in LINKS or scales


def _wide_link(start: fx.Node, sums: Collection[fx.Node], descended: Set[fx.Node], facts: Facts) -> tuple[fx.Node, Link] | None:
    """A link that branches or reads side inputs.

    Of residual sums the skip must be computed from one alone, without mixing, and have its shape; so only where shapes are recorded.
    """
    seen, stack, found = {start}, [start], set[fx.Node]()
    while stack:
        node = stack.pop()
        if facts.kinds[node] not in _WIDE or shape_of(node) is None or len(seen) > _WIDEST or word_of(node.target) == "detach":
            return None
        for source in facts.flow[node]:
            if source in sums:
                found.add(source)
            elif source in descended and source not in seen:
                seen.add(source)
                stack.append(source)
    if len(found) != 1 or shape_of(end := found.pop()) != shape_of(start):
        return None
    memory = {facts.base[node] for node in (end, *seen)}
    if any(not memory.issuperset(facts.writes.get(node, ())) for node in seen):  # such as buffers
        return None
    return end, tuple(sorted(seen, key=facts.index.__getitem__))


def tail_of(end: fx.Node, links: Sequence[Link], descended: Set[fx.Node], facts: Facts) -> Link:
    """What follows the last sum of a chain, where every link of the chain has the same operations and they follow here too."""
    kinds = {tuple(facts.kinds[node] for node in link) for link in links}
    node, found = end, list[fx.Node]()
    for kind in kinds.pop() if len(kinds) == 1 else ():
        following = next((user for user in node.users if facts.kinds[user] == kind and _reads_only(node, user, descended, facts)), None)
        if following is None:
            return ()
        node = following
        found.append(node)
    return tuple(found) if shape_of(node) == shape_of(end) else ()


def _reads_only(source: fx.Node, node: fx.Node, descended: Set[fx.Node], facts: Facts) -> bool:
    """Whether of all that residual sums went into, a node that may stand in a link reads one value alone."""
    plain = _is_plain(node, facts) or (shape_of(node) is not None and word_of(node.target) != "detach")
    return plain and descended & set(facts.flow[node]) == {source}
