"""`DeviceState` against `State` on the CPU, bit for bit; fingerprints by Triton against those in C. A plain script:

python tests/arithmetic/device_cases.py --device cuda         on a GPU, in under a minute
python tests/arithmetic/device_cases.py --device cpu          in Triton's interpreter, as `test_device_state` runs it

One line for each group: ok, or FAILED and why. Exits with the number of those that failed. --only NAME,... runs some groups.
"""

import argparse
import math
import os
import subprocess
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
from mnet_fx.arithmetic.device_state import DeviceState, LostBits, Reserve, supported
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.arithmetic.kernels.c import hashes
from mnet_fx.runtime import offload

INF, NAN = math.inf, math.nan
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, BF16, F16, F64)


class Run:
    """A chain on both: what it starts from, what is added in each step, and how State went."""

    def __init__(self, x0, ys, factors, v0=None, held=None, *, device="cpu", reserve=None, horizon=None):
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
        words = device_state._kernels().words
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

    def blind(self):
        """Forth and back with no look at the device in between, which may be far behind; then everything at once."""
        steps, dev = len(self.ys), self.dev
        ys = [y.to(self.device) for y in self.ys]
        found, prints, wanted = [], [dev.fingerprint()[0]], []
        for t, y in enumerate(ys):
            found.append(dev.step(y)[1])
            prints.append(dev.fingerprint()[0])
            self.records.append(self.ref.step(self.ys[t], *self.factors[t])[0])
            wanted.append(self.ref.read())
        after, planes = (dev.X.clone(), dev.U.clone(), dev.integers()), dev.planes
        for t in reversed(range(steps)):
            found.append(dev.unstep_x(t))
            dev.unstep_u(t, ys[t])
            prints.append(dev.fingerprint()[0])
            wanted.append(self.ref.unstep_x(self.records[t]))
            self.ref.unstep_u(self.records[t], self.ys[t])
        for a, b in zip(found, wanted, strict=True):
            same(a, b, "x")
        assert all(torch.equal(a, b) for a, b in zip(prints[:steps], reversed(prints[steps:]), strict=False)), "fingerprints"
        assert self.bits() == (True, True), "the start"
        assert after[2][0].shape == self.ref.X.shape
        assert len(planes.planes) == planes.words[steps], "planes that nobody took are kept"
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
    return Run(x0, ys, list(zip(gammas, weights, strict=True)), v, device=DEVICE, **options)


DEVICE = "cpu"
BAD = [("x0", 3, NAN), (0, 0, NAN), (2, 9, INF), (2, 3, INF), (3, 7, -INF)]


def plain(n, dtype):
    made(n, 4, 0.9, dtype).all()
    made(n, 5, 0.05, dtype).blind()
    made(n, 4, [0.5, 0.0, 0.9, 0.0], dtype, v0=1.0, weights=[1.0, -0.5, 0.1, 1.0]).all()
    made(n, 5, 0.9, dtype, jump=(3, 1e4 if dtype is F16 else 1e30)).blind()
    made(n, 4, 0.5, dtype, bad=BAD, grow=2.5, v0=0.5).all(restep=True)


def held(n):
    made(n, 4, 0.5, BF16, [BF16, F32, BF16, F32], held=F32, bad=BAD).all(restep=True)
    made(n, 3, 0.05, F16, held=F64).all()
    made(n, 3, 0.5, F32, held=F64).blind()


def promoted(n):
    made(n, 5, 0.5, BF16, [BF16, F32, BF16, F64, F32], bad=[*BAD, (4, 1, NAN), (1, 2, NAN)]).all(restep=True)
    made(n, 4, 0.05, F16, [F16, BF16, F64, F64], bad=[(0, 1, INF)]).all()
    made(n, 3, 0.05, F16, [F16, F64, F16], v0=1.0).blind()
    made(n, 4, 0.9, F32, [F32, F64, F64, F16], v0=0.1, jump=(2, 1e8), bad=[(0, 3, NAN), (1, 4, INF)]).all(restep=True)
    ys = [torch.zeros(2, dtype=F64), *(torch.tensor([0.0, y]) for y in (-1.0, 206.9081, 0.0, 0.0, 3e38))]  # the last takes 12 planes
    factors = [(0.0, 1.0), (0.05, 1.0), (0.9, -0.5), (1 / 256, 1.0), (0.9, 1.0), (0.5, 1.0)]
    Run(torch.tensor([0.0, 2.0]), ys, factors, device=DEVICE).all(restep=True)


def magnitudes(n):
    """Below what is normal, and beyond what the stream's dtype can hold."""
    for dtype, scale, grow in (
        (F32, 1e-40, 1.0),
        (BF16, 1e-39, 1.0),
        (F16, 1e-7, 1.0),
        (F64, 1e-310, 1.0),
        (F32, 1e37, 8.0),
        (F16, 1e4, 4.0),
    ):
        made(n, 3, 0.5, dtype, scale=scale, grow=grow).all()
    made(n, 3, 0.9, BF16, scale=1e37, grow=16.0).all(restep=True)
    made(n, 3, 0.9, F64, jump=(1, 1e300), bad=[(0, 3, NAN), (1, 4, 1e305)]).all()


def again(n):
    """Forth and back more often than there is room for fingerprints at first."""
    run = made(n, 3, 0.3, jump=(1, 1e6))
    for _ in range(3):
        run.all(restep=True)


def skipped(n):
    """Steps with other factors than were told at the start, as where layers are skipped; forth once more with those."""
    run = made(n, 6, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], jump=(3, 1e5))
    run.factors[2:] = [(0.3, 0.7), (0.01, 2.0), (0.5, 0.5), (0.0, 1.0)]
    real = run.dev.step
    run.dev.step = lambda y: real(y, *run.factors[run.dev.time])
    run.all(restep=True)


def unseen(n):
    """A stream that was written to is told apart, also by NaN; not where elements are NaN by themselves."""

    def is_seen(dev, x):
        dev.step(torch.zeros_like(x), given=x)
        return not torch.equal(*[print_[0].cpu() for print_ in dev.written])

    for dtype in DTYPES:
        for wrong in (None, NAN, INF, 3.0):
            run = made(n, 3, 0.5, dtype, bad=())
            run.to(2)
            x = run.dev.read()
            if wrong is not None:
                x.view(-1)[n // 2] = wrong
            assert is_seen(run.dev, x) == (wrong is not None), (dtype, wrong)
    x0 = torch.randn(n)
    x0[0] = NAN
    dev = DeviceState(x0.to(DEVICE), None, [(0.5, 0.5)] * 2, 2.0)
    assert not is_seen(dev, dev.read())
    for narrow, wide in ((F16, F32), (F32, F64)):  # a step that widens the format
        dev = DeviceState(torch.randn(n, device=DEVICE).to(narrow), None, [(0.5, 0.5)] * 2, 2.0)
        x = dev.read()
        dev.step(torch.randn(n, device=DEVICE, dtype=wide), given=x)
        assert torch.equal(*[print_[0].cpu() for print_ in dev.written])


def long(n):
    made(n, 100, 0.9, grow=1.1).blind()
    made(n, 40, 0.5).blind()
    made(n, 200, 0.99, BF16).blind()


def forward_only(n):
    """For inference: nothing is kept, the same x."""
    torch.manual_seed(0)
    x0, ys = torch.randn(n), [10.0**t * torch.randn(n) for t in range(6)]
    ref, dev = State(x0, horizon=1.25), DeviceState(x0.to(DEVICE), None, [(0.2, 0.8)] * 6, 1.25, store=False)
    for t, y in enumerate(ys):
        same(dev.step(y.to(DEVICE))[1], ref.step(y, 0.2, 0.8)[1], f"x after step {t}")
    assert dev.fingerprint() == ()
    assert dev.planes is None


def ahead(n):
    """A state that goes on alone gives the same x; the other stays, and goes back. The device has not come to any of it when it is told."""
    for dtype, gammas, jump in ((F32, 0.5, None), (BF16, 0.05, None), (F32, [0.9, 0.9, 0.5, 0.0, 0.5, 0.9], (4, 100.0))):
        run = made(n, 6, gammas, dtype, [dtype] * 4 + [F32] * 2, jump=jump, bad=BAD, v0=0.5)
        run.to(3)
        dev, ref = run.dev.ahead(), run.ref.ahead()
        found = [dev.step(y.to(DEVICE))[1] for y in run.ys[3:]]
        for t, x in enumerate(found, 3):
            same(x, ref.step(run.ys[t], *run.factors[t])[1], f"x after step {t}")
        assert run.bits() == (True, True), "the state that stayed"
        run.to(0)
        run.all()


def away(n):
    """A state of which the memory is given back at the end, and the planes lie elsewhere on the way back; or forth once more."""
    offload._DEVICES |= {"cpu"}
    spilling, jumping = {"gammas": 0.05}, {"gammas": [0.9, 0.0, 0.5, 0.9, 0.3, 0.0], "jump": (3, 100.0), "bad": BAD}
    for dtype, (back, options) in product((F32, BF16), enumerate((spilling, jumping))):  # of either size of U
        run = made(n, 6, **options, dtype=dtype, v0=0.5)
        run.to(6)
        run.to(6 - 2 * back)
        handover = offload.Offload(run.dev.device)
        run.dev.trim(wait=True)
        bulk, there = run.dev.bulk(), {plane.data_ptr() for plane in run.dev.planes.planes}
        handover.wait(run.dev, list)
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        assert there
        assert not any(t.untyped_storage().nbytes() for t in bulk)
        others = [torch.full((n,), 170, dtype=torch.uint8, device=DEVICE) for _ in range(3 * len(bulk))]  # take the memory
        handover(list)
        assert {plane.data_ptr() for plane in run.dev.planes.planes} != there
        run.note()
        for t in (0, 6) if back else (6, 0):
            run.to(t)
        assert all(bool((t == 170).all()) for t in others), "somebody else's memory was written to"


def layouts(n):
    """The stream and what is added to it with other strides, no memory of their own, or not on a word's boundary."""
    if n < 17:
        return
    torch.manual_seed(0)
    rows = n // 8
    x0 = torch.randn(8, 3, rows).to(DEVICE).permute(2, 0, 1)
    ys = [torch.randn(8 * 3 * rows + 1).to(DEVICE)[1:].view(8, 3, rows).permute(2, 0, 1), torch.randn(rows, 8, 3).to(DEVICE)]
    ys += [torch.randn(rows, 1, 3).to(DEVICE).expand(rows, 8, 3), torch._efficientzerotensor((rows, 8, 3), device=DEVICE)]
    ys += [torch.view_as_complex(torch.randn(rows, 8, 3, 2)).to(DEVICE).conj().imag]
    assert ys[-1].is_neg()
    ref, dev = State(x0.cpu(), horizon=2.0), DeviceState(x0, None, [(0.5, 0.5)] * 5, 2.0)
    for t, y in enumerate(ys):
        _, x = ref.step(torch.zeros(y.shape) if y._is_zerotensor() else y.cpu().clone() + 0.0, 0.5, 0.5)
        found = dev.step(y)[1]
        same(found, x, f"step {t}")
        assert found.stride() == x.stride()
    assert torch.equal(dev.integers()[1].cpu(), ref.U)


def lost(n):
    """Where a plane was missing: the forward pass is right, the way back raises, and the next chain has room."""
    reserve = Reserve(most=0)
    torch.manual_seed(0)
    x0, ys, factors = torch.randn(n), [torch.randn(n) for _ in range(6)], [(0.5, 0.5)] * 6
    ys[4] *= 1e30
    ref, dev = State(x0, horizon=2.0), DeviceState(x0.to(DEVICE), None, factors, 2.0, reserve=reserve)
    for y in ys:
        same(dev.step(y.to(DEVICE))[1], ref.step(y, 0.5, 0.5)[1], "x")
    told, words = None, dev.planes.words
    try:
        dev.confirm()
    except LostBits as error:
        told = error.step
    assert told == 4, f"bits were lost in step 4; told: {told}"
    word, words[6] = words[6], -1  # as if the device had not told yet
    dev.unstep_x(5)
    dev.unstep_u(5, ys[5].to(DEVICE))
    assert dev.unstep_x(4).isnan().all()
    dev.unstep_u(4, ys[4].to(DEVICE))
    words[6] = word
    try:
        dev.unstep_x(3)
        raise AssertionError("bits were lost, and nothing was said")
    except LostBits:
        pass
    assert reserve.most is None
    Run(x0, ys, factors, device=DEVICE, reserve=reserve, horizon=2.0).blind()
    assert reserve.most > 2
    Run(x0, ys, factors, device=DEVICE, reserve=reserve, horizon=2.0).blind()


def refusals(n):
    dev = DeviceState(torch.ones(n, device=DEVICE), None, [(0.5, 0.5)] * 2)
    for bad in (torch.ones(n + 1, device=DEVICE), torch.ones(n, dtype=torch.int32, device=DEVICE), torch.ones(n, device="meta")):
        try:
            dev.step(bad)
        except device_state.StreamError:
            continue
        raise AssertionError(f"{bad.dtype} {bad.shape} was taken")
    assert supported(dev.read(), [(0.5, 0.5)])
    assert not supported(dev.read(), [(0.5, 0.5)] * 961)
    assert not supported(dev.read().to(torch.complex64), [(0.5, 0.5)])
    assert not supported(torch.ones(2, device="meta"), [(0.5, 0.5)])


def words(n):
    """Every U that an element can have when it becomes NaN, at the first and the last time."""
    times, sizes = torch.tensor([0, 1, 959, 960]), torch.tensor([0, 1, 2**52 - 1, 2**52, 2**52 + 2**23])
    times, sizes, signs = (t.flatten() for t in torch.meshgrid(times, sizes, torch.tensor([1, -1]), indexing="ij"))
    times, sizes, signs = (t[(sizes > 0) | (signs > 0)] for t in (times, sizes, signs))  # no integer is -0
    big = sizes >> 52
    U = ((signs < 0).long() << 63) | (torch.where(big > 0, 1077, 1) + times << 52) | (sizes & (2**52 - 1))
    U, X = U.view(F64).to(DEVICE), torch.arange(len(U), dtype=torch.int32, device=DEVICE)
    dev = DeviceState(torch.ones(len(U), device=DEVICE), None, [(0.5, 0.5)])
    X2, U2 = torch.zeros_like(X), torch.zeros_like(U)
    dev.loops.recode(dev.device, dev.grid, X, U, X2, U2, 0, 0, len(U), dev.rounds, device_state.BLOCK)
    assert torch.equal(raw(U), raw(U2))
    assert torch.equal(X, X2)
    dev.U = U
    assert torch.equal(dev.integers()[1].cpu(), (signs * sizes).double())
    assert dev.integers()[2].all()


def fingerprints(n):
    """The numbers of the loop in C, for any bytes anywhere."""
    from mnet_fx.arithmetic.kernels import device_hash

    torch.manual_seed(0)
    sizes = (1, 3, 7, 8, 9, 100, n) if DEVICE == "cpu" else (1, 3, 7, 4096, 12345, n, 5 * n)
    tensors = [torch.randn(size).to(kind) for size in sizes for kind in (F32, BF16, F64)]
    tensors += [torch.randint(0, 256, (size + 16,), dtype=torch.uint8)[k : k + size] for k in range(9) for size in (1, 5, 13, 24, 33)]
    tensors += [torch.randn(20).to(BF16)[k:] for k in range(5)] + [torch.zeros(0), torch.arange(13, dtype=torch.uint8) > 5]
    there = [torch.cat([t.flatten()[:0].new_zeros(k), t]).to(DEVICE)[k:] for k, t in zip((0, 1, 3, 5) * 99, tensors, strict=False)]
    wanted = [h - (1 << 64) if h >> 63 else h for h in hashes()(tensors)]
    for _ in range(2):  # the second time by a table that is there
        assert device_hash.hashes_on_device(there).tolist() == wanted
    for t, number in list(zip(there, wanted, strict=True))[:: 5 if DEVICE == "cpu" else 1]:
        assert device_hash.hashes_on_device([t]).tolist() == [number]
    freed, hidden = torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)[2:]
    for t in (freed, hidden):
        t.untyped_storage().resize_(0)
    for none in (torch._efficientzerotensor(5, device=DEVICE), freed, hidden):
        try:
            device_hash.hashes_on_device([none, there[0]])
        except RuntimeError:
            continue
        raise AssertionError("no error where there is no memory")


def drawn(n):
    """Chains of any kind, by hypothesis."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    gammas = st.one_of(st.sampled_from([0.0, 1 / 256, 0.05, 0.5, 0.9, 0.999]), st.floats(0, 0.9999))
    values = st.one_of(st.floats(-4, 4, width=32), st.floats(), st.sampled_from([0.0, -0.0, 1e-45, 3e38, -3e38, NAN, INF]))

    @st.composite
    def runs(draw):
        size, dtype, steps = draw(st.integers(1, 5)), draw(st.sampled_from(DTYPES)), draw(st.integers(1, 6))
        kinds = DTYPES if draw(st.booleans()) else (dtype,)
        held = torch.promote_types(dtype, draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else None

        def tensor(kind):
            grow = 10.0 ** draw(st.sampled_from([0, 0, 0, 3, 8, 30, -30]))
            return (grow * torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=F64)).to(kind)

        ys = [tensor(draw(st.sampled_from(kinds))) for _ in range(steps)]
        factors = [(g, draw(st.sampled_from([1.0, 1 - g, -0.5]))) for g in draw(st.lists(gammas, min_size=steps, max_size=steps))]
        return tensor(dtype), ys, factors, tensor(dtype) if draw(st.booleans()) else None, held

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
    )
    @given(runs())
    def check(run):
        Run(*run, device=DEVICE).all(restep=True)

    check()


EXAMPLES = 15
GROUPS = {
    "float32": lambda n: plain(n, F32),
    "bfloat16": lambda n: plain(n, BF16),
    "float16": lambda n: plain(n, F16),
    "float64": lambda n: plain(n, F64),
    **{
        f.__name__: f
        for f in (
            held,
            promoted,
            magnitudes,
            again,
            skipped,
            unseen,
            forward_only,
            ahead,
            away,
            layouts,
            lost,
            refusals,
            words,
            fingerprints,
            drawn,
        )
    },
}
EVERYWHERE = ("float32", "bfloat16", "float64", "fingerprints")  # on a GPU, for each number of elements; the others for one
SIZES = (1000, 1, 17, 70001, 1 << 20)


def speed():
    """Microseconds of the host for a move of few elements; milliseconds and GB/s of many, with other sizes of blocks."""
    for n, steps in ((1000, 400), (1 << 24, 12)):
        for dtype in (F32, BF16):
            for block, programs in ((256, 2048), (256, 8192), (512, 2048), (512, 8192)) if n > 1000 else ((256, 2048),):
                device_state.BLOCK = block
                device_state.PROGRAMS = programs
                moves(n, dtype, steps, f"{n} elements of {dtype}, blocks of {block}, {programs} programs")


def moves(n, dtype, steps, title):
    x0, y, reserve = torch.randn(n).to(DEVICE, dtype), torch.randn(n).to(DEVICE, dtype), Reserve()
    wide = x0.element_size()
    moved = {
        "step": 4 * wide + 24 if dtype is F32 else 3 * wide + 16,
        "unstep_x": 20 if dtype is F32 else 14,
        "unstep_u": 20 if dtype is F32 else 10,
    }
    for _ in range(3):
        dev, host, events = DeviceState(x0, None, [(0.9, 0.1)] * steps, 10.0, reserve=reserve), dict.fromkeys(moved, 0.0), []
        torch.cuda.synchronize()
        for name, t in [("step", t) for t in range(steps)] + [
            (name, t) for t in reversed(range(steps)) for name in ("unstep_x", "unstep_u")
        ]:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            begin = time.perf_counter()
            dev.step(y) if name == "step" else dev.unstep_x(t) if name == "unstep_x" else dev.unstep_u(t, y)
            host[name] += time.perf_counter() - begin
            pair[1].record()
            events.append((name, pair))
        torch.cuda.synchronize()
    for name, size in moved.items():
        times = sorted(a.elapsed_time(b) for which, (a, b) in events if which == name)
        ms = times[len(times) // 2]
        found = f"{1e6 * host[name] / steps:.0f} us of the host" if n < 1 << 20 else f"{ms:.3f} ms, {n * size / ms / 1e6:.0f} GB/s"
        print(f"{title}: {name} {found}", flush=True)


def jobs(device):
    """(name, elements) of all groups."""
    if device == "cpu":
        return [(name, 70) for name in GROUPS]
    groups = [name for name in (*GROUPS, "long") if name != "drawn"]  # which would compile for each dtype and number of elements
    return [(name, n) for n in SIZES for name in groups if n == SIZES[0] or name in EVERYWHERE]


def run(name, n):
    """1 where a group failed."""
    begin = time.perf_counter()
    if DEVICE == "cpu":  # either several programs of several rounds, or one of one, which the interpreter is quicker with
        sizes = (32, 32, 2) if name in ("float32", "words") else (128, 128, 1)
        device_state.BLOCK, device_state.REACH_BLOCK, device_state.PROGRAMS = sizes
    try:
        GROUPS.get(name, long)(n)
        state = "ok"
    except ModuleNotFoundError as error:
        state = f"skipped: {error}"
    except Exception as error:
        state = f"FAILED {type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
    print(f"{name}, {n} elements: {state} ({time.perf_counter() - begin:.1f} s)", flush=True)
    return int(state.startswith("FAILED"))


def main():
    global DEVICE, EXAMPLES
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--part", default="")  # K/N: the K-th of N processes, as which all groups run on a GPU
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--speed", action="store_true")  # on a GPU: how long moves take, and nothing else
    options = parser.parse_args()
    DEVICE, EXAMPLES = options.device, options.examples
    torch.set_num_threads(1)
    if options.speed:
        return speed()
    if DEVICE != "cpu" and not options.part and options.processes > 1:
        parts = [[sys.executable, __file__, *sys.argv[1:], "--part", f"{k}/{options.processes}"] for k in range(options.processes)]
        return sum(child.wait() for child in [subprocess.Popen(part) for part in parts])
    chosen = [job for job in jobs(DEVICE) if not options.only or job[0] in options.only.split(",")]
    k, of = map(int, (options.part or "0/1").split("/"))
    return sum(run(*job) for job in chosen[k::of])


if __name__ == "__main__":
    sys.exit(main())
