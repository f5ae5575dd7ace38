"""What the runtime is compared with; nothing in here uses the runtime."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(x0: Tensor, functions, factors, v0: Tensor | None = None) -> list[Tensor]:
    """x[0], ..., x[T] of v' = g v + b f(x), x' = x + v', in the arithmetic of x0's dtype, differentiable by plain autograd."""
    x, v = x0, torch.zeros_like(x0) if v0 is None else v0
    stream = [x]
    for f, (g, b) in zip(functions, factors, strict=True):
        v = g * v + b * f(x)
        x = x + v
        stream.append(x)
    return stream


class IntegerState:
    """(X, U) of one element in Python integers of any size, following the decisions noted in the records of the runtime."""

    def __init__(self, X: int, U: int) -> None:
        self.X, self.U = X, U

    def step(self, y: float, scale: float, ratio: float, x_bits: float | None, u_bits: float | None) -> tuple[int | None, int | None]:
        """One step; returns the low bits that a spill of X or U takes out, as signed integers."""
        self.X, x_low = split(self.X, x_bits)
        self.U, u_low = split(self.U, u_bits)
        self.U += round(y * scale)
        self.X += round(float(self.U) * ratio)
        return x_low, u_low


def split(n: int, bits: float | None) -> tuple[int, int | None]:
    """n = whole * 2**bits + low with low in [-2**(bits-1), 2**(bits-1)); bits None: nothing splits off; inf: everything does."""
    if bits is None:
        return n, None
    if bits == float("inf"):
        return 0, n
    k = int(bits)
    whole = (n + (1 << (k - 1))) >> k
    return whole, n - (whole << k)


def unpack(planes: Tensor, element: int) -> int:
    """The signed integer that the packed bytes (planes, numel) hold for one element."""
    column = planes[:, element].tolist()
    return sum(byte << (8 * j) for j, byte in enumerate(column)) - (1 << (8 * len(column) - 1))


def numeric_gradient(function, x: Tensor, direction: Tensor, eps: float) -> float:
    """Directional derivative of a scalar function at x by central differences."""
    return ((function(x + eps * direction) - function(x - eps * direction)) / (2 * eps)).item()


class Biased(torch.autograd.Function):
    """The identity, whose gradient is off by a hundredth: what a judge of gradients must see."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01
