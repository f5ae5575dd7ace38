"""The tape by itself, on hand-made steps: gradients against two oracles that are not ours, seeking, and the proof."""

import itertools
import math

import pytest
import torch
from oracles import numeric_gradient, recurrence
from torch import nn

from mnet_fx import InversionError, MnetWarning, StreamError, state_bits
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime import replay
from mnet_fx.runtime.steps import Chain, run_chain
from mnet_fx.runtime.tape import PlainTape, ReversingTape, StoringTape

TAPES = [ReversingTape, StoringTape]
D = 6


class Step(nn.Module):
    """(x, *sides) -> (f(x, *sides),)"""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, *sides):
        return (self.f(x, *sides),)


def chain(kind, functions, factors, x0, v0=None, sides=(), on_drift="raise"):
    state = State(x0.detach(), None if v0 is None else v0.detach())
    tape = kind("region", state, factors, on_drift)
    return run_chain(Chain(tape, x0, v0), [(Step(f), sides) for f in functions])[0], tape


def functions(steps=6, dtype=torch.float32):
    return nn.ModuleList(nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, D)) for _ in range(steps)).to(dtype)


def factors(gammas):
    return tuple((g, 1 - g) for g in gammas)


MIXED = factors([0.0, 0.9, 0.3, 0.0, 1 / 256, 0.99])
WEIGHTED = ((0.9, 0.5), (0.3, 0.0), (0.5, 2.0), (0.0, 0.7), (0.2, 1.0), (0.99, 0.01))


@pytest.mark.parametrize("kind", [*TAPES, PlainTape])
@pytest.mark.parametrize("with_velocity", [False, True])
@pytest.mark.parametrize(
    "each", [MIXED, WEIGHTED, factors([0.9] * 6), ((0.4, 0.0),) * 6], ids=["mixed", "weighted", "alike", "nothing added"]
)
def test_gradients_are_those_of_the_recurrence_in_float64(kind, with_velocity, each):
    fs = functions(dtype=torch.float64).eval()
    x0 = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    v0 = torch.randn(5, D, dtype=torch.float64, requires_grad=True) if with_velocity else None
    inputs = [x0, *([v0] if with_velocity else []), *fs.parameters()]
    out, _ = chain(kind, fs, each, x0, v0)
    expected = recurrence(x0, fs, each, v0)[-1]
    assert (out - expected).abs().max() < 1e-9
    for a, b in zip(torch.autograd.grad(out.exp().sum(), inputs), torch.autograd.grad(expected.exp().sum(), inputs), strict=True):
        assert (a - b).abs().max() <= 1e-8 * b.abs().max()


@pytest.mark.parametrize("gamma", [0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-8, 1 - 1e-15])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
def test_gradients_are_as_exact_as_their_dtype_for_every_gamma(gamma, dtype, error):
    """The weights of the gradients of x and v add up to one, and the lesser must not be lost beside the greater."""
    weights = [(torch.randn(D, D) / 3).double() for _ in range(6)]
    steps = [(gamma, 1 - gamma) if gamma else (0.0, 1.0)] * 6
    found = []
    for kind, of in ((PlainTape, dtype), (None, torch.float64)):
        parameters = [w.to(of, copy=True).requires_grad_() for w in weights]
        fs, x0 = [lambda x, p=p: x @ p for p in parameters], torch.linspace(-1, 1, 5 * D, dtype=of).view(5, D).requires_grad_()
        out = recurrence(x0, fs, steps)[-1] if kind is None else chain(kind, fs, steps, x0)[0]
        found.append(torch.autograd.grad((out * torch.linspace(-1, 2, D, dtype=of)).sum(), [x0, *parameters]))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= error * b.norm()


DEPTHS = [(g, steps) for g in (0.0, 1 / 256, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999) for steps in (2, 12, 50, 300)]


@pytest.mark.parametrize(("gamma", "steps"), [*DEPTHS, (0.05, 1000)])  # benchmarks/exactness.py goes to 1000 at each
def test_state_comes_back_and_bits_stay_at_the_floor_for_every_gamma_and_depth(gamma, steps):
    torch.set_num_threads(1)
    fs = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(steps)]
    x0, parameters = torch.randn(32, D, requires_grad=True), [p for f in fs for p in f.parameters()]
    out, tape = chain(ReversingTape, fs, factors([gamma] * steps), x0)
    spilled = [s.bytes.numel() for r in tape.records for s in (r.u_spill, r.x_spill) if s is not None]
    gradients = torch.autograd.grad(out.square().mean(), [x0, *parameters])
    assert tape.time == 0
    assert not tape.state.U.any()
    stored, _ = chain(PlainTape, fs, factors([gamma] * steps), x0)
    assert all(map(torch.equal, gradients, torch.autograd.grad(stored.square().mean(), [x0, *parameters])))
    assert 8 * sum(spilled) / x0.numel() <= 1.1 * state_bits(gamma, steps) + 16  # 16: whole bytes, and a stream that grows


@pytest.mark.parametrize("kind", TAPES)
def test_gradients_agree_with_finite_differences(kind):
    fs = functions(dtype=torch.float64).eval()
    x0 = torch.randn(5, D, dtype=torch.float64)
    direction = torch.randn(5, D, dtype=torch.float64)
    leaf = x0.clone().requires_grad_()
    out, _ = chain(kind, fs, MIXED, leaf)
    out.exp().sum().backward()
    numeric = numeric_gradient(lambda x: chain(kind, fs, MIXED, x)[0].exp().sum(), x0, direction, 1e-4)  # the grid is 1e-12 fine
    assert abs((leaf.grad * direction).sum().item() - numeric) < 1e-6 * abs(numeric) + 1e-6


@pytest.mark.parametrize("kind", TAPES)
def test_any_order_of_partial_gradients_gives_what_stored_activations_give(kind):
    fs, x0 = functions(), torch.randn(5, D, requires_grad=True)
    wanted = [[0], [5], [2], [1, 4], [5], [3], [0, 1, 2, 3, 4, 5]]

    def gradients(kind):
        torch.manual_seed(1)
        out, _ = chain(kind, fs, MIXED, x0)
        found = []
        for indices in wanted:
            found += torch.autograd.grad(out.exp().sum(), [p for i in indices for p in fs[i].parameters()], retain_graph=True)
        (gx,) = torch.autograd.grad(out.exp().sum(), x0, create_graph=True)
        return found + list(torch.autograd.grad(gx.square().sum(), [p for p in fs.parameters() if p.dim() == 2]))

    assert all(map(torch.equal, gradients(kind), gradients(PlainTape)))


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("frozen", list(itertools.chain.from_iterable(itertools.combinations(range(3), r) for r in range(4))), ids=str)
@pytest.mark.parametrize("leaf", [True, False])
def test_frozen_steps_and_inputs_without_gradient(kind, frozen, leaf):
    fs = functions(3)
    for i in frozen:
        fs[i].requires_grad_(False)
    x0 = torch.randn(5, D, requires_grad=leaf)
    trained = [p for p in fs.parameters() if p.requires_grad] + ([x0] if leaf else [])

    def gradients(kind):
        torch.manual_seed(1)
        out, _ = chain(kind, fs, factors([0.9] * 3), x0)
        return torch.autograd.grad(out.exp().sum(), trained) if trained else [out.detach()]

    assert all(map(torch.equal, gradients(kind), gradients(PlainTape)))


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("t", range(4))
def test_nan_in_a_step_comes_out_and_does_not_reach_the_next_batch(kind, bad, t):
    fs = functions(4).eval()
    poison = nn.Parameter(torch.zeros(()))
    steps = [(lambda x, f=f: f(x) + poison) if i == t else f for i, f in enumerate(fs)]
    results = []
    for value in (0.0, bad, 0.0):
        x0 = torch.ones(5, D, requires_grad=True)
        with torch.no_grad():
            poison.fill_(value)
        out, tape = chain(kind, steps, factors([0.5] * 4), x0)
        (gradient,) = torch.autograd.grad(out.sum(), x0)
        results.append((out.detach(), gradient))
        assert kind is StoringTape or (tape.time == 0 and not tape.state.U.any())
    assert torch.isnan(results[1][0]).all()
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("which", ["u_spill", "x_spill"])
def test_a_flipped_bit_in_the_spilled_store_is_found(which):
    fs, x0 = functions(40).eval(), torch.randn(5, D, requires_grad=True)
    out, tape = chain(ReversingTape, [lambda x, f=f: f(x) + x for f in fs], factors([0.3] * 40), x0)
    spilled = [getattr(r, which) for r in tape.records if getattr(r, which) is not None]
    spilled[0].bytes[0, 3] ^= 1
    with pytest.raises(InversionError, match="the state before step"):
        out.sum().backward()


def test_the_error_says_how_many_elements_of_the_state_are_off_and_by_how_much():
    drift = torch.zeros(5, D)
    steps = [lambda x: torch.tanh(x) + drift, torch.sin, torch.cos]
    out, _ = chain(ReversingTape, steps, factors([0.75] * 3), torch.randn(5, D, requires_grad=True))
    drift = torch.zeros(5, D).index_put((torch.tensor([1, 4]), torch.tensor([2, 2])), torch.tensor([0.5, -1.0]))
    with pytest.raises(InversionError, match=r"in 2 element\(s\), by up to 0.25") as caught:
        out.sum().backward()
    assert (caught.value.step, caught.value.elements) == (0, 2)
    assert caught.value.largest == pytest.approx(0.25)


def test_a_chain_that_started_moving_does_not_count_elements_that_differ_from_rest():
    drift, x0, v0 = [0.0], torch.randn(5, D, requires_grad=True), torch.randn(5, D)
    out, _ = chain(ReversingTape, [lambda x: torch.tanh(x) + drift[0], torch.sin], factors([0.75] * 2), x0, v0)
    drift[0] = 0.5
    with pytest.raises(InversionError, match="the state before step 0 differs between") as caught:
        out.sum().backward()
    assert caught.value.elements is None


@pytest.mark.parametrize("kind", TAPES)
def test_an_error_of_ours_in_a_rerun_keeps_its_words(kind):
    count = itertools.count(1)

    def inner(x):
        if next(count) > 1:
            raise StreamError("of a chain inside of the step")
        return torch.tanh(x)

    out, _ = chain(kind, [inner, torch.sin], factors([0.9] * 2), torch.randn(5, D, requires_grad=True))
    with pytest.raises(StreamError, match=r"^of a chain inside of the step"):
        out.sum().backward()


@pytest.mark.parametrize("allocation", range(4))
def test_a_backward_pass_that_ran_out_of_memory_may_be_tried_again(monkeypatch, allocation):
    fs, x0 = functions(4).eval(), torch.randn(5, D, requires_grad=True)
    out, _ = chain(ReversingTape, fs, factors([0.9] * 4), x0)
    expected = torch.autograd.grad(chain(PlainTape, fs, factors([0.9] * 4), x0)[0].sum(), x0)
    left, empty_like = [allocation], torch.empty_like

    def allocate(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise torch.OutOfMemoryError("full")
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", allocate)
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(out.sum(), x0, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out.sum(), x0)[0], expected[0])


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("on_drift", ["raise", "warn", "ignore"])
def test_a_step_that_does_not_repeat_is_reported_as_asked(kind, on_drift, recwarn):
    count = itertools.count(1)
    fs, x0 = functions(4).eval(), torch.randn(5, D, requires_grad=True)
    steps = [fs[0], fs[1], lambda x: fs[2](x) * next(count), fs[3]]
    out, _ = chain(kind, steps, factors([0.9] * 4), x0, on_drift=on_drift)
    if on_drift == "raise":
        with pytest.raises(InversionError, match="nondeterministic") as caught:
            out.sum().backward()
        assert (caught.value.region, caught.value.step) == ("region", 2)
    else:
        out.sum().backward()
        assert bool([w for w in recwarn if issubclass(w.category, MnetWarning)]) == (on_drift == "warn")


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("what", ["parameter", "buffer", "side input"])
def test_what_changed_between_forward_and_backward_is_named(kind, what, monkeypatch):
    monkeypatch.setattr(replay, "SMALL", 0)  # on a device, a rerun reads the copies of small buffers

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(D, D)
            self.register_buffer("mask", torch.ones(D))
            self.scale = nn.Parameter(torch.zeros(()))  # hides every change from the output

        def forward(self, x, side):
            return self.scale * (self.inner(x) * self.mask + side)

    fs = nn.ModuleList(Scaled() for _ in range(4))
    side, x0 = torch.randn(D), torch.randn(5, D, requires_grad=True)
    out, _ = chain(kind, fs, factors([0.9] * 4), x0, sides=(side,))
    {"parameter": fs[1].inner.weight, "buffer": fs[1].mask, "side input": side}[what].data[0] += 1
    with pytest.raises(InversionError, match=what):
        out.sum().backward()


def test_a_rerun_outside_of_a_backward_has_gradients_enabled_as_the_first_run_had():
    x0, fs = torch.randn(5, D), functions(3).eval()
    steps = [lambda x, f=f: f(x) * (2.0 if torch.is_grad_enabled() else 1.0) for f in fs]
    _, tape = chain(ReversingTape, steps, factors([0.9] * 3), x0)
    with torch.no_grad():
        assert torch.equal(tape.state_at(0), State(x0).read())


class Counting(nn.Module):
    """A residual that depends on how often it ran, which a buffer counts."""

    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = nn.Linear(D, D), in_place
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.runs.add_(1)
        else:
            self.runs = self.runs + 1
        return torch.tanh(self.linear(x)) * self.runs.clone()


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("in_place", [True, False])
def test_every_rerun_starts_from_the_buffers_of_the_first_run(kind, in_place):
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs = nn.ModuleList(Counting(in_place) for _ in range(3))
        out, _ = chain(tape, fs, factors([0.9] * 3), x0)
        found.append([g for i in (0, 2, 1) for g in torch.autograd.grad(out.exp().sum(), fs[i].parameters(), retain_graph=True)])
        assert [f.runs.item() for f in fs] == [1, 1, 1]
    assert all(map(torch.equal, *found))


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", TAPES)
def test_a_side_input_of_another_class_may_not_change_either(kind):
    scale, side = nn.Parameter(torch.zeros(())), torch.ones(D).as_subclass(Tagged)
    steps = [lambda x, s: scale * (x + s).as_subclass(torch.Tensor)] * 3
    out, _ = chain(kind, steps, factors([0.9] * 3), torch.randn(5, D, requires_grad=True), sides=(side,))
    side.add_(1)
    with pytest.raises(InversionError, match="side input 0"):
        out.sum().backward()


@pytest.mark.parametrize("kind", TAPES)
def test_a_side_input_may_come_from_inference_mode(kind):
    with torch.inference_mode():
        side = torch.randn(D)
    fs, x0 = functions(3).eval(), torch.randn(5, D, requires_grad=True)
    outs = [chain(tape, [lambda x, s, f=f: f(x) + s for f in fs], factors([0.9] * 3), x0, sides=(side,))[0] for tape in (kind, PlainTape)]
    assert all(map(torch.equal, *(torch.autograd.grad(out.sum(), [x0, *fs.parameters()]) for out in outs)))


@pytest.mark.parametrize("kind", TAPES)
def test_a_parameter_whose_memory_is_gone_is_named(kind):
    fs = functions(3).eval()
    out, _ = chain(kind, fs, factors([0.9] * 3), torch.randn(5, D, requires_grad=True))
    fs[1][0].bias.untyped_storage().resize_(0)
    with pytest.raises(InversionError, match=r"parameter 'f.0.bias', whose memory was freed"):
        out.sum().backward()


def test_a_seek_runs_each_step_under_its_own_autocast():
    fs, x0 = functions(4).eval(), torch.randn(5, D, requires_grad=True)

    def gradients(kind):
        run = Chain(kind("region", State(x0.detach()), factors([0.9] * 4)), x0, None)
        for t, f in enumerate(fs):
            with torch.autocast("cpu", torch.bfloat16, enabled=t % 2 == 1):
                run.step(Step(f), ())
        wanted = [fs[i].parameters() for i in (0, 3, 1)]
        return [g for parameters in wanted for g in torch.autograd.grad(run.x.exp().sum(), parameters, retain_graph=True)]

    assert all(map(torch.equal, gradients(ReversingTape), gradients(PlainTape)))


@pytest.mark.parametrize("kind", TAPES)
def test_every_rerun_sees_the_threads_and_the_autocast_of_the_first_run(kind):
    layers, seen, x0 = [nn.Linear(D, D) for _ in range(4)], [[] for _ in range(4)], torch.randn(5, D, requires_grad=True)

    def seeing(t, x):
        seen[t].append((torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return torch.tanh(layers[t](x))

    run = Chain(kind("region", State(x0.detach()), factors([0.9] * 4)), x0, None)
    for t, dtype in enumerate([torch.float16, torch.bfloat16, torch.float16, torch.bfloat16]):
        torch.set_num_threads(1 + t % 2)
        with torch.autocast("cpu", dtype, enabled=t != 3):
            run.step(Step(lambda x, t=t: seeing(t, x)), ())
    torch.set_num_threads(3)
    for t in (0, 3, 1):
        torch.autograd.grad(run.x.sum(), layers[t].parameters(), retain_graph=True)
    assert torch.get_num_threads() == 3
    assert all(len(found) > 1 for found in seen)
    assert [set(found) for found in seen] == [
        {(1, True, torch.float16)},
        {(2, True, torch.bfloat16)},
        {(1, True, torch.float16)},
        {(2, False, torch.bfloat16)},
    ]


def test_a_step_that_differs_on_the_way_forward_again_is_named():
    fs, x0, count = functions(6).eval(), torch.randn(5, D, requires_grad=True), itertools.count(1)
    steps = [*fs[:2], lambda x: fs[2](x) + (next(count) > 2), *fs[3:]]  # right in its first rerun, wrong in the next
    out, _ = chain(ReversingTape, steps, factors([0.9] * 6), x0)
    torch.autograd.grad(out.sum(), fs[0].parameters(), retain_graph=True)
    with pytest.raises(InversionError, match="the state after step 2") as caught:
        torch.autograd.grad(out.sum(), fs[5].parameters())
    assert caught.value.step == 2


@pytest.mark.parametrize("change", [lambda x: x.detach().add_(1), lambda x: x.data.add_(1)], ids=["in place", "data"])
def test_a_kept_input_that_changed_is_found_even_where_the_residual_hides_it(change):
    scale = nn.Parameter(torch.zeros(()))
    steps, x0 = [(Step(lambda x: scale * torch.exp(x)), ()) for _ in range(3)], torch.randn(5, D)
    tape = StoringTape("region", State(x0), factors([0.9] * 3))
    out, (escaped,), _ = run_chain(Chain(tape, x0, None), steps, escapes={1})
    change(escaped)
    with pytest.raises(InversionError, match="the stream before step 1, changed in place") as caught:
        out.sum().backward()
    assert caught.value.step == 1


@pytest.mark.parametrize("kind", [*TAPES, PlainTape])
def test_a_step_that_writes_to_the_stream_is_refused(kind):
    with pytest.raises(StreamError, match="step 1: the step writes to the stream in place"):
        chain(kind, [torch.tanh, torch.relu_], factors([0.9] * 2), torch.randn(5, D, requires_grad=True))


@pytest.mark.parametrize("kind", TAPES)
def test_a_rerun_that_raises_leaves_the_tape_able_to_go_on(kind):
    fs, x0 = functions(4).eval(), torch.randn(5, D, requires_grad=True)
    trouble = [False]

    def sometimes(x):
        if trouble[0]:
            raise MemoryError("no memory")
        return fs[2](x)

    out, _ = chain(kind, [fs[0], fs[1], sometimes, fs[3]], factors([0.9] * 4), x0)
    trouble[0] = True
    with pytest.raises(MemoryError):
        torch.autograd.grad(out.sum(), x0, retain_graph=True)
    trouble[0] = False
    expected, _ = chain(PlainTape, fs, factors([0.9] * 4), x0)
    assert torch.equal(torch.autograd.grad(out.sum(), x0)[0], torch.autograd.grad(expected.sum(), x0)[0])


def test_early_stop_set_by_the_user_does_not_skip_the_end_of_a_step():
    fs, x0 = functions(4), torch.randn(5, D, requires_grad=True)
    for stop in (True, False):
        with torch.utils.checkpoint.set_checkpoint_early_stop(stop):
            out, tape = chain(ReversingTape, fs, factors([0.9] * 4), x0)
            out.sum().backward()
        assert tape.time == 0
        assert not tape.half
