"""The state of one chain on a device: the bits of `State`, without a read of the host in any step.

What a step decides (units, ratios, spills) is decided on the device and stays there, in a ledger with a row for each time, see
`kernels.device_decide`. The host knows the time, the dtypes, and how much memory there is for what is spilled (`device_planes`); so the
record of a step is its index, and the state can be moved before the device has come to it. A step takes two launches, and so does its
inverse. Fingerprints are gathered on the way by the same passes over the elements, and stay on the device until somebody wants them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import StreamError
from .device_planes import LostBits, Planes, Reserve
from .fixed_point import _check_stream
from .formats import Format
from .kernels.choice import usable
from .kernels.eager import strides
from .kernels.launching import Launcher

__all__ = ["DeviceState", "LostBits", "Reserve", "supported"]

BLOCK, REACH_BLOCK = 256, 1024  # elements that a program takes at once; with more, too few programs have room for their registers
PROGRAMS = 2048  # at most, since each ends in atomic operations on the same words
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TOPS = {dtype: torch.finfo(dtype).max for dtype in _FLOATS}


@cache
def _kernels() -> Any:
    """All kernels by name, and the words of a ledger; Triton is imported when the first chain wants it."""
    from .kernels import device, device_decide
    from .kernels.device_math import MOST_STEPS, OPTIONS

    kernels = {name: getattr(device, name) for name in device.__all__} | {"start": device_decide.start, "reach": device_decide.reach}
    launchers = {name: Launcher(kernel, OPTIONS) for name, kernel in kernels.items()}
    return SimpleNamespace(**launchers, words=device_decide, most_steps=MOST_STEPS)


def supported(x0: Tensor, factors: Sequence[tuple[float, float]], held: torch.dtype | None = None) -> bool:
    """Whether a `DeviceState` can carry a chain; `State` can carry any."""
    return (
        x0.layout is torch.strided
        and 0 < x0.numel() < 2**31
        and x0.dtype in _FLOATS
        and (held is None or held in _FLOATS)
        and len(factors) > 0
        and usable(x0.device)
        and len(factors) <= _kernels().most_steps
    )


@lru_cache(maxsize=64)
def _template(factors: tuple[tuple[float, float], ...], device: torch.device) -> Tensor:
    """A ledger with what is known beforehand."""
    words = _kernels().words
    with torch.inference_mode(False):
        rows = torch.zeros((len(factors) + 1, words.WORDS.value), dtype=torch.int64, device="cpu")
        gamma = words.GAMMA.value
        rows[1:, gamma : gamma + 2] = torch.tensor(factors, dtype=torch.float64, device="cpu").view(torch.int64)
        rows[:, words.STEPS.value] = len(factors)
        return rows.to(device)


class DeviceState:
    """Integers (X, U) of one chain on a device; the interface of `State`, but that the factors of all steps are told at the start.

    Args:
        x0: the stream, on the device; any strides.
        v0: initial velocity, shape of x0, or None for zero.
        factors: (g[t], b[t]) of every step.
        horizon, held: as in `State`.
        store: whether to keep what is spilled, so that the chain can go back.
        reserve: of the region, see `Reserve`.
        proof: whether to gather fingerprints; default: if `store`.

    Attributes:
        time: the t of (X[t], U[t]); while `half`, U is that of t + 1.
        X, U: dense tensors, as in `State` but for elements that are NaN, see `kernels.device_math`; `integers` gives them plain.
        dtype, format: of the stream at this time.
        from_rest: whether v[0] is known to be 0.
        written: after a step, two prints that are equal if the stream it was given was that of its time, but for elements that are NaN.
    """

    def __init__(
        self,
        x0: Tensor,
        v0: Tensor | None = None,
        factors: Sequence[tuple[float, float]] = (),
        horizon: float = 1.0,
        held: torch.dtype | None = None,
        store: bool = True,
        reserve: Reserve | None = None,
        proof: bool | None = None,
    ) -> None:
        _check_stream(x0)
        self.loops = _kernels()
        self.dtype, self.format = x0.dtype, Format.of(held or x0.dtype)
        self.kinds, self.time, self.half, self.from_rest = [(self.dtype, self.format)], 0, False, v0 is None
        self.fine = 2 + math.ceil(math.log2(max(horizon, 1.0)))
        self.X = torch.empty_like(x0, dtype=self.format.dtype, requires_grad=False)  # dense, whatever the strides of x0
        self.U = torch.empty_like(self.X, dtype=self.format.u_dtype)
        self.device, self.n, self.steps, self.store = self.X.device, self.X.numel(), len(factors), store
        self.proof = store if proof is None else proof
        self.block = BLOCK
        self.grid, self.rounds = _split(self.n, BLOCK)
        self.reach_grid, self.reach_rounds = _split(self.n, REACH_BLOCK)
        self.factors = [(float(g), float(b)) for g, b in factors]
        self.ledger = _template(tuple(self.factors), self.device).clone()
        gammas, reserve = [g for g, _ in factors], reserve or Reserve()
        self.planes = Planes(gammas, self.format, self.from_rest, self.X, reserve) if store else None
        self.mailbox = self.planes.mail.address if self.planes is not None else 0
        self._fill(self._aligned(x0), None if v0 is None else self._aligned(v0), self.loops.start)

    def _fill(self, x0: Tensor, v0: Tensor | None, start: Any) -> None:
        self.sums = torch.zeros((4 * self.steps + 8, 2), dtype=torch.int64, device=self.device)
        self.none = self.sums[-1]
        self.slot, self.used = 1, 0  # of `sums`: 0 is for numbers that nobody wants
        bits, fresh, some = self.format.bits, min(self.fine, self.format.fine), x0 if v0 is None else v0
        start(self.device, self.reach_grid, x0, some, self.ledger, fresh, self.n, self.reach_rounds, bits, v0 is not None, REACH_BLOCK)
        to = (self.X, self.U, self.ledger, self.sums, self.slot, self.n, self.rounds)
        self.loops.fill(self.device, self.grid, x0, some, *to, v0 is not None, self.proof, self.block)

    def step(self, y: Tensor, *factors: float, given: Tensor | None = None) -> tuple[int, Tensor]:
        """One step of the recurrence, in place, as `State.step`: the next one. Its factors were told at the start; others are told now.

        Returns its index, and the new x as a fresh tensor. With `given`, the stream as somebody has it, `written` then tells whether that
        still was x[t].

        Raises:
            StreamError: y is on another device, or of a dtype that no stream has.
        """
        t = self.time
        if self.half or t >= self.steps:
            raise RuntimeError(f"no step can be taken now, at time {t} of {self.steps}" + (", half-way back" if self.half else ""))
        y = self._aligned(y)
        if factors and factors != self.factors[t]:
            self._tell(t, *factors)
        dtype = self.dtype if y.dtype is self.dtype else torch.promote_types(self.dtype, y.dtype)
        out = torch.empty_like(self.X, dtype=dtype)
        capacity = self.planes.make_room(t) if self.planes is not None else 0
        widen, raised = self._widen(Format.of(dtype))
        form = self.format
        if self.planes is not None:
            self.planes.launching(t)
        self.loops.reach(
            self.device,
            self.reach_grid,
            *(y, self.ledger, self.mailbox, t, capacity, min(self.fine, form.fine), widen, raised, self.n, self.reach_rounds),
            *(form.limit, form.u_limit, form.bits, _TOPS[dtype], self.store, REACH_BLOCK),
        )
        slot = self._fresh_slot()
        of = (self.ledger, self.sums, slot, widen, self.n, t, self.rounds)
        how = (self.store, self.proof, given is not None, self.block)
        self.loops.shear(self.device, self.grid, self.X, self.U, y, out, y if given is None else self._aligned(given), *of, *how)
        self.written = ((self.sums[slot + 1],), (self.none,))
        self.time, self.dtype, self.slot = t + 1, dtype, slot
        self.kinds[t + 1 :] = [(dtype, form)]
        return t, out

    def _tell(self, t: int, gamma: float, weight: float) -> None:
        """Step t has other factors than it was said to have: layers were skipped."""
        self.factors[t], at = (float(gamma), float(weight)), self.loops.words.GAMMA.value
        with torch.inference_mode(False):
            told = torch.tensor(self.factors[t], dtype=torch.float64, device="cpu").view(torch.int64)
        self.ledger[t + 1, at : at + 2].copy_(told)
        if self.planes is not None:
            self.planes.expect([gamma for gamma, _ in self.factors])

    def unstep_x(self, record: int) -> Tensor:
        """First half of the inverse, which needs no y: x is x[t] again, u still u[t+1]. Returns x[t].

        Raises:
            LostBits: it is known by now that the chain cannot go back.
        """
        t = self._previous(record)
        dtype, form = self.kinds[t]
        out = torch.empty_like(self.X, dtype=dtype)  # before anything moves, as it may fail
        X = self.X if form == self.format else torch.empty_like(self.X, dtype=form.dtype)
        self.before = (self.sums, self.slot)
        slot = self._fresh_slot()
        told = slot if form == self.format else 0
        of = (self.ledger, self.sums, told, self.n, t, self.rounds)
        self.loops.unshear_x(self.device, self.grid, self.X, self.U, out, *of, False, self.proof, self.block)
        if X is not self.X:
            self._recode(X, self.U, -form.widening(self.format), 0)
        self.time, self.half, self.dtype, self.format, self.slot = t, True, dtype, form, slot
        return out

    def unstep_u(self, record: int, y: Tensor) -> None:
        """Second half of the inverse: u is u[t] again.

        Raises:
            LostBits: for the first step: the chain could not go back.
        """
        t, form, y = self.time, self.kinds[self.time + 1][1], self._aligned(y)
        narrow = form != self.format
        U = self.U if self.U.dtype == self.format.u_dtype else torch.empty_like(self.U, dtype=self.format.u_dtype)
        of = (self.ledger, self.sums, 0 if narrow else self.slot, self.n, t, self.rounds)
        self.loops.unshear_u(self.device, self.grid, self.X, self.U, y, *of, self.proof, self.block)
        if U is not self.U:
            self._recode(self.X, U, 0, -self.format.widening(form))
        if narrow and self.proof:
            self.loops.note(self.device, self.grid, self.X, self.U, self.sums, self.slot, self.n, self.rounds, self.block)
        self.half = False
        if t == 0:
            self.confirm()

    def restep_x(self, record: int) -> None:
        """Takes `unstep_x` back, for a step whose second half never ran (its f raised)."""
        t = self.time
        dtype, form = self.kinds[t + 1]
        slot = self._fresh_slot()
        if form != self.format:
            self._recode(torch.empty_like(self.X, dtype=form.dtype), self.U, self.format.widening(form), 0)
        of = (self.ledger, self.sums, slot, self.n, t, self.rounds)
        self.loops.unshear_x(self.device, self.grid, self.X, self.U, self.X, *of, True, self.proof, self.block)
        if self.proof:
            sums, old = self.before
            self.sums[slot, 1].copy_(sums[old, 1])  # U has not moved
        self.time, self.half, self.dtype, self.format, self.slot = t + 1, False, dtype, form, slot

    def read(self) -> Tensor:
        """x as a fresh tensor of the stream's dtype, in the layout of X; NaN where it is."""
        out = torch.empty_like(self.X, dtype=self.dtype)
        self.loops.read(self.device, self.grid, self.X, self.U, out, self.ledger, self.n, self.time, self.rounds, self.block)
        return out

    def confirm(self) -> None:
        """Waits until the device has decided on all steps taken.

        Raises:
            LostBits: the chain cannot go back.
        """
        if self.planes is not None:
            self.planes.look(wait=True)

    def ahead(self) -> Self:
        """As of `State`: keeps nothing of what is spilled from here on."""
        state = copy.copy(self)
        state.X, state.U, state.ledger, state.sums = self.X.clone(), self.U.clone(), self.ledger.clone(), self.sums.clone()
        state.kinds, state.factors, state.planes, state.mailbox = [*self.kinds], [*self.factors], None, 0
        state.store = state.proof = False
        return state

    def tensors(self) -> list[Tensor]:
        """What it keeps on the device."""
        return [self.ledger, self.sums, *self.bulk()]

    def bulk(self) -> list[Tensor]:
        """As of `State`."""
        return [self.X, self.U, *([] if self.planes is None else self.planes.planes)]

    def trim(self, wait: bool) -> None:
        """As of `State`: planes that were ready."""
        if self.planes is not None:
            self.planes.trim(wait)

    def moved(self) -> None:
        """As of `State`; waits until the device has come to the end of the forward pass."""
        if self.planes is None or not self.planes.planes:
            return
        words, rows, addresses = self.loops.words, self.ledger[1:], self.planes.moved()
        taken, each = rows[:, words.XPLANES.value] + rows[:, words.UPLANES.value], torch.arange(words.MOST_PLANES, device=self.device)
        which = ((rows[:, words.USED.value] - taken)[:, None] + each).clamp(0, len(addresses) - 1)
        there = rows[:, words.PLANE.value : words.PLANE.value + words.MOST_PLANES]
        there.copy_(torch.where(each < taken[:, None], addresses[which], there))

    def off_zero(self) -> tuple[int, float]:
        """As of `State`; waits for the device."""
        _, U, _ = self.integers()
        unit, ratio = self.meaning()[:2]
        return int(torch.count_nonzero(U)), float(U.abs().max()) * ratio * unit

    def fingerprint(self, *_: Tensor) -> tuple[Tensor, ...]:
        """The fingerprints of X and U at this time, as one int64 tensor on the device, in which nothing will change; none without proof."""
        return (self.sums[self.slot],) if self.proof else ()

    def meaning(self) -> tuple[float, float, float, float]:
        """(unit, ratio, bound of |x|, bound of |v|) at this time; waits for the device."""
        row = self.ledger[self.time, :4].cpu()
        ratio, x_bound, v_bound = row.view(torch.float64)[1:].tolist()
        return math.ldexp(1.0, int(row[0])), ratio, x_bound, v_bound

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """(X, U, mask) as `State` holds them at a whole time."""
        if self.U.dtype is not torch.float64:
            field = (self.X >> 21) & 2047
            return (self.X << 11) >> 11, self.U, (field > 0) & (field < 2047)
        word = self.U.view(torch.int64)
        field, held = (word >> 52) & 2047, word & ((1 << 52) - 1)
        gone = ((field > 0) & (field < 1023)) | (field > 1076)
        held = (held + torch.where(field > 1076, 1 << 52, 0)).double()
        return self.X, torch.where(gone, torch.where(word < 0, 0.0 - held, held), self.U), gone

    def _previous(self, record: int) -> int:
        if self.half or record != self.time - 1:
            raise RuntimeError(f"step {record} cannot be undone at time {self.time}" + (", half-way back" if self.half else ""))
        if self.planes is not None:
            self.planes.look()
        return record

    def _widen(self, wider: Format) -> tuple[int, int]:
        """Goes over to a format, if it has more bits. Returns by how many bits X, and the ratio of U, are finer then."""
        if wider.bits <= self.format.bits:
            return 0, 0
        bits, keeps = self.format.widening(wider), self.format.u_dtype == wider.u_dtype
        X = torch.empty_like(self.X, dtype=wider.dtype)
        self._recode(X, self.U if keeps else torch.empty_like(self.U, dtype=wider.u_dtype), bits, 0 if keeps else bits)
        self.format = wider
        return bits, bits if keeps else 0

    def _recode(self, X: Tensor, U: Tensor, xbits: int, ubits: int) -> None:
        """Goes over to X and U, which are X * 2^xbits and U * 2^ubits then; either may be what it was."""
        self.loops.recode(self.device, self.grid, self.X, self.U, X, U, xbits, ubits, self.n, self.rounds, self.block)
        self.X, self.U = X, U

    def _fresh_slot(self) -> int:
        """The first of two rows of `sums` that hold zeros; `self.sums` is another tensor then if need be."""
        self.used += 2
        if self.used + 2 >= self.sums.shape[0]:
            self.sums, self.used = torch.zeros_like(self.sums), 2
        return self.used

    def _aligned(self, t: Tensor) -> Tensor:
        """t in the layout of X, as plain memory; copied only where it is not."""
        if t.device != self.device:
            raise StreamError(f"a tensor on {t.device} meets a stream on {self.device}: a momentum region lies on one device")
        if t.dtype not in _TOPS or t.shape != self.X.shape:
            found, wanted = (f"{tuple(shape)} and dtype {dtype}" for shape, dtype in ((t.shape, t.dtype), (self.X.shape, self.dtype)))
            raise StreamError(f"a stream of shape {wanted} meets a tensor of shape {found}")
        if t.is_neg() or t._is_zerotensor():
            t = t.resolve_neg().clone()
        same = t.stride() == self.X.stride() or strides(t) == strides(self.X)
        return t if same else torch.empty_like(self.X, dtype=t.dtype).copy_(t)


def _split(n: int, block: int) -> tuple[int, int]:
    """(programs, rounds): how many programs go over n elements, and how often each takes a block of them."""
    blocks = -(-n // block)
    rounds = -(-blocks // PROGRAMS)
    return -(-blocks // rounds), rounds
