"""Layers that draw from Python's and NumPy's generators: a rerun draws the same numbers, and takes none away from others."""

import random
from random import uniform

import numpy as np
import pytest
import torch
from numpy.random import rand
from torch import nn

import mnet_fx

D = 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + self.scale() * torch.tanh(self.linear(x))


class ByModule(Layer):
    """Stochastic depth."""

    def forward(self, x):
        return x if random.random() < 0.3 else super().forward(x)

    def scale(self):
        return random.choice([0.5, 1.0, 2.0])


class ByFunction(Layer):
    def scale(self):
        return uniform(0.5, 1.5)


class ByAnotherFunction(Layer):
    def scale(self):
        return drawn()


def drawn():
    return random.gauss(1.0, 0.1)


class ByNumpy(Layer):
    def scale(self):
        return float(np.random.normal())


class ByFunctionOfNumpy(Layer):
    def scale(self):
        return float(rand())


class ByBoth(Layer):
    def scale(self):
        return float(np.random.rand()) + random.random()


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def trained(net, x):
    """Gradients of three steps, and what is drawn after each."""
    random.seed(0)
    np.random.seed(0)
    found = []
    for _ in range(3):
        net.zero_grad()
        net(x).square().mean().backward()
        found += [torch.zeros(()) if p.grad is None else p.grad.clone() for p in net.parameters()]
        found += [torch.tensor([random.random(), np.random.rand()])]
    return found


@pytest.mark.parametrize("layer", [ByModule, ByFunction, ByAnotherFunction, ByNumpy, ByFunctionOfNumpy, ByBoth])
def test_a_rerun_draws_the_same(layer):
    x = torch.randn(3, D)
    reversible, stored = (trained(mnet_fx.momentumize(Net(layer), regions=["layers"], backward=b), x) for b in ("reversible", "stored"))
    assert all(map(torch.equal, reversible, stored))


def test_their_states_are_not_read_where_no_code_names_them(monkeypatch):
    class Plain(Layer):
        def scale(self):
            return 1.0

    monkeypatch.setattr(random, "getstate", None)
    monkeypatch.setattr(np.random, "get_state", None)
    net = mnet_fx.momentumize(Net(Plain), regions=["layers"])
    net(torch.randn(3, D)).sum().backward()
