"""Links: what may stand between a residual sum s and the skip of the next one.

relu(s), norm(s), s * 0.5                           operations on one value, one after the other
s / s.square().mean().sqrt(), norm(s.mT).mT         single operations that branch, or between changes of layout
s * mask, s.masked_fill(mask, 0), s + positions     with side inputs, which no residual sum goes into
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

import torch.fx as fx
import torch.utils._pytree as pytree

from passes.graphs.facts import Facts, shape_of
from passes.graphs.ops import LINKS, operands, word_of

__all__ = ["Link", "interruption_of", "link_of", "made_of", "tail_of"]

Link = tuple[fx.Node, ...]
_WIDE = LINKS | {"scale", "add", "elementwise", "reduce", "layout"}
_WIDEST = 40  # most nodes of a link that branches
_LARGE = 1e3  # what is filled in from here on is a mark, and no value of a stream


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
    scales = facts.kinds[node] == "scale" and len(node.all_input_nodes) == 1
    varying = {source for source in facts.flow[node] if source in facts.varies}
    if len(varying) != 1:
        return False  # such as one that is written to
    return scales or (facts.kinds[node] in LINKS and varying == {(operands(node) or (None,))[0]})


def _wide_link(start: fx.Node, sums: Collection[fx.Node], descended: Set[fx.Node], facts: Facts) -> tuple[fx.Node, Link] | None:
    """A link that branches or reads side inputs.

    Of residual sums the skip must be computed from one alone, without mixing, and have its shape; so only where shapes are recorded.
    """
    seen, stack, found = {start}, [start], set[fx.Node]()
    while stack:
        node = stack.pop()
        if not _fits(node, facts) or shape_of(node) is None or len(seen) > _WIDEST:
            return None
        for source in facts.flow[node]:
            if source in sums:
                found.add(source)
            elif source in descended and source not in seen:
                seen.add(source)
                stack.append(source)
    if len(found) != 1 or shape_of(end := found.pop()) != shape_of(start) or not _gradients_come(start, end, seen, facts):
        return None
    return end, tuple(sorted(seen, key=facts.index.__getitem__))


def _gradients_come(start: fx.Node, end: fx.Node, inside: Set[fx.Node], facts: Facts) -> bool:
    """Whether a way from the skip back to the sum passes no `detach`."""
    seen, queue = {start}, [start]
    for node in queue:
        if node is end:
            return True
        if word_of(node.target) != "detach":
            new = [source for source in facts.flow[node] if (source in inside or source is end) and source not in seen]
            seen.update(new)
            queue += new
    return False


def _fits(node: fx.Node, facts: Facts) -> bool:
    """Whether the values of a node are a stream's, which has one grid for all of them: none is -inf or -1e9, as before a maximum."""
    if facts.kinds[node] not in _WIDE or word_of(node.target) not in ("masked_fill", "where"):
        return facts.kinds[node] in _WIDE
    made = [source for source in node.all_input_nodes if facts.kinds[source] == "create"]  # such as torch.full(...)
    numbers = (value for one in (node, *made) for value in pytree.tree_leaves((one.args, one.kwargs)) if isinstance(value, (int, float)))
    return all(abs(value) < _LARGE for value in numbers)


def interruption_of(start: fx.Node, sums: Collection[fx.Node], descended: Set[fx.Node], facts: Facts) -> tuple[fx.Node, fx.Node] | None:
    """For a skip without a link: the nearest residual sum of its shape, and the first node between them that no link may contain."""
    seen, queue, ends, barred = {start}, [start], list[fx.Node](), list[fx.Node]()
    for node in queue:
        if node in sums:
            ends.append(node)
            continue
        if not _fits(node, facts) or word_of(node.target) == "detach":
            barred.append(node)
        new = [source for source in facts.flow[node] if source in descended and source not in seen]
        seen.update(new)
        queue += new
    end = max(ends, key=facts.index.__getitem__, default=start)
    alike = end is not start and shape_of(end) == shape_of(start) is not None
    return (end, barred[0]) if barred and alike else None


def tail_of(end: fx.Node, links: Sequence[Link], descended: Set[fx.Node], facts: Facts) -> Link:
    """What follows the last sum of a chain, where every link of the chain has the same operations and they follow here too."""
    kinds = {tuple(facts.kinds[node] for node in link) for link in links}
    node, found = end, list[fx.Node]()
    for one in links[-1] if len(kinds) == 1 else ():
        following = next((user for user in node.users if _alike(user, one, facts) and _reads_only(node, user, descended, facts)), None)
        if following is None:
            return ()
        node = following
        found.append(node)
    return tuple(found) if shape_of(node) == shape_of(end) else ()


def _alike(a: fx.Node, b: fx.Node, facts: Facts) -> bool:
    """Whether two nodes do the same; two norms, activations or dropouts are alike."""
    if facts.kinds[a] != facts.kinds[b] or facts.kinds[a] in LINKS:
        return facts.kinds[a] == facts.kinds[b]
    return a.target == b.target and _values(a) == _values(b)


def _values(node: fx.Node) -> list[object]:
    """What a node is given that is no node."""
    return [None if isinstance(value, fx.Node) else value for value in pytree.tree_leaves((node.args, node.kwargs))]


def _reads_only(source: fx.Node, node: fx.Node, descended: Set[fx.Node], facts: Facts) -> bool:
    """Whether of all that residual sums went into, a node that may stand in a link reads one value alone."""
    plain = _is_plain(node, facts) or (shape_of(node) is not None and word_of(node.target) != "detach")
    return plain and descended & set(facts.flow[node]) == {source}
