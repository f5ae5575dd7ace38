"""The rules: why a residual-looking add, a step or a module is left as it is.

Every refusal has one of the codes of `CODES`. The rules about single steps are the tuple `RULES`; those about whole chains (side inputs
from inside, length, nesting, order) are applied by `plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx as fx

from passes.facts import Facts, dtype_of, owner_path, shape_of
from passes.match import Projection
from passes.ops import OUT_OF_PLACE
from passes.regions import Refusal
from passes.steps import Span

__all__ = ["CODES", "RULES", "Code", "check", "refuse", "refuse_projection"]


@dataclass(frozen=True)
class Code:
    """What a refusal code means and what the user can do about it, one sentence each."""

    meaning: str
    hint: str


CODES: dict[str, Code] = {
    "projection_shortcut": Code(
        "The skip of the sum is a projection or other function of the input, not the input or a multiple of it.",
        "Nothing needs to be done: blocks that change the shape stay as they are, between two regions.",
    ),
    "shape_changed": Code(
        "The step returns another shape than it takes.",
        "Keep the shape of the stream within a chain.",
    ),
    "dtype_changed": Code(
        "The step returns a narrower dtype than it takes.",
        "Cast inside the branch, so that the stream keeps its dtype.",
    ),
    "not_real": Code(
        "The stream is not of a real floating dtype, so that no momentum chain can carry it.",
        "Nothing needs to be done for integers; keep complex values inside the branch, and the stream real.",
    ),
    "broadcast": Code(
        "The skip is broadcast by the sum, so the step returns a larger tensor than it takes.",
        "Expand the skip before the first block.",
    ),
    "inplace_stream": Code(
        "The step overwrites in place a value of the stream that the caller owns or that is read again.",
        "Use the out-of-place form, such as nn.ReLU(inplace=False) or x = x + f(x).",
    ),
    "mutated_side": Code(
        "The step overwrites in place a tensor that was made outside of it, which a second run of the step would overwrite again.",
        "Copy the tensor before writing to it, or write to it outside of the block.",
    ),
    "side_from_inside": Code(
        "The step reads a value from inside an earlier step, which a region does not keep; the chain was cut there.",
        "Nothing needs to be done, or compute the value before the chain.",
    ),
    "interleaved": Code(
        "Something outside the chain has to run between its steps, so the chain cannot become one call.",
        "Move the computation or in-place write that stands between the blocks before or after them.",
    ),
    "too_short": Code(
        "Fewer consecutive steps than a region must have.",
        "Nothing needs to be done: a single step saves no memory.",
    ),
    "nested": Code(
        "The add lies inside a step of another region and is in no chain of its own there, or around longer chains.",
        "Nothing needs to be done: the memory inside the step is freed by the region that contains it.",
    ),
    "untraceable": Code(
        "The preview could not read the module, so what is inside it is not seen.",
        "Call the model once, or give example_inputs: then Dynamo captures it.",
    ),
    "lost_context": Code(
        "The adds lie within a block under autocast, no_grad or a checkpoint of the model's own, or the graph changes a state of torch's.",
        "Put the context around the call of the model, or around each branch; leave checkpoints out, a chain keeps no activations.",
    ),
    "graph_break": Code(
        "Dynamo ended the graph right behind the chain, so what follows is compiled by itself.",
        "Find the break with TORCH_LOGS=graph_breaks; or name the list of layers, momentumize(model, regions=[...]): no capture is needed.",
    ),
}


def refuse(code: str, add: fx.Node, explanation: str) -> Refusal:
    """A refusal of the add of a graph, with the hint of its code."""
    return Refusal(code, add.name, owner_path(add), explanation, CODES[code].hint)


def refuse_projection(found: Projection) -> Refusal:
    """A refusal for a sum whose short side is not the identity."""
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
    """In-place sums onto the stream may be replaced by plain adds, provided nobody sees the difference; other writes may not stay."""
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
