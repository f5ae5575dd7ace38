"""Compiled parts keep all that their backward needs, whatever memory the user granted: recomputed by AOTAutograd, dropout draws anew."""

from contextlib import nullcontext

import pytest
import torch
import torch._functorch.config as functorch_config
from oracles import numeric_gradient
from torch import nn

import mnet_fx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def by_setting():
    return functorch_config.patch(activation_memory_budget=0.0)


def by_region():
    region = getattr(torch.autograd.graph, "region_activation_memory_budget", None)
    return pytest.skip("since torch 2.14") if region is None else region(0.0)


class Within(nn.Module):
    """A model under a context of its own forward."""

    def __init__(self, net, context):
        super().__init__()
        self.net, self.context = net, context

    def forward(self, x):
        with self.context():
            return self.net(x)


@pytest.mark.parametrize("backward", ["reversible", "stored"])
@pytest.mark.parametrize("budget", [nullcontext, by_setting, by_region])
def test_gradients_of_dropout_by_finite_differences(backward, budget):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), *(Block() for _ in range(4)), nn.GELU(), nn.Dropout(0.5)).double()
    model = Within(net, by_region) if budget is by_region else net
    options = {"inner": "aot_eager_decomp_partition", "backward": backward, "gamma": 0.5, "precision": "high"}
    compiled = torch.compile(model, backend=mnet_fx.backend(**options))
    x, direction, weights = torch.randn(3, 6, 8, dtype=torch.float64)

    def loss(x):
        torch.manual_seed(7)
        return (compiled(x) * weights).sum()

    with by_setting() if budget is by_setting else nullcontext():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        numeric = numeric_gradient(lambda x: loss(x.requires_grad_()).detach(), x, direction, 1e-4)
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-5)
    assert functorch_config.activation_memory_budget == 1.0
