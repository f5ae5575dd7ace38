"""`plan`, and `momentumize(memory=...)`: a training step takes what was said, and at most what was asked."""

import copy
import itertools
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from budget_models import UNet
from hypothesis import given
from models import MLP, Encoder
from torch import nn

import mnet_fx
from mnet_fx import MnetError, SettingsError
from mnet_fx.budget.measured import measure
from mnet_fx.budget.planning import _Tries

MIB = 2**20


def taken(net, inputs):
    """The peak of forward and backward."""

    def step():
        out = net(*inputs)
        return out.sum()

    step().backward()
    net.zero_grad(set_to_none=False)
    return measure(step, lambda loss: loss.backward()).peak


def encoder():
    torch.manual_seed(0)
    return Encoder(4, 64, 4), (torch.randn(4, 32, 64),)


@pytest.fixture(scope="module")
def plans():
    model, inputs = encoder()
    first = mnet_fx.plan(model, inputs, memory=0.9, gamma=0.9)
    least, plain = first.least.total_bytes, first.plain.total_bytes
    found = [first.at(round(least + i / 5 * (plain - least))) for i in range(6)]
    assert mnet_fx.plan(model, inputs, memory=found[3].memory, gamma=0.9) == found[3]
    return model, inputs, found


def test_what_is_predicted_is_measured_and_fits(plans):
    model, inputs, found = plans
    for plan in found:
        assert plan.predicted.total_bytes <= plan.memory
        peak = taken(mnet_fx.momentumize(copy.deepcopy(model), **plan.options), inputs)
        assert peak == pytest.approx(plan.predicted.peak_bytes, rel=0.01)
        assert peak + plan.predicted.total_bytes - plan.predicted.peak_bytes <= 1.01 * plan.memory


def test_a_share_of_plain_training_may_be_all_of_it(plans):
    model, inputs, found = plans
    assert mnet_fx.plan(model, inputs, memory=1.0, gamma=0.9).memory == found[0].plain.total_bytes


def test_more_memory_keeps_more_and_runs_less_again(plans):
    _, _, found = plans
    peaks, works = [p.predicted.total_bytes for p in found], [p.predicted.flops_ratio for p in found]
    assert peaks == sorted(peaks)
    assert works == sorted(works, reverse=True)
    assert len(set(peaks)) > 3
    assert found[0].predicted.total_bytes == found[0].least.total_bytes
    assert works[0] > 1.2 > 1.1 > works[-1]
    text = str(found[2])
    assert "this plan" in text
    assert "steps of the chain in" in text


def test_momentumize_plans_by_itself():
    model, inputs = encoder()
    net = mnet_fx.momentumize(model, inputs, memory=0.8, gamma=0.9)
    plan = mnet_fx.plan(model, inputs, memory=0.8, gamma=0.9)
    assert [net.mnet_fx_options[key] for key in ("rest", "keep", "gamma")] == ["checkpoint", plan.options["keep"], 0.9]
    assert plan.options["keep"] > 0
    text = mnet_fx.momentumize(model, inputs, memory=f"{plan.memory / MIB} MiB", gamma=0.9).mnet_fx_options["keep"]
    assert text == plan.options["keep"]


def test_granularities_are_named():
    with pytest.raises(SettingsError, match="granularity must be one or more"):
        mnet_fx.plan(MLP(2, 8, 8), (torch.randn(2, 8),), memory=1.0, granularity=())


@pytest.mark.parametrize(
    ("layers", "kinds", "gammas"), [(8, ("add", 4), (0.9,)), pytest.param(80, ("add", 2, 4), (0.1, 0.9), marks=pytest.mark.long)]
)
def test_a_plan_chooses_what_makes_a_step_where_it_is_asked_to(layers, kinds, gammas):
    torch.manual_seed(0)
    model, inputs, sizes = MLP(layers, 64, 8), (torch.randn(256, 64),), {}
    for gamma in gammas:
        each = {kind: mnet_fx.plan(model, inputs, memory=1.0, gamma=gamma, granularity=kind) for kind in kinds}
        sizes[gamma] = least = {kind: plan.least.total_bytes for kind, plan in each.items()}
        plan = mnet_fx.plan(model, inputs, memory=1.0, gamma=gamma, granularity=kinds)
        for memory in (min(least.values()), sorted(least.values())[1], plan.plain.total_bytes):
            best = plan.at(memory)
            others = [plan.at(memory) for kind, plan in each.items() if least[kind] <= memory]
            assert best in others
            assert best.predicted.flops_ratio == min(other.predicted.flops_ratio for other in others)
            assert f"granularity={best.options['granularity']!r}" in str(best) or best.options["granularity"] == "add"
            peak = taken(mnet_fx.momentumize(copy.deepcopy(model), **best.options), inputs)
            assert peak == pytest.approx(best.predicted.peak_bytes, abs=1.01 * inputs[0].numel())  # values decide on a byte more or less
        with pytest.raises(MnetError, match="does not fit") as least_of_all:
            plan.at(min(least.values()) - 1)
        with pytest.raises(MnetError) as one:
            each[min(least, key=least.get)].at(min(least.values()) - 1)
        assert str(least_of_all.value) == str(one.value)
    if layers == 80:  # a deep one, where bits that are put aside weigh more than a step's activations
        assert min(sizes[0.9], key=sizes[0.9].get) == "add"
        assert min(sizes[0.1], key=sizes[0.1].get) != "add"


def test_convolutions_within_three_percent():
    torch.manual_seed(0)
    model, inputs = UNet(), (torch.randn(2, 3, 32, 32),)
    for memory in (0.9, 0.75):
        plan = mnet_fx.plan(model, inputs, memory=memory, gamma=0.9)
        peak = taken(mnet_fx.momentumize(copy.deepcopy(model), **plan.options), inputs)
        assert peak + plan.predicted.total_bytes - plan.predicted.peak_bytes <= 1.03 * plan.memory


def test_the_optimizer_counts():
    model, inputs = encoder()
    without = mnet_fx.plan(model, inputs, memory=0.8)
    with pytest.raises(MnetError, match=r"does not fit in .* the least kept, a training step takes"):
        mnet_fx.plan(model, inputs, memory=without.least.total_bytes, optimizer=torch.optim.AdamW)
    assert mnet_fx.plan(model, inputs, memory="1GiB", optimizer=torch.optim.AdamW).predicted.parts["optimizer state"] > 0


def test_errors():
    model, inputs = encoder()
    for options, match in (
        ({"rest": "checkpoint"}, "leave rest out"),
        ({"keep": 3}, "leave keep out"),
        ({"regions": ["layers"]}, "leave regions out"),
        ({"backward": "stored"}, "leave backward out"),
        ({"loss": 3}, "loss must be"),
    ):
        with pytest.raises(SettingsError, match=match):
            mnet_fx.plan(model, inputs, memory=0.5, **options)
    for memory in ("much", 0, -1.0, True, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="memory must be"):
            mnet_fx.plan(model, inputs, memory=memory)
    for options in ({"rest": "checkpoint"}, {"keep": 3}, {"regions": ["layers"]}, {"backward": "stored"}):
        with pytest.raises(SettingsError, match="memory chooses rest and keep"):
            mnet_fx.momentumize(model, inputs, memory=0.5, **options)
    with pytest.raises(SettingsError, match="example_inputs"):
        mnet_fx.momentumize(model, memory=0.5)


def test_a_model_without_chains_keeps_all_or_does_not_fit():
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), (torch.randn(4, 8),)
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        net = mnet_fx.momentumize(model, inputs, memory="1MiB")
    assert net.mnet_fx_options["keep"] == 0


class Searching(_Tries):
    """Steps that take as many bytes as a function of what is kept says."""

    def __init__(self, sizes, taken):
        self.all, self.taken, self.tried = sizes, taken, set()

    sizes = property(lambda self: self.all)

    def at(self, keep):
        self.tried.add(keep)
        return SimpleNamespace(total_bytes=self.taken(keep))


@given(st.lists(st.sampled_from([1, 5, 100, 10_000]), min_size=1, max_size=100), st.sampled_from([0.0, 0.1, 1.0, 1.3]), st.data())
def test_the_most_that_fits_is_found_in_few_tries(items, slope, data):
    """Whether what is kept adds to the peak byte for byte, less, more, or only from some size on."""
    sizes = [0, *itertools.accumulate(items)]
    free = data.draw(st.sampled_from([0, sizes[-1] // 2]))
    size = 1000 + data.draw(st.integers(0, 2 * sizes[-1]))

    def taken(keep):
        return 1000 + int(slope * max(0, keep - free))

    tries = Searching(sizes, taken)
    assert tries._most(size) == max(keep for keep in sizes if taken(keep) <= size)
    assert len(tries.tried) <= 3 * len(sizes).bit_length()
    if slope == 1.0 and free == 0 and len(set(items)) == 1:
        assert len(tries.tried) <= 4
