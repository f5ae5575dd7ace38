"""`DeviceState` against `State` on the CPU, bit for bit; fingerprints by Triton against those in C. A plain script:

python tests/arithmetic/device_cases.py --device cuda         on a GPU, in under a minute
python tests/arithmetic/device_cases.py --device cpu          in Triton's interpreter, as `test_device_state` runs it

One line for each group: ok, or FAILED and why. Exits with the number of those that failed.
"""

import argparse
import math
import os
import sys
import time
import traceback
from itertools import product
from pathlib import Path

if __name__ == "__main__" and "cuda" not in " ".join(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from mnet_fx.arithmetic import device_state
from mnet_fx.arithmetic.device_state import DeviceState, LostBits, Reserve
from mnet_fx.arithmetic.fixed_point import State

INF, NAN = math.inf, math.nan
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, BF16, F16, F64)


class Run:
    """A chain on both: what it starts from, what is added in each step, and how State went."""

    def __init__(self, x0, ys, factors, v0=None, held=None, device="cpu", reserve=None, horizon=None):
        self.ys, self.factors, self.device = ys, factors, device
        horizon = horizon or min(max(1 / (1 - g) for g, _ in factors), len(factors))
        self.ref = State(x0, v0, horizon, held=held)
        self.dev = DeviceState(x0.to(device), None if v0 is None else v0.to(device), factors, horizon, held, reserve=reserve)
        self.records, self.seen, self.prints = [], [], []
        self.note()

    def note(self):
        """The states must be the same; keeps what they are."""
        ref, dev = self.ref, self.dev
        X, U, mask = dev.integers()
        gone = ref.mask if ref.mask is not None else torch.zeros_like(ref.X, dtype=torch.bool)
        assert torch.equal(mask.cpu(), gone), "mask"
        assert (X.dtype, U.dtype, dev.dtype, dev.format) == (ref.X.dtype, ref.U.dtype, ref.dtype, ref.format), "dtypes"
        assert torch.equal(X.cpu(), ref.X), "X"
        assert torch.equal(U.cpu(), ref.U), "U"
        assert dev.meaning() == (ref.unit, ref.ratio, ref.x_bound, ref.v_bound), f"{dev.meaning()} for {ref.unit, ref.ratio}"
        same(dev.read(), ref.read(), "read")
        self.seen[dev.time :] = [(dev.X.clone(), dev.U.clone())]
        self.prints[dev.time :] = [dev.fingerprint()]

    def step(self):
        t = self.dev.time
        record, x = self.ref.step(self.ys[t], *self.factors[t])
        self.records[t:] = [record]
        index, found = self.dev.step(self.ys[t].to(self.device))
        assert index == t
        same(found, x, f"x after step {t}")
        spilled = sum(s.bytes.shape[0] for s in (record.x_spill, record.u_spill) if s is not None)
        words = device_state._modules()[1]
        used = self.dev.ledger[t : t + 2, words.USED.value].diff().item()
        assert used == spilled, f"{used} planes for {spilled} in step {t}"
        self.note()

    def back(self, restep=False):
        t = self.dev.time - 1
        if restep:
            self.dev.unstep_x(t)
            self.dev.restep_x(t)
            assert self.bits() == (True, True), "restep"
            assert torch.equal(self.dev.fingerprint()[0], self.prints[t + 1][0]), "fingerprint after restep"
        same(self.dev.unstep_x(t), self.ref.unstep_x(self.records[t]), f"x before step {t}")
        same(self.dev.read(), self.ref.read(), "read half-way")
        self.dev.unstep_u(t, self.ys[t].to(self.device))
        self.ref.unstep_u(self.records[t], self.ys[t])
        noted = self.prints[t][0]
        assert self.bits() == (True, True), f"state before step {t}"
        assert torch.equal(self.dev.fingerprint()[0], noted), f"fingerprint before step {t}"
        self.note()

    def bits(self):
        X, U = self.seen[self.dev.time]
        return torch.equal(raw(X), raw(self.dev.X)), torch.equal(raw(U), raw(self.dev.U))

    def to(self, t):
        while self.dev.time < t:
            self.step()
        while self.dev.time > t:
            self.back()

    def all(self, restep=False):
        """Forth, partly back and forth again, then back to the start."""
        steps = len(self.ys)
        self.to(steps)
        self.to(steps - (steps + 1) // 2)
        self.to(steps)
        while self.dev.time:
            self.back(restep)
        return self


def raw(t):
    return t.view(torch.int64) if t.dtype is torch.float64 else t


def same(found, wanted, what):
    found = found.cpu()
    assert found.dtype == wanted.dtype, f"{what}: {found.dtype} for {wanted.dtype}"
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: NaN elsewhere"
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    a, b = (t.masked_fill(t.isnan(), 0.0).contiguous().view(kinds) for t in (found, wanted))
    assert torch.equal(a, b), f"{what}: {(a != b).sum()} elements differ"


def made(n, steps, gammas, dtype=F32, y_dtype=None, scale=1.0, grow=1.0, jump=None, bad=(), v0=None, weights=None, seed=0, **options):
    """A `Run` on random numbers: y grows by `grow` from step to step, by jump[1] in step jump[0]; bad: (step, element, value)."""
    torch.manual_seed(seed)
    gammas = gammas if isinstance(gammas, list) else [gammas] * steps
    y_dtypes = y_dtype if isinstance(y_dtype, list) else [y_dtype or dtype] * steps
    x0 = (scale * torch.randn(n, dtype=F64)).to(dtype)
    ys = [(scale * grow**t * torch.randn(n, dtype=F64)) for t in range(steps)]
    if jump is not None:
        ys[jump[0]] *= jump[1]
    v = None if v0 is None else (v0 * scale * torch.randn(n, dtype=F64)).to(dtype)
    for t, i, value in bad:
        (x0 if t == "x0" else v if t == "v0" else ys[t])[i % n] = value
    ys = [y.to(kind) for y, kind in zip(ys, y_dtypes, strict=True)]
    weights = weights or [1 - g for g in gammas]
    return Run(x0, ys, list(zip(gammas, weights, strict=True)), v, **options)
