"""Exact arithmetic of the momentum recurrence: two integer shears, each undone bit for bit.

The momentum recurrence of Sander et al. 2021 (arXiv 2102.07870, eq. 2), with a weight b[t] (1 - g[t] in the paper),

    v[t+1] = g[t] * v[t] + b[t] * f[t](x[t])
    x[t+1] = x[t] + v[t+1]

contains a multiplication by g < 1, which no rounding arithmetic can undo. Put u[t] = v[t] / (g[0] * ... * g[t-1]): then each line only adds
to one variable a function of the *other* one, which is a shear (lifting step). Here x and u are integers,

    x = X * unit                  v = U * ratio * unit

and what is added is rounded to an integer first:

    ratio <- g * ratio                          U is not touched; what one unit of U means shrinks instead
    U <- U + round(y * b / (ratio * unit))      undone by subtracting the same rounded number
    X <- X + round(U * ratio)                   undone by subtracting the same rounded number

so the inverse is exact for every g, every y and any number of steps (Levesque & Verlet 1993; Rein & Tamayo 2018, arXiv 1704.07715).

**Where the bits go.** A step contracts volume by g, so log2(1/g) bits per element *must* be kept by whoever wants to go back. They are the
low bits of U, whose magnitude grows by 1/g for a given v. When U would outgrow its 53 bits, its low bits are *spilled*: moved to packed
bytes, losslessly, and put back by the inverse. X is re-gridded in the same way when the stream outgrows its range. g = 0 forgets v
altogether, so the whole of U is spilled: that step is a checkpoint.

**Formats.** The dtypes and sizes of X and U for each dtype of the stream are in `formats`. A stream that is promoted on the way, by a
residual of a wider dtype, is *widened*, losslessly.

**Accuracy.** The grid is equally fine everywhere, while float32 is finer where |x| is small. Where residual functions mix elements, as
networks do, that makes no difference: the largest error, relative to the largest |x|, is at most twice the float32 recurrence's (but in
chaotic chains, which blow up the roundings of f itself: with a finer grid, their ratio is another, not a smaller one). Where elements never
mix and those below 1e-3 of the largest grow to its size, it can be a hundred times larger. Within 12 bytes that cannot be mended: an X of
40 bits leaves too few for a U that resolves v as finely, holds roundings that add up, and has room to spill a byte; a unit for each
channel does nothing for the elements of one. Held as float64 (`held`, 16 bytes), such streams keep the promise down to 1e-6 of the largest.

**Never a wrap.** Decisions are taken on the host, from an upper bound of |x| and |v| that follows the recurrence with max|y| of each step
(one scalar read per step and forward pass; none when going back, since every decision is in the step's `Record`).

**inf and NaN** in x[0] or y add nothing to the integers; they are kept as a mask, and come out of `read` as NaN from then on. So does
what no float64 should be, beyond 2^1000.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import StreamError
from .fingerprints import prints
from .formats import Format, has_float64
from .kernels.eager import EAGER, LARGEST, Kernels, Spill, fill, max_abs, read, spill, strides, unspill
from .rotations import Rotation

__all__ = ["Record", "State"]


@dataclass
class Record:
    """What the inverse of one step needs besides y: host numbers, and what was spilled.

    `scale`, `ratio`: the two factors of the shears. `unit`, `old_ratio`, `bounds`, `mask`, `dtype`, `format`: the state's fields before the
    step (after it, while `unstep_x` has been done). `rotation`: see `RotatedState`.
    """

    scale: float
    ratio: float
    finite: bool
    unit: float
    old_ratio: float
    bounds: tuple[float, float]
    mask: Tensor | None
    dtype: torch.dtype
    format: Format
    x_spill: Spill | None = None
    u_spill: Spill | None = None
    rotation: Rotation | None = None


class State:
    """Integers (X, U) of one chain at one time, and the numbers that give them meaning.

    Args of `start`:
        x0: the stream, real floating dtype, any shape and strides.
        v0: initial velocity, shape of x0, or None for zero.
        horizon: about how many steps a rounding of v lives on in x, min(steps, 1 / (1 - g)); u gets log2 of it more bits.
        kernels: the loops to use.
        held: hold the stream as one of this dtype, because it will be promoted to it; default its own.

    Exactness: after `step(y, ...)` gave a record r, `unstep_x(r)` and `unstep_u(r, y)` restore every bit of X, U and every other field.
    The forward itself errs by half a unit per rounding: at most 2**-30 of max|x[0]| for float32, see `Format`.
    """

    X: Tensor
    U: Tensor

    def __init__(
        self, x0: Tensor, v0: Tensor | None = None, horizon: float = 1.0, kernels: Kernels = EAGER, held: torch.dtype | None = None
    ) -> None:
        _check_stream(x0)
        self.format = Format.of(held or x0.dtype)
        self.dtype, self.kernels = x0.dtype, kernels
        self.mask: Tensor | None = None
        self.fine = 2 + math.ceil(math.log2(max(horizon, 1.0)))
        self.ratio = self._fresh()
        self.X = torch.empty_like(x0, dtype=self.format.dtype, requires_grad=False)  # dense, whatever the strides of x0
        self.U = torch.zeros_like(self.X, dtype=self.format.u_dtype)
        x0, self.x_bound = self._finite(x0)
        v0, self.v_bound = self._finite(v0) if v0 is not None else (None, 0.0)
        self.unit = 2.0 ** (_exponent(max(self.x_bound, self.v_bound)) - self.format.bits)
        fill(self.X, x0, 1 / self.unit, self.mask is None)
        self.x_bound += 0.5 * self.unit if self.x_bound else 0.0  # the roundings; a bound of 0 says that all are 0
        self.v_bound += 0.5 * self.unit * self.ratio if self.v_bound else 0.0
        if v0 is not None:
            fill(self.U, v0, 1 / (self.unit * self.ratio), self.mask is None)
        self.from_rest = self.v_bound == 0.0

    def _finite(self, t: Tensor) -> tuple[Tensor, float]:
        """t in the layout of X and max|t| over its finite elements; the others, and those beyond LARGEST, join the mask."""
        bound = self._largest(t)
        t = self._aligned(t)
        if not bound <= LARGEST:
            bad = ~(t.abs() <= min(LARGEST, torch.finfo(t.dtype).max))
            self.mask = bad if self.mask is None else self.mask | bad
            bound = self._largest(t.masked_fill(bad, 0.0))
        return t, bound

    def _largest(self, t: Tensor) -> float:
        """max|t| of a stream, a residual, X or U. This and `_is_any` are all that decisions take from values."""
        return max_abs(t)

    def _is_any(self, where: Tensor) -> bool:
        """Whether a mask has any element."""
        return bool(where.any())

    def _aligned(self, t: Tensor) -> Tensor:
        """t with the strides of X, copied only where it has others."""
        return t if t.stride() == self.X.stride() or strides(t) == strides(self.X) else torch.empty_like(self.X, dtype=t.dtype).copy_(t)

    def step(self, y: Tensor, gamma: float, weight: float) -> tuple[Record, Tensor]:
        """One step of the recurrence, in place: v <- gamma * v + weight * y; x <- x + v.

        Args:
            y: f(x), shape of x, any real floating dtype and strides.
            gamma: in [0, 1).
            weight: the factor b of y.

        Returns:
            What the inverse needs, and the new x as a fresh tensor.
        """
        record = self._record()
        y, y_bound = self._finite(y)
        record.finite = self.mask is record.mask
        self.dtype = torch.promote_types(self.dtype, y.dtype)
        self._widen(Format.of(self.dtype))
        self._make_room(record, gamma, abs(weight) * y_bound)
        record.ratio, record.scale = self.ratio, weight / (self.ratio * self.unit)
        out = torch.empty_like(self.X, dtype=self.dtype)
        self._loops(record, record.finite).shear(self.X, self.U, y, out, record.scale, record.ratio, self.unit, record.finite)
        return record, self._held(out)

    def _held(self, out: Tensor) -> Tensor:
        """x after a step, masked: what the dtype cannot hold would be inf in the plain model, and stay so."""
        if self.x_bound > torch.finfo(self.dtype).max and self._is_any(beyond := torch.isinf(out)):
            self.mask = beyond if self.mask is None else self.mask | beyond
        return self._masked(out)

    def _record(self) -> Record:
        return Record(1.0, 1.0, True, self.unit, self.ratio, (self.x_bound, self.v_bound), self.mask, self.dtype, self.format)

    def unstep_x(self, record: Record) -> Tensor:
        """First half of the inverse, which needs no y: x is x[t] again, u still u[t+1]. Returns x[t]."""
        out = torch.empty_like(self.X, dtype=record.dtype)  # before anything moves, as it may fail
        self._swap(record)
        self._loops(record).unshear_x(self.X, self.U, out, record.ratio, self.unit)
        if record.x_spill is None and record.format == self.format:
            return self._masked(out)
        if record.x_spill is not None:
            unspill(self.X, record.x_spill)
        self.X = _shifted(self.X, self.format.dtype, -self.format.widening(record.format))
        return self.read()

    def unstep_u(self, record: Record, y: Tensor) -> None:
        """Second half of the inverse: u is u[t] again."""
        self._loops(record, record.finite).unshear_u(self.U, self._aligned(y), record.scale, record.finite)
        if record.u_spill is not None:
            unspill(self.U, record.u_spill)
        if self.U.dtype != self.format.u_dtype:
            self.U = _shifted(self.U, self.format.u_dtype, -self.format.widening(record.format))

    def restep_x(self, record: Record) -> None:
        """Takes `unstep_x` back, for a step whose second half never ran (its f raised)."""
        self._swap(record)
        self.X = _shifted(self.X, self.format.dtype, record.format.widening(self.format))
        if record.x_spill is not None:
            spill(self.X, record.x_spill.bits, self.format.limit)
        self._loops(record, False).unshear_x(self.X, self.U, torch.empty_like(self.X), -record.ratio, 1.0)

    def _loops(self, record: Record, finite: bool = True) -> Kernels:
        """The loops for one step; `finite`: whether any will do."""
        return self.kernels if finite else EAGER

    def read(self) -> Tensor:
        """x as a fresh tensor of the stream's dtype, in the layout of X, with NaN where the mask is set."""
        out = torch.empty_like(self.X, dtype=self.dtype)
        read(self.X, out, self.unit)
        return self._masked(out)

    def _masked(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x.masked_fill_(self.mask, math.nan)

    def _swap(self, record: Record) -> None:
        """Exchanges the fields that are not X or U with those in the record: before the step for after it, and back."""
        bounds = (self.x_bound, self.v_bound)
        self.unit, record.unit = record.unit, self.unit
        self.ratio, record.old_ratio = record.old_ratio, self.ratio
        (self.x_bound, self.v_bound), record.bounds = record.bounds, bounds
        self.mask, record.mask = record.mask, self.mask
        self.dtype, record.dtype = record.dtype, self.dtype
        self.format, record.format = record.format, self.format

    def _widen(self, wider: Format) -> None:
        """Goes over to a format, losslessly, if it has more bits."""
        if wider.bits <= self.format.bits:
            return
        bits = self.format.widening(wider)
        self.X = _shifted(self.X, wider.dtype, bits)
        self.unit *= 2.0**-bits
        if self.format.u_dtype == wider.u_dtype:
            self.ratio *= 2.0**bits
        else:
            self.U = _shifted(self.U, wider.u_dtype, bits)
        self.format = wider

    def _fresh(self) -> float:
        """Ratio of the units of U and X where U starts from 0 or has been spilled."""
        return 2.0 ** -min(self.fine, self.format.fine)

    def _make_room(self, record: Record, gamma: float, increment: float) -> None:
        """Brings the bounds and the ratio to after the step, spilling what would outgrow X or U."""
        if self.x_bound + gamma * self.v_bound + increment >= self.format.limit * self.unit:
            self.x_bound = min(self.x_bound, self._largest(self.X) * self.unit)
            self.v_bound = min(self.v_bound, self._largest(self.U) * self.ratio * self.unit)
        v_bound = gamma * self.v_bound + increment
        x_bound = self.x_bound + v_bound
        held = self.v_bound / (self.ratio * self.unit)  # a bound of |U|
        self._room_in_x(record, x_bound)
        self._room_in_u(record, gamma, v_bound, held)
        slack = self.ratio * self.unit  # the roundings of this step: two in U, two in X
        self.v_bound, self.x_bound = v_bound * (1 + 1e-9) + slack, x_bound * (1 + 1e-9) + slack + self.unit

    def _room_in_x(self, record: Record, x_bound: float) -> None:
        if x_bound < self.format.limit * self.unit - 4 * self.unit:
            return
        bits = _exponent(x_bound) - (math.frexp(self.unit)[1] - 1) - (self.format.bits - 1)  # room for more than one doubling
        bound = self.x_bound / self.unit
        if bound >= 0.5:  # else X is all zeros, which any unit serves
            record.x_spill = spill(self.X, bits, bound)
        self.unit, self.ratio = math.ldexp(self.unit, bits), math.ldexp(self.ratio, -bits)

    def _room_in_u(self, record: Record, gamma: float, v_bound: float, held: float) -> None:
        self.ratio *= gamma
        if self.v_bound == 0.0:
            self.ratio = self._fresh()
        elif gamma == 0.0 or self.ratio < 2.0**-300:
            record.u_spill = spill(self.U, math.inf, held)
            self.ratio = self._fresh()
        elif v_bound >= self.format.u_limit * self.ratio * self.unit:
            bits = (math.frexp(self._fresh() / self.ratio)[1] - 1) // 8 * 8  # whole bytes; by frexp, as a device does, never by log2
            record.u_spill = spill(self.U, bits, held)
            self.ratio *= 2.0**bits

    def ahead(self) -> Self:
        """A state of the same time that goes on alone, while this one stays."""
        state = copy.copy(self)
        state.X, state.U = self.X.clone(), self.U.clone()
        return state

    def tensors(self) -> list[Tensor]:
        """What it keeps on a device, but for what is in records."""
        return self.bulk()

    def bulk(self) -> list[Tensor]:
        """Of that, what grows with the stream; each has memory of its own."""
        return [self.X, self.U]

    def trim(self, wait: bool) -> None:
        """Frees what no step needed. wait: for a device that has not told yet."""

    def moved(self) -> None:
        """To be called when the memory of these was given back for a time, and may lie elsewhere now."""

    def off_zero(self) -> tuple[int, float]:
        """Number of elements with v other than 0, and max|v| in units of x."""
        return int(torch.count_nonzero(self.U)), max_abs(self.U) * self.ratio * self.unit

    def fingerprint(self, *others: Tensor) -> tuple[Any, ...]:
        """Fingerprints of X, of U, and of other tensors; they stay on their device."""
        return tuple(prints([self.X, self.U, *others]))


def _shifted(T: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """T * 2**bits in another dtype; T itself where there is nothing to do."""
    return T if bits == 0 and T.dtype is dtype else T.double().mul_(2.0**bits).to(dtype)


def _exponent(bound: float) -> int:
    """Smallest e with bound <= 2**e, but at least -450 (also for 0), so that units and their ratios stay far from underflow."""
    return max(math.frexp(bound)[1], -450) if bound > 0.0 else -450


def _check_stream(x: Tensor) -> None:
    if x.device.type == "meta":
        raise StreamError("the stream is on the meta device: it has no values to put on a grid; move model and input to a real device")
    if not has_float64(x.device):
        raise StreamError(
            f"the stream is on {x.device}, which has no float64, and a momentum chain needs that to be exact: run on a CPU or on CUDA, or "
            "leave this part out"
        )
    if not x.dtype.is_floating_point:
        raise StreamError(f"the stream of a momentum region must be real floating point, got {x.dtype}: convert it, or leave this part out")
    if x.numel() == 0:
        raise StreamError(f"the stream of a momentum region is empty, shape {tuple(x.shape)}: skip zero-size batches")
