"""`torch.cat` whose gradients do not hold on to each other.

Those of autograd are parts of one tensor, the gradient of all that was concatenated: that of a U-Net's skip keeps the whole of it until the
skip has been gone back through. Here each has memory of its own. Values and their order are autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from ..errors import UNCOMPILED
from ..runtime.replay import exported, transformed

__all__ = ["apart", "with_own_gradients"]

_CATS = (torch.cat, torch.concat, torch.concatenate)
_PLAIN = (Tensor, FakeTensor)


def with_own_gradients(gm: fx.GraphModule) -> None:
    """Puts `apart` in the place of each `torch.cat` of a graph that runs as it is."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _CATS:
            node.target = apart
    gm.recompile()


def apart(tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> Tensor:
    """`torch.cat`, which it calls itself where anything is unusual."""
    plain = all(type(t) in _PLAIN and t.layout is torch.strided and t.is_floating_point() for t in tensors)
    alike = len({(t.dtype, t.dim()) for t in tensors}) == 1
    if others or not (plain and alike) or not torch.is_grad_enabled() or transformed() or exported():
        return torch.cat(list(tensors), dim, **others)
    return _Apart.apply(dim, *tensors)


class _Apart(Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dim, ctx.sizes = dim, [t.shape[dim] for t in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (1 + len(ctx.sizes))
        parts = zip(grad.split(ctx.sizes, ctx.dim), ctx.needs_input_grad[1:], strict=True)
        return None, *(_own(part) if needed else None for part, needed in parts)


def _own(part: Tensor) -> Tensor:
    """A tensor, in memory of its own where it lies in larger memory."""
    try:
        is_part = type(part) in _PLAIN and part.layout is torch.strided and part.untyped_storage().nbytes() > part.nbytes
    except NotImplementedError:  # many gradients at once, as with is_grads_batched
        return part
    return part.clone() if is_part else part
