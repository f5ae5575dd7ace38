"""What autograd keeps between forward and backward for what lies outside of all chains."""

from __future__ import annotations

from collections.abc import Collection

import torch.fx as fx

from passes.graphs.effects import observed

__all__ = ["kept_outside"]


def kept_outside(gm: fx.GraphModule, inside: Collection[fx.Node]) -> int | None:
    """Bytes that ordinary autograd saves for the gradients of the operations outside of all regions.

    Counted are the storages that these operations save when the graph runs as it was captured, each once and as a whole: activations,
    masks, statistics, also values that a chain hands out and that something outside saves. Not counted is what is there anyway: parameters,
    buffers and inputs of the graph; nor the state of the chains, nor what an autograd function, a checkpoint or the like keeps by
    other means than saved tensors. A compiler as `inner` may save less, or recompute. With sizes that vary, those of the capture count.

    Args:
        gm: the planned graph.
        inside: nodes of all regions.

    Returns:
        The number of bytes, 0 where the graph was captured without gradients; None where the capture recorded no fake tensors, or a
        size depends on values.
    """
    effects = observed(gm)
    if not effects:
        return None
    own = {number for node, effect in effects.items() if node.op in ("placeholder", "get_attr") for number in effect.memory}
    saved = {number: size for node, effect in effects.items() if node not in inside for number, size in effect.saved}
    sizes = [size for number, size in saved.items() if number not in own]
    return None if None in sizes else sum(size or 0 for size in sizes)
