"""Every code with which a residual-looking add, a step or a module is left as it is: what it means, and what to do about it.

The table in `docs/not-rewritten.md` shows them all.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODES", "Code"]


@dataclass(frozen=True)
class Code:
    """What a refusal code means and what the user can do about it, one sentence each."""

    meaning: str
    hint: str


CODES: dict[str, Code] = {
    "projection_shortcut": Code(
        "The skip of the sum is a projection or other function of the input, not the input or a multiple of it.",
        "Blocks that change the shape stay as they are, between two regions; rest='checkpoint' runs them again instead of keeping them.",
    ),
    "two_streams": Code(
        "The sum carries a second stream beside that of a chain, as nodes beside edges; a captured chain has one.",
        "Name the list of layers, momentumize(model, regions=[...]): what a layer hands on besides its first output goes along.",
    ),
    "shape_changed": Code(
        "The step returns another shape than it takes.",
        "Keep the shape of the stream within a chain.",
    ),
    "dtype_changed": Code(
        "The step returns a narrower dtype than it takes, or casts the stream on its way around the branch.",
        "Cast inside the branch, or before the first block, so that the stream keeps its dtype.",
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
        "Compute the value before the chain; or name the list of layers, momentumize(model, regions=[...]), whose layers hand values on.",
    ),
    "interleaved": Code(
        "Something outside the chain has to run between its steps, so the chain cannot become one call.",
        "Move the computation or in-place write that stands between the blocks before or after them.",
    ),
    "too_short": Code(
        "Fewer consecutive steps than a region must have.",
        "Nothing needs to be done: a single step saves no memory.",
    ),
    "interrupted": Code(
        "Between two sums the stream passes through more than norms, activations, scales and masks, and the chains there are too short.",
        "Put it into a branch; or, where it belongs to a layer, name the list of layers, momentumize(model, regions=[...]).",
    ),
    "left_before": Code(
        "The first call of the model, or the net whose checkpoint it has, left the add as it is, and all calls are one network.",
        "See what that call says of it, in train mode or eval mode; or name the list of layers, momentumize(model, regions=[...]).",
    ),
    "nested": Code(
        "The add lies inside a step of another region and is in no chain of its own there, or around longer chains.",
        "Inside of a step nothing needs to be done: its region frees that memory; around longer chains, rest='checkpoint' runs it again.",
    ),
    "untraceable": Code(
        "The preview could not read the module, so what is inside it is not seen.",
        "Call the model once, or give example_inputs: then Dynamo captures it.",
    ),
    "left_to_python": Code(
        "Python ran the code that the add is in: Dynamo left it to it, as it does with what is disabled or what it cannot capture.",
        "TORCH_LOGS=graph_breaks may say why; or name the list of layers, momentumize(model, regions=[...]): no capture is needed.",
    ),
    "lost_context": Code(
        "The adds lie in a block under autocast, inference_mode, vmap or a checkpoint of the model's, or the graph changes torch's state.",
        "Put the context around the call of the model, or around each branch; leave checkpoints out, a chain keeps no activations.",
    ),
    "list_left": Code(
        'A list of alike modules that regions="auto" left as it is: one of another width, or one that the model\'s library does not mark.',
        "Where its layers follow each other, name it beside the others: momentumize(model, regions=[...]).",
    ),
    "graph_break": Code(
        "Dynamo ended the graph right behind the chain, so what follows is compiled by itself.",
        "Find the break with TORCH_LOGS=graph_breaks; or name the list of layers, momentumize(model, regions=[...]): no capture is needed.",
    ),
}
