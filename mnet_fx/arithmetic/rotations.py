"""Rotated velocities: where v is multiplied by g, an orthogonal matrix O[t] may turn it too, at no cost in bits.

With matched weights, z = x + c v is what the original network would read. Between two residual functions v may be mapped by any map that
keeps volume but for the factor g, as long as z stays as it is:

    v[t+1] = (g v[t] + b f[t](x[t])) O[t]                x[t+1] = z[t+1] - c[t+1] v[t+1]

so that errors come to lie where the next function listens least, or, with signs drawn at random, do not add up.

No integer is turned, which no rounding arithmetic could undo. U stays in the frame in which it began, v = U Q ratio unit with Q[0] = 1 and
Q[t+1] = Q[t] O[t], and both lines are shears as ever:

    U <- U + round(y Q[t]' b / (ratio unit))
    X <- X + round(U M ratio)                            M = (1 + c) Q[t] - c Q[t+1]  with c = c[t+1]
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MnetError

__all__ = ["Rotation"]


@dataclass(frozen=True)
class Rotation:
    """How v is turned between steps t and t + 1.

    Attributes:
        axis: the dimension of channels.
        before, after: the frames Q[t] and Q[t+1]: orthogonal, of shape (n, n), or vectors (n,) of signs, of any floating dtype; None: the
            identity.
        reach: c[t+1].
    """

    axis: int
    before: Tensor | None
    after: Tensor | None
    reach: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._now())

    def check(self) -> None:
        """
        Raises:
            MnetError: a frame was changed in place since the chain ran.
        """
        if self._now() != self.__dict__["_versions"]:
            raise MnetError(
                "a frame of the calibration was changed in place since the forward pass, which its gradient needs as it was: calibrate "
                "before the forward pass, or give momentumize other maps"
            )

    def _now(self) -> list[int]:
        """Versions of the frames."""
        return [frame._version for frame in (self.before, self.after) if frame is not None and not frame.is_inference()]

    def residual(self, y: Tensor) -> Tensor:
        """y Q[t]': what the step adds to u."""
        return y if self.before is None else self._times(y, _transposed(self.before))

    def residual_gradient(self, gradient: Tensor) -> Tensor:
        """That of y, from that of y Q[t]'."""
        return gradient if self.before is None else self._times(gradient, self.before)

    def velocity(self, u: Tensor) -> Tensor:
        """u M: what the step adds to x."""
        return self._times(u, self._matrix(u))

    def velocity_gradient(self, gradient: Tensor) -> Tensor:
        """That of u, from that of u M."""
        return self._times(gradient, _transposed(self._matrix(gradient)))

    def _matrix(self, like: Tensor) -> Tensor:
        """M, in float64, as a vector where frames are signs."""
        one = torch.ones(like.shape[self.axis], dtype=torch.float64, device=like.device)
        before, after = (one if frame is None else frame.to(like.device) for frame in (self.before, self.after))
        if before.dim() != after.dim():
            before, after = (frame.diag() if frame.dim() == 1 else frame for frame in (before, after))
        return before.to(torch.float64, copy=True).mul_(1 + self.reach).sub_(after, alpha=self.reach)

    def _times(self, t: Tensor, factor: Tensor) -> Tensor:
        moved, factor = t.movedim(self.axis, -1), factor.to(t)
        if factor.dim() == 1:
            return (moved * factor).movedim(-1, self.axis)
        with torch.autocast(t.device.type, enabled=False) if torch.is_autocast_enabled(t.device.type) else nullcontext():
            return (moved @ factor).movedim(-1, self.axis)


def _transposed(frame: Tensor) -> Tensor:
    return frame.mT if frame.dim() == 2 else frame
