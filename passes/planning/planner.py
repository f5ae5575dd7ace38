"""A graph -> which regions it will get, and why everything else stays.

residual sums --chains--> steps --rules--> legal runs --cut at side inputs from inside--> pieces
pieces --which lie in which, or in place of which--> --an order in which the graph can run--> regions
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch.fx as fx

from passes.graphs.facts import Facts, bytes_of, dtype_of, free_shape_of
from passes.graphs.schedule import schedule
from passes.planning.hoisting import hoisted
from passes.planning.kept import kept_outside
from passes.planning.matching import Chain, ResidualSum, chains, match
from passes.planning.nesting import Nest, Piece, adds_of, nodes_of
from passes.planning.overwritten import overwritten, with_attributes_handed
from passes.planning.rules import check, refuse, refuse_projection
from passes.planning.side_outputs import with_side_outputs
from passes.planning.spans import Span, common_path, dead_ends_of, spans_of
from passes.planning.streams import second_streams
from passes.planning.totals import totals_of
from passes.regions import Granularity, Plan, PlannedRegion, Refusal, Total

__all__ = ["plan"]


Divided = Callable[[Sequence[tuple[str, tuple[str, ...]]]], Sequence[range]]
"""Given the path and the link of each step of a chain, which of them may be regions, in order."""
Refusals = dict[fx.Node, Refusal]
"""Why residual adds stay as they are, as far as one stage tells; a later stage has the last word."""


@dataclass(frozen=True)
class _Graph:
    """What every stage knows."""

    facts: Facts
    sums: dict[fx.Node, ResidualSum]
    dead_ends: set[fx.Node]
    min_steps: int
    divided: Divided


def _whole(steps: Sequence[object]) -> Sequence[range]:
    return (range(len(steps)),)


def plan(
    gm: fx.GraphModule, *, granularity: Granularity = "add", min_steps: int = 2, nested: bool = False, divided: Divided = _whole
) -> Plan:
    """Find the residual chains of a graph that can each become one region; time is linear in the size of the graph.

    Args:
        gm: a captured graph, which is not changed.
        granularity: "add" makes a step of every residual add; "module" makes a step of each block that owns consecutive adds, a number k of
            every k such blocks; of fewer, where a chain would have less than `min_steps` steps.
        min_steps: fewest steps of a region.
        nested: whether a chain within one step of another gets a region in the code of that step.
        divided: which of the steps of a chain may be a region together, given their paths and links; default all.

    Returns:
        The plan; its regions and refusals together account for every residual-looking add.

    Raises:
        ValueError: if `granularity` or `min_steps` is out of range.
    """
    if granularity not in ("add", "module") and (isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1):
        raise ValueError(f'granularity must be "add", "module" or how many blocks make a step, got {granularity!r}')
    if min_steps < 1:
        raise ValueError(f"min_steps must be at least 1, got {min_steps}")
    facts = Facts.of(gm)
    sums, projections = match(facts)
    graph = _Graph(facts, sums, dead_ends_of(facts), min_steps, divided)
    pieces, illegal = _all_pieces(granularity, graph)
    nest, lost = _nested(pieces, nested, graph)
    nest, disordered = _ordered(nest, graph)
    nest = _with_sides(nest, graph)
    copied = {i: overwritten(nest.pieces[i], facts) for i, parent in nest.parent.items() if parent is None}
    nest.pieces = with_attributes_handed(nest.pieces, {node for nodes in copied.values() for node in nodes})
    totals = _totals(nest, graph)
    seconds = second_streams(facts, sums, projections)
    refusals = {add: refuse_projection(found, facts) for add, found in projections.items()} | seconds | illegal | lost | disordered
    kept = {add for i in nest.parent for add in adds_of(nest.pieces[i])}
    adds = sorted({*sums, *projections, *seconds}, key=facts.index.__getitem__)
    return Plan(
        residual_adds=tuple(add.name for add in adds),
        regions=_regions(nest, copied, totals, _names(gm), facts),
        refusals=tuple(refusals[add] for add in adds if add not in kept),
        kept_outside=kept_outside(gm, {node for i in nest.parent for node in nodes_of(nest.pieces[i])}),
    )


def _all_pieces(granularity: Granularity, graph: _Graph) -> tuple[list[Piece], Refusals]:
    """The legal pieces of all chains."""
    pieces: list[Piece] = []
    refusals: Refusals = {}
    all_chains = chains(graph.sums, graph.facts)
    for chain in all_chains:
        found, why = _pieces(chain, granularity, graph)
        pieces += found
        refusals |= why
    return pieces, refusals | _interrupted(all_chains, refusals)


def _interrupted(all_chains: Sequence[Chain], refusals: Refusals) -> Refusals:
    """Of chains that are too short, those before or behind which another of the same shape would follow but for what stands between."""
    last = {chain.sums[-1].add: chain for chain in all_chains}
    found = Refusals()
    for chain in all_chains:
        if chain.interruption is not None:
            end, barred = chain.interruption
            why = f"%{barred.name} stands between %{end.name} and %{chain.sums[0].skip.name}, the skip of %{chain.sums[0].add.name}"
            adds = [one.add for short in (chain, last.get(end)) if short is not None for one in short.sums]
            found |= {add: refuse("interrupted", add, why) for add in adds if add in refusals and refusals[add].code == "too_short"}
    return found


def _pieces(chain: Chain, granularity: Granularity, graph: _Graph) -> tuple[list[Piece], Refusals]:
    """Legal runs of at least `min_steps` steps of one chain."""
    spans = spans_of(chain, granularity, graph.facts, graph.sums, graph.dead_ends)
    runs, refusals = _legal_runs(spans, graph)
    pieces: list[Piece] = []
    for run in runs:
        found, why = _cut(run, graph)
        refusals |= why
        for piece in found:
            parts = [piece[part.start : part.stop] for part in graph.divided([(span.path, span.link) for span in piece])]
            left = set(adds_of(piece)).difference(*map(adds_of, parts))
            refusals |= {add: refuse("left_before", add, f"%{add.name} was in no chain there") for add in left}
            pieces += parts
    if pieces or granularity == "add":
        return pieces, refusals
    return _pieces(chain, granularity - 1 if isinstance(granularity, int) and granularity > 1 else "add", graph)


def _legal_runs(spans: Sequence[Span], graph: _Graph) -> tuple[list[Piece], Refusals]:
    """Longest runs of steps that break no rule."""
    runs: list[list[Span]] = [[]]
    refusals: Refusals = {}
    for span in spans:
        if (refusal := check(span, graph.facts)) is None:
            runs[-1].append(span)
            continue
        refusals |= {found.add: refuse(refusal.code, found.add, refusal.explanation) for found in span.sums}
        runs.append([])
    return [tuple(run) for run in runs if run], refusals


def _cut(run: Piece, graph: _Graph) -> tuple[list[Piece], Refusals]:
    """Cut a run before each step that reads a value from inside an earlier step of the same piece, and drop short pieces.

    What only the first step of a piece makes is computed before the piece instead, where it can be.
    """
    newest = _newest_step(run, graph.facts)
    starts, cuts = [0], Refusals()
    for t, span in enumerate(run):
        inner = [node for node in span.inputs() if newest.get(node, -1) >= starts[-1]]
        if not inner or t == starts[-1]:
            continue
        if all(newest[node] == starts[-1] for node in inner) and (freed := hoisted(run[starts[-1] : starts[-1] + 1], graph.facts)):
            return _cut((*run[: starts[-1]], *freed, *run[starts[-1] + 1 :]), graph)
        starts.append(t)
        read = f"%{inner[0].name}, which is computed from inside step {newest[inner[0]]} of the chain"
        cuts[span.add] = refuse("side_from_inside", span.add, f"the step reads {read}")
    pieces = [run[start:end] for start, end in zip(starts, [*starts[1:], len(run)], strict=True) if end > start]
    short = [piece for piece in pieces if len(piece) < graph.min_steps]
    reasons = {add: refuse("too_short", add, _too_short(piece, len(pieces) > 1, graph)) for piece in short for add in adds_of(piece)}
    return [piece for piece in pieces if len(piece) >= graph.min_steps], reasons | cuts


def _too_short(piece: Piece, was_cut: bool, graph: _Graph) -> str:
    return f"the chain is {len(piece)} of at least {graph.min_steps} steps long" + (" after a cut at a side input" if was_cut else "")


def _newest_step(run: Piece, facts: Facts) -> dict[fx.Node, int]:
    """For each node, the last step of the run from whose inside it descends."""
    newest = {node: t for t, span in enumerate(run) for node in span.nodes}
    first, last = facts.index[run[0].nodes[0]], facts.index[run[-1].nodes[-1]]
    for node in facts.nodes[first:last]:
        if node not in newest:
            step = max((newest.get(before, -1) for before in facts.flow[node]), default=-1)
            if step >= 0:
                newest[node] = step
    return newest


def _nested(pieces: list[Piece], within: bool, graph: _Graph) -> tuple[Nest, Refusals]:
    """Which pieces are kept, and which lies in which. Single residual adds inside a step have the code `nested` too."""
    nest = Nest.of(pieces, within)
    lost = {add: f"%{add.name} lies {where}" for i, where in nest.lost.items() for add in adds_of(pieces[i])}
    kept = {add for i in nest.parent for add in adds_of(nest.pieces[i])}
    for i in nest.parent:
        where = f"lies inside a step of the chain that ends in %{adds_of(nest.pieces[i])[-1].name}"
        lost |= {node: f"%{node.name} {where}" for node in nodes_of(nest.pieces[i]) - kept if node in graph.sums}
    return nest, {add: refuse("nested", add, why) for add, why in lost.items()}


def _ordered(nest: Nest, graph: _Graph) -> tuple[Nest, Refusals]:
    """Where pieces need each other's values, compute these before the pieces, or else drop the shortest, until the graph can run, and
    within each step its code."""
    refusals: Refusals = {}
    for level, stuck in iter(lambda: _first_stuck(nest, graph), None):
        pieces, why = _hoisted(stuck, level, nest, graph)
        if pieces is None:
            worst = min(stuck, key=lambda i: len(adds_of(nest.pieces[i])))
            lost = adds_of(nest.pieces[worst])
            if (part := _part(worst, level, nest, graph)) is None:
                nest.drop(worst)
            else:
                nest.shorten(worst, part)
                lost = [add for add in lost if add not in adds_of(part)]
            found = "something between the steps of the chain of %{} has to run both after and before it"
            why = {add: refuse("interleaved", add, found.format(add.name)) for add in lost}
        else:
            nest.pieces = pieces
        refusals |= why
    return nest, refusals


def _first_stuck(nest: Nest, graph: _Graph) -> tuple[list[int], set[int]] | None:
    """The first level of which pieces have no place in an order, and these pieces."""
    return next(((level, stuck) for level in nest.levels() if (stuck := _stuck(level, nest.pieces, graph))), None)


def _stuck(level: list[int], pieces: Sequence[Piece], graph: _Graph) -> set[int]:
    """The pieces of one level that have no place in an order."""
    found = [pieces[i] for i in level]
    return {level[i] for i in schedule(graph.facts, [nodes_of(piece) for piece in found], _copied(found, graph.facts))[1]}


def _part(worst: int, level: list[int], nest: Nest, graph: _Graph) -> Piece | None:
    """The longest beginning or end of a piece that has a place in an order; None if none is long enough."""
    whole = nest.pieces[worst]

    def is_free(part: Piece) -> bool:
        return worst not in _stuck(level, [*nest.pieces[:worst], part, *nest.pieces[worst + 1 :]], graph)

    lengths = range(graph.min_steps, len(whole))
    head = bisect_left(lengths, True, key=lambda n: not is_free(whole[:n]))
    tail = bisect_left(lengths, True, key=lambda n: not is_free(whole[-n:]))
    longest = max(head, tail)
    return None if longest == 0 else whole[: lengths[longest - 1]] if head == longest else whole[-lengths[longest - 1] :]


def _hoisted(stuck: set[int], level: list[int], nest: Nest, graph: _Graph) -> tuple[list[Piece] | None, Refusals]:
    """All pieces, some without what others read of their first steps; None where no piece gets unstuck by that."""
    held = {node for i, parent in nest.parent.items() if parent in stuck for node in nodes_of(nest.pieces[i])}
    before = {i: nest.pieces[i] for i in stuck}
    after = {i: found for i in stuck if (found := hoisted(before[i], graph.facts)) and not (nodes_of(before[i]) - nodes_of(found)) & held}
    free = after.keys() - _stuck(level, [after.get(i, piece) for i, piece in enumerate(nest.pieces)], graph)
    if not free:
        return None, {}
    outside = {node for i in free for node in nodes_of(before[i]) - nodes_of(after[i]) if node in graph.sums}
    why = "%{} is computed before a chain whose first step reads it, since others do too"
    refusals = {node: refuse("interleaved", node, why.format(node.name)) for node in outside}
    return [after[i] if i in free else piece for i, piece in enumerate(nest.pieces)], refusals


def _with_sides(nest: Nest, graph: _Graph) -> Nest:
    """With steps that compute what others make of their insides, where the graph can run so."""
    first = {i: graph.facts.index[nest.pieces[i][0].nodes[0]] for i, parent in nest.parent.items() if parent is None}
    level = sorted(first, key=first.__getitem__)
    found = dict(zip(level, with_side_outputs([nest.pieces[i] for i in level], graph.facts, graph.sums), strict=True))
    pieces = [found.get(i, piece) for i, piece in enumerate(nest.pieces)]
    return replace(nest, pieces=pieces) if pieces != nest.pieces and not _stuck(level, pieces, graph) else nest


def _totals(nest: Nest, graph: _Graph) -> dict[int, tuple[Total, ...]]:
    """Of each outermost piece the running sums that its region can form; none where the graph could not run so."""
    facts, level = graph.facts, [i for i, parent in nest.parent.items() if parent is None]
    taken = {node for i in level for node in nodes_of(nest.pieces[i])} | graph.sums.keys()
    found = {i: totals_of(nest.pieces[i], facts, taken) for i in level}
    inside = [nodes_of(nest.pieces[i]) | {facts.named[name] for total in found[i] for name in total.nodes} for i in level]
    return {} if schedule(facts, inside, _copied([nest.pieces[i] for i in level], facts))[1] else found


def _copied(pieces: Sequence[Piece], facts: Facts) -> set[fx.Node]:
    return {node for piece in pieces for span in piece for node in span.copied_adds(facts)}


def _names(gm: fx.GraphModule) -> Iterator[str]:
    taken = {name for name, _ in gm.named_children()} | {node.name for node in gm.graph.nodes}
    number = 0
    while True:
        if (name := f"momentum_region_{number}") not in taken and not hasattr(gm, name):
            yield name
        number += 1


def _regions(
    nest: Nest, copied: dict[int, list[fx.Node]], totals: dict[int, tuple[Total, ...]], names: Iterator[str], facts: Facts
) -> tuple[PlannedRegion, ...]:
    kept = sorted(nest.parent, key=lambda i: facts.index[nest.pieces[i][0].nodes[0]])
    named: dict[int | None, str] = {None: "", **dict(zip(kept, names, strict=False))}
    regions = (_region(nest.pieces[i], named[i], named[nest.parent[i]], copied.get(i, ()), facts) for i in kept)
    return tuple(replace(region, totals=totals.get(i, ())) for i, region in zip(kept, regions, strict=True))


def _region(piece: Piece, name: str, within: str, copied: Sequence[fx.Node], facts: Facts) -> PlannedRegion:
    steps = tuple(span.named(facts) for span in piece)
    inside = nodes_of(piece)
    escapes = (t for t in range(1, len(piece)) if facts.users_outside(piece[t].source, inside))
    sizes = [bytes_of(node) for node in copied]
    return PlannedRegion(
        name=name,
        within=within,
        backward="stored" if within else "reversible",
        path=common_path(step.path for step in steps),
        kind=_kind(piece),
        steps=steps,
        escapes=tuple(escapes),
        shape=free_shape_of(piece[0].source),
        dtype=dtype_of(piece[0].source),
        copied=tuple(node.name for node in copied),
        copied_bytes=None if None in sizes else sum(size or 0 for size in sizes),
    )


def _kind(piece: Piece) -> str:
    links = {span.link for span in piece[:-1]} | ({piece[-1].link} - {()})
    if any(len(span.sums) > 1 for span in piece) or len(links) > 1:
        return "block"
    link = links.pop() if links else ()
    return "pre-activation" if not link else "post-norm" if "norm" in link else "post-activation" if "activation" in link else "block"
