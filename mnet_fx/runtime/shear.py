"""The autograd functions that join a chain's values, which come from a tape, to its gradients, which are those of the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import UNCOMPILED, StreamError
from .guise import Guise, dressed, plain

__all__ = ["Enter", "Factors", "Shear", "handed_on"]

Factors = tuple[tuple[float, float], ...]
ROUNDING = 1e-15  # of a sum of two factors that are exact to the last bit


class Enter(Function):
    """x0 and v0, put on the grid; straight-through backward."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, v0: Tensor | None, tape: Any) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.handed_on, ctx.region = tape.handed_on[0], tape.region
        with torch._C.DisableTorchFunction():  # subclasses and modes are about the model's operations
            start, token = tape.enter(), None if v0 is None else _token(plain(x0))
        return dressed(start, Guise.of(x0)), token

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if gv is not None:
            _check_unwritten(gv, (ctx.region, -1))
            gv = gv * ctx.handed_on[1]
        elif gx is not None and ctx.needs_input_grad[1]:
            gv = torch.zeros_like(gx)  # g[0] = 0 forgets v0
        return gx, gv, None


class Shear(Function):
    """(x[t], v[t], y) -> (x[t+1], v[t+1]): values from the tape, gradient of v' = g v + b y, x' = x + v'.

    v is a token of the stream's shape without memory: only its gradient is real. What is handed on as the gradient of v[t] is that of y,
    which is there anyway, and whoever takes it multiplies it by g[t] / b[t] (see `handed_on`): one tensor less, and one pass over the
    elements. Where velocities are rotated, it is that of u, see `arithmetic.rotations`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, tape: Any, t: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.handed_on, ctx.rotation = tape.factors[t], tape.handed_on[t : t + 2], tape.rotations.get(t)
        ctx.dtypes, ctx.place = (x.dtype, y.dtype), (tape.region, t)
        if y.device != x.device:
            raise StreamError(
                f"{tape.region}, step {t}: the stream is on {x.device}, and what the step adds to it on {y.device}: one region per device, "
                "with the stream moved between the two, or move what is added"
            )
        guise = Guise.of_sum(x, y, tape.region)
        with torch._C.DisableTorchFunction():
            after = tape.push(t, plain(y), plain(x))
            token = _token(after)
        return dressed(after, guise), token

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        (gamma, weight), (x_dtype, y_dtype), rotation = ctx.factors, ctx.dtypes, ctx.rotation
        if rotation is not None:
            rotation.check()
        if gx is None:
            assert gv is None, "whoever reads v[t + 1] reads x[t + 1]"
            return None, None, None, None, None
        _check_unwritten(gv, ctx.place)
        (scale, _), *after = ctx.handed_on
        by_x = gx if rotation is None else rotation.velocity_gradient(gx)
        total = _weighted(by_x, scale, gv, scale * after[0][1] if after else 0.0)
        if total is gx and gamma:
            total = gx.clone()  # as others have gx too, which `_check_unwritten` could not tell apart
        gy = None
        if ctx.needs_input_grad[2]:
            gy = total if rotation is None else rotation.residual_gradient(total)
            gy = (gy if weight else gy * weight).to(y_dtype)
        return gx.to(x_dtype), total if gamma and ctx.needs_input_grad[1] else None, gy, None, None


def handed_on(factors: Factors) -> tuple[tuple[float, float], ...]:
    """For each step what the gradient of v[t + 1] was multiplied by before it is handed on, and by what that is to be multiplied then."""
    return tuple((weight or 1.0, gamma / (weight or 1.0)) for gamma, weight in factors)


def _weighted(gx: Tensor, a: float, gv: Tensor | None, b: float) -> Tensor:
    """a gx + b gv, in one pass where a + b = 1."""
    if gv is None:
        return gx if a == 1 else gx * a
    if abs(a + b - 1) < ROUNDING and gx.dtype == gv.dtype:
        return torch.lerp(gv, gx, a) if a < b else torch.lerp(gx, gv, b)  # 1 minus the lesser is exact enough, also in float32
    return torch.add(gx if a == 1 else gx * a, gv, alpha=b)


def _check_unwritten(gv: Tensor | None, place: tuple[str, int]) -> None:
    """
    Raises:
        StreamError: somebody wrote to the gradient of y that the step behind handed on, which is that of v.
    """
    if gv is not None and not gv.is_inference() and gv._version:
        raise StreamError(
            f"{place[0]}: a hook, or the backward of an autograd.Function, writes to the gradient of what step {place[1] + 1} adds to the "
            "stream, which torch forbids (others may read it): make it return a new tensor"
        )


def _token(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, (0,) * x.dim())
