"""The integer shears against integers of unbounded size, and against the recurrence in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import IntegerState, recurrence, unpack

from mnet_fx.arithmetic.cost import state_bytes
from mnet_fx.arithmetic.fingerprints import fingerprint
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.arithmetic.kernels import eager as loops
from mnet_fx.arithmetic.kernels.eager import LARGEST, read, spill, unspill
from mnet_fx.budget.measured import measure
from mnet_fx.errors import StreamError
from mnet_fx.settings import matched_weights, momentum_weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
gammas = st.one_of(st.sampled_from([0.0, 1 / 256, 0.05, 0.5, 0.9, 0.999]), st.floats(0, 0.9999))
shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)
values = st.one_of(st.floats(-4, 4, width=32), st.floats(width=32), st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]))


@st.composite
def runs(draw):
    """(x0, v0 or None, [(y, gamma, weight), ...]): a stream and what is added to it, of any shape and magnitude, inf and nan included."""
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    others = DTYPES if draw(st.booleans()) else [dtype]

    def tensor():
        size, kind = math.prod(shape), draw(st.sampled_from(others))
        numbers = st.lists(values | st.floats() if kind is torch.float64 else values, min_size=size, max_size=size)
        return torch.tensor(draw(numbers), dtype=torch.float64).reshape(shape).to(kind)

    steps = [(tensor(), g, draw(st.sampled_from([1.0, 1.0 - g]))) for g in draw(st.lists(gammas, min_size=1, max_size=12))]
    return tensor(), tensor() if draw(st.booleans()) else None, steps


def snapshot(state):
    fields = (state.unit, state.ratio, state.x_bound, state.v_bound, state.dtype, state.format)
    return state.X.clone(), state.U.clone(), fields, None if state.mask is None else state.mask.clone()


def same(a, b):
    masks = (a[3] is None and b[3] is None) or (a[3] is not None and b[3] is not None and torch.equal(a[3], b[3]))
    integers = all(x.dtype == y.dtype and torch.equal(x, y) and fingerprint(x) == fingerprint(y) for x, y in zip(a[:2], b[:2], strict=True))
    return integers and a[2] == b[2] and masks


def assert_undone(state, records, ys, seen):
    """Takes a state back step by step, each first half to and fro, and compares it with the snapshots of the way forward."""
    for t in reversed(range(len(records))):
        x = state.unstep_x(records[t])
        assert torch.equal(state.X, seen[t][0])
        assert torch.equal(x.nan_to_num(), state.read().nan_to_num())
        state.restep_x(records[t])
        assert same(snapshot(state), seen[t + 1])
        state.unstep_x(records[t])
        state.unstep_u(records[t], ys[t])
        assert same(snapshot(state), seen[t])


@given(runs())
def test_unstep_undoes_step_for_any_values(run):
    x0, v0, steps = run
    state = State(x0, v0)
    seen, records = [snapshot(state)], []
    for y, g, b in steps:
        records.append(state.step(y, g, b)[0])
        seen.append(snapshot(state))
    assert_undone(state, records, [y for y, *_ in steps], seen)


@given(runs())
def test_every_number_is_that_of_integers_of_any_size(run):
    x0, v0, steps = run
    state = State(x0, v0)
    exact = [IntegerState(int(X), int(U)) for X, U in zip(state.X.flatten().tolist(), state.U.flatten().tolist(), strict=True)]
    for y, g, b in steps:
        format_ = state.format
        record, _ = state.step(y, g, b)
        for oracle in exact:
            oracle.X <<= format_.widening(state.format)
            oracle.U <<= format_.widening(state.format) if format_.u_dtype != state.format.u_dtype else 0
        for i, (oracle, part) in enumerate(zip(exact, y.double().flatten().tolist(), strict=True)):
            bits = [None if s is None else s.bits for s in (record.x_spill, record.u_spill)]
            lows = oracle.step(part if abs(part) <= LARGEST else 0.0, record.scale, record.ratio, *bits)
            assert (state.X.flatten()[i].item(), state.U.flatten()[i].item()) == (oracle.X, oracle.U)
            for low, spilled in zip(lows, (record.x_spill, record.u_spill), strict=True):
                assert spilled is None or unpack(spilled.bytes, i) == low
            assert abs(oracle.U) < 2**53
            assert abs(oracle.X) <= state.format.limit
            assert abs(oracle.X) * state.unit <= state.x_bound
            assert abs(oracle.U) * state.ratio * state.unit <= state.v_bound
        assert state.v_bound < 1.001 * state.format.u_limit * state.ratio * state.unit
        if record.u_spill is not None:
            assert 2**-8 < state.ratio / 2.0 ** -min(state.fine, state.format.fine) <= 1  # out are whole bytes, and none too many


@given(
    st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=9),
    st.integers(1, 60),
    st.sampled_from([torch.int32, torch.float64]),
)
def test_spill_is_lossless(numbers, bits, dtype):
    T = torch.tensor(numbers, dtype=dtype)
    before, bound = T.clone(), float(max(map(abs, numbers)))
    spilled = spill(T, bits, bound)
    assert spilled.bytes.dtype is torch.uint8
    assert spilled.bytes.shape[0] <= math.ceil(bits / 8)
    unspill(T, spilled)
    assert torch.equal(T, before)


@pytest.mark.parametrize("bits", [math.inf, 9, 12])
def test_a_spill_has_room_for_its_bound(bits):
    T = torch.tensor([128.0, -128.0, 0.0])
    unspill(T, spilled := spill(T, bits, 128.0))
    assert T.tolist() == [128.0, -128.0, 0.0]
    assert spilled.bytes.shape[0] == 2


def test_zeros_of_either_sign_are_one_integer():
    zeros = torch.tensor([-0.0, 0.0, -1e-30, 1.0], dtype=torch.float64)
    for state in (State(zeros), State(torch.ones(4), zeros.float())):
        before, y = state.fingerprint(), torch.ones(4)
        record, _ = state.step(y, 0.5, 0.5)
        state.unstep_x(record)
        state.unstep_u(record, y)
        assert state.fingerprint() == before


@pytest.mark.parametrize("weights", [momentum_weights, matched_weights])
@pytest.mark.parametrize(
    "gamma",
    [0.0, 0.05, 0.5, 0.9, 0.99, 0.999, lambda t, T: t / T, lambda t, T: 0.0 if t == 0 else 0.9],
    ids=["0", "0.05", "0.5", "0.9", "0.99", "0.999", "rising", "first"],
)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_forward_errs_no_more_than_twice_the_float32_recurrence(weights, gamma, scale):
    schedule = [gamma(t, 40) if callable(gamma) else gamma for t in range(40)]
    ours, float32 = errors(mixing("saturating", 40, scale), list(zip(schedule, weights(schedule), strict=True)), scale, horizon=10)
    assert ours <= 2 * float32


@pytest.mark.parametrize("kind", ["saturating", "linear", "normalised"])
@pytest.mark.parametrize(
    ("gamma", "steps"), [(g, steps) for g in (0.0, 1 / 256, 0.3, 0.9, 0.999) for steps in (2, 12, 100)] + [(0.99, 300), (0.999, 300)]
)
def test_the_promise_of_accuracy_holds_at_any_depth_where_elements_mix(kind, gamma, steps):
    ours, float32 = errors(mixing(kind, steps), [(gamma, 1 - gamma)] * steps, horizon=min(steps, 1 / (1 - gamma)))
    assert ours <= 2 * float32


@pytest.mark.parametrize("kind", ["elementwise, saturating", "elementwise, linear"])
@pytest.mark.parametrize(("gamma", "steps"), [(g, steps) for g in (0.0, 1 / 256, 0.3, 0.9, 0.999) for steps in (2, 12, 100)])
def test_held_as_float64_the_promise_holds_where_elements_do_not_mix(kind, gamma, steps):
    x0 = 10.0 ** (-5 * torch.rand(50, 24)) * torch.randn(50, 24).sign()
    functions, factors = mixing(kind, steps), [(gamma, 1 - gamma)] * steps
    ours, float32 = errors(functions, factors, horizon=min(steps, 1 / (1 - gamma)), x0=x0, held=torch.float64)
    assert ours <= 2 * float32


def test_roundings_of_a_velocity_that_lives_long_do_not_add_up():
    ours, float32 = errors(mixing("saturating", 3000), [(0.999, 0.001)] * 3000, horizon=1000)
    assert ours <= float32 / 5


def mixing(kind, steps, scale=1.0):
    """Residual functions in which every element depends on several, as in a network, or on itself alone."""
    forms = {
        "saturating": lambda x, w: scale * torch.tanh(x @ w / scale),
        "linear": lambda x, w: 0.5 * (x @ w),
        "normalised": lambda x, w: scale * torch.nn.functional.layer_norm(x, (24,)) @ w,
        "elementwise, saturating": lambda x, w: torch.tanh(3 * x),
        "elementwise, linear": lambda x, w: 1.5 * w[0] * x,
    }
    return [lambda x, w=w: forms[kind](x, w.to(x.dtype)) for w in torch.randn(steps, 24, 24, dtype=torch.float64) / 24**0.5]


def errors(functions, factors, scale=1.0, horizon=1.0, x0=None, held=None):
    """Largest errors of our x[0], ..., x[T] and of the float32 recurrence's, over the largest |x|, all against float64."""
    x0 = scale * torch.randn(50, 24) if x0 is None else x0
    exact, float32 = recurrence(x0.double(), functions, factors), recurrence(x0, functions, factors)
    state = State(x0, horizon=horizon, held=held)
    ours = [state.read()]
    for f, (g, b) in zip(functions, factors, strict=True):
        ours.append(state.step(f(ours[-1]), g, b)[1])
        assert torch.equal(ours[-1], state.read())
    largest = max(x.abs().max() for x in exact)
    return [max((a.double() - b).abs().max() for a, b in zip(stream, exact, strict=True)) / largest for stream in (ours, float32)]


def test_bounds_hold_from_the_start_with_the_roundings_of_x_and_v():
    state = State(torch.tensor([1 + 0.75 * 2.0**-38], dtype=torch.float64), torch.tensor([1 + 0.75 * 2.0**-40], dtype=torch.float64))
    assert state.X.item() * state.unit > 1 + 0.75 * 2.0**-38  # rounded up
    assert state.U.item() * state.ratio * state.unit > 1 + 0.75 * 2.0**-40
    assert state.X.item() * state.unit <= state.x_bound
    assert state.U.item() * state.ratio * state.unit <= state.v_bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_velocity_far_beyond_the_stream_fits(dtype):
    x0, v0, ys = 2e-7 * torch.ones(50).to(dtype), 100 * torch.randn(50).to(dtype), torch.randn(4, 50).to(dtype)
    state = State(x0, v0)
    before, expected = snapshot(state), recurrence(x0.double(), [lambda x, y=y: y.double() for y in ys], [(0.5, 0.5)] * 4, v0.double())
    assert state.U.abs().max() <= state.format.u_limit
    records = []
    for y, exact in zip(ys, expected[1:], strict=True):
        record, x = state.step(y, 0.5, 0.5)
        records.append(record)
        assert (x.double() - exact).abs().max() <= max(torch.finfo(dtype).eps, 2.0**-37) * exact.abs().max()
    for record, y in zip(reversed(records), reversed(list(ys)), strict=True):
        state.unstep_x(record)
        state.unstep_u(record, y)
    assert same(snapshot(state), before)


@pytest.mark.parametrize(
    ("before", "after", "error"), [(torch.bfloat16, torch.float32, 2.0**-24), (torch.float32, torch.float64, 2.0**-30)], ids=str
)
def test_a_promoted_stream_has_the_precision_of_its_new_dtype(before, after, error):
    x0, v0, y = torch.randn(50).to(before), torch.randn(50).to(before), torch.randn(50).to(after)
    state = State(x0, v0)
    start = snapshot(state)
    record, x = state.step(y, 0.5, 0.7)
    exact = x0.double() + 0.5 * v0.double() + 0.7 * y.double()
    assert x.dtype is after
    assert (x.double() - exact).abs().max() <= error * exact.abs().max()
    assert torch.equal(state.unstep_x(record), x0)
    state.unstep_u(record, y)
    assert same(snapshot(state), start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7])
def test_bounds_hold_with_the_roundings_of_every_step(dtype, weight):
    state, y = State(torch.ones(1, dtype=dtype)), torch.ones(1, dtype=dtype)
    for _ in range(40):
        state.step(y, 0.999, weight)
        assert state.X.abs().item() * state.unit <= state.x_bound
        assert state.U.abs().item() * state.ratio * state.unit <= state.v_bound


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_a_velocity_of_zero_has_nothing_to_forget(gamma):
    state = State(torch.randn(50))
    ratio = state.ratio
    record, _ = state.step(torch.randn(50), gamma, 0.5)
    assert record.u_spill is None
    assert record.ratio == ratio


@pytest.mark.parametrize("largest", [1.0, 1.999, 3e-7, 5e8])
def test_a_float32_stream_is_held_to_two_to_the_minus_thirty_of_its_largest(largest):
    x0 = largest * torch.linspace(-1, 1, 9999)
    state = State(x0)
    assert (state.X.double() * state.unit - x0.double()).abs().max() <= 2.0**-30 * largest


@pytest.mark.parametrize("largest", [1e-150, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("jump", [1e-150, 1.0, 1e150, 1e300])
def test_a_float64_stream_may_jump_to_any_magnitude_and_back(largest, jump):
    x0, ys = largest * torch.randn(50).double(), [jump * torch.randn(50).double() for _ in range(3)]
    state = State(x0, -x0)
    before, records = snapshot(state), []
    exact = recurrence(x0, [lambda x, y=y: y for y in ys], [(0.25, 0.5)] * 3, -x0)
    for y, expected in zip(ys, exact[1:], strict=True):
        record, x = state.step(y, 0.25, 0.5)
        records.append(record)
        assert (x - expected).abs().max() <= 2.0**-37 * max(expected.abs().max(), 1e-130)
    for record, y in zip(reversed(records), reversed(ys), strict=True):
        state.unstep_x(record)
        state.unstep_u(record, y)
    assert same(snapshot(state), before)


def test_beyond_what_counts_as_finite_is_nan():
    x0, y = torch.tensor([[1.0, 1.7e308, 1.0, 1.0], [1.0, 0.0, -1.7e308, 1e301]], dtype=torch.float64)
    state = State(x0)
    assert torch.isnan(state.read()).tolist() == [False, True, False, False]
    before = snapshot(state)
    record, x = state.step(y, 0.5, 0.5)
    assert torch.isnan(x).tolist() == [False, True, True, False]
    assert x[3] == pytest.approx(5e300)
    state.unstep_x(record)
    state.unstep_u(record, y)
    assert same(snapshot(state), before)


def test_a_growing_stream_is_put_on_a_coarser_grid_and_comes_back():
    state = State(torch.zeros(7))
    before = snapshot(state)
    ys = [torch.randn(7) * 10.0**k for k in range(-30, 30, 3)]
    records = [state.step(y, 0.5, 0.5)[0] for y in ys]
    assert sum(r.x_spill is not None for r in records) > 10
    for record, y in zip(reversed(records), reversed(ys), strict=True):
        state.unstep_x(record)
        state.unstep_u(record, y)
    assert same(snapshot(state), before)


@pytest.mark.parametrize(("gamma", "steps"), [(0.9, 1000), (0.5, 300), (0.05, 100), (1 / 256, 40)])
def test_spilled_bits_stay_at_the_floor(gamma, steps):
    state, spilled = State(torch.randn(1000)), 0
    for _ in range(steps):
        record, _ = state.step(torch.tanh(state.read()) * (torch.rand(1000) - 0.5), gamma, 1 - gamma)
        spilled += 0 if record.u_spill is None else record.u_spill.bytes.numel() * 8
        assert state.ratio <= 0.25  # U is never coarser than X
    floor = math.log2(1 / gamma) * steps
    assert spilled / 1000 <= 1.1 * floor
    assert spilled / 1000 >= floor - 52  # what U still holds
    predicted = state_bytes([gamma] * steps)
    assert abs(predicted - 12 - spilled / 8000) <= 3


@given(
    st.one_of(st.integers(-200, 127), st.integers(-170, -140)),
    st.sampled_from([torch.float32, *DTYPES]),
    st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=40),
)
def test_x_is_read_with_one_rounding(exponent, dtype, numbers):
    X, out = torch.tensor(numbers, dtype=torch.int32), torch.empty(len(numbers), dtype=dtype)
    read(X, out, 2.0**exponent)
    assert torch.equal(out, (X.double() * 2.0**exponent).to(dtype))


def test_a_step_and_its_inverse_allocate_nothing_of_full_size_but_x():
    state, y = State(torch.randn(1 << 20)), torch.randn(1 << 20)
    state.unstep_u(state.step(y, 0.9, 0.1)[0], y)  # makes the work buffers of this thread
    allocated = measure(lambda: state.step(y, 0.9, 0.1), lambda r: (state.unstep_x(r[0]), state.unstep_u(r[0], y)))
    assert 4 << 20 <= allocated.kept <= (4 << 20) + 1000
    assert allocated.peak <= (8 << 20) + 1000  # x[t+1] of the step, and x[t] of the inverse


def test_bits_do_not_depend_on_the_number_of_threads_which_may_grow_on_the_way(monkeypatch):
    monkeypatch.setattr(loops, "CHUNK_CPU", 1 << 14)
    loops._scratch.buffers.clear()
    x0, ys, found = torch.randn(70_000), [torch.randn(70_000) for _ in range(4)], []
    for threads in ((1, 1, 1, 1), (2, 2, 2, 2), (1, 3, 2, 6)):
        torch.set_num_threads(threads[0])
        state, seen = State(x0), []
        for n, y in zip(threads, ys, strict=True):
            torch.set_num_threads(n)
            record, x = state.step(y, 1e-5, 0.5)
            seen.append((record, x))
        found.append([x for _, x in seen] + [r.u_spill.bytes for r, _ in seen if r.u_spill is not None])
        for n, y, (record, _) in zip(threads, reversed(ys), reversed(seen), strict=True):
            torch.set_num_threads(n)
            state.unstep_x(record)
            state.unstep_u(record, y)
        assert torch.equal(state.read(), State(x0).read())
        assert not state.U.any()
    assert len(found[0]) > 4
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x0", "y"])
def test_inf_and_nan_come_out_as_nan_and_leave_the_integers_alone(bad, where):
    x0, y = torch.ones(4), torch.ones(4)
    (x0 if where == "x0" else y)[2] = bad
    state = State(x0)
    start = snapshot(state)
    record, x = state.step(y, 0.5, 0.5)
    assert torch.isnan(x).tolist() == torch.isnan(state.read()).tolist()
    assert torch.isnan(state.read()).tolist() == [False, False, True, False]
    assert state.X.abs().max().item() <= state.format.limit
    state.unstep_x(record)
    assert torch.isnan(state.read()).tolist() == [False, False, where == "x0", False]
    state.unstep_u(record, y)
    assert same(snapshot(state), start)


def test_what_was_not_finite_stays_so_when_more_joins_it():
    x0, v0, big = torch.full((5,), 3e38), torch.zeros(5), torch.tensor([0.0, 0.0, 3e38, 0.0, 0.0])
    x0[0], v0[1], y = math.nan, math.inf, torch.tensor([0.0, 0.0, 0.0, -math.inf, 0.0])
    state, records, seen = State(x0, v0), [], []
    for step in (big, y):
        seen.append(snapshot(state))
        records.append(state.step(step, 0.0, 1.0)[0])
    assert torch.isnan(state.read()).tolist() == [True, True, True, True, False]
    for record, step, before in zip(reversed(records), (y, big), reversed(seen), strict=True):
        state.unstep_x(record)
        state.unstep_u(record, step)
        assert same(snapshot(state), before)
    assert torch.isnan(state.read()).tolist() == [True, True, False, False, False]


def test_only_what_its_dtype_cannot_hold_is_lost():
    state = State(torch.tensor([6e4, 0.0, 0.0]).half())
    state.step(torch.tensor([0.0, 6e4, 0.0]).half(), 0.5, 1.0)
    assert state.x_bound > 65504
    assert state.mask is None
    _, x = state.step(torch.tensor([6e4, 0.0, 0.0]).half(), 0.5, 1.0)
    assert torch.isnan(x).tolist() == [True, True, False]


def test_layout_of_the_stream_is_kept_whatever_the_layout_of_y():
    x0 = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state, plain = State(x0), State(x0.contiguous())
    y = torch.randn(2, 3, 4, 5)
    state.step(y, 0.5, 0.5)
    plain.step(y, 0.5, 0.5)
    assert state.read().is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(state.read(), plain.read())
    strided = torch.randn(8, 6)[::2, 1:]
    assert torch.equal(State(strided).read(), State(strided.contiguous()).read())
    assert torch.equal(State(strided[:1].expand(3, 5)).read(), State(strided[:1].repeat(3, 1)).read())


@pytest.mark.parametrize(
    ("x0", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), "floating point"),
        (torch.zeros(3, dtype=torch.complex64), "floating point"),
        (torch.zeros(0, 3), "zero-size"),
        (torch.zeros(3, device="meta"), "meta"),
    ],
    ids=["int", "complex", "empty", "meta"],
)
def test_streams_that_cannot_be_carried_are_refused(x0, words):
    with pytest.raises(StreamError, match=words):
        State(x0)
