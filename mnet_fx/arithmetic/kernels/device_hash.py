"""Fingerprints of tensors on a device, by Triton: the numbers of `c.hashes`, and they stay on the device.

One launch serves any number of tensors: a table says which part of which tensor each program reads. It is made once for each set of
addresses, which are the same from step to step where they are those of parameters.
"""
# mypy: ignore-errors

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_math import OPTIONS, mixed
from .eager import is_freed
from .launching import Launcher, raw_stream

__all__ = ["hashes_on_device"]

BLOCK = 1024  # words of 8 bytes
PART = 16 * BLOCK  # words that one program reads
_MOST_TABLES = 4096  # more than a deep model has steps


@triton.jit
def hash_part(start, size, first, last, BLOCK: tl.constexpr):
    """The sum of the mixed words first ... last - 1 of `size` bytes at an address, which need not be one of words."""
    shift = (start % 8) * 8
    words = tl.multiple_of((start - start % 8).to(tl.pointer_type(tl.int64)), 8)
    whole, end = size // 8, (size + start % 8 + 7) // 8  # end: of the words of memory in which a byte of the tensor lies
    total = tl.zeros([BLOCK], tl.int64)
    for base in range(first, last, BLOCK):
        at = base + tl.arange(0, BLOCK)
        ok = at < last
        w = tl.load(words + at, ok, 0)
        if shift > 0:
            w = ((w >> shift) & ((shift * 0 + 1 << 64 - shift) - 1)) | (tl.load(words + at + 1, ok & (at + 1 < end), 0) << (64 - shift))
        w = tl.where(at < whole, w, w & ((size * 0 + 1 << (size % 8) * 8) - 1))
        total += tl.where(ok, mixed(w, at), 0)
    return tl.sum(total, 0)


@triton.jit
def hash_table(table, sums, BLOCK: tl.constexpr):
    """table: rows of int64 (address, bytes, first word, end of words, place in sums), one for each program."""
    row = table + tl.program_id(0).to(tl.int64) * 5
    found = hash_part(tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), BLOCK)
    tl.atomic_add(sums + tl.load(row + 4), found)


@triton.jit(do_not_specialize=["address", "size", "part"])
def hash_one(address, size, sums, part, BLOCK: tl.constexpr):
    """One tensor, without a table; `part` words for each program."""
    first = tl.program_id(0).to(tl.int64) * part
    start, size = first * 0 + address, first * 0 + size
    tl.atomic_add(sums, hash_part(start, size, first, tl.minimum(first + part, (size + 7) // 8), BLOCK))


_OF_TABLE, _OF_ONE = Launcher(hash_table, OPTIONS), Launcher(hash_one, OPTIONS)


class _Zeros:
    """Words that hold 0, each handed out once; allocated many at a time, since that takes longer than a launch."""

    MANY = 1 << 12

    def __init__(self) -> None:
        self.left: dict[tuple[torch.device, int], tuple[Tensor, int]] = {}
        self.lock = Lock()

    def take(self, count: int, device: torch.device) -> Tensor:
        key = (device, raw_stream(device))
        with self.lock:
            words, used = self.left.get(key, (None, self.MANY))
            if words is None or used + count > self.MANY:
                with torch.inference_mode(False):
                    words, used = torch.zeros(max(count, self.MANY), dtype=torch.int64, device=device), 0
            self.left[key] = (words, used + count)
        return words[used : used + count]


_ZEROS = _Zeros()


class _Tables:
    """Tables on devices, the ones used last."""

    def __init__(self) -> None:
        self.known: OrderedDict[tuple, Tensor] = OrderedDict()
        self.lock = Lock()

    def of(self, parts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
        """The table for (address, bytes) of some tensors, in the order of the current stream."""
        key = (parts, device, raw_stream(device))
        with self.lock:
            if (table := self.known.get(key)) is not None:
                self.known.move_to_end(key)
                return table
            with torch.inference_mode(False):
                table = self._made(parts, device)
            self.known[key] = table
            if len(self.known) > _MOST_TABLES:
                self.known.popitem(last=False)
        return table

    @staticmethod
    def _made(parts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
        rows = []
        for place, (address, size) in enumerate(parts):
            words = (size + 7) // 8
            rows += [(address, size, first, min(first + PART, words), place) for first in range(0, words, PART)]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 5)
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


_TABLES = _Tables()


def hashes_on_device(tensors: list[Tensor]) -> Tensor:
    """A number for each tensor, an int64 tensor on their device: those of `c.hashes` (modulo 2^64, with a sign). Nothing is waited for.

    Args:
        tensors: one or more, dense, on one device.

    Raises:
        RuntimeError: one has elements and no memory.
    """
    device = tensors[0].device
    sums = _ZEROS.take(len(tensors), device)
    parts = tuple((t.data_ptr(), t.numel() * t.element_size()) for t in tensors)
    if any(size and is_freed(t) for t, (_, size) in zip(tensors, parts, strict=True)):
        raise RuntimeError("a tensor whose memory was freed has no fingerprint")
    if len(parts) == 1:
        (address, size), words = parts[0], (parts[0][1] + 7) // 8
        if words:
            _OF_ONE(device, -(-words // PART), address, size, sums, PART, BLOCK)
    elif (programs := (table := _TABLES.of(parts, device)).shape[0]) > 0:
        _OF_TABLE(device, programs, table, sums, BLOCK)
    return sums
