"""A linear layer and its cross entropy in chunks of tokens, of which the backward pass computes one after the other again: no more than one
chunk's logits are ever there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes import Head

from ..runtime.replay import exported, transformed
from ..runtime.segment import run_segment
from .filling import Unseen

__all__ = ["ChunkedHead"]


class ChunkedHead(Unseen):
    """`cross_entropy(linear(hidden, weight, bias), target)`.

    A chunk has as many rows as there are features, so that its logits are as large as the weights, or so many that its logits are as large
    as all hidden values. The sum over the chunks is rounded otherwise than a sum over all rows.

    Args:
        head: what `passes.heads` found.
        on_drift: what is done about a rerun that differs.
    """

    def __init__(self, head: Head, on_drift: str) -> None:
        super().__init__()
        self.head, self.on_drift = head, on_drift
        self.name = f"the head {head.linear}"

    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None) -> Tensor:
        """
        Args:
            hidden: rows of features, of any leading shape.
            weight: classes x features.
            bias: classes, or None.
            target: the class of each row, int64.
            class_weight: classes, or None.
        """
        taken = hidden if self.head.slices is None else hidden[self.head.slices]
        rows = taken.reshape(-1, weight.shape[1])
        total = torch.stack([self._sum(part, weight, bias, wanted, class_weight) for part, wanted in self._chunks(rows, weight, target)])
        if self.head.reduction == "sum":
            return total.sum()
        wide = torch.promote_types(total.dtype, torch.float32)
        return (total.to(wide).sum() / self._count(target, class_weight, wide)).to(total.dtype)

    def _chunks(self, rows: Tensor, weight: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        classes, features = weight.shape
        size = max(1, features, rows.shape[0] * features // classes)
        yield from zip(rows.split(size), target.split(size), strict=True)

    def _count(self, target: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The number of rows that count, or the sum of their weights."""
        counting = target != self.head.ignore_index
        if class_weight is None:
            return counting.sum(dtype=dtype)
        return (class_weight[target.where(counting, 0)] * counting).sum(dtype=dtype)  # no mask as an index, for which a device would wait

    def _sum(self, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None) -> Tensor:
        inputs = [rows, target, weight, *(t for t in (bias, class_weight) if t is not None)]
        step = _Chunk(self.head, bias is not None, class_weight is not None)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs) or transformed() or exported():
            return step(rows, *inputs)[0]
        return run_segment(self.name, self.on_drift, step, rows, inputs, 0)[0]


class _Chunk(nn.Module):
    """The sum of the cross entropies of some rows."""

    stateless = True

    def __init__(self, head: Head, has_bias: bool, has_class_weight: bool) -> None:
        super().__init__()
        self.head, self.has_bias, self.has_class_weight = head, has_bias, has_class_weight

    def path_of(self, name: str) -> str:
        return name

    def forward(self, _: Tensor, rows: Tensor, target: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor]:
        bias = more[0] if self.has_bias else None
        class_weight = more[-1] if self.has_class_weight else None
        logits = F.linear(rows, weight, bias)
        options: dict[str, Any] = {"ignore_index": self.head.ignore_index, "label_smoothing": self.head.label_smoothing}
        return (F.cross_entropy(logits, target, class_weight, reduction="sum", **options),)
