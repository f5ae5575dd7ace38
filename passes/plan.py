"""A graph -> which regions it will get, and why everything else stays.

residual sums --chains--> steps --rules--> legal runs --cut at side inputs from inside--> pieces
pieces --which lie in which, or in place of which--> --an order in which the graph can run--> regions
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch.fx as fx

from passes.facts import Facts, bytes_of, dtype_of, free_shape_of
from passes.hoisting import hoisted
from passes.kept import kept_outside
from passes.legality import check, refuse, refuse_projection
from passes.match import Chain, ResidualSum, chains, match
from passes.nesting import Nest, Piece, adds_of, nodes_of
from passes.own_copies import overwritten_sides, overwritten_streams, with_attributes_handed
from passes.regions import Granularity, Plan, PlannedRegion, Refusal
from passes.schedule import schedule
from passes.side_outputs import with_side_outputs
from passes.steps import Span, common_path, dead_ends_of, spans_of

__all__ = ["plan"]


@dataclass
class _Draft:
    """A plan in the making."""

    facts: Facts
    sums: dict[fx.Node, ResidualSum]
    min_steps: int
    dead_ends: set[fx.Node]
    refusals: dict[fx.Node, Refusal] = field(default_factory=dict)


def plan(gm: fx.GraphModule, *, granularity: Granularity = "add", min_steps: int = 2, nested: bool = False) -> Plan:
    """Find the residual chains of a graph that can each become one region; time is linear in the size of the graph.

    Args:
        gm: a captured graph, which is not changed.
        granularity: "add" makes a step of every residual add; "module" makes a step of each block that owns consecutive adds, where that
            leaves a chain at least `min_steps` steps.
        min_steps: fewest steps of a region.
        nested: whether a chain within one step of another gets a region in the code of that step.

    Returns:
        The plan; its regions and refusals together account for every residual-looking add.

    Raises:
        ValueError: if `granularity` or `min_steps` is out of range.
    """
    if granularity not in ("add", "module"):
        raise ValueError(f'granularity must be "add" or "module", got {granularity!r}')
    if min_steps < 1:
        raise ValueError(f"min_steps must be at least 1, got {min_steps}")
    facts = Facts.of(gm)
    sums, projections = match(facts)
    draft = _Draft(facts, sums, min_steps, dead_ends_of(facts))
    draft.refusals = {add: refuse_projection(found) for add, found in projections.items()}
    pieces = [piece for chain in chains(sums, facts) for piece in _pieces(chain, granularity, draft)]
    nest = _nested(pieces, nested, draft)
    _order(nest, draft)
    _take_in_sides(nest, draft)
    outer = {i: nest.pieces[i] for i, parent in nest.parent.items() if parent is None}
    copied = {i: overwritten_sides(piece, facts) + overwritten_streams(piece, facts) for i, piece in outer.items()}
    nest.pieces = with_attributes_handed(nest.pieces, {node for nodes in copied.values() for node in nodes})
    adds = sorted({*sums, *projections}, key=facts.index.__getitem__)
    return Plan(
        residual_adds=tuple(add.name for add in adds),
        regions=_regions(nest, copied, _names(gm), facts),
        refusals=tuple(draft.refusals[add] for add in adds if add in draft.refusals),
        kept_outside=kept_outside(gm, {node for i in nest.parent for node in nodes_of(nest.pieces[i])}),
    )


def _pieces(chain: Chain, granularity: Granularity, draft: _Draft) -> list[Piece]:
    """Legal runs of at least `min_steps` steps of one chain; every add outside of them is refused."""
    spans = spans_of(chain, granularity, draft.facts, draft.sums, draft.dead_ends)
    pieces: list[Piece] = []
    for run in _legal_runs(spans, draft):
        pieces += _cut(run, draft)
    if granularity == "module" and not pieces:
        for found in chain.sums:
            draft.refusals.pop(found.add, None)
        return _pieces(chain, "add", draft)
    for add in (found.add for piece in pieces for span in piece for found in span.sums):
        draft.refusals.pop(add, None)
    return pieces


def _legal_runs(spans: Sequence[Span], draft: _Draft) -> Iterator[Piece]:
    """Longest runs of steps that break no rule."""
    run: list[Span] = []
    for span in spans:
        refusal = check(span, draft.facts)
        if refusal is None:
            run.append(span)
            continue
        draft.refusals |= {found.add: refuse(refusal.code, found.add, refusal.explanation) for found in span.sums}
        yield tuple(run)
        run = []
    yield tuple(run)


def _cut(run: Piece, draft: _Draft) -> list[Piece]:
    """Cut a run before each step that reads a value from inside an earlier step of the same piece, and drop short pieces."""
    newest = _newest_step(run, draft.facts)
    starts = [0]
    for t, span in enumerate(run):
        inner = [node for node in span.inputs() if newest.get(node, -1) >= starts[-1]]
        if inner and t > starts[-1]:
            starts.append(t)
            read = f"%{inner[0].name}, which is computed from inside step {newest[inner[0]]} of the chain"
            draft.refusals[span.add] = refuse("side_from_inside", span.add, f"the step reads {read}")
    pieces = [run[start:end] for start, end in zip(starts, [*starts[1:], len(run)], strict=True) if end > start]
    for piece in pieces:
        if len(piece) < draft.min_steps:
            _refuse_short(piece, len(pieces) > 1, draft)
    return [piece for piece in pieces if len(piece) >= draft.min_steps]


def _refuse_short(piece: Piece, was_cut: bool, draft: _Draft) -> None:
    found = f"the chain is {len(piece)} of at least {draft.min_steps} steps long" + (" after a cut at a side input" if was_cut else "")
    for add in (found.add for span in piece for found in span.sums):
        draft.refusals.setdefault(add, refuse("too_short", add, found))


def _newest_step(run: Piece, facts: Facts) -> dict[fx.Node, int]:
    """For each node, the last step of the run from whose inside it descends."""
    newest = {node: t for t, span in enumerate(run) for node in span.nodes}
    if not run:
        return newest
    first, last = facts.index[run[0].nodes[0]], facts.index[run[-1].nodes[-1]]
    for node in facts.nodes[first:last]:
        if node not in newest:
            step = max((newest.get(before, -1) for before in facts.flow[node]), default=-1)
            if step >= 0:
                newest[node] = step
    return newest


def _nested(pieces: list[Piece], within: bool, draft: _Draft) -> Nest:
    """Which pieces are kept, and which lies in which."""
    nest = Nest.of(pieces, within)
    for i, where in nest.lost.items():
        draft.refusals |= {add: refuse("nested", add, f"%{add.name} lies {where}") for add in adds_of(pieces[i])}
    _refuse_insides(nest, draft)
    return nest


def _refuse_insides(nest: Nest, draft: _Draft) -> None:
    """A residual add inside a step, too short a chain by itself, is better called nested."""
    kept = {add for i in nest.parent for add in adds_of(nest.pieces[i])}
    for i in nest.parent:
        where = f"lies inside a step of the chain that ends in %{adds_of(nest.pieces[i])[-1].name}"
        found = (node for node in nodes_of(nest.pieces[i]) - kept if node in draft.sums)
        draft.refusals |= {node: refuse("nested", node, f"%{node.name} {where}") for node in found}


def _order(nest: Nest, draft: _Draft) -> None:
    """Where pieces need each other's values, compute these before the pieces, or else drop the shortest, until the graph can run, and
    within each step its code."""
    while found := next(((level, stuck) for level in nest.levels() if (stuck := _stuck(level, nest, draft))), None):
        level, stuck = found
        if _hoist(stuck, level, nest, draft):
            continue
        worst = min(stuck, key=lambda i: len(adds_of(nest.pieces[i])))
        for add in adds_of(nest.pieces[worst]):
            draft.refusals[add] = refuse(
                "interleaved", add, f"something between the steps of the chain of %{add.name} has to run both after and before it"
            )
        nest.drop(worst)


def _take_in_sides(nest: Nest, draft: _Draft) -> None:
    """Let the steps compute what others make of their insides, where the graph can run so."""
    level = sorted((i for i, parent in nest.parent.items() if parent is None), key=lambda i: draft.facts.index[nest.pieces[i][0].nodes[0]])
    before = list(nest.pieces)
    for i, piece in zip(level, with_side_outputs([nest.pieces[i] for i in level], draft.facts, draft.sums), strict=True):
        nest.pieces[i] = piece
    if nest.pieces != before and _stuck(level, nest, draft):
        nest.pieces = before


def _hoist(stuck: set[int], level: list[int], nest: Nest, draft: _Draft) -> bool:
    """Take out of the pieces what others read of their first steps; False where no piece gets unstuck by that."""
    held = {node for i, parent in nest.parent.items() if parent in stuck for node in nodes_of(nest.pieces[i])}
    before = {i: nest.pieces[i] for i in stuck}
    after = {i: found for i in stuck if (found := hoisted(before[i], draft.facts)) and not (nodes_of(before[i]) - nodes_of(found)) & held}
    nest.pieces = [after.get(i, piece) for i, piece in enumerate(nest.pieces)]
    free = after.keys() - _stuck(level, nest, draft)
    nest.pieces = [before[i] if i in before and i not in free else piece for i, piece in enumerate(nest.pieces)]
    outside = {node for i in free for node in nodes_of(before[i]) - nodes_of(after[i])}
    draft.refusals |= {
        node: refuse("interleaved", node, f"%{node.name} is computed before a chain whose first step reads it, since others do too")
        for node in outside
        if node in draft.sums
    }
    return bool(free)


def _stuck(level: list[int], nest: Nest, draft: _Draft) -> set[int]:
    """The pieces of one level that have no place in an order."""
    pieces = [nest.pieces[i] for i in level]
    copied = {node for piece in pieces for span in piece for node in span.copied_adds(draft.facts)}
    return {level[i] for i in schedule(draft.facts, [nodes_of(piece) for piece in pieces], copied)[1]}


def _names(gm: fx.GraphModule) -> Iterator[str]:
    taken = {name for name, _ in gm.named_children()} | {node.name for node in gm.graph.nodes}
    number = 0
    while True:
        if (name := f"momentum_region_{number}") not in taken and not hasattr(gm, name):
            yield name
        number += 1


def _regions(nest: Nest, copied: dict[int, list[fx.Node]], names: Iterator[str], facts: Facts) -> tuple[PlannedRegion, ...]:
    kept = sorted(nest.parent, key=lambda i: facts.index[nest.pieces[i][0].nodes[0]])
    named: dict[int | None, str] = {None: "", **dict(zip(kept, names, strict=False))}
    return tuple(_region(nest.pieces[i], named[i], named[nest.parent[i]], copied.get(i, ()), facts) for i in kept)


def _region(piece: Piece, name: str, within: str, copied: Sequence[fx.Node], facts: Facts) -> PlannedRegion:
    steps = tuple(span.named(facts) for span in piece)
    inside = nodes_of(piece)
    escapes = (t for t in range(1, len(piece)) if facts.users_outside(piece[t].source, inside))
    sizes = [bytes_of(node) for node in copied]
    return PlannedRegion(
        name=name,
        within=within,
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
