"""Adds -> residual adds -> chains, by dataflow alone.

    s = skip ----------------------------------\\
    s --> norm --> attention --> dropout --> + = residual add           s' = skip of the next add
                       ^ side input                  \\--> (relu, norm, dropout: the link) --> s'

A sum is residual when one of its terms, the skip, is an ancestor of another and a mixing operation lies between. Adds are visited in
graph order, and a walk back from a branch jumps over each residual add it meets, so that long skips cost one step per add they span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.fx as fx

from passes.graphs.facts import Facts, owner_path, shape_of
from passes.graphs.ops import MIXING, is_add, is_other_sum, operands
from passes.planning.links import Link, interruption_of, link_of, made_of, tail_of
from passes.regions import ResidualAdd

__all__ = ["Chain", "Projection", "ResidualSum", "chains", "match"]

_SHORT_SIDE = 24  # longest projection that is looked for: the walk back along the short side of a sum


@dataclass(frozen=True)
class ResidualSum:
    """A residual add with its nodes; `ResidualAdd` is what others see of it."""

    add: fx.Node
    skip: fx.Node
    branch: fx.Node | None
    frontier: tuple[fx.Node, ...]  # what the branch reads that is not newer than the skip, the skip included

    def named(self) -> ResidualAdd:
        return ResidualAdd(self.add.name, self.skip.name, self.branch.name if self.branch else None, owner_path(self.add))


@dataclass(frozen=True)
class Projection:
    """A sum that looks residual but whose short side is not the identity."""

    add: fx.Node
    common: fx.Node  # the value from which both sides descend
    short: tuple[fx.Node, ...]  # nodes of the short side, nearest to the sum first


@dataclass(frozen=True)
class Chain:
    """Residual sums each of whose skips is the sum before, or is reached from it through its link; links[0] is empty."""

    sums: tuple[ResidualSum, ...]
    links: tuple[Link, ...]
    tail: Link  # after the last sum, where all links are alike
    interruption: tuple[fx.Node, fx.Node] | None  # the sum before the first skip, and why there is no link to it


@dataclass(frozen=True)
class _Walk:
    """The ancestors of a value down to the position of a presumed skip."""

    visited: tuple[fx.Node, ...]  # in graph order, newer than the skip
    frontier: tuple[fx.Node, ...]
    between: frozenset[fx.Node]  # the visited nodes that descend from the skip


def match(facts: Facts) -> tuple[dict[fx.Node, ResidualSum], dict[fx.Node, Projection]]:
    """Find the residual adds of a graph, and those that only look so.

    Args:
        facts: facts of the graph.

    Returns:
        Residual sums and projection shortcuts by add, both in graph order.
    """
    sums: dict[fx.Node, ResidualSum] = {}
    projections: dict[fx.Node, Projection] = {}
    for node in facts.nodes:
        if node not in facts.varies or not (facts.kinds[node] == "add" or is_other_sum(node)):
            continue
        found = _residual(node, facts, sums) if facts.kinds[node] == "add" else _other_residual(node, facts, sums)
        if found is not None:
            sums[node] = found
        elif facts.kinds[node] == "add" and (projection := _projection(node, facts, sums)) is not None:
            projections[node] = projection
    inner = {term for found in sums.values() for term in _inner_adds(found.add, facts) if found.branch is None and is_add(found.add)}
    return {add: found for add, found in sums.items() if add not in inner}, projections


def _residual(add: fx.Node, facts: Facts, sums: dict[fx.Node, ResidualSum]) -> ResidualSum | None:
    """Read a sum as `skip + branch`, or with inner sums flattened as `skip + several terms`; the skip may be scaled."""
    plain = _plain_terms(add)
    if plain is not None:
        for skip, branch in ((skip, branch) for term, branch in (plain, plain[::-1]) for skip in _same_values(term, facts)):
            walk = _branch(skip, branch, _filled(branch, [add], facts), facts, sums)
            if walk is not None:
                return ResidualSum(add, skip, branch, walk.frontier)
    terms = _terms(add, facts)
    skips = {term: _unscaled(term, facts) for term in terms}
    if len(terms) < 3 and plain is not None and all(term is skip for term, skip in skips.items()):
        return None
    oldest = min(terms, key=lambda term: facts.index[skips[term]])
    return _whole(add, skips[oldest], [term for term in terms if term is not oldest], facts, sums)


def _other_residual(node: fx.Node, facts: Facts, sums: dict[fx.Node, ResidualSum]) -> ResidualSum | None:
    """Read x - f(x), addcmul(x, a, f(x)) and the like, whose first operand is the skip."""
    first, *terms = (operands(node)[0], *(value for value in node.all_input_nodes if value is not operands(node)[0]))
    return _whole(node, _unscaled(first, facts), terms, facts, sums)


def _whole(add: fx.Node, skip: fx.Node, terms: list[fx.Node], facts: Facts, sums: dict[fx.Node, ResidualSum]) -> ResidualSum | None:
    """A sum of which only the whole is known, if one of its terms is a residual branch."""
    mixes, readers = facts.kinds[add] in MIXING, [add, *_inner_adds(add, facts)]
    if all(_branch(skip, term, _filled(term, readers, facts), facts, sums, mixes) is None for term in terms):
        return None
    return ResidualSum(add, skip, None, _walk(add, skip, facts, sums).frontier)


def _same_values(term: fx.Node, facts: Facts) -> list[fx.Node]:
    """A term, and behind `Identity`, `contiguous` and the like the value that it repeats."""
    found = [term]
    while facts.kinds[found[-1]] == "identity" and isinstance(operands(found[-1])[0], fx.Node):
        found.append(operands(found[-1])[0])
    return found


def _unscaled(term: fx.Node, facts: Facts) -> fx.Node:
    """The value behind multiplications by numbers and parameters that keep its shape."""
    while facts.kinds[term] in ("identity", "scale"):
        varying = [source for source in facts.flow[term] if source in facts.varies]  # what writes to an operand is there, too
        if len(varying) != 1 or varying[0] not in term.all_input_nodes:
            break
        if len(term.all_input_nodes) > 1 and not shape_of(term) == shape_of(varying[0]) is not None:
            break
        term = varying[0]
    return term


def _plain_terms(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of `a + b`, None where `alpha` scales one of them, or where it is another operation."""
    terms = operands(add)
    return (terms[0], terms[1]) if len(terms) == 2 and add.kwargs.get("alpha", 1) == 1 else None


def _inner_adds(add: fx.Node, facts: Facts) -> list[fx.Node]:
    """Adds whose result only serves as a term of this sum."""
    found, stack = [], [add]
    while stack:
        node = stack.pop()
        for term in operands(node)[: 2 if _plain_terms(node) else 1]:
            if isinstance(term, fx.Node) and is_add(term) and facts.kinds[term] == "add" and len(term.users) == 1 and _plain_terms(term):
                found.append(term)
                stack.append(term)
    return found


def _terms(add: fx.Node, facts: Facts) -> list[fx.Node]:
    inner = _inner_adds(add, facts)
    return [term for node in (add, *inner) for term in operands(node)[:2] if term not in inner]


def _filled(term: fx.Node, readers: list[fx.Node], facts: Facts) -> list[fx.Node]:
    """The writes to a term of a sum between where it was made and where it is read: y = zeros_like(x); y[m] = f(x[m]); x + y."""
    memory, index = set(facts.shares[term]), facts.index
    writes = [node for reader in readers if term in reader.all_input_nodes for node in facts.flow[reader] if index[node] > index[term]]
    return [node for node in writes if not memory.isdisjoint(facts.writes.get(node, ()))]


def _branch(
    skip: fx.Node, branch: fx.Node, filled: list[fx.Node], facts: Facts, sums: dict[fx.Node, ResidualSum], mixes: bool = False
) -> _Walk | None:
    """The walk from `branch` back to `skip`, if that makes a residual branch.

    Args:
        skip, branch: the terms.
        filled: the writes to `branch` since it was made.
        facts, sums: of the graph.
        mixes: whether the sum itself mixes, as addmm does.
    """
    if skip.op == "get_attr" or skip not in facts.varies or facts.index[skip] >= max(map(facts.index.__getitem__, (branch, *filled))):
        return None
    walk = _walk(branch, skip, facts, sums, filled)
    mixes = mixes or any(facts.kinds[node] in MIXING or node in sums for node in walk.between)
    return walk if branch in walk.between and mixes and not _enters(walk, skip, facts, sums) else None


def _walk(start: fx.Node, skip: fx.Node, facts: Facts, sums: dict[fx.Node, ResidualSum], filled: Sequence[fx.Node] = ()) -> _Walk:
    """The walk back from what `start` holds after the writes `filled`."""
    lowest = facts.index[skip]
    visited: dict[fx.Node, tuple[fx.Node, ...]] = {}
    frontier: dict[fx.Node, None] = {}
    stack = [start]
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        known = sums.get(node)
        jumps = known is not None and node is not start and facts.index[known.skip] >= lowest
        visited[node] = (known.skip, *known.frontier) if known is not None and jumps else facts.values[node]
        if node is start:
            visited[node] = (*visited[node], *filled)
        for source in visited[node]:
            if facts.index[source] > lowest:
                stack.append(source)
            else:
                frontier[source] = None
    in_order = sorted(visited, key=lambda node: (node is start, facts.index[node]))
    between: set[fx.Node] = set()
    for node in in_order:
        if any(source is skip or source in between for source in visited[node]):
            between.add(node)
    return _Walk(tuple(in_order), tuple(frontier), frozenset(between))


def _enters(walk: _Walk, skip: fx.Node, facts: Facts, sums: dict[fx.Node, ResidualSum]) -> bool:
    """True if another stream joins between skip and branch: the presumed skip is then its side input, such as an attention mask."""
    inside = (sums[node] for node in walk.between if node in sums)
    return any(found.skip is not skip and found.skip not in walk.between for found in inside)


def _projection(add: fx.Node, facts: Facts, sums: dict[fx.Node, ResidualSum]) -> Projection | None:
    plain = _plain_terms(add)
    if plain is None:
        return None
    for start, other in (plain, plain[::-1]):
        short = _short_side(start, facts)
        common = [source for node in short for source in facts.values[node] if source in facts.varies]
        if not common or other in short or other.op in ("placeholder", "get_attr"):
            continue
        filled = _filled(other, [add], facts)
        walk = _walk(other, common[-1], facts, sums, filled)
        reached = [node for node in common if node in walk.visited or node in walk.frontier]
        if not reached:
            continue
        walk = _walk(other, reached[0], facts, sums, filled)
        longer = _mixings(walk, facts) > sum(facts.kinds[node] in MIXING for node in short)
        if longer and not any(node in sums for node in walk.between):  # a merge of stages, as in a feature pyramid, spans blocks
            return Projection(add, reached[0], tuple(short[: common.index(reached[0]) + 1]))
    return None


def _mixings(walk: _Walk, facts: Facts) -> int:
    return sum(facts.kinds[node] in ("convolution", "linear", "mix") for node in walk.between)


def _short_side(start: fx.Node, facts: Facts) -> list[fx.Node]:
    """Nodes from a term back along its only varying input, as far as they make up a projection."""
    path: list[fx.Node] = []
    node, projections = start, 0
    while len(path) < _SHORT_SIDE:
        sources = [source for source in facts.values[node] if source in facts.varies]
        projections += facts.kinds[node] in ("convolution", "linear")
        if len(sources) != 1 or projections > 1 or facts.kinds[node] in ("mix", "add", "reduce"):
            break
        path.append(node)
        node = sources[0]
    return path


def chains(sums: dict[fx.Node, ResidualSum], facts: Facts) -> tuple[Chain, ...]:
    """Join residual sums into chains; where several continue the same one, the longest continuation wins, and the
    last of equally long ones, which is the outer one if they are nested.

    Args:
        sums: residual sums by add, in graph order.
        facts: facts of the graph.

    Returns:
        Chains that hold each sum exactly once, some of them of a single sum, ordered by their first add.
    """
    descended = made_of(sums, facts)
    before = {add: link for add, found in sums.items() if (link := link_of(found.skip, sums, descended, facts)) is not None}
    successor: dict[fx.Node, fx.Node] = {}
    length = dict.fromkeys(sums, 1)
    for add in reversed(sums):
        if add in before:
            previous = before[add][0]
            if previous not in successor or length[add] > length[successor[previous]]:
                successor[previous] = add
                length[previous] = length[add] + 1
    found = []
    for add in sums:
        if add not in before or successor[before[add][0]] is not add:
            adds = [add]
            while adds[-1] in successor:
                adds.append(successor[adds[-1]])
            links = [before[node][1] for node in adds[1:]]
            tail = tail_of(adds[-1], links, descended, facts)
            interruption = None if add in before else interruption_of(sums[add].skip, sums, descended, facts)
            found.append(Chain(tuple(sums[node] for node in adds), ((), *links), tail, interruption))
    return tuple(found)
