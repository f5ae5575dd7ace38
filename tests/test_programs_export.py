"""The random residual programs once more, captured by torch.export: the same properties hold in that dialect."""

import pytest
import strategies
import torch
import zoo
from hypothesis import given, settings
from strategies import ADDITIVE, Block, is_chain, options, programs
from test_programs import build, convs, modes, plain, run, show
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx
from mnet_fx import parts
from passes import Refusal

few = settings(max_examples=max(5, settings().max_examples // 10))


@pytest.fixture(autouse=True)
def nothing_is_traced(monkeypatch):
    """As if no module could be traced symbolically."""
    refusal = Refusal("untraceable", "", "", "not tried", "")
    monkeypatch.setattr(parts, "_traced", lambda net, settings: parts.Parts({}, (refusal,)))


def rewritten(spec, conv, training, dtype=torch.float32, **arguments):
    inputs = tuple(value.detach() for value in strategies.inputs(conv, dtype))
    net = zoo.rewritten(build(spec, conv, training, dtype), example_inputs=inputs, **arguments)
    show(net)
    return net


@few
@given(programs(max_size=5), convs, modes, options())
def test_gamma_zero_is_the_original(spec, conv, training, choice):
    expected = plain(spec, conv, training)
    net = rewritten(spec, conv, training, torch.float64, gamma=0, granularity=choice.granularity)
    zoo.assert_near(zoo.seeded(run, net, conv, torch.float64), expected, 1e-8)


@few
@given(programs(max_size=4), convs, modes, options())
def test_reversible_is_stored(spec, conv, training, choice):
    plain(spec, conv, training)
    pair = [rewritten(spec, conv, training, backward=kind, **choice.arguments(conv)) for kind in ("reversible", "stored")]
    zoo.assert_identical(*(zoo.seeded(run, net, conv) for net in pair))


@few
@given(programs(ADDITIVE, max_size=5).filter(is_chain), convs, modes)
def test_every_add_that_is_legal_is_rewritten(spec, conv, training):
    net = rewritten(spec, conv, training)
    assert [region.steps for region in net.report.regions] == [len(spec)], mnet_fx.report(net)


@pytest.mark.parametrize("kind", sorted(strategies.KINDS))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_kind_between_two_others(kind, training):
    spec = [Block("plain"), Block(kind), Block("plain")]
    try:
        expected = zoo.seeded(run, build(spec, False, training, torch.float64), False, torch.float64)
    except RuntimeError:
        pytest.skip("plain autograd cannot differentiate it either")
    net = rewritten(spec, False, training, torch.float64, gamma=0)
    zoo.assert_near(zoo.seeded(run, net, False, torch.float64), expected, 1e-8)
