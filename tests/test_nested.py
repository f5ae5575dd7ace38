"""Chains within the steps of chains: what the runtime makes of a region in the code of a step."""

import copy
import pickle

import pytest
import torch
import zoo
from oracles import recurrence
from torch import nn
from zoo import Everyday, Perceptron, Recurrent, one_thread, tokens  # noqa: F401  (one a fixture)

import mnet_fx
from mnet_fx.budget.measured import measure


class Inner(nn.Module):
    """A branch with a chain of two in it: an LSTM, and a perceptron with BatchNorm, both with dropout."""

    def __init__(self, width=6):
        super().__init__()
        self.into, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.a, self.b = Recurrent(width), Perceptron(width)

    def forward(self, x):
        y = self.into(x)
        y = y + self.a(y)
        y = y + self.b(y)
        return self.out(y)


def nested():
    torch.manual_seed(0)
    return Everyday(pairs=1, extra=[Inner(), Inner()])


def step(net, x=None):
    """All that one training step gives and leaves."""
    x = tokens().to(net.head.weight.dtype) if x is None else x
    x = x.clone().requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"out": out.detach(), "grad of x": x.grad} | zoo.leftovers(net)


def test_the_report_says_which_regions_lie_within_others():
    net = mnet_fx.momentumize(nested(), gamma=0.9)
    rows = [(region.path, region.steps, region.storage, region.state_bytes_per_element) for region in net.report.regions]
    assert rows == [("", 4, "reverse", 12.0), ("blocks.2", 2, "nested", None), ("blocks.3", 2, "nested", None)]
    assert (net.report.rewritten_adds, net.report.residual_adds) == (8, 8)


@pytest.mark.parametrize("training", [True, False])
def test_gamma_zero_is_the_original(training):
    model = nested().double().train(training)
    net = mnet_fx.momentumize(copy.deepcopy(model), gamma=0)
    zoo.assert_near(zoo.seeded(step, net), zoo.seeded(step, model), 1e-8)


@pytest.mark.parametrize("gamma", [0.9, 0.05])
@pytest.mark.parametrize("velocity", ["zero", "first", "module"])
def test_gradients_are_those_of_stored_activations(gamma, velocity):
    """Twice, so that buffers and gradients of one step are there when the next begins."""
    found = []
    for kind in ("reversible", "stored"):
        net = nested()
        start = nn.Linear(6, 6) if velocity == "module" else velocity
        net = mnet_fx.momentumize(net, gamma=gamma, initial_velocity=start, backward=kind)
        zoo.seeded(step, net)
        found.append(zoo.seeded(step, net))
    zoo.assert_identical(*found)
    missing = [name for name, t in found[0].items() if name.startswith("grad") and (t is None or not t.any())]
    assert not missing


def test_both_chains_follow_the_recurrence():
    """Values and gradients against both recurrences in plain float64, the inner ones with a velocity of their own."""
    torch.manual_seed(0)
    blocks = [Inner() for _ in range(3)]
    model = Everyday(pairs=0, extra=blocks).double().eval()
    factors = [(0.7, 1 - 0.7)]

    def inner(block):
        return lambda x: block.out(recurrence(block.into(x), [block.a, block.b], 2 * factors)[-1])

    net = mnet_fx.momentumize(copy.deepcopy(model), gamma=0.7)
    found = step(net)
    original, x = copy.deepcopy(model), tokens().double().requires_grad_()
    out = original.head(recurrence(original.stem(x), [inner(block) for block in original.blocks], 3 * factors)[-1])
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    zoo.assert_near(found, {"out": out.detach(), "grad of x": x.grad} | zoo.leftovers(original), 1e-8)


def test_second_and_partial_backwards():
    found = []
    for net in zoo.twins(nested(), gamma=0.9):
        x = tokens().requires_grad_()
        out = zoo.seeded(net, x).tanh().sum()
        weight = net.blocks[2].b.fc1.weight
        (partial,) = torch.autograd.grad(out, net.blocks[3].a.out.weight, retain_graph=True)
        (first,) = torch.autograd.grad(out, weight, create_graph=True)
        first.square().sum().backward()
        found.append({"partial": partial, "first": first.detach(), "grad of x": x.grad} | zoo.leftovers(net))
    zoo.assert_identical(*found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_work_on_their_own(copied):
    net = mnet_fx.momentumize(nested(), gamma=0.9)
    other = copied(net)
    expected = zoo.seeded(step, copy.deepcopy(net))
    zoo.assert_identical(zoo.seeded(step, other), expected)
    assert all(p.grad is None for p in net.parameters())


def test_a_submodule_replaced_later_has_its_effect():
    net = mnet_fx.momentumize(nested().eval(), gamma=0)
    net.blocks[2].b.fc1 = nn.Linear(6, 12)
    plain = nested().eval()
    plain.load_state_dict(net.state_dict())
    zoo.assert_agree(net(tokens()), plain(tokens()))


def test_functional_call_with_the_backward_after_the_call():
    net = mnet_fx.momentumize(nested(), gamma=0.9, initial_velocity=nn.Linear(6, 6))
    given = {name: (p + 0.1).detach().requires_grad_() for name, p in net.named_parameters()}
    out = zoo.seeded(torch.func.functional_call, net, given, (tokens(),))
    found = torch.autograd.grad(out.sum(), list(given.values()))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(given[name])
    fresh = mnet_fx.momentumize(nested(), gamma=0.9, initial_velocity=nn.Linear(6, 6))
    fresh.load_state_dict({name: given[name].detach() if name in given else t for name, t in fresh.state_dict().items()})
    expected = torch.autograd.grad(zoo.seeded(fresh, tokens()).sum(), list(fresh.parameters()))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(found)


def test_a_weight_of_the_inner_chain_that_changes_before_the_backward_pass_is_named():
    net = mnet_fx.momentumize(nested(), gamma=0.9)
    out = net(tokens())
    with torch.no_grad():
        net.blocks[2].b.fc1.weight.add_(1)
    with pytest.raises(mnet_fx.InversionError, match=r"step 2.*parameter 'blocks\.2\.b\.fc1\.weight'"):
        out.sum().backward()


@pytest.mark.slow
def test_what_is_kept_does_not_grow_with_inner_chains():
    def kept(inner):
        torch.manual_seed(0)

        def layer():
            return nn.Linear(64, 64)

        branches = [nn.Sequential(layer(), *(Sum(layer()) for _ in range(inner)), layer()) for _ in range(8)]
        net = mnet_fx.momentumize(nn.Sequential(layer(), *map(Sum, branches)), gamma=0.9)
        assert len(net.report.regions) == 1 + 8 * (inner > 0)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.randn(256, 64)
        return measure(lambda: net(x).sum(), torch.Tensor.backward).kept

    class Sum(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return x + self.f(x)

    kept(0), kept(4)  # lazily made buffers
    assert kept(4) == kept(0)
