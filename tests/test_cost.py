"""The theory as functions, and the choice of storage that follows from it."""

import math

import pytest
import torch

from mnet_fx import SettingsError, state_bits, state_bytes, step_bits
from mnet_fx.arithmetic.cost import storage


def test_a_step_sheds_the_logarithm_of_what_it_contracts():
    assert step_bits(0.5) == 1
    assert step_bits(0.0) == 32  # a whole v
    assert step_bits(1e-300) == 32
    assert state_bits(0.9, 101) == pytest.approx(100 * math.log2(1 / 0.9))
    assert state_bits(0.9, 100, zero_velocity=False) == state_bits(0.9, 101)
    assert state_bits([0.0, 0.5, 0.25]) == 3  # the first step is free from v[0] = 0


@pytest.mark.parametrize(
    ("arguments", "words"), [((1.0, 3), r"\[0, 1\)"), ((-0.1, 3), r"\[0, 1\)"), ((0.5,), "steps"), (([0.5], 2), "steps")]
)
def test_what_makes_no_sense_is_an_error(arguments, words):
    with pytest.raises(SettingsError, match=words):
        state_bits(*arguments)


@pytest.mark.parametrize("arguments", [(0.9,), ([0.9, 1.0],), ([0.9], torch.int32), ([0.9], "float32"), (["0.9"],)], ids=str)
def test_bytes_of_what_makes_no_sense_are_an_error(arguments):
    with pytest.raises(SettingsError, match="must be a"):
        state_bytes(*arguments)


@pytest.mark.parametrize(
    ("gamma", "steps", "dtype", "expected"),
    [
        (0.9, 3, torch.float32, ("inputs", 12)),  # three float32 inputs take no more than x and u
        (0.9, 4, torch.float32, ("reverse", 12)),
        (0.9, 4, torch.bfloat16, ("inputs", 8)),
        (0.9, 5, torch.bfloat16, ("reverse", 8)),
        (0.9, 2, torch.float64, ("inputs", 16)),
        (0.0, 50, torch.float32, ("inputs", 200)),  # gamma 0 is a checkpoint
        (0.9, 1000, torch.float32, ("reverse", state_bytes([0.9] * 1000))),
    ],
)
def test_storage_is_what_takes_fewest_bytes(gamma, steps, dtype, expected):
    assert storage([gamma] * steps, dtype) == expected


def test_bytes_of_the_state_follow_the_floor():
    for gamma in (0.05, 0.3, 0.5, 0.9):
        floor = state_bits(gamma, 2000) / 8
        assert floor - 7 <= state_bytes([gamma] * 2000) - 12 <= floor + 1
