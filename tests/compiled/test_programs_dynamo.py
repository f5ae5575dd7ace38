"""The random residual programs once more, captured by Dynamo: the same properties hold in that dialect, with each part compiled."""

import pytest
import strategies
import torch
import zoo
from hypothesis import given, settings
from strategies import ADDITIVE, ILLEGAL, Block, is_chain, options, programs
from test_programs import build, convs, loss_of, modes, plain
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx

few = settings(max_examples=max(5, settings().max_examples // 10))


def run(spec, conv, training, dtype=torch.float32, **arguments):
    """All that one forward and backward pass of the compiled program gives and leaves."""
    torch._dynamo.reset()
    mnet_fx.reset_reports()
    program = build(spec, conv, training, dtype)
    compiled = torch.compile(program, backend=mnet_fx.backend(**{"inner": "aot_eager"} | arguments), dynamic=False)
    x, side = strategies.inputs(conv, dtype)
    torch.manual_seed(7)
    outputs = compiled(x, side)
    loss_of(outputs).backward()
    results = {f"output {i}": out.detach().clone() for i, out in enumerate(outputs)}
    return results | {"grad of x": x.grad, "grad of side": side.grad} | zoo.leftovers(program)


@few
@given(programs(max_size=5), convs, modes, options())
def test_gamma_zero_is_the_original(spec, conv, training, choice):
    expected = plain(spec, conv, training)
    zoo.assert_near(run(spec, conv, training, torch.float64, gamma=0, granularity=choice.granularity), expected, 1e-8)


@few
@given(programs(max_size=4), convs, modes, options())
def test_reversible_is_stored(spec, conv, training, choice):
    plain(spec, conv, training)
    pair = [run(spec, conv, training, backward=kind, **choice.arguments(conv)) for kind in ("reversible", "stored")]
    zoo.assert_identical(*pair)


@few
@given(programs(ADDITIVE, max_size=5).filter(is_chain), convs, modes)
def test_every_add_that_is_legal_is_rewritten(spec, conv, training):
    run(spec, conv, training, inner="eager")
    (report,) = mnet_fx.reports()
    assert [region.steps for region in report.regions] == [len(spec)], report


@pytest.mark.parametrize("kind", sorted(strategies.KINDS))
def test_each_kind_between_two_others(kind):
    spec = [Block("linear"), Block("linear"), Block(kind), Block("linear"), Block("linear")]
    try:
        expected = plain(spec, False, True)
    except Exception:
        pytest.skip("plain autograd cannot differentiate it either")
    zoo.assert_near(run(spec, False, True, torch.float64, gamma=0), expected, 1e-8)
    assert mnet_fx.reports()[0].rewritten_adds >= 4


@pytest.mark.parametrize(("kind", "code"), sorted(ILLEGAL.items()))
def test_an_illegal_block_is_refused_with_its_code(kind, code):
    torch._dynamo.reset()
    mnet_fx.reset_reports()
    spec = [Block("linear"), Block("linear"), Block(kind), Block("linear")]
    compiled = torch.compile(build(spec, False, False), backend=mnet_fx.backend(inner="eager"))
    with torch.no_grad():
        compiled(*strategies.inputs(False))
    assert code in {refusal.code for refusal in mnet_fx.reports()[0].refusals}
