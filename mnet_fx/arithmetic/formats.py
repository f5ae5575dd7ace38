"""How streams of each dtype are held as integers.

For float32 streams, X is an int32 and U holds integers below 2^53 in a float64 (12 bytes per element for both): sums of such numbers are
exact, and no conversion from or to int64 is needed, which makes a step twice as fast on CPUs. For float64, X is a float64 too; for bfloat16
and float16, both are int32 (8 bytes). The unit is a power of two that gives max|x[0]| 30 bits (39 for float64, 18 for 16-bit streams):
several more than the stream's own precision, or than float32's for float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["Format", "has_float64"]


@dataclass(frozen=True)
class Format:
    """How a stream of one dtype is held.

    Attributes:
        dtype, u_dtype: dtypes of X and U.
        bits: bits given to max|x[0]|.
        limit, u_limit: |X| and |U| stay below; sums of two such numbers are exact. limit * 2**(fine + 8) <= u_limit, so that
            spilling a byte always makes room.
        fine: at most this many bits by which the unit of a fresh U is finer than the unit of X.
    """

    dtype: torch.dtype
    u_dtype: torch.dtype
    bits: int
    limit: float
    u_limit: float
    fine: int

    @staticmethod
    def of(dtype: torch.dtype) -> Format:
        """Format of a stream of floating dtype `dtype`."""
        return _FORMATS.get(dtype, _FLOAT32)

    @property
    def state_bytes(self) -> int:
        """Resident bytes per element of X and U together."""
        return self.dtype.itemsize + self.u_dtype.itemsize

    def widening(self, wider: Format) -> int:
        """Bits by which integers of this format are shifted left on the way to a wider one."""
        return min(wider.bits - self.bits, math.floor(math.log2(wider.limit / self.limit) + 1e-3))


_FLOAT64 = Format(torch.float64, torch.float64, bits=39, limit=2.0**41, u_limit=2.0**52, fine=3)
_FLOAT32 = Format(torch.int32, torch.float64, bits=30, limit=2.0**31 - 2.0**16, u_limit=2.0**52, fine=13)
_FLOAT16 = Format(torch.int32, torch.int32, bits=18, limit=2.0**20, u_limit=2.0**30, fine=2)
_FORMATS = {torch.float64: _FLOAT64, torch.float32: _FLOAT32, torch.bfloat16: _FLOAT16, torch.float16: _FLOAT16}


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, in which products and roundings are made: Apple's does not, nor do some of Intel's."""
    if device.type == "xpu":
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"
