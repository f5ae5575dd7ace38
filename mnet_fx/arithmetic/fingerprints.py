"""Numbers that tell whether tensors changed: each depends on every bit of its tensor and on where it stands.

The bits are read as 64-bit words, each word is mixed with its place by the finaliser of splitmix64 (Steele, Lea, Flood 2014), and the
results are added up. Equal tensors give equal numbers, others all but surely do not. On a CPU with a C compiler (see `kernels`) this is one
pass over the memory. Elsewhere the words are laid out as a table, and only the sums of its columns and of its rows are mixed: sums are
cheap, and mixing, by multiplications and shifts that no cancellation survives, makes the numbers depend on order and sign as well. The two
ways give different numbers, so a process stays with one.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.c import NativeError, hashes
from .kernels.choice import usable
from .kernels.eager import flat, is_dense
from .valueless import valueless

__all__ = ["fingerprint", "fingerprints", "prints"]

log = logging.getLogger("mnet_fx")
_ROW_SMALL, _ROW_LARGE = 1056, 8224  # words; multiples of 8, for whole vectors, and no powers of 2
ON_HOST = {"cpu"}
"""Types of the devices whose numbers are at hand; those of others stay there until somebody reads them."""
_PLAIN = (Tensor, nn.Parameter)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(*tensors: Tensor) -> tuple[int, ...]:
    """The fingerprints of some tensors, to be compared as one."""
    return tuple(fingerprints(tensors))


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """A number for each tensor, of any dtype, strides and device; one synchronisation for each device. 0 where there are no values."""
    found = prints(tensors)
    for device in {number.device for number in found if isinstance(number, Tensor)}:
        places = [i for i, number in enumerate(found) if isinstance(number, Tensor) and number.device == device]
        for i, number in zip(places, torch.stack([found[i] for i in places]).tolist(), strict=True):
            found[i] = number
    return found


def prints(tensors: Sequence[Tensor]) -> list[Any]:
    """The same numbers, those of devices as int64 tensors that are still there: nothing waits for them."""
    if not tensors:
        return []
    native = _native() if "cpu" in ON_HOST else None
    if native is not None and all(map(_is_simple, tensors)) and not valueless():
        return list(native(tensors))
    if valueless(*tensors):
        for t in tensors:
            _dense(t)  # for the memory that it takes
        return [0] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    found, in_c = list[Any]([0] * len(tensors)), list[int]()
    for i, t in enumerate(tensors):
        plain = native is not None and t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)
        (in_c if plain else by_device.setdefault(t.device, [])).append(i)
    if native is not None and in_c:
        for i, number in zip(in_c, native([_dense(tensors[i]) for i in in_c]), strict=True):
            found[i] = number
    for device, places in by_device.items():
        numbers = _on_device(device)([tensors[i] for i in places])
        for i, number in zip(places, numbers.tolist() if device.type in ON_HOST else numbers.unbind(), strict=True):
            found[i] = number
    return found


def _is_simple(t: Tensor) -> bool:
    """Whether these are real numbers on a CPU, as they lie in memory: most are."""
    return type(t) in _PLAIN and t.is_cpu and t.is_contiguous() and not (t.is_complex() or t.is_neg())


@cache
def _on_device(device: torch.device) -> Callable[[Sequence[Tensor]], Tensor]:
    """By Triton where it is there and MNET_FX_FUSED is not 0, else by torch."""
    if device.type == "cpu" or not usable(device):
        return _by_torch
    from .kernels.device_hash import hashes_on_device

    return lambda tensors: hashes_on_device([_dense(t) for t in tensors])


@cache
def _native() -> Callable[[Sequence[Tensor]], list[int]] | None:
    """The loop in C, if there can be one and MNET_FX_FUSED is not 0; this is asked once."""
    if os.environ.get("MNET_FX_FUSED") == "0":
        return None
    try:
        return hashes()
    except NativeError as error:
        log.info("fingerprints cannot be compiled (%s)", error)
        return None


def _dense(t: Tensor) -> Tensor:
    """A real tensor without gaps, overlaps and noted signs, of the same bits in memory order."""
    if t.is_conj() or t.is_neg():
        t = t.detach().resolve_conj().resolve_neg()
    if t.is_complex():
        t = torch.view_as_real(t.detach())
    return t if t.is_contiguous() or is_dense(t) else t.detach().contiguous()


def _by_torch(tensors: Sequence[Tensor]) -> Tensor:
    """A 1-d int64 tensor of the numbers; all tensors are mixed at once, since with small ones it is the calls that take the time."""
    words = [_summed(t) for t in tensors]
    lengths = [sum(part.numel() for part in parts) for parts in words]
    mixed = _mixed(torch.cat(list(itertools.chain(*words))), lengths).cumsum_(0)
    return torch.cat([mixed.new_zeros(1), mixed])[_ends(tuple(lengths), mixed.device)].diff()


def _summed(t: Tensor) -> list[Tensor]:
    """The bits of t as words in 1-d int64 tensors: as they are if few, else the sums of columns and of rows of a table of them."""
    elements = flat(_dense(t).detach())
    per_word = 8 // elements.element_size()
    elements = elements.clone() if elements.storage_offset() % per_word else elements  # words must be aligned
    spare = elements.numel() % per_word
    words = (elements[: elements.numel() - spare] if spare else elements).view(torch.int64)
    parts = [elements[-spare:].view(_INTEGERS[elements.element_size()]).to(torch.int64)] if spare else []
    row = _ROW_SMALL if words.numel() < _ROW_SMALL**2 else _ROW_LARGE
    if words.numel() < 2 * row:
        return [words, *parts]
    rows = words.numel() // row
    table = words[: rows * row].view(rows, row)
    return [table.sum(0), table.sum(1), words[rows * row :], *parts]


def _mixed(z: Tensor, lengths: Sequence[int]) -> Tensor:
    """The words of z, each mixed with its place, which is counted from 1 again after each of `lengths` words."""
    z = z + _places(tuple(lengths), z.device)
    z = z.bitwise_xor_(z >> 30).mul_(-4658895280553007687)
    z = z.bitwise_xor_(z >> 27).mul_(-7723592293110705685)
    return z.bitwise_xor_(z >> 31)


@lru_cache(maxsize=256)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each of some tensors ends, after a 0. Kept: a list that goes to a device waits for it."""
    with torch.inference_mode(False):
        return torch.tensor([0, *itertools.accumulate(lengths)], device=device)


@lru_cache(maxsize=64)
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """1, 2, ... up to each length, one after the other, each times an odd constant."""
    with torch.inference_mode(False):
        places = torch.arange(1, max(lengths) + 1, device=device).mul_(-7046029254386353131)
        return torch.cat([places[:length] for length in lengths])
