"""The runtime against two oracles that share none of its code: plain autograd of the float64 recurrence, and finite differences.

"stored" shares its autograd functions with "reversible", so that the two agree shows nothing about these.
"""

import pytest
import torch
from oracles import numeric_gradient, recurrence
from test_tape import TAPES, D, factors
from torch import nn

from mnet_fx import MomentumNet
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime.steps import Chain, run_chain
from mnet_fx.runtime.tape import PlainTape
from mnet_fx.settings import Settings

KINDS = [*TAPES, PlainTape]
SCHEDULES = {
    "constant": factors([0.9] * 5),
    "moving at once": factors([0.7, 0.0, 0.3, 0.9, 0.5]),
    "at rest at first": factors([0.0, 0.9, 0.0, 0.5, 0.99]),
    "one step": factors([0.6]),
    "all forgotten": factors([0.0] * 4),
    "nearly one": factors([0.999, 0.99, 0.999, 0.99, 0.999]),
    "weights of their own": ((0.5, 2.0), (0.25, -1.0), (0.8, 0.1), (0.0, 3.0)),
    "matched": Settings(gamma=0.8, weights="matched").factors(5),
    "matched, a schedule": Settings(gamma=lambda t, steps: t / steps, weights="matched").factors(5),
    "a schedule": Settings(gamma=lambda t, steps: 0.9 - 0.1 * t).factors(5),
}


class Residual(nn.Module):
    """(f(x, side), an extra output that f depends on, one that it does not)"""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 9), nn.Linear(9, D)

    def forward(self, x, side):
        hidden = torch.tanh(self.inner(x) * (1 + 0.1 * side.sum()))
        return self.outer(hidden), hidden, (x * side).square()


class Problem:
    """One chain with all that gradients may be asked for."""

    def __init__(self, schedule, moving):
        torch.manual_seed(0)
        self.factors = SCHEDULES[schedule]
        self.fs = nn.ModuleList(Residual() for _ in self.factors).double()
        self.x, self.v, self.side = torch.randn(5, D).double(), torch.randn(5, D).double() if moving else None, torch.randn(D).double()
        self.weights = torch.randn(5, D).double()
        self.inputs = [t.requires_grad_() for t in (self.x, self.v, self.side) if t is not None] + list(self.fs.parameters())

    def loss(self, out, stream, extras):
        """Of the end, of a value of the stream on the way, and of extra outputs."""
        hidden, aside = extras[0], extras[-1]
        return (out * self.weights).sin().sum() + stream.square().sum() + 0.1 * hidden.exp().sum() + 0.1 * aside.sum()

    def ours(self, kind):
        state = State(self.x.detach(), None if self.v is None else self.v.detach())
        steps = [(f, (self.side,)) for f in self.fs]
        tape = kind("region", state, self.factors)
        out, (stream,), extras = run_chain(Chain(tape, self.x, self.v), steps, escapes={len(self.fs) - 1})
        return self.loss(out, stream, extras)

    def plain(self):
        extras = []

        def f(step, x):
            y, *more = step(x, self.side)
            extras.extend(more)
            return y

        stream = recurrence(self.x, [lambda x, step=step: f(step, x) for step in self.fs], self.factors, self.v)
        return self.loss(stream[-1], stream[-2], extras)


def gradients(loss, inputs):
    return [
        torch.zeros_like(t) if g is None else g for t, g in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True)
    ]


def assert_close(ours, plain, tolerance):
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() <= tolerance * (b.abs().max() + 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "moving"])
def test_first_gradients_are_those_of_the_recurrence(kind, schedule, moving):
    problem = Problem(schedule, moving)
    assert problem.ours(kind).item() == pytest.approx(problem.plain().item(), rel=1e-8)
    assert_close(gradients(problem.ours(kind), problem.inputs), gradients(problem.plain(), problem.inputs), 1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "moving"])
def test_second_gradients_are_those_of_the_recurrence(kind, schedule, moving):
    problem = Problem(schedule, moving)

    def second(loss):
        first = torch.autograd.grad(loss, problem.inputs, create_graph=True, allow_unused=True)
        return gradients(sum(g.square().sum() for g in first if g is not None and g.requires_grad), problem.inputs)

    assert_close(second(problem.ours(kind)), second(problem.plain()), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "moving"])
def test_gradients_agree_with_finite_differences(kind, schedule, moving):
    problem = Problem(schedule, moving)
    found = gradients(problem.ours(kind), problem.inputs)
    for t, g in zip(problem.inputs, found, strict=True):
        start, direction = t.detach().clone(), torch.randn_like(t)

        def at(value, t=t):
            with torch.no_grad():
                t.copy_(value)
            return problem.ours(kind).detach()

        near, far = (numeric_gradient(at, start, direction, eps) for eps in (1e-3, 2e-3))  # so far that the grid does not show
        numeric = (4 * near - far) / 3  # without the error of second order (Richardson)
        at(start)
        assert (g * direction).sum().item() == pytest.approx(numeric, abs=1e-5 * (g * direction).abs().sum().item() + 1e-6)


@pytest.mark.parametrize("kind", TAPES)
def test_the_gradient_of_the_initial_velocity_alone(kind):
    """x[T] of a chain whose residuals are 0 is x[0] + (g + g**2 + ...) v[0]."""
    x, v = torch.randn(5, D, dtype=torch.float64, requires_grad=True), torch.randn(5, D, dtype=torch.float64, requires_grad=True)

    class Zero(nn.Module):
        def forward(self, x):
            return (x * 0,)

    steps = [(Zero(), ())] * 3
    out, _, _ = run_chain(Chain(kind("region", State(x.detach(), v.detach()), factors([0.5, 0.25, 0.8])), x, v), steps)
    out.sum().backward()
    assert torch.allclose(v.grad, torch.full_like(v, 0.5 + 0.5 * 0.25 + 0.5 * 0.25 * 0.8), atol=1e-12)
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_a_network_that_starts_with_a_velocity(use_backprop, gamma):
    torch.manual_seed(0)
    fs, start = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(4)], nn.Linear(D, D)
    net = MomentumNet(fs, gamma, init_speed=True, init_function=start, use_backprop=use_backprop).double()
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    expected = recurrence(x, fs, factors([gamma] * 4), start(x))[-1].exp().sum()
    assert_close(gradients(net(x).exp().sum(), inputs), gradients(expected, inputs), 1e-7)
