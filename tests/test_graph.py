"""The graph that autograd sees is the model's: what a step gives besides the stream is an ancestor of the stream where f's value is."""

import pytest
import torch
import zoo
from test_tape import MIXED, TAPES, D, Step, factors
from torch import nn

import mnet_fx
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime.steps import Chain, run_chain
from mnet_fx.runtime.tape import PlainTape


class Hidden(nn.Module):
    """(f(h(x)), h(x), and more that f does not depend on)"""

    def __init__(self, how="middle"):
        super().__init__()
        self.inner, self.outer, self.how = nn.Linear(D, 9), nn.Linear(9, D), how

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        y = torch.sin(self.outer(hidden))
        if self.how == "the value itself":
            return y, y
        if self.how == "the stream":
            return y, x
        if self.how == "aside":
            return y, self.outer(hidden.square())
        if self.how == "value without gradient":
            return y.detach(), hidden
        if self.how == "views":
            first, second = hidden.split([4, 5], 1)
            return torch.sin(self.outer(torch.cat([first * 2, second], 1))), first, second
        return y, hidden


HOWS = ["middle", "the value itself", "the stream", "aside", "value without gradient", "views"]


def run(kind, fs, gammas=(0.5, 0.0, 0.9, 0.3), x0=None):
    x0 = torch.randn(5, D, requires_grad=True, generator=torch.Generator().manual_seed(1)) if x0 is None else x0
    out, _, extras = run_chain(Chain(kind("region", State(x0.detach()), factors(gammas)), x0, None), [(f, ()) for f in fs])
    return x0, out, extras


def layers(how, number=4):
    torch.manual_seed(0)
    return nn.ModuleList(Hidden(how) for _ in range(number))


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("how", HOWS)
def test_retained_gradients_of_extra_outputs(kind, how):
    found = []
    for tape in (kind, PlainTape):
        fs = layers(how)
        x0, out, extras = run(tape, fs)
        for extra in extras:
            extra.retain_grad()
        (out.exp().sum() + extras[1].square().sum()).backward()
        found.append([t.grad for t in (x0, *extras, *fs.parameters())])
    assert any(g is not None for g in found[0][1:])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("how", HOWS)
def test_gradients_with_respect_to_extra_outputs(kind, how):
    found = []
    for tape in (kind, PlainTape):
        x0, out, extras = run(tape, layers(how))
        wanted = [t for t in (*extras, x0) if t.requires_grad]
        first = torch.autograd.grad(out.exp().sum(), wanted, allow_unused=True, create_graph=True)
        used = [g for g in first if g is not None and g.requires_grad]
        second = torch.autograd.grad(sum(g.square().sum() for g in used), x0, allow_unused=True, retain_graph=True)
        found.append([*first, *second, *torch.autograd.grad(extras[1].sum(), x0, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("how", HOWS)
def test_hooks_that_change_the_gradient_of_extra_outputs(kind, how):
    found = []
    for tape in (kind, PlainTape):
        fs = layers(how)
        _, out, extras = run(tape, fs)
        for extra in extras:
            extra.register_hook(lambda g: g * 0.5)
        (out.exp().sum() + extras[1].sum()).backward()
        found.append([p.grad for p in fs.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("how", ["the value itself", "aside", "middle"])
@pytest.mark.parametrize("when", ["between steps", "afterwards"])
def test_writes_to_extra_outputs(kind, how, when):
    """Where the original may write, and gets the gradients of what it wrote; autograd forbids it where it needs the value."""

    def gradients(tape):
        fs = layers(how)
        x0 = torch.randn(5, D, requires_grad=True, generator=torch.Generator().manual_seed(1))
        chain, kept = Chain(tape("region", State(x0.detach()), factors([0.5] * 4)), x0, None), []
        for f in fs:
            (extra,) = chain.step(f, ())
            kept.append(extra.mul_(3) if when == "between steps" else extra)
        loss = chain.x.exp().sum() + sum(extra.mul_(2).sum() if when == "afterwards" else extra.sum() for extra in kept)
        return [g for g in torch.autograd.grad(loss, [x0, *fs.parameters()], allow_unused=True) if g is not None]

    ours = gradients(kind)
    if how == "aside":
        assert all(map(torch.equal, ours, gradients(PlainTape)))
    else:  # sine and tanh need what they were given or gave: plain autograd refuses, a rerun has them
        reference = layers(how)
        x0 = torch.randn(5, D, requires_grad=True, generator=torch.Generator().manual_seed(1))
        chain, total = Chain(PlainTape("region", State(x0.detach()), factors([0.5] * 4)), x0, None), 0.0
        for f in reference:
            (extra,) = chain.step(f, ())
            total = total + (extra * (3 if when == "between steps" else 2)).sum()
        loss = chain.x.exp().sum() + total
        expected = [g for g in torch.autograd.grad(loss, [x0, *reference.parameters()], allow_unused=True) if g is not None]
        zoo.assert_agree(list(ours), expected)


class Net(nn.Module):
    """Collects what its layers add; writes to the last of it where asked."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        hidden = []
        for f in self.f:
            y = torch.tanh(f(x))
            hidden.append(y)
            x = x + y
        return x, hidden


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x):
        y = torch.tanh(self.f(x))
        return x + y, y


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x):
        hidden = []
        for f in self.f:
            x, y = f(x)
            hidden.append(y)
        return x, hidden


@pytest.mark.parametrize("make", [Net, Layers])
@pytest.mark.parametrize("backward", ["reversible", "stored"])
def test_whole_models(make, backward):
    found = []
    for momentum in (False, True):
        torch.manual_seed(0)
        net, x = make(), torch.randn(3, D, generator=torch.Generator().manual_seed(1))
        if momentum:
            net = mnet_fx.momentumize(net, gamma=0.0, backward=backward, **({"regions": ["f"]} if make is Layers else {}))
        out, hidden = net(x)
        hidden[1].retain_grad()
        hidden[2].register_hook(torch.zeros_like)
        (out.square().sum() + hidden[2].sum()).backward()
        found.append([hidden[1].grad, *(p.grad for p in net.parameters())])
    zoo.assert_agree(found[1], found[0])
    assert not found[1][5].any()


@pytest.mark.parametrize("kind", TAPES)
def test_a_backward_pass_between_two_steps(kind):
    """Deep supervision: the tape is elsewhere when the next step ends."""
    found = []
    for tape in (kind, PlainTape):
        torch.manual_seed(0)
        fs, x0 = nn.ModuleList(nn.Linear(D, D) for _ in range(6)), torch.randn(5, D, requires_grad=True)
        run, gradients = Chain(tape("region", State(x0.detach()), MIXED), x0, None), []
        for t, f in enumerate(fs):
            run.step(Step(f), ())
            if t in (1, 3):
                gradients += torch.autograd.grad(run.x.exp().sum(), [x0, *fs[: t + 1].parameters()], retain_graph=True)
        found.append([*gradients, *torch.autograd.grad(run.x.exp().sum(), [x0, *fs.parameters()])])
    assert all(map(torch.equal, *found))
