"""Random residual programs: gamma=0 computes the original, chains follow the recurrence, and gradients are those of stored activations."""

import pytest
import strategies
import torch
import zoo
from hypothesis import assume, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from oracles import recurrence
from strategies import ADDITIVE, ILLEGAL, KINDS, Block, Options, Program, is_chain, options, programs
from zoo import one_thread  # noqa: F401  (a fixture)

from mnet_fx.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:.*no residual chain was rewritten")  # not every program has one
few = settings(max_examples=max(8, settings().max_examples // 5))  # each is captured twice or more
convs = st.sampled_from([False, False, True])
modes = st.booleans()


def build(spec, conv, training, dtype=torch.float32):
    torch.manual_seed(5)
    return Program(spec, conv).to(dtype).train(training)


def loss_of(outputs):
    """A sum in which every element of every output has a weight of its own."""
    weighted = (out * torch.linspace(-1, 1.5, out.numel(), dtype=out.dtype).view_as(out) for out in outputs)
    return sum(part.sum() * (i + 1) for i, part in enumerate(weighted))


def run(net, conv, dtype=torch.float32):
    """All that one forward and backward pass gives and leaves."""
    x, side = strategies.inputs(conv, dtype)
    outputs = net(x, side)
    loss_of(outputs).backward()
    results = {f"output {i}": out.detach().clone() for i, out in enumerate(outputs)}
    return results | {"grad of x": x.grad, "grad of side": side.grad} | zoo.leftovers(net)


def plain(spec, conv, training):
    """What the program itself gives in float64; programs that autograd cannot differentiate as they stand are not to be used."""
    try:
        return zoo.seeded(run, build(spec, conv, training, torch.float64), conv, torch.float64)
    except RuntimeError as error:
        if "inplace operation" in str(error):
            return assume(False)
        raise


def show(net):
    if currently_in_test_context():
        note(str(net.report))


def assert_oracle(spec, conv, training, **arguments):
    expected = plain(spec, conv, training)
    net = zoo.rewritten(build(spec, conv, training, torch.float64), gamma=0, **arguments)
    show(net)
    zoo.assert_near(zoo.seeded(run, net, conv, torch.float64), expected, 1e-8)
    return net


def assert_exact(spec, conv, training, choice):
    reversible, stored = (
        zoo.rewritten(build(spec, conv, training), backward=kind, **choice.arguments(conv)) for kind in ("reversible", "stored")
    )
    show(reversible)
    zoo.assert_identical(zoo.seeded(run, reversible, conv), zoo.seeded(run, stored, conv))


@few
@given(programs(), convs, modes, options())
def test_gamma_zero_is_the_original(spec, conv, training, choice):
    velocity = "zero" if choice.initial_velocity == "module" else choice.initial_velocity
    assert_oracle(spec, conv, training, initial_velocity=velocity, granularity=choice.granularity, weights=choice.weights)


@few
@given(programs(max_size=5), st.sampled_from([1, 1, 3]), convs, modes, options())
def test_reversible_is_stored(spec, repeated, conv, training, choice):
    """Three times over is long enough to spill bits, which short chains never do."""
    plain(spec * repeated, conv, training)
    assert_exact(spec * repeated, conv, training, choice)


@few
@given(programs(), convs, modes, st.integers(2, 3))
def test_steps_of_several_blocks_are_as_right_as_others(spec, conv, training, blocks):
    assert_oracle(spec, conv, training, granularity=blocks)
    assert_exact(spec, conv, training, Options(0.9, "momentum", "zero", blocks))


@few
@given(programs(ADDITIVE).filter(is_chain), convs, modes, options())
def test_a_chain_follows_the_recurrence(spec, conv, training, choice):
    """Values, gradients and batch statistics against the recurrence in plain float64, every block a step."""
    net = zoo.rewritten(build(spec, conv, training, torch.float64), **(arguments := choice.arguments(conv)))
    if arguments["initial_velocity"] not in ("zero", "first"):
        net.initial_velocity.double()
    assert [region.steps for region in net.report.regions] == [len(spec)], net.report
    found = zoo.seeded(run, net, conv, torch.float64)
    velocity = choice.arguments(conv)["initial_velocity"]
    original = build(spec, conv, training, torch.float64)
    if isinstance(velocity, torch.nn.Module):
        original.initial_velocity = velocity.double()
    zoo.assert_near(zoo.seeded(run_recurrence, original, spec, choice, conv), found, 1e-8)


def run_recurrence(original, spec, choice, conv):
    """As `run`, with the chain of a program replaced by the recurrence, each step's residual function written as mathematics."""
    x, side = strategies.inputs(conv, torch.float64)
    gate, branches = [], []

    def residual(t):
        def f(x):
            branches[t:] = [original.blocks[t].residual(x, gate[0])]
            return branches[t]

        return f

    x0 = original.stem(x)
    gate.append(original.side(side))
    v0 = original.initial_velocity(x0) if choice.initial_velocity == "module" else None
    settings = Settings(choice.gamma, "first" if choice.initial_velocity == "first" else "zero", choice.weights)
    stream = recurrence(x0, [residual(t) for t in range(len(spec))], settings.factors(len(spec)), v0)
    shown = {"early_exit": lambda t: stream[t + 1], "shows_branch": lambda t: branches[t]}
    outputs = [stream[-1], *(shown[block.kind](t) for t, block in enumerate(spec) if block.kind in shown)]
    loss_of(outputs).backward()
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return results | {"grad of x": x.grad, "grad of side": side.grad} | zoo.leftovers(original)


@few
@given(programs(max_size=2), st.sampled_from(sorted(ILLEGAL)), programs(max_size=2), convs, modes, options())
def test_a_forbidden_block_is_refused_or_right(before, kind, after, conv, training, choice):
    spec = (*before, Block(kind), *after)
    net = assert_oracle(spec, conv, training, granularity=choice.granularity)
    codes = {refusal.code for refusal in net.report.refusals}
    assert ILLEGAL[kind] in codes or kind == "mutated_side"  # a side input that one step alone reads may be made inside of it
    assert_exact(spec, conv, training, choice)


@pytest.mark.parametrize("kind", sorted(ILLEGAL))
def test_a_forbidden_block_in_a_chain_is_refused_by_name(kind):
    spec = (Block("linear"), Block("linear"), Block(kind), Block("linear"), Block("linear"), Block(kind))
    net = assert_oracle(spec, False, True)
    found = [(refusal.code, refusal.path) for refusal in net.report.refusals]
    assert found == [(ILLEGAL[kind], "blocks.2"), (ILLEGAL[kind], "blocks.5")]
    assert [region.steps for region in net.report.regions] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", [False, pytest.param(True, marks=pytest.mark.long)])
def test_every_kind_of_block(kind, conv):
    """What hypothesis might miss: each kind among others, in a chain long enough to be reversed."""
    spec = (Block("linear"), Block(kind), Block("linear"), Block(kind, back=1), Block("linear"), Block(kind))
    assert_oracle(spec, conv, training=True)
    assert_exact(spec, conv, True, Options(0.5, "momentum", "module") if conv else Options(0.9, "matched"))


def test_programs_shrink_to_one_block():
    from hypothesis import find

    with_defaults = settings(max_examples=200, database=None)
    assert find(programs(), lambda spec: True, settings=with_defaults) == (Block("linear"),)
    assert find(programs(), lambda spec: any(b.kind == "post_norm" for b in spec), settings=with_defaults) == (Block("post_norm"),)
