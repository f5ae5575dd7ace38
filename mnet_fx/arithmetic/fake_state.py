"""The state of a chain on fake tensors: keeps what a real one keeps, for a stream of supposed magnitude."""

from __future__ import annotations

from torch import Tensor

from .fixed_point import State

__all__ = ["RESIDUAL", "FakeState"]

RESIDUAL = 1.0  # supposed: the largest |f(x)| and |v|, relative to the largest |x|


class FakeState(State):
    """A state of fake integers. All decisions are those of `State` for a stream whose largest element stays 1, with residuals of at most
    `RESIDUAL`: a real stream spills a byte earlier or later where these ratios are others.
    """

    def _finite(self, t: Tensor) -> tuple[Tensor, float]:
        return self._aligned(t), RESIDUAL if hasattr(self, "unit") else 1.0

    def _largest(self, T: Tensor) -> float:
        return 1.0 / self.unit if T is self.X else RESIDUAL / (self.ratio * self.unit)
