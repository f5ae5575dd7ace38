"""Steps that differentiate within themselves: forces and energies, with or without a chain inside and a checkpoint outside."""

import pytest
import torch
from test_tape import TAPES, D, chain, factors
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import mnet_fx
from mnet_fx import InversionError
from mnet_fx.runtime.tape import PlainTape


class Force(nn.Module):
    """The gradient of an energy, which is a network, by x."""

    def __init__(self, net, create_graph=True, leaf=True):
        super().__init__()
        self.net, self.create_graph, self.leaf = net, create_graph, leaf

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_() if self.leaf else x
            energy = self.net(z).square().sum()
            return torch.autograd.grad(energy, z, create_graph=self.create_graph)[0] + x


def plain_net():
    return nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, D))


def momentum_net():
    return mnet_fx.MomentumNet([plain_net() for _ in range(6)], gamma=0.9, use_backprop=False)


def stored(f):
    """The same with activations stored, also inside."""
    for module in f.modules():
        if isinstance(module, mnet_fx.MomentumNet):
            module.use_backprop = True
    return f


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("net", [plain_net, momentum_net])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_step_that_differentiates_within_itself(kind, net, create_graph, leaf, early_stop):
    found = []
    for tape in (kind, PlainTape):
        torch.manual_seed(0)
        fs, x0 = nn.ModuleList(Force(net(), create_graph, leaf) for _ in range(4)), torch.randn(5, D, requires_grad=True)
        fs = fs if tape is kind else stored(fs)
        with set_checkpoint_early_stop(early_stop):
            out, _ = chain(tape, fs, factors([0.5, 0.0, 0.9, 0.5]), x0)
            wanted = [x0, *fs.parameters()]
            found.append(torch.autograd.grad(out.square().sum(), wanted, allow_unused=True, retain_graph=True))
            found[-1] += torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
        found[-1] += (torch.get_rng_state(),)
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class Statistics(nn.Module):
    """A step whose first half counts, by a buffer and an attribute, and which is rerun in the middle."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.runs = nn.BatchNorm1d(D), nn.Linear(D, D), 0

    def forward(self, x):
        self.runs += 1
        h = torch.tanh(self.linear(self.norm(x)) * self.runs)
        return torch.autograd.grad(h.square().sum(), x, create_graph=True)[0] + h


@pytest.mark.parametrize("kind", TAPES)
def test_what_a_step_rerun_in_the_middle_counts(kind):
    found = []
    for tape in (kind, PlainTape):
        torch.manual_seed(0)
        fs, x0 = nn.ModuleList(Statistics() for _ in range(3)), torch.randn(5, D, requires_grad=True)
        for _ in range(2):
            out, _ = chain(tape, fs, factors([0.5] * 3), x0)
            gradients = torch.autograd.grad(out.square().sum(), [x0, *fs.parameters()])
        assert [f.runs for f in fs] == [2, 2, 2]
        found.append([*gradients, *fs.buffers()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("outer", ["reversible", "stored"])
def test_a_checkpoint_around_it_all(create_graph, outer):
    found = []
    for how in ("ours", "plain"):
        torch.manual_seed(0)
        x = torch.randn(4, D, requires_grad=True)
        forces = [Force(momentum_net(), create_graph) for _ in range(6)]
        net = mnet_fx.MomentumNet(forces, gamma=0.9, use_backprop=outer == "stored")
        out = checkpoint(net, x, use_reentrant=False) if how == "ours" else stored(net)(x)
        found.append(torch.autograd.grad(out.square().sum(), [x, *net.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", TAPES)
def test_a_step_that_goes_back_through_the_steps_before_it(kind):
    """Its side input is the input of the chain, so that the tape moves before the step ends, which it survives; its rerun cannot do so."""

    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x, start):
            h = torch.tanh(self.linear(x))
            return h + torch.autograd.grad(h.square().sum(), start, create_graph=True)[0]

    def gradient(tape):
        fs, x0 = nn.ModuleList(Back() for _ in range(3)), torch.randn(5, D, requires_grad=True)
        out, _ = chain(tape, fs, factors([0.5] * 3), x0, sides=(x0,))
        return torch.autograd.grad(out.square().sum(), x0)

    assert gradient(PlainTape)[0].any()
    with pytest.raises(InversionError, match="the course of the step"):  # in a rerun x[t] has no history; as under a checkpoint
        gradient(kind)
