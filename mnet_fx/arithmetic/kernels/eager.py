"""The loops over all elements: shears and their inverses, spilling of low bits. Plain tensors in, plain tensors changed.

On a CPU the loops go chunk by chunk, so that the parts of x, u and y at hand stay in cache through all operations on them, and through work
buffers of chunk size that each thread allocates once. No tensor of full size is allocated.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "EAGER",
    "LARGEST",
    "Kernels",
    "Spill",
    "fill",
    "flat",
    "is_dense",
    "is_freed",
    "is_normal",
    "max_abs",
    "read",
    "shear",
    "spill",
    "strides",
    "unshear_u",
    "unshear_x",
    "unspill",
]

CHUNK_CPU = 1 << 18  # elements per pass and thread; less, and calling operations takes longer than they do
CHUNK_DEVICE = 1 << 23
LARGEST = 2.0**1000  # magnitude up to which numbers count as finite, so that bounds, units and scales of a float64 stream are finite too
MOST_CHUNKS = 4  # of so many threads together; more would not stay in cache


@dataclass(frozen=True)
class Spill:
    """Low bits of an integer tensor, packed into whole bytes.

    T = q * 2**bits + low - 2**(8 * planes - 1), with low = sum of bytes[j] * 256**j.

    Attributes:
        bits: by how many bits T was shifted right (math.inf: T was emptied).
        bytes: uint8, shape (planes, numel).
    """

    bits: float
    bytes: Tensor


class _Scratch(threading.local):
    """Chunk-sized work buffers of the current thread, allocated once (again when it may use more threads)."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def get(self, like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
        if like.device.type != "cpu":  # a caching allocator is as quick, and knows about streams
            return torch.empty(size, dtype=dtype, device=like.device)
        if dtype not in self.buffers or self.buffers[dtype].numel() < size:
            with torch.inference_mode(False):
                self.buffers[dtype] = torch.empty(_chunk_size(), dtype=dtype, device="cpu")
        return self.buffers[dtype][:size]


_scratch = _Scratch()


def flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, as a 1-d view."""
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def strides(t: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes of the dimensions in which t has more than one element, in order of dimension."""
    return [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def is_dense(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(strides(t)):
        if stride != expected:
            return False
        expected *= size
    return True


def is_freed(t: Tensor) -> bool:
    """Whether a tensor has no memory of its own to read: its storage was freed, which an offset hides, or it is zero by its kind."""
    return t.data_ptr() == 0 or bool(t.storage_offset() > 0 and t.untyped_storage().size() == 0)


def _chunk_size() -> int:
    return CHUNK_CPU * min(torch.get_num_threads(), MOST_CHUNKS)


def _chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Flat chunks of dense tensors of equal strides, side by side; sized to stay in cache on a CPU. None of fake tensors on one, where work
    buffers are there already and chunks take no memory.
    """
    if isinstance(tensors[0], FakeTensor) and tensors[0].device.type == "cpu":
        return ()
    size = _chunk_size() if tensors[0].device.type == "cpu" else CHUNK_DEVICE
    whole = [flat(t) for t in tensors]
    return [tuple(whole)] if tensors[0].numel() <= size else zip(*(t.split(size) for t in whole), strict=True)


def max_abs(t: Tensor) -> float:
    """max|t| as a Python float (nan or inf where t has one); 0 for an empty tensor. Synchronises with the device."""
    if t.numel() == 0:
        return 0.0
    low, high = torch.stack(torch.aminmax(t)).tolist()
    return float(max(-low, high))  # a NaN anywhere makes NaNs of both


def shear(X: Tensor, U: Tensor, y: Tensor, out: Tensor, scale: float, ratio: float, unit: float, finite: bool = True) -> None:
    """One step, in place: U += round(y * scale); X += round(U * ratio); out = X * unit.

    Args:
        X, U, y, out: dense tensors of equal strides.
        scale, ratio, unit: see the module's text.
        finite: False where y has inf, nan or more than LARGEST; these add nothing.
    """
    for x, u, part, o in _chunks(X, U, y, out):
        q = _rounded(part, u, scale, finite)
        u.add_(_integers(q, u))
        x.add_(_integers(_product(u, ratio).round_(), x))
        _put(x, o, unit)


def unshear_x(X: Tensor, U: Tensor, out: Tensor, ratio: float, unit: float) -> None:
    """First half of the inverse, in place: X -= round(U * ratio); out = X * unit."""
    for x, u, o in _chunks(X, U, out):
        x.sub_(_integers(_product(u, ratio).round_(), x))
        _put(x, o, unit)


def unshear_u(U: Tensor, y: Tensor, scale: float, finite: bool = True) -> None:
    """Second half of the inverse, in place: U -= round(y * scale)."""
    for u, part in _chunks(U, y):
        u.sub_(_integers(_rounded(part, u, scale, finite), u))


def read(X: Tensor, out: Tensor, unit: float) -> None:
    """out = X * unit."""
    for x, o in _chunks(X, out):
        _put(x, o, unit)


def fill(T: Tensor, t: Tensor, scale: float, finite: bool = True) -> None:
    """T = round(t * scale), where elements of t that are not finite count as 0; `finite` as in `shear`."""
    for integers, part in _chunks(T, t):
        integers.copy_(_rounded(part, part, scale, finite).add_(0.0))  # + 0.0 turns -0.0 into 0.0, so that equal integers have equal bits


def _rounded(y: Tensor, u: Tensor, scale: float, finite: bool) -> Tensor:
    q = _scratch.get(u, torch.float64, u.numel()).copy_(y)
    return (q if finite else q.masked_fill_(~(q.abs() <= LARGEST), 0.0)).mul_(scale).round_()


def _product(t: Tensor, factor: float) -> Tensor:
    """t * factor in float64, in a work buffer."""
    q = _scratch.get(t, torch.float64, t.numel())
    return torch.mul(t, factor, out=q) if t.dtype is torch.float64 else q.copy_(t).mul_(factor)


def is_normal(unit: float) -> bool:
    """Whether integers times a unit are normal numbers of float32, so that they are rounded there as the integers themselves are."""
    return 2.0**-126 <= unit <= 2.0**96


def _put(x: Tensor, out: Tensor, unit: float) -> None:
    """out = x * unit, rounded once."""
    if x.dtype is torch.int32 and out.dtype is torch.float32 and is_normal(unit):
        out.copy_(x).mul_(unit)
    else:
        out.copy_(_product(x, unit))


def _integers(q: Tensor, like: Tensor) -> Tensor:
    """q in the dtype of `like`."""
    return q if like.dtype is torch.float64 else _scratch.get(like, like.dtype, like.numel()).copy_(q)


@dataclass(frozen=True)
class Kernels:
    """The three loops over all elements. Any implementation gives the same bits, so they can be mixed freely."""

    shear: Callable[..., None] = shear
    unshear_x: Callable[..., None] = unshear_x
    unshear_u: Callable[..., None] = unshear_u


EAGER = Kernels()


def spill(T: Tensor, bits: float, bound: float) -> Spill:
    """Shifts the integers of T right by `bits`, rounding to nearest, in place, and returns what fell off.

    Args:
        T: dense tensor of integers, int32 or float64, any shape.
        bits: shift, at least 1; math.inf empties T.
        bound: an upper bound of max|T|; bytes that no |T| <= bound can need are not stored.

    Returns:
        The spill, `unspill` of which restores T exactly. Holds ceil((log2(min(2**(bits - 1), bound)) + 1) / 8) bytes per element.
    """
    fraction, reach = math.frexp(max(bound, 1.0) + 1)
    reach -= fraction == 0.5  # |T| < 2**reach
    if bits > reach:
        bits = math.inf
    planes = math.ceil((min(bits - 1, reach) + 1) / 8)
    store = torch.empty((planes, T.numel()), dtype=torch.uint8, device=T.device)
    offset, start = 2.0 ** (8 * planes - 1), 0
    for (part,) in _chunks(T):
        size = part.numel()
        whole, low = _scratch.get(part, torch.float64, size), _scratch.get(part, torch.int64, size)
        if math.isinf(bits):
            low.copy_(part).add_(int(offset))
            part.zero_()
        else:
            whole.copy_(part).mul_(2.0**-bits).add_(0.5).floor_()
            low.copy_(part)
            part.copy_(whole)  # never -0.0: x + 0.5 is none
            low.sub_(whole.view(torch.int64).copy_(part), alpha=int(2.0**bits)).add_(int(offset))
        for plane in range(planes):
            torch.bitwise_and(low, 255, out=whole.view(torch.int64))
            store[plane, start : start + size].copy_(whole.view(torch.int64))
            low.bitwise_right_shift_(8)
        start += size
    return Spill(bits, store)


def unspill(T: Tensor, spilled: Spill) -> None:
    """Inverse of `spill`, in place."""
    planes, start = spilled.bytes.shape[0], 0
    offset = int(2.0 ** (8 * planes - 1))
    for (part,) in _chunks(T):
        size = part.numel()
        low, whole = _scratch.get(part, torch.int64, size), _scratch.get(part, torch.float64, size).view(torch.int64)
        low.zero_()
        for plane in reversed(range(planes)):
            low.bitwise_left_shift_(8)
            low.add_(whole.copy_(spilled.bytes[plane, start : start + size]))
        low.sub_(offset)
        if not math.isinf(spilled.bits):
            low.add_(whole.copy_(part), alpha=int(2.0**spilled.bits))
        part.copy_(low)
        start += size
