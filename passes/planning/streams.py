"""Sums that carry a second stream beside a chain: x + f(x, e), where e, the stream of another chain, is newer than x.

    e = e + a(x, e)
    x = x + b(x, e)      reads x itself, so it is residual; what it reads of e lies in a step of the chain of e

A mask that is added to scores is none: the scores know of it only through the steps that read it before. But where a chain goes on from
the sum, that is enough:

    m = m + a(m, z)
    z = z + b(m)         knows of z through m
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


def second_streams(facts: Facts, sums: Mapping[fx.Node, ResidualSum], known: Collection[fx.Node]) -> dict[fx.Node, Refusal]:
    """A refusal for each such sum.

    Args:
        facts: facts of the graph.
        sums: the residual sums of the chains that there are, by add.
        known: further adds of which something is said already.
    """
    found: dict[fx.Node, Refusal] = {}
    skips = {known.skip for known in sums.values()}
    for node in facts.nodes:
        if facts.kinds[node] != "add" or node in sums or node in known:
            continue
        if node not in skips and any(user in sums for user in node.users):
            continue  # a term of another sum
        terms = [term for term in operands(node)[:2] if isinstance(term, fx.Node) and term in facts.varies]
        for skip, branch in (terms, terms[::-1]) if len(terms) == 2 else ():
            if skip.op != "get_attr" and branch not in sums and _reads(branch, skip, facts, sums, node in skips):
                found[node] = refuse("two_streams", node, f"%{branch.name} is computed from %{skip.name} and from another chain's stream")
    return found


def _reads(branch: fx.Node, skip: fx.Node, facts: Facts, sums: Collection[fx.Node], goes_on: bool) -> bool:
    """Whether a branch reads sums of another stream, and mixes what it computes from the skip, by other ways or where a chain goes on."""
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
    return (reached or goes_on) and joined
