"""The recurrence in floating point, for what cannot follow integers."""

from __future__ import annotations

import torch
from torch import Tensor

from .shear import Factors
from .tape import PlainTape

__all__ = ["FloatTape"]


class FloatTape(PlainTape):
    """No tape: the recurrence in floating point, for what cannot follow integers (torch.func's transforms, forward-mode differentiation,
    torch.export), and for streams without elements.

    Equal to the others up to rounding in the stream's dtype; v is held in float32 at least.
    """

    def __init__(self, region: str, factors: Factors) -> None:
        self._begin(region, factors, "ignore")

    def begin(self, x0: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return x0, v0

    def watches(self, x: Tensor) -> bool:
        return False  # x + y is the caller's own, and there are no integers that a write would leave behind

    def advance(self, t: int, x: Tensor, v: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        gamma, weight = self.factors[t]
        dtype = torch.promote_types(x.dtype, y.dtype)
        y, rotation = weight * y.to(torch.promote_types(dtype, torch.float32)), self.rotations.get(t)
        y = y if rotation is None else rotation.residual(y)
        v = y if v is None else gamma * v + y
        return (x + (v if rotation is None else rotation.velocity(v))).to(dtype), v
