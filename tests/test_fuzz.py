"""A few random programs of `fuzz.py` for each way in; `python tests/fuzz.py` runs as many as wanted."""

import fuzz
import fuzz_programs
import pytest

SEEDS = {way: range(3 if way == "aot_eager" else 6) for way in fuzz.WAYS}


@pytest.mark.parametrize("way", fuzz.WAYS)
def test_programs(way):
    outcomes = {seed: fuzz.tried(way, seed)[0] for seed in SEEDS[way]}
    failed = {seed: outcome.detail for seed, outcome in outcomes.items() if outcome.kind == "FAILED"}
    assert not failed
    assert sum(outcome.kind == "right" for outcome in outcomes.values()) >= len(SEEDS[way]) // 3


def test_a_seed_gives_one_program():
    for seed in range(50):
        source = fuzz_programs.written(seed)
        assert source == fuzz_programs.written(seed)
        compile(source.text, "program", "exec")
    assert {fuzz_programs.written(seed).kind for seed in range(50)} == {"flat", "layered", "chain", "sums"}


def other_momentum(model, trial, gamma, **options):
    return fuzz.captured(model, trial, gamma=gamma + 0.01, **options)


def other_stored(model, trial, gamma, backward="reversible", **options):
    return fuzz.captured(model, trial, gamma=gamma + 1e-6 * (backward == "stored"), backward=backward, **options)


def another_recurrence(model, trial, gamma, **options):
    return fuzz.captured(model, trial, gamma=gamma * (1 - 1e-6), **options)


BROKEN = [(other_momentum, "gamma=0 is not"), (other_stored, "reversible is not"), (another_recurrence, "not the recurrence")]


@pytest.mark.parametrize(("way", "failure"), BROKEN)
def test_each_oracle_sees_what_is_wrong(monkeypatch, way, failure):
    seed = next(seed for seed in range(100) if fuzz_programs.written(seed).kind == "chain")
    assert fuzz.tried("captured", seed)[0].detail == "recurrence"
    monkeypatch.setitem(fuzz.WAYS, "captured", way)
    outcome, _ = fuzz.tried("captured", seed)
    assert (outcome.kind, outcome.detail.startswith(failure)) == ("FAILED", True), outcome
