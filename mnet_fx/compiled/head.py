"""A linear layer and its cross entropy in chunks of tokens, of which the backward pass computes one after the other again: no more than one
chunk's logits are ever there.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from passes import Head

from ..runtime.segment import run_segment
from ..runtime.surroundings import exported, transformed
from .filling import Unseen

__all__ = ["ChunkedHead", "Logits"]


class ChunkedHead(Unseen):
    """`cross_entropy(linear(hidden, weight, bias), target)`.

    Where the logits are given out as well, they are what the loss is computed of, so that gradients pass through them, and they are not
    kept for that: a rerun computes those of its rows again.

    A chunk has as many rows as there are features, so that its logits are as large as the weights, or so many that its logits are as large
    as all hidden values. The sum over the chunks is rounded otherwise than a sum over all rows.

    Args:
        head: what `passes.heads` found.
        on_drift: what is done about a rerun that differs.
    """

    def __init__(self, head: Head, on_drift: str) -> None:
        super().__init__()
        self.head, self.on_drift = head, on_drift
        self.name = self.title = f"the head {head.linear}"
        self.cost = head.cost
        self.stored = 0  # 1: the logits are kept, and nothing is computed in chunks

    def forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, logits: Tensor | None
    ) -> Tensor:
        """
        Args:
            hidden: rows of features, of any leading shape.
            weight: classes x features.
            bias: classes, or None.
            target: the class of each row, int64.
            class_weight: classes, or None.
            logits: what the linear layer gave, where others read that too.
        """
        if self.stored or transformed() or exported():  # to be recorded or transformed whole
            values = F.linear(hidden, weight, bias) if logits is None else logits
            return self.head.loss(self._rows(values, target), target, class_weight, self.head.reduction)
        size = _chunk_size(target.shape[0], weight)
        rest = None if logits is None else self._rows(logits, target)
        sums = []
        for i, (wanted, rows) in enumerate(zip(target.split(size), self._rows(hidden, target).split(size), strict=True)):
            part = None
            if rest is not None:
                rest, part = _Part.apply(rest, i * size, i * size + rows.shape[0])
            sums.append(self._sum(weight, bias, class_weight, wanted, rows, part))
        total = torch.stack(sums)
        if self.head.reduction == "sum":
            return total.sum()
        wide = torch.promote_types(total.dtype, torch.float32)
        return (total.to(wide).sum() / self._count(target, class_weight, wide)).to(total.dtype)

    def _rows(self, values: Tensor, target: Tensor) -> Tensor:
        taken = values if self.head.slices is None else values[self.head.slices]
        return taken.reshape(target.shape[0], values.shape[-1])

    def _count(self, target: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The number of rows that count, or the sum of their weights."""
        counting = target != self.head.ignore_index
        if class_weight is None:
            return counting.sum(dtype=dtype)
        return (class_weight[target.where(counting, 0)] * counting).sum(dtype=dtype)  # no mask as an index, for which a device would wait

    def _sum(
        self, weight: Tensor, bias: Tensor | None, class_weight: Tensor | None, target: Tensor, rows: Tensor, logits: Tensor | None
    ) -> Tensor:
        inputs = [rows, target, weight, *(t for t in (bias, class_weight) if t is not None)]
        step = _Chunk(self.head, bias is not None, class_weight is not None, logits)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
            return step(rows, *inputs)[0]
        return run_segment(self.name, self.on_drift, step, rows, inputs, 0 if logits is None else None)[0]


class Logits(Unseen):
    """The linear layer of a head, whose values others read too."""

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(hidden, weight, bias)


def _chunk_size(rows: int, weight: Tensor) -> int:
    classes, features = weight.shape
    return max(1, features, rows * features // classes)


class _Chunk(nn.Module):
    """The sum of the cross entropies of some rows.

    Args:
        logits: what to read in the first run; None: what the linear layer gives.
    """

    stateless = True

    def __init__(self, head: Head, has_bias: bool, has_class_weight: bool, logits: Tensor | None) -> None:
        super().__init__()
        self.head, self.has_bias, self.has_class_weight, self.logits = head, has_bias, has_class_weight, logits

    def path_of(self, name: str) -> str:
        return name

    def forward(self, _: Tensor, rows: Tensor, target: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor]:
        bias = more[0] if self.has_bias else None
        class_weight = more[-1] if self.has_class_weight else None
        logits, self.logits = self.logits, None
        if logits is None:
            with saved_tensors_hooks(_same, _same) if self.head.shared else nullcontext():  # no layer of the first run's
                logits = F.linear(rows, weight, bias)
        return (self.head.loss(logits, target, class_weight, "sum"),)


def _same(saved: Tensor) -> Tensor:
    return saved


class _Part(torch.autograd.Function):
    """Rows of a table, and the table for those who take the others: the gradients of all rows are written to one table, which the last who
    took some makes. (Those of `split` are gathered first, and then copied into one.)
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.start, ctx.stop, ctx.shape = start, stop, table.shape
        return table.view_as(table), table[start:stop]

    @staticmethod
    def backward(ctx: Any, table: Tensor | None, rows: Tensor | None) -> tuple[Tensor | None, None, None]:
        if rows is None:
            return table, None, None
        if table is None:
            table = rows.new_zeros(ctx.shape)
        table[ctx.start : ctx.stop] = rows
        return table, None, None
