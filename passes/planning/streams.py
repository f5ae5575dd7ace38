"""Sums that carry a second stream beside a chain: x + f(x, e), where e, the stream of another chain, is newer than x.

    e = e + a(x, e)
    x = x + b(x, e)      reads x itself, so it is residual; what it reads of e lies in a step of the chain of e

A mask that is added to scores is none: the scores know of it only through the steps that read it before. But where a chain goes on from
the sum, or sums like it follow each other, that is enough:

    m = m + a(m, z)                     y = y + f(x)
    z = z + b(m)                        x = x + g(y)
    z = z + c(z)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.fx as fx

from passes.graphs.facts import Facts
from passes.graphs.ops import MIXING, operands
from passes.planning.matching import ResidualSum
from passes.planning.rules import refuse
from passes.regions import Refusal

__all__ = ["second_streams"]

_Pair = tuple[fx.Node, fx.Node]  # the skip and the branch of a sum


def second_streams(facts: Facts, sums: Mapping[fx.Node, ResidualSum], known: Collection[fx.Node]) -> dict[fx.Node, Refusal]:
    """A refusal for each such sum.

    Args:
        facts: facts of the graph.
        sums: the residual sums of the chains that there are, by add.
        known: further adds of which something is said already.
    """
    skips = {known.skip for known in sums.values()}
    found: dict[fx.Node, _Pair] = {}
    in_series: dict[fx.Node, _Pair] = {}
    for node in facts.nodes:
        if facts.kinds[node] != "add" or node in sums or node in known:
            continue
        if node not in skips and any(user in sums for user in node.users):
            continue  # a term of another sum
        terms = [term for term in operands(node)[:2] if isinstance(term, fx.Node) and term in facts.varies]
        for skip, branch in (terms, terms[::-1]) if len(terms) == 2 else ():
            if skip.op == "get_attr" or branch in sums:
                continue
            joined, reached = _reads(branch, skip, facts, sums)
            if joined and (reached or node in skips):
                found[node] = (skip, branch)
            elif joined and _stands_by_sums(node, skip, facts) and _knows(branch, skip, facts):
                in_series[node] = (skip, branch)
    links = [(skip, node) for node, (skip, _) in in_series.items() if skip in in_series]
    found |= {node: in_series[node] for link in links for node in link}
    return {node: _refused(node, *found[node]) for node in sorted(found, key=facts.index.__getitem__)}


def _refused(node: fx.Node, skip: fx.Node, branch: fx.Node) -> Refusal:
    return refuse("two_streams", node, f"%{branch.name} is computed from %{skip.name} and from another chain's stream")


def _stands_by_sums(node: fx.Node, skip: fx.Node, facts: Facts) -> bool:
    """Whether a sum adds to another sum, or is added to: only then can it be one of a series."""
    return facts.kinds[skip] == "add" or any(facts.kinds.get(user) == "add" for user in node.users)


def _knows(branch: fx.Node, skip: fx.Node, facts: Facts) -> bool:
    """Whether a branch descends from the skip."""
    lowest, ahead, seen = facts.index[skip], [branch], set[fx.Node]()
    while ahead:
        node = ahead.pop()
        if node is skip:
            return True
        if node not in seen and facts.index[node] > lowest:
            seen.add(node)
            ahead += facts.values[node]
    return False


def _reads(branch: fx.Node, skip: fx.Node, facts: Facts, sums: Collection[fx.Node]) -> tuple[bool, bool]:
    """Whether a branch reads sums of another stream, and whether it mixes what it computes from the skip by other ways."""
    lowest, joined = facts.index[skip], False
    ahead, seen = [(branch, facts.kinds[branch] in MIXING)], set[tuple[fx.Node, bool]]()
    reached = False
    while ahead:
        node, mixed = ahead.pop()
        if (node, mixed) in seen:
            continue
        seen.add((node, mixed))
        for source in facts.values[node]:
            reached |= source is skip and mixed
            joined |= source in sums and facts.index[source] > lowest
            if facts.index[source] > lowest and source not in sums:
                ahead.append((source, mixed or facts.kinds[source] in MIXING))
    return joined, reached
