"""The passes over elements of a chain on a device, in Triton: the loops of `eager`, with every factor read from the ledger.

Each program goes over `rounds` blocks of BLOCK elements. A block takes the short way where nothing is spilled, nothing can be NaN and the
unit is a normal float32; else the long way (`*_any`), which gives the same bits. Fingerprints (see `mixed`) of the words of X and U, as
they are at the time that the pass leads to, are added to the two words of `sums` that the host names.
"""
# mypy: ignore-errors
# ruff: noqa: RET505, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .device_decide import (
    DONE,
    GONE,
    LOST,
    PLANE,
    RATIO,
    SCALE,
    STEPS,
    UMAX,
    UNIT,
    UPLANES,
    USHIFT,
    WIDEN,
    WORDS,
    XMAX,
    XPLANES,
    XSHIFT,
    YMAX,
)
from .device_math import (
    bits_of,
    brought_back,
    f64,
    infinite,
    joined,
    mixed,
    nearest,
    odd,
    pow2,
    put,
    put_away,
    put_masked,
    put_normal,
    split,
    widened,
    word,
)

__all__ = ["fill", "note", "read", "recode", "shear", "unshear_u", "unshear_x"]


@triton.jit
def abnormal(e):
    """Whether integers times 2^e may be other than normal numbers of float32, see `eager.is_normal`."""
    return (e < -126) | (e > 96)


@triton.jit
def largest_bits(T):
    """max|T| of a block, as the bits of a float64."""
    if T.dtype == tl.float64:
        return tl.max(bits_of(tl.abs(T)), 0)
    else:
        return bits_of(tl.max(tl.abs(T), 0).to(tl.float64))


@triton.jit
def told(row, sums, slot, xtop, utop, fpx, fpu, PROOF: tl.constexpr):
    """Adds what one program has found of X and U to the row and to `sums`: the largest of each, and their fingerprints."""
    tl.atomic_max(row + XMAX, largest_bits(xtop))
    tl.atomic_max(row + UMAX, largest_bits(utop))
    if PROOF:
        tl.atomic_add(sums + 2 * slot, tl.sum(fpx, 0))
        tl.atomic_add(sums + 2 * slot + 1, tl.sum(fpu, 0))


@triton.jit(do_not_specialize=["slot", "rounds"])
def fill(x0, v0, X, U, ledger, sums, slot, n, rounds, HAS_V: tl.constexpr, PROOF: tl.constexpr, BLOCK: tl.constexpr):
    """X and U at time 0."""
    unit = pow2(tl.load(ledger + UNIT))
    scale, v_scale = 1.0 / unit, 1.0 / (unit * f64(tl.load(ledger + RATIO)))
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    fpx, fpu = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    xtop, utop = tl.zeros([BLOCK], X.dtype.element_ty), tl.zeros([BLOCK], U.dtype.element_ty)
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        q = widened(tl.load(x0 + at, ok, 0.0))
        bad = odd(q)
        x = nearest(tl.where(bad, 0.0, q.to(tl.float64)) * scale, xtop) + tl.zeros([BLOCK], X.dtype.element_ty)  # no -0.0
        u = tl.zeros([BLOCK], U.dtype.element_ty)
        if HAS_V:
            v = widened(tl.load(v0 + at, ok, 0.0))
            bad = bad | odd(v)
            u += nearest(tl.where(odd(v), 0.0, v.to(tl.float64)) * v_scale, utop)
        xtop, utop = tl.maximum(xtop, tl.abs(x)), tl.maximum(utop, tl.abs(u))
        x, u = joined(x, u, tl.where(bad, 0, -1).to(tl.int64))
        tl.store(X + at, x, ok)
        tl.store(U + at, u, ok)
        if PROOF:
            fpx += tl.where(ok, mixed(word(x), at), 0)
            fpu += tl.where(ok, mixed(word(u), at), 0)
    told(ledger, sums, slot, xtop, utop, fpx, fpu, PROOF)


@triton.jit
def shear_any(x, u, v, nxt, at, ok, t, STORE: tl.constexpr, DTYPE: tl.constexpr):
    """A block of `shear` on the long way: (words of X and U, X, U, out)."""
    x, u, born = split(x, u)
    xplanes, uplanes, unit = tl.load(nxt + XPLANES), tl.load(nxt + UPLANES), pow2(tl.load(nxt + UNIT))
    keeps = (tl.load(nxt + LOST) == 0) & STORE
    x = put_away(x, tl.load(nxt + XSHIFT), tl.where(keeps, xplanes, 0), nxt + PLANE, at, ok)
    u = put_away(u, tl.load(nxt + USHIFT), tl.where(keeps, uplanes, 0), nxt + PLANE + xplanes, at, ok)
    bad = odd(v)
    u = u + nearest(tl.where(bad, 0.0, v.to(tl.float64)) * f64(tl.load(nxt + SCALE)), u)
    x = x + nearest(u.to(tl.float64) * f64(tl.load(nxt + RATIO)), x)
    o = put(x, unit, DTYPE)
    born = tl.where((born < 0) & (bad | infinite(o)), born * 0 + t + 1, born)
    x_word, u_word = joined(x, u, born)
    return x_word, u_word, x, u, put_masked(o, born >= 0)


@triton.jit
def unlike(given, x, unit, whole, u_dtype: tl.constexpr):
    """1 where what was given is not X * unit, else 0. NaN there counts only where the state is `whole`: has no NaN of its own."""
    if u_dtype == tl.int32:  # the words of X hold more than X
        x, _, _ = split(x, x)
    return tl.where(given != put(x, unit, given.dtype), tl.where(given == given, whole * 0 + 1, whole), 0)


@triton.jit(do_not_specialize=["slot", "widen", "t", "rounds"])
def shear(
    X, U, y, out, given, ledger, sums, slot, widen, n, t, rounds,
    STORE: tl.constexpr, PROOF: tl.constexpr, CHECK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step t: U += round(y * scale); X += round(U * ratio); out = X * unit. CHECK: the next slot counts the elements of
    `given` that were not x[t].
    """
    nxt = ledger + (t.to(tl.int64) + 1) * WORDS
    before = pow2(tl.load(nxt - WORDS + UNIT) - widen)  # the unit that X has, by now in the wider format; the row has the one before
    whole = (tl.load(nxt - WORDS + GONE) == 0).to(tl.int64)
    count = tl.zeros([BLOCK], tl.int64)
    e = tl.load(nxt + UNIT)
    unit, ratio, scale = pow2(e), f64(tl.load(nxt + RATIO)), f64(tl.load(nxt + SCALE))
    special = ((tl.load(nxt + GONE) | tl.load(nxt + XSHIFT) | tl.load(nxt + USHIFT)) > 0) | abnormal(e)
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    fpx, fpu = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    xtop, utop = tl.zeros([BLOCK], X.dtype.element_ty), tl.zeros([BLOCK], U.dtype.element_ty)
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        x, u, v = tl.load(X + at, ok, 0), tl.load(U + at, ok, 0), widened(tl.load(y + at, ok, 0.0))
        if CHECK:
            count += tl.where(ok, unlike(tl.load(given + at, ok, 0.0), x, before, whole, U.dtype.element_ty), 0)
        if special:
            x_word, u_word, x, u, o = shear_any(x, u, v, nxt, at, ok, t, STORE, out.dtype.element_ty)
        else:
            u = u + nearest(v.to(tl.float64) * scale, u)
            x = x + nearest(u.to(tl.float64) * ratio, x)
            x_word, u_word, o = x, u, put_normal(x, unit, out.dtype.element_ty)
        tl.store(X + at, x_word, ok)
        tl.store(U + at, u_word, ok)
        tl.store(out + at, o, ok)
        xtop, utop = tl.maximum(xtop, tl.abs(x)), tl.maximum(utop, tl.abs(u))
        if PROOF:
            fpx += tl.where(ok, mixed(word(x_word), at), 0)
            fpu += tl.where(ok, mixed(word(u_word), at), 0)
    told(nxt, sums, slot, xtop, utop, fpx, fpu, PROOF)
    if CHECK:
        tl.atomic_add(sums + 2 * slot + 2, tl.sum(count, 0))


@triton.jit
def unshear_x_any(x, u, nxt, unit, at, ok, t, RESTEP: tl.constexpr, DTYPE: tl.constexpr):
    """A block of `unshear_x` on the long way: (word of X to keep, to be proved, out)."""
    x, u, born = split(x, u)
    shift, planes, lost = tl.load(nxt + XSHIFT), tl.load(nxt + XPLANES), tl.load(nxt + LOST)
    moved = nearest(u.to(tl.float64) * f64(tl.load(nxt + RATIO)), x)
    if RESTEP:
        x = put_away(x, shift, planes * 0, nxt + PLANE, at, ok) + moved  # the planes hold the bits still
    else:
        x = brought_back(x - moved, shift, tl.where(lost == 0, planes, 0), nxt + PLANE, at, ok)
    o = put_masked(put(x, unit, DTYPE), ((born >= 0) & (born <= t)) | (lost == t + 1))  # where bits are lost, all is NaN
    kept, _ = joined(x, u, born)
    proved, _ = joined(x, u, tl.where(born > t, -1, born))
    return kept, proved, o


@triton.jit(do_not_specialize=["slot", "t", "rounds"])
def unshear_x(X, U, out, ledger, sums, slot, n, t, rounds, RESTEP: tl.constexpr, PROOF: tl.constexpr, BLOCK: tl.constexpr):
    """X at time t again, by X -= round(U * ratio), and out = X * unit. RESTEP: takes that back, to t + 1; nothing goes to `out`."""
    row = ledger + t.to(tl.int64) * WORDS
    nxt = row + WORDS
    e = tl.load(row + UNIT) - tl.load(nxt + WIDEN)
    unit, ratio = pow2(e), f64(tl.load(nxt + RATIO))
    special = ((tl.load(nxt + GONE) | tl.load(nxt + XSHIFT) | tl.load(nxt + LOST)) > 0) | abnormal(e)
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    fpx = tl.zeros([BLOCK], tl.int64)
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        x, u = tl.load(X + at, ok, 0), tl.load(U + at, ok, 0)
        if special:
            x, proved, o = unshear_x_any(x, u, nxt, unit, at, ok, t + 1 if RESTEP else t, RESTEP, out.dtype.element_ty)
        else:
            moved = nearest(u.to(tl.float64) * ratio, x)
            x = x + moved if RESTEP else x - moved
            proved, o = x, put_normal(x, unit, out.dtype.element_ty)
        tl.store(X + at, x, ok)
        if not RESTEP:
            tl.store(out + at, o, ok)
        if PROOF:
            fpx += tl.where(ok, mixed(word(proved), at), 0)
    if PROOF:
        tl.atomic_add(sums + 2 * slot, tl.sum(fpx, 0))


@triton.jit
def unshear_u_any(X, u, v, nxt, at, ok, t):
    """A block of `unshear_u` on the long way: the word of U. What became NaN in this step is a number again."""
    x, u, born = split(tl.load(X + at, ok, 0), u)
    xplanes, uplanes = tl.load(nxt + XPLANES), tl.load(nxt + UPLANES)
    u = u - nearest(tl.where(odd(v), 0.0, v.to(tl.float64)) * f64(tl.load(nxt + SCALE)), u)
    u = brought_back(u, tl.load(nxt + USHIFT), tl.where(tl.load(nxt + LOST) == 0, uplanes, 0), nxt + PLANE + xplanes, at, ok)
    x_word, u_word = joined(x, u, tl.where(born > t, -1, born))
    if u.dtype == tl.int32:
        tl.store(X + at, x_word, ok)
    return u_word


@triton.jit(do_not_specialize=["slot", "t", "rounds"])
def unshear_u(X, U, y, ledger, sums, slot, n, t, rounds, PROOF: tl.constexpr, BLOCK: tl.constexpr):
    """U at time t again, by U -= round(y * scale)."""
    nxt = ledger + (t.to(tl.int64) + 1) * WORDS
    scale = f64(tl.load(nxt + SCALE))
    special = (tl.load(nxt + GONE) | tl.load(nxt + USHIFT)) > 0
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    fpu = tl.zeros([BLOCK], tl.int64)
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        u, v = tl.load(U + at, ok, 0), widened(tl.load(y + at, ok, 0.0))
        if special:
            u = unshear_u_any(X, u, v, nxt, at, ok, t)
        else:
            u = u - nearest(v.to(tl.float64) * scale, u)
        tl.store(U + at, u, ok)
        if PROOF:
            fpu += tl.where(ok, mixed(word(u), at), 0)
    if PROOF:
        tl.atomic_add(sums + 2 * slot + 1, tl.sum(fpu, 0))
    if tl.program_id(0) == 0:  # a step forward again gathers them anew; nobody reads them before
        for w in tl.static_range(YMAX, DONE + 1):
            tl.store(nxt + w, tl.load(nxt + STEPS) * 0)


@triton.jit(do_not_specialize=["t", "rounds"])
def read(X, U, out, ledger, n, t, rounds, BLOCK: tl.constexpr):
    """out = X * unit at time t, NaN where an element is; also while U is still that of t + 1."""
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    unit = pow2(tl.load(ledger + t.to(tl.int64) * WORDS + UNIT))
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        x, _, born = split(tl.load(X + at, at < n, 0), tl.load(U + at, at < n, 0))
        tl.store(out + at, put_masked(put(x, unit, out.dtype.element_ty), (born >= 0) & (born <= t)), at < n)


@triton.jit(do_not_specialize=["slot", "rounds"])
def note(X, U, sums, slot, n, rounds, BLOCK: tl.constexpr):
    """The fingerprints of X and U as they are."""
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    fpx, fpu = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        fpx += tl.where(at < n, mixed(word(tl.load(X + at, at < n, 0)), at), 0)
        fpu += tl.where(at < n, mixed(word(tl.load(U + at, at < n, 0)), at), 0)
    tl.atomic_add(sums + 2 * slot, tl.sum(fpx, 0))
    tl.atomic_add(sums + 2 * slot + 1, tl.sum(fpu, 0))


@triton.jit(do_not_specialize=["xbits", "ubits", "rounds"])
def recode(X, U, X2, U2, xbits, ubits, n, rounds, BLOCK: tl.constexpr):
    """X2 = X * 2^xbits and U2 = U * 2^ubits, in the words of another format."""
    base = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    zero = tl.zeros([1], tl.int64)
    for i in range(rounds):
        at = base + i * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        x, u, born = split(tl.load(X + at, ok, 0), tl.load(U + at, ok, 0))
        x = (x.to(tl.float64) * pow2(zero + xbits)).to(X2.dtype.element_ty)
        u = (u.to(tl.float64) * pow2(zero + ubits)).to(U2.dtype.element_ty)
        x, u = joined(x, u, born)
        tl.store(X2 + at, x, ok)
        tl.store(U2 + at, u, ok)
