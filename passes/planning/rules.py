"""The rules: why a residual-looking add, a step or a module is left as it is.

The rules about single steps are the tuple `RULES`; those about whole chains (side inputs
from inside, length, nesting, order) are applied by `plan`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from passes.graphs.facts import Facts, dtype_of, owner_path, shape_of
from passes.graphs.ops import OUT_OF_PLACE
from passes.planning.matching import Projection
from passes.planning.spans import Span
from passes.regions import Refusal

__all__ = ["RULES", "check", "refuse", "refuse_projection"]


def refuse(code: str, add: fx.Node, explanation: str) -> Refusal:
    """A refusal of the add of a graph, with the hint of its code."""
    return Refusal.of(code, add.name, owner_path(add), explanation)


def refuse_projection(found: Projection, facts: Facts) -> Refusal:
    """A refusal for a sum whose short side is not the identity."""
    before, after = dtype_of(found.common), dtype_of(found.short[0])
    if before != after and all(facts.kinds[node] in ("cast", "identity") for node in found.short):
        return refuse("dtype_changed", found.add, f"the skip of %{found.add.name} is %{found.common.name}, of {before}, cast to {after}")
    through = ", ".join(f"%{node.name}" for node in reversed(found.short))
    return refuse(
        "projection_shortcut", found.add, f"the skip of %{found.add.name} is not %{found.common.name} itself: it passes through {through}"
    )


def check(span: Span, facts: Facts) -> Refusal | None:
    """The first rule that a step breaks, or None.

    Args:
        span: the step.
        facts: facts of its graph.

    Returns:
        A refusal of the step's last add, or None if the step is legal.
    """
    return next((found for rule in RULES if (found := rule(span, facts)) is not None), None)


def _overwrites_stream(span: Span, facts: Facts) -> Refusal | None:
    """Refuses a step that writes to its input, unless the write is a sum in place whose result alone is read later."""
    memory, shared, copied = facts.base[span.source], {span.source}, set[fx.Node]()
    for node in span.nodes:
        target = facts.alias.get(node)
        if memory not in facts.writes.get(node, ()):
            (copied if target in copied else shared if target in shared else set()).add(node)
            continue
        if node in facts.stale and node.target in OUT_OF_PLACE:
            return refuse("inplace_stream", span.add, f"%{node.name} overwrites %{span.source.name}, which is read again later")
        if target not in copied and not (node.target in OUT_OF_PLACE and target in shared):
            return refuse("inplace_stream", span.add, f"%{node.name} overwrites %{span.source.name}, the input of the step")
        if target not in copied and memory.op in ("placeholder", "get_attr"):
            return refuse("inplace_stream", span.add, f"%{node.name} overwrites %{memory.name}, which the caller or the module owns")
        copied.add(node)
    return None


def _overwrites_side(span: Span, facts: Facts) -> Refusal | None:
    inside = {*span.nodes, facts.base[span.source]}
    for node in span.nodes:
        outside = [memory for memory in facts.writes.get(node, ()) if memory not in inside]
        if outside:
            return refuse("mutated_side", span.add, f"%{node.name} overwrites %{outside[0].name}, which was made outside of the step")
    return None


def _changes_shape(span: Span, facts: Facts) -> Refusal | None:
    before, after = shape_of(span.source), shape_of(span.target)
    if before is None or after is None or before == after:
        return None
    found = f"%{span.source.name} has shape {before}, %{span.target.name} has shape {after}"
    return refuse("broadcast" if shape_of(span.add) == after and not span.link else "shape_changed", span.add, found)


def _changes_dtype(span: Span, facts: Facts) -> Refusal | None:
    before, after = dtype_of(span.source), dtype_of(span.target)
    if before is None or after is None or _may_hold(before, after):
        return None
    return refuse("dtype_changed", span.add, f"%{span.source.name} is {before}, %{span.target.name} is {after}")


def _may_hold(before: str, after: str) -> bool:
    """Whether a stream may go from one dtype to another: to a wider one; or under autocast, which mixes them, to any."""
    wider = torch.promote_types(getattr(torch, before), getattr(torch, after)) == getattr(torch, after)
    return wider or any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def _is_not_real(span: Span, facts: Facts) -> Refusal | None:
    dtype = dtype_of(span.source)
    if dtype is None or getattr(torch, dtype).is_floating_point:
        return None
    return refuse("not_real", span.add, f"%{span.source.name} is {dtype}")


RULES: tuple[Callable[[Span, Facts], Refusal | None], ...] = (
    _overwrites_stream,
    _overwrites_side,
    _changes_shape,
    _changes_dtype,
    _is_not_real,
)
