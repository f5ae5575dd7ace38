"""Rotated velocities: undone bit for bit, and the recurrence that they should be."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_fixed_point import DTYPES, assert_undone, gammas, snapshot, values

from mnet_fx.arithmetic import rotated_state
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.arithmetic.rotated_state import RotatedState
from mnet_fx.arithmetic.rotations import Rotation
from mnet_fx.settings import matched_weights


def orthogonal(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def signs(n, seed):
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


@st.composite
def runs(draw):
    """(x0, [(y, gamma, weight, rotation or None), ...]): streams of any shape, layout and magnitude, inf and nan included."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    axis = 1 if len(shape) == 4 else len(shape) - 1
    order = draw(st.permutations(range(len(shape))))
    others = DTYPES if draw(st.booleans()) else [draw(st.sampled_from(DTYPES))]
    frames = [None]
    steps = draw(st.lists(gammas, min_size=1, max_size=8))
    for t in range(len(steps)):
        kind = draw(st.sampled_from([None, signs, orthogonal]))
        frames.append(kind and kind(shape[axis], t).to(draw(st.sampled_from([torch.float32, torch.float64]))))

    def tensor():
        kind = draw(st.sampled_from(others))
        numbers = st.lists(values | st.floats() if kind is torch.float64 else values, min_size=math.prod(shape), max_size=math.prod(shape))
        laid_out = torch.empty([shape[i] for i in order], dtype=kind).permute([order.index(i) for i in range(len(shape))])
        return laid_out.copy_(torch.tensor(draw(numbers), dtype=torch.float64).reshape(shape))

    def rotation(t):
        plain = frames[t] is frames[t + 1] is None
        return None if plain else Rotation(axis, frames[t], frames[t + 1], draw(st.sampled_from([0.0, 0.1, 1.0, 9.0])))

    return tensor(), [(tensor(), gamma, draw(st.sampled_from([1.0, 1.0 - gamma])), rotation(t)) for t, gamma in enumerate(steps)]


def _outgrowing(gamma):
    """A stream of zeros to which more is added than the ratio of its units can follow."""
    ones, none, large = torch.ones(2, dtype=torch.float64), torch.zeros(2), torch.tensor([0.0, 4.5e189], dtype=torch.float64)
    turns = Rotation(0, None, ones, 0.0), Rotation(0, ones, None, 0.0)
    return none, [(none, gamma, 1.0, None), (none, gamma, 1.0, turns[0]), (large, gamma, 1.0, turns[1]), (none, gamma, 1.0, None)]


@given(runs(), st.sampled_from([1, 1 << 18]))
@example(_outgrowing(0.0), 1)
@example(_outgrowing(0.5), 1)
def test_unstep_undoes_step_for_any_values(run, chunk):
    x0, steps = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotated_state, "CHUNK_CPU", chunk)
        state = RotatedState(x0)
        seen, records = [snapshot(state)], []
        for y, gamma, weight, rotation in steps:
            records.append(state.step(y, gamma, weight, rotation)[0])
            seen.append(snapshot(state))
            assert state.X.double().abs().max() * state.unit <= state.x_bound
            assert state.X.double().abs().max() <= state.format.limit
            assert state.U.double().abs().max() * state.ratio * state.unit <= state.v_bound
            assert state.U.double().abs().max() < 2.0**53
        assert_undone(state, records, [y for y, *_ in steps], seen)


@pytest.mark.parametrize("gamma", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("kind", [signs, orthogonal])
@pytest.mark.parametrize(("shape", "axis"), [((300, 8), 1), ((3, 8, 5, 7), 1), ((8,), 0)], ids=["tokens", "images", "one"])
def test_the_recurrence_is_that_of_rotated_deviations(gamma, kind, shape, axis):
    """In the terms of the original's stream z: d' = a (d + f) O, z' = z + f, x' = z' - d'; nothing here is in a frame."""
    steps = 40
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = matched_weights([gamma] * steps)
    reach = [gamma / weight for weight in weights] + [0.0]
    frames = [None, *(kind(8, t) for t in range(1, steps)), None]
    state, z, d = RotatedState(x0.float()), x0.float().double(), torch.zeros_like(x0)

    def matrix(frame):
        return torch.eye(8, dtype=torch.float64) if frame is None else frame.diag() if frame.dim() == 1 else frame

    for t in range(steps):
        y = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        rotation = Rotation(axis, frames[t], frames[t + 1], reach[t + 1] if t + 1 < steps else 0.0)
        c = rotation.reach
        _, x = state.step(y.float(), gamma, weights[t], rotation)
        z, e = z + y.float().double(), d + y.float().double()
        turned = (e.movedim(axis, -1) @ matrix(frames[t]).T @ matrix(frames[t + 1])).movedim(-1, axis)
        d = c / (1 + c) * turned
        assert torch.allclose(x.double(), z - d, atol=1e-6)
    assert torch.allclose(x.double(), z, atol=1e-6)


def test_without_a_rotation_it_is_the_plain_state_to_the_bit():
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    plain, rotated = State(x), RotatedState(x)
    for _ in range(3):
        assert torch.equal(plain.step(y, 0.5, 0.7)[1], rotated.step(y, 0.5, 0.7)[1])
    assert torch.equal(plain.X, rotated.X)
    assert torch.equal(plain.U, rotated.U)


def test_parts_are_views_that_make_up_the_whole():
    rotation = Rotation(2, orthogonal(4, 0), None, 0.0)
    X = torch.arange(24.0).reshape(2, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotated_state, "CHUNK_CPU", 1)
        parts = list(rotated_state._parts(rotation, X, X.clone()))
        assert [tuple(one.shape) for _, one, _ in parts] == [(4, 4), (2, 4)]  # as many rows as a matrix has, at least
        for turn, one, _ in parts:
            assert turn.axis == 1
            one.add_(1)
        assert torch.equal(X, torch.arange(24.0).reshape(2, 3, 4) + 1)
        images = torch.randn(2, 4, 3, 5)
        wide = Rotation(1, orthogonal(4, 0), None, 0.0)
        assert [tuple(one.shape) for _, one, _ in rotated_state._parts(wide, images, images)] == [(1, 4, 3, 5)] * 2
        across = images.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
        assert [tuple(one.shape) for _, one, _ in rotated_state._parts(wide, across, across)] == [(2, 4, 3, 5)]


def test_no_product_is_made_in_less_than_its_dtype():
    rotation, g = Rotation(1, orthogonal(8, 0), orthogonal(8, 1), 0.5), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotation.residual(g), rotation.residual_gradient(g), rotation.velocity(g), rotation.velocity_gradient(g)
    expected = rotation.residual(g), rotation.residual_gradient(g), rotation.velocity(g), rotation.velocity_gradient(g)
    assert all(map(torch.equal, found, expected))


def test_a_stream_that_is_promoted_is_as_fine_as_what_is_added():
    state, y = RotatedState(torch.ones(3, 8, dtype=torch.bfloat16)), torch.full((3, 8), 1.0 + 2.0**-20)
    _, x = state.step(y, 0.0, 1.0, Rotation(1, None, orthogonal(8, 0), 0.0))
    assert x.dtype is torch.float32
    assert torch.allclose(x, 1.0 + y, rtol=0, atol=2.0**-24)


def test_what_the_dtype_cannot_hold_is_gone_for_good():
    state, rotation = RotatedState(torch.full((2, 4), 6e4, dtype=torch.float16)), Rotation(1, None, signs(4, 0), 0.0)
    y = torch.zeros(2, 4, dtype=torch.float16)
    y[0, 1] = 6e4
    records = [state.step(t, 0.0, 1.0, rotation) for t in (y, -y)]
    assert all(torch.equal(x.isfinite(), y == 0) for _, x in records)
    for (record, _), t in zip(reversed(records), (-y, y), strict=True):
        x = state.unstep_x(record)
        state.unstep_u(record, t)
    assert torch.equal(x, torch.full((2, 4), 6e4, dtype=torch.float16))
