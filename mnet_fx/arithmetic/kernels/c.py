"""The shears of `eager` in C, one pass over the elements each: same bits, in half the time, or a quarter where tensors are small. And the
mixing of `fingerprints`.

The machine's C compiler takes some tenths of a second for each. Nothing is kept on disk, so what runs was made for this processor.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .eager import is_freed

__all__ = ["NativeError", "compiled", "hashes"]

_TYPES = {  # float16: gcc 12 and clang have it
    torch.int32: "int32_t",
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "_Float16",
}
_PARALLEL = 1 << 15  # elements; below, waking another thread takes longer than the loop
_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]  # none that alters a result
_FASTER = ["-march=native", "-fopenmp"]  # not every compiler takes these
_PATIENCE = 30  # seconds; it takes tenths of one
_HUNG: set[str] = set()  # compilers that are not asked again

_PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint16_t bits; } bfloat16;

static inline float widened(bfloat16 b) {
    const uint32_t bits = (uint32_t)b.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bfloat16 narrowed(float f) {  /* ties to even; f is no NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bfloat16){(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#define EACH for (int64_t i = 0; i < n; i++)
#define FOR_ALL(...) /* a team of one would take time too */ \\
    if (threads == 1) { _Pragma("omp simd") EACH __VA_ARGS__ } \\
    else { _Pragma("omp parallel for simd num_threads(threads)") EACH __VA_ARGS__ }
"""

# The types T0, T1, ... are those of the tensors, in order; READ makes a double of a y, PUT an x of the stream's dtype of an X.
_LOOPS = {
    "shear": """
void shear(T0 *restrict X, T1 *restrict U, const T2 *restrict y, T3 *restrict out,
           double scale, double ratio, double unit, int64_t n, int threads) {
    FOR_ALL({
        const T1 u = U[i] + (T1)rint(READ(y[i]) * scale);
        const T0 x = X[i] + (T0)rint((double)u * ratio);
        U[i] = u;
        X[i] = x;
        out[i] = PUT(x);
    })
}""",
    "unshear_x": """
void unshear_x(T0 *restrict X, const T1 *restrict U, T2 *restrict out, double ratio, double unit, int64_t n, int threads) {
    FOR_ALL({
        const T0 x = X[i] - (T0)rint((double)U[i] * ratio);
        X[i] = x;
        out[i] = PUT(x);
    })
}""",
    "unshear_u": """
void unshear_u(T0 *restrict U, const T1 *restrict y, double scale, int64_t n, int threads) {
    FOR_ALL({ U[i] -= (T0)rint(READ(y[i]) * scale); })
}""",
}

_HASHES = """
#include <stdint.h>
#include <string.h>

static inline uint64_t mixed(const unsigned char *word, int64_t bytes, int64_t place) {
    uint64_t z = 0;
    memcpy(&z, word, bytes);
    z += (uint64_t)(place + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* table: where the tensors are, their bytes, and room for what comes out, `count` each. */
void hashes(uint64_t *table, int64_t count, int64_t parallel, int threads) {
    for (int64_t k = 0; k < count; k++) {
        const unsigned char *words = (const unsigned char *)(uintptr_t)table[k];
        const int64_t n = table[count + k] / 8, rest = table[count + k] % 8;
        uint64_t sum = rest ? mixed(words + 8 * n, rest, n) : 0;
        if (threads == 1 || n < parallel) {
            for (int64_t i = 0; i < n; i++) sum += mixed(words + 8 * i, 8, i);
        } else {
            #pragma omp parallel for simd reduction(+ : sum) num_threads(threads)
            for (int64_t i = 0; i < n; i++) sum += mixed(words + 8 * i, 8, i);
        }
        table[2 * count + k] = sum;
    }
}
"""


class NativeError(Exception):
    """There is no compiler, or it cannot compile this."""


@cache
def compiled(name: str, dtypes: tuple[torch.dtype, ...]) -> Callable[..., None]:
    """A loop of `eager.Kernels` for tensors of these dtypes, on the CPU, dense and of equal strides; for finite y only.

    Raises:
        NativeError: it cannot be compiled.
    """
    function = getattr(_library(_source(name, dtypes)), name)
    factors = {"shear": 3, "unshear_x": 2, "unshear_u": 1}[name]
    function.argtypes = [ctypes.c_void_p] * len(dtypes) + [ctypes.c_double] * factors + [ctypes.c_int64, ctypes.c_int]
    function.restype = None

    def run(tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        n = tensors[0].numel()
        function(*(t.data_ptr() for t in tensors), *factors, n, torch.get_num_threads() if n >= _PARALLEL else 1)

    return run


@cache
def hashes() -> Callable[[Sequence[Tensor]], list[int]]:
    """A function that gives a number for each of some dense tensors on the CPU: the sum of its 64-bit words, each mixed with its place.

    Raises:
        NativeError: it cannot be compiled.
    """
    function = _library(_HASHES).hashes
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    function.restype = None

    def numbers(places: Sequence[int], sizes: Sequence[int]) -> list[int]:
        count = len(places)
        table = _array(ctypes.c_uint64, 3 * count)(*places, *sizes)
        function(table, count, _PARALLEL, torch.get_num_threads())
        return table[2 * count :]

    def run(tensors: Sequence[Tensor]) -> list[int]:
        places, sizes = [*map(Tensor.data_ptr, tensors)], [t.nbytes for t in tensors]
        doubtful = 0 in places or any(map(Tensor.storage_offset, tensors))
        if doubtful and any(size and is_freed(t) for size, t in zip(sizes, tensors, strict=True)):
            raise RuntimeError("a tensor whose memory was freed has no fingerprint")
        return numbers(places, sizes)

    sample = bytes(range(20))  # no tensor, which a FakeTensorMode around the first call would make without values
    buffer = ctypes.create_string_buffer(sample, len(sample))
    if numbers([ctypes.addressof(buffer)], [len(sample)]) != [_hash(sample)]:
        raise NativeError("it gives other numbers than Python")
    return run


@cache  # else each array would leave a cycle of a type with itself to the garbage collector
def _array(kind: Any, length: int) -> Any:
    return kind * length


def _hash(data: bytes) -> int:
    """What `hashes` gives for these bytes, in Python."""
    total, most = 0, (1 << 64) - 1
    for place in range(0, len(data), 8):
        z = int.from_bytes(data[place : place + 8].ljust(8, b"\0"), sys.byteorder) + (place // 8 + 1) * 0x9E3779B97F4A7C15 & most
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & most
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & most
        total += z ^ (z >> 31)
    return total & most


def _source(name: str, dtypes: tuple[torch.dtype, ...]) -> str:
    y, out = {"shear": (2, 3), "unshear_x": (2, 2), "unshear_u": (1, 1)}[name]
    read = "(double)widened(y)" if dtypes[y] is torch.bfloat16 else "(double)(y)"
    put = {
        torch.float64: "(double)(x) * unit",
        torch.float32: "(float)(x) * (float)unit" if dtypes[0] is torch.int32 else "(float)((double)(x) * unit)",
        torch.bfloat16: "narrowed((float)((double)(x) * unit))",
        torch.float16: "(_Float16)(float)((double)(x) * unit)",
    }[dtypes[out]]
    types = [f"typedef {_TYPES[dtype]} T{i};" for i, dtype in enumerate(dtypes)]
    return "\n".join([_PRELUDE, *types, f"#define READ(y) {read}", f"#define PUT(x) ({put})", _LOOPS[name], ""])


def _library(source: str) -> ctypes.CDLL:
    """The source, compiled and loaded.

    Raises:
        NativeError: whatever went wrong; also at once where an earlier try had to be stopped.
    """
    compiler = os.environ.get("CC", "").strip() or "cc"
    if compiler in _HUNG:
        raise NativeError(f"{compiler}: it took too long before")
    reason = ""
    try:
        with tempfile.TemporaryDirectory(prefix="mnet_fx", ignore_cleanup_errors=True) as folder:
            for flags in ([*_FLAGS, *_FASTER], _FLAGS):
                try:
                    return _built([*shlex.split(compiler), *flags], source, Path(folder) / f"loop{len(flags)}.so")
                except NativeError as error:
                    reason = str(error)
    except subprocess.TimeoutExpired as error:
        _HUNG.add(compiler)
        raise NativeError(f"{compiler}: it took more than {_PATIENCE} s") from error
    except (OSError, ValueError) as error:  # no compiler, no folder to write to; quotes that do not match
        raise NativeError(f"{compiler}: {error}") from error
    raise NativeError(f"{compiler}: {reason}")


def _built(command: list[str], source: str, path: Path) -> ctypes.CDLL:
    command = [*command, "-x", "c", "-", "-o", str(path), "-lm"]
    result = subprocess.run(command, input=source, text=True, errors="replace", capture_output=True, timeout=_PATIENCE)
    if result.returncode:
        raise NativeError(result.stderr.strip() or "no reason given")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # nothing was written, or it needs a library that is not there
        raise NativeError(str(error)) from error
