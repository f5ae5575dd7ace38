"""Sums that carry a second stream beside a chain: x + f(x, e), where e, the stream of another chain, is newer than x.

    e = e + a(x, e)
    x = x + b(x, e)      reads x itself, so it is residual; what it reads of e lies in a step of the chain of e

A mask that is added to scores is none: the scores know of it only through the steps that read it before.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from passes.graphs.facts import Facts
from passes.graphs.ops import MIXING, operands
from passes.planning.rules import refuse
from passes.regions import Refusal

__all__ = ["second_streams"]


def second_streams(facts: Facts, sums: Collection[fx.Node], known: Collection[fx.Node]) -> dict[fx.Node, Refusal]:
    """A refusal for each such sum.

    Args:
        facts: facts of the graph.
        sums: the adds of the chains that there are.
        known: further adds of which something is said already.
    """
    found: dict[fx.Node, Refusal] = {}
    for node in facts.nodes:
        if facts.kinds[node] != "add" or node in sums or node in known or any(user in sums for user in node.users):
            continue
        terms = [term for term in operands(node)[:2] if isinstance(term, fx.Node) and term in facts.varies]
        for skip, branch in (terms, terms[::-1]) if len(terms) == 2 else ():
            if skip.op != "get_attr" and branch not in sums and _reads(branch, skip, facts, sums):
                found[node] = refuse("two_streams", node, f"%{branch.name} is computed from %{skip.name} and from another chain's stream")
    return found


def _reads(branch: fx.Node, skip: fx.Node, facts: Facts, sums: Collection[fx.Node]) -> bool:
    """Whether a branch mixes what it computes from the skip, and not only through sums of another stream, some of which it reads."""
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
    return reached and joined
