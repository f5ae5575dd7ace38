"""The autograd functions that join a chain's values, which come from a tape, to its gradients, which are those of the recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import UNCOMPILED, StreamError
from .guise import Guise, dressed, plain

__all__ = ["Enter", "Factors", "Shear"]

Factors = tuple[tuple[float, float], ...]


class Enter(Function):
    """x0 and v0, put on the grid; straight-through backward."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, v0: Tensor | None, tape: Any) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.gamma = tape.factors[0][0]
        with torch._C.DisableTorchFunction():  # subclasses and modes are about the model's operations
            start, token = tape.enter(), None if v0 is None else _token(plain(x0))
        return dressed(start, Guise.of(x0)), token

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if gv is not None:
            gv = gv * ctx.gamma  # see Shear
        elif gx is not None and ctx.needs_input_grad[1]:
            gv = torch.zeros_like(gx)  # g[0] = 0 forgets v0
        return gx, gv, None


class Shear(Function):
    """(x[t], v[t], y) -> (x[t+1], v[t+1]): values from the tape, gradient of v' = g v + b y, x' = x + v'.

    v is a token of the stream's shape without memory: only its gradient is real. What is handed on as the gradient of v[t] is that of
    v[t+1], which is to be multiplied by g[t] by whoever takes it: one pass over the elements less. Where velocities are rotated, it is
    that of u, see `arithmetic.rotations`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, tape: Any, t: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.dtypes, ctx.rotation = tape.factors[t : t + 2], (x.dtype, y.dtype), tape.rotations.get(t)
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
        (gamma, weight), (x_dtype, y_dtype), rotation = ctx.factors[0], ctx.dtypes, ctx.rotation
        if rotation is not None:
            rotation.check()
        by_x = gx if gx is None or rotation is None else rotation.velocity_gradient(gx)
        if gv is not None:
            next_gamma = ctx.factors[1][0]
            gv = gv * next_gamma if by_x is None else torch.add(by_x, gv, alpha=next_gamma)
        total = by_x if gv is None else gv
        if total is None:
            return None, None, None, None, None
        gy = None
        if ctx.needs_input_grad[2]:
            gy = ((total if rotation is None else rotation.residual_gradient(total)) * weight).to(y_dtype)
        return None if gx is None else gx.to(x_dtype), total if gamma and ctx.needs_input_grad[1] else None, gy, None, None


def _token(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, (0,) * x.dim())
