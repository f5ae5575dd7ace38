"""`torch.cat` that does not hold on to the gradient of all that it joined while one of them waits.

Autograd's gradients are parts of one tensor. That of a U-Net's skip waits until those of the skip's other readers are there, and keeps the
whole of that tensor until then. Here it waits in memory of its own:

    cat --part--> Apart --own--> sum with the gradients of other readers, in autograd's order --> who made the skip

The sum goes element by element, so it is the same to the bit, strides included. Where nothing is added, who made the skip gets a part of a
larger tensor again, as kernels may add up otherwise where strides or alignment are others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from weakref import ref

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from ..errors import UNCOMPILED
from ..runtime.surroundings import exported, transformed

__all__ = ["joined", "let_skips_wait_apart"]

_CATS = (torch.cat, torch.concat, torch.concatenate)
_PLAIN = (Tensor, FakeTensor)


def let_skips_wait_apart(gm: fx.GraphModule, shared: Collection[int]) -> None:
    """Puts `joined` in the place of each `torch.cat` that reads a skip.

    Args:
        gm: a graph that runs as it is.
        shared: which of its placeholders others read too.
    """
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    skips = {given[i] for i in shared}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _CATS and not skips.isdisjoint(node.all_input_nodes):
            tensors = node.args[0] if node.args else node.kwargs["tensors"]
            node.target, node.kwargs = joined, {**node.kwargs, "waiting": [i for i, t in enumerate(tensors) if t in skips]}
    gm.recompile()


def joined(tensors: Sequence[Tensor], *args: Any, waiting: Collection[int], **kwargs: Any) -> Tensor:
    """`torch.cat`.

    Args:
        waiting: which of them are skips.
    """
    if torch.is_grad_enabled() and not transformed() and not exported():
        skips = [i for i in waiting if _may_wait(tensors[i]) and sum(tensors[i] is t for t in tensors) == 1]
        tensors = [_apart(t) if i in skips else t for i, t in enumerate(tensors)]
    return torch.cat(list(tensors), *args, **kwargs)


def _may_wait(t: Tensor) -> bool:
    """Hooks that are there would see another layout; ours is there in a rerun, whose gradients go nowhere."""
    return type(t) in _PLAIN and t.layout is torch.strided and t.grad_fn is not None and not t._backward_hooks


def _apart(t: Tensor) -> Tensor:
    part = _Part()
    t.register_hook(part.alone)
    return _Apart.apply(t, part)


class _Part:
    """A gradient that was taken out of a larger tensor, and how it lay there."""

    def __init__(self) -> None:
        self._own: ref[Tensor] | None = None
        self._size = 0  # elements of that tensor
        self._lay: tuple[Any, ...] = ()  # shape, strides, offset

    def taken(self, part: Tensor) -> Tensor:
        own = part.clone()
        self._own = ref(own)
        self._lay = (part.shape, part.stride(), part.storage_offset())
        self._size = part.untyped_storage().nbytes() // part.element_size()
        return own

    def alone(self, grad: Tensor) -> Tensor | None:
        """The hook on the sum: the gradient as it lay, if nothing was added to it, which may be done in place."""
        if self._own is None or self._own() is not grad or grad._version:
            return None
        return grad.new_empty(self._size).as_strided(*self._lay).copy_(grad)


class _Apart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: _Part) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.part = part
        return x.detach()  # a view would have other strides where sizes are 1, and by these `cat` chooses its layout

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        waits = grad is not None and not torch.is_inference_mode_enabled() and _has_gaps(grad)  # there, nothing tells of a sum in place
        return ctx.part.taken(grad) if waits else grad, None


def _has_gaps(grad: Tensor) -> bool:
    """Whether a gradient surely lies in a larger tensor, and all its strides count. Without gaps, as in a batch of one, it depends on who
    else holds that tensor whether autograd adds in place; strides of sizes of 1 a copy may change. So the sum could lie otherwise.
    """
    try:
        plain = type(grad) in _PLAIN and grad.layout is torch.strided and grad.untyped_storage().nbytes() > grad.nbytes
    except NotImplementedError:  # many gradients at once, as with is_grads_batched
        return False
    return plain and 1 not in grad.shape and 0 not in grad.stride() and not torch.ops.aten.is_non_overlapping_and_dense.default(grad)
