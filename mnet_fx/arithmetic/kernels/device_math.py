"""Arithmetic that the kernels of `device` share: exact rounding, how an element that became NaN is written, and where low bits go.

Two rules, each of which a wrong bit would follow from: no kernel takes a Python float as an argument, since Triton makes a float32 of it
(numbers come from the ledger, or are known when the kernel is compiled); and kernels are compiled with enable_fp_fusion=False.

**NaN without a mask.** An element whose y, or x, was not finite goes on moving as in `State`, as if that y were 0; only what is read from
it is NaN. The time from which it is NaN is written into the element itself, so that it costs no memory: into the exponent of U, where U is
a float64 (no integer has an exponent of 1 ... 1022, nor one of 1077 and more), else into the 11 top bits of X (which holds 21).
"""
# mypy: ignore-errors
# ruff: noqa: RET505, SIM300

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
NATIVE = tl.constexpr(not INTERPRETED and torch.version.hip is None)
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": False, "num_warps": 4}
MOST_STEPS = 960  # so that a time fits into what is free of the exponent on either side
_SIGN = tl.constexpr(-(1 << 63))
_MANTISSA = tl.constexpr((1 << 52) - 1)
_EMPTIED = tl.constexpr(64)  # as a shift: nothing stays


@triton.jit
def f64(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def bits_of(x):
    return x.to(tl.int64, bitcast=True)


@triton.jit
def rint(q):
    """q rounded half to even, exact for every finite q: from 2^52 on a float64 is an integer already."""
    if NATIVE:
        return tl.inline_asm_elementwise("cvt.rni.f64.f64 $0, $1;", "=d,d", [q], dtype=tl.float64, is_pure=True, pack=1)
    else:
        big = tl.where(q < 0, -4503599627370496.0, 4503599627370496.0).to(tl.float64)
        return tl.where(tl.abs(q) < 4503599627370496.0, (q + big) - big, q)


@triton.jit
def nearest(q, like):
    """q rounded half to even, in the dtype of `like`."""
    if like.dtype == tl.float64:
        return rint(q)
    else:
        if NATIVE:
            return tl.inline_asm_elementwise("cvt.rni.s32.f64 $0, $1;", "=r,d", [q], dtype=tl.int32, is_pure=True, pack=1)
        else:
            return rint(q).to(tl.int32)


@triton.jit
def pow2(e):
    """2^e for a normal result."""
    return f64((e + 1023).to(tl.int64) << 52)


@triton.jit
def exponent(x):
    """frexp(x)[1] of a normal positive number: the smallest e with x < 2^e."""
    return ((bits_of(x) >> 52) & 2047) - 1022


@triton.jit
def mixed(word, place):
    """The finaliser of splitmix64, of a word and its place: what `c.hashes` adds up."""
    z = word.to(tl.uint64, bitcast=True) + (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def word(x):
    """The bits of an X or U as an int64."""
    if x.dtype == tl.float64:
        return bits_of(x)
    else:
        return x.to(tl.int64)


@triton.jit
def widened(v):
    """v as a float32, or as the float64 that it is. Triton's interpreter would lose a bfloat16 that is not normal."""
    if v.dtype == tl.float64:
        return v
    else:
        if NATIVE or v.dtype != tl.bfloat16:
            return v.to(tl.float32)
        else:
            return (v.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def odd(v):
    """Whether v, as `widened` gives it, is inf, NaN or beyond 2^1000 (`eager.LARGEST`)."""
    if v.dtype == tl.float64:
        return (tl.abs(v) <= 1.0715086071862673e301) == 0
    else:
        return (tl.abs(v) <= 3.4028234663852886e38) == 0


@triton.jit
def infinite(o):
    """Whether a number that is no NaN is inf, in its own dtype."""
    if o.dtype == tl.float64:
        return tl.abs(o) > 1.7976931348623157e308
    else:
        return tl.abs(widened(o)) > 3.4028234663852886e38


@triton.jit
def narrowed(f, DTYPE: tl.constexpr):
    """A float32 as a 16-bit float, ties to even. Triton's interpreter would cut bfloat16 off."""
    if NATIVE or DTYPE == tl.float16:
        return f.to(DTYPE)
    else:
        w = f.to(tl.int32, bitcast=True)
        up = (w + 0x7FFF + ((w >> 16) & 1)) >> 16
        return tl.where(f == f, up, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def put(x, unit, DTYPE: tl.constexpr):
    """x * unit as `eager.read` gives it: rounded once, to 16 bits by way of float32."""
    q = x.to(tl.float64) * unit
    if DTYPE == tl.float64:
        return q
    else:
        if DTYPE == tl.float32:
            return q.to(tl.float32)
        else:
            return narrowed(q.to(tl.float32), DTYPE)


@triton.jit
def put_normal(x, unit, DTYPE: tl.constexpr):
    """The same where `eager.is_normal(unit)`: no float64 where float32 gives the same bits."""
    if (x.dtype == tl.int32) and (DTYPE == tl.float32):
        return x.to(tl.float32) * unit.to(tl.float32)
    else:
        return put(x, unit, DTYPE)


@triton.jit
def put_masked(o, gone):
    """o, and NaN where gone."""
    if o.dtype == tl.float64:
        return tl.where(gone, float("nan"), o)
    else:
        f = tl.where(gone, float("nan"), widened(o))
        if o.dtype == tl.float32:
            return f
        else:
            return narrowed(f, o.dtype)


@triton.jit
def split(x, u):
    """(X, U, born) of an element as it is kept: its integers, and the time from which it is NaN; -1 where it is a number."""
    if u.dtype == tl.float64:
        w = bits_of(u)
        e = (w >> 52) & 2047
        gone = ((e > 0) & (e < 1023)) | (e > 1076)
        held = ((w & _MANTISSA) + tl.where(e > 1076, _MANTISSA + 1, 0)).to(tl.float64)
        plain = tl.where(gone, tl.where(w < 0, 0.0 - held, held), u)
        return x, plain, tl.where(gone, e - tl.where(e > 1076, 1077, 1), -1)
    else:
        field = (x >> 21) & 2047
        born = tl.where((field > 0) & (field < 2047), field - 1, -1).to(tl.int64)
        return (x << 11) >> 11, u, born


@triton.jit
def joined(x, u, born):
    """The inverse of `split`."""
    gone = born >= 0
    if u.dtype == tl.float64:
        held = tl.abs(u).to(tl.int64)  # below 2^53
        e = tl.where(held > _MANTISSA, 1077, 1) + tl.maximum(born, 0)
        return x, tl.where(gone, f64((bits_of(u) & _SIGN) | (e << 52) | (held & _MANTISSA)), u)
    else:
        field = (tl.maximum(born, 0) + 1).to(tl.int32) << 21
        return tl.where(gone, (x & 0x1FFFFF) | field, x), u


@triton.jit
def put_away(v, shift, planes, addresses, at, ok):
    """v shifted right by `shift` (64: emptied), rounded to nearest, as `eager.spill`; its low bits go to so many planes of bytes."""
    whole, one = v.to(tl.int64), shift * 0 + 1
    stays, s = shift < _EMPTIED, tl.minimum(shift, 62)
    q = tl.where(stays, (whole + tl.where(s > 0, one << tl.maximum(s - 1, 0), 0)) >> s, 0)
    low = whole - tl.where(stays, q << s, 0) + (one << tl.maximum(8 * planes - 1, 0))
    for p in range(planes):
        plane = tl.load(addresses + p).to(tl.pointer_type(tl.uint8))
        tl.store(plane + at, ((low >> (8 * p)) & 255).to(tl.uint8), ok)
    return q.to(v.dtype)


@triton.jit
def brought_back(v, shift, planes, addresses, at, ok):
    """The inverse of `put_away`."""
    one = shift * 0 + 1
    low = v.to(tl.int64) * 0 - tl.where(planes > 0, one << tl.maximum(8 * planes - 1, 0), 0)
    for p in range(planes):
        plane = tl.load(addresses + p).to(tl.pointer_type(tl.uint8))
        low += tl.load(plane + at, ok, 0).to(tl.int64) << (8 * p)
    return (low + tl.where(shift < _EMPTIED, v.to(tl.int64) << tl.minimum(shift, 62), 0)).to(v.dtype)
