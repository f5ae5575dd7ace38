"""How close the outputs of a network are to another's, on the same calls, in eval mode without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .arguments import Call

__all__ = ["evaluated", "graded_outputs", "mean_cosine", "outputs", "relative_error"]


@contextmanager
def evaluated(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for a time."""
    flags = {module: module.training for module in net.modules()}
    try:
        for module in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def outputs(net: nn.Module, call: Call) -> list[Tensor]:
    """The floating tensors of an output, in float64; of those with a row for each token, the rows that are not masked out."""
    with torch.no_grad():
        return graded_outputs(net, call)


def graded_outputs(net: nn.Module, call: Call) -> list[Tensor]:
    """The same, with what autograd knows of them."""
    output = net(*call[0], **call[1])
    leaves = pytree.tree_leaves(list(output.values()) if isinstance(output, Mapping) else output)
    floats = [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    mask = call[1].get("attention_mask")
    return [t[mask.bool()] if isinstance(mask, Tensor) and mask.shape == t.shape[:-1] else t.clone() for t in floats]


def relative_error(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """Norm of the difference of all outputs of all calls, relative to the norm of those expected."""
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    off, size = (float(sum(t.square().sum() for t in part)) for part in ([a - b for a, b in pairs], [b for _, b in pairs]))
    return (off / max(size, 1e-300)) ** 0.5


def mean_cosine(found: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """Mean cosine between the rows (last dimension) of the first output of each call; nan where none has a dimension."""
    pairs = [(ours[0], theirs[0]) for ours, theirs in zip(found, expected, strict=True) if ours and ours[0].dim()]
    cosines = [torch.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs]
    return float(torch.cat(cosines).mean()) if cosines else float("nan")
