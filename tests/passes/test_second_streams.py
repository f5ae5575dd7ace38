"""Two streams side by side: the adds of the second are in the report, too."""

import pytest
import torch
from torch import nn

import mnet_fx
import passes


class Layer(nn.Module):
    """Edges, then nodes, as in a mesh network."""

    def __init__(self, direct=True, mixes=True):
        super().__init__()
        self.edges, self.nodes = nn.Linear(8, 4), nn.Linear(8 if direct else 4, 4)
        self.direct, self.mixes = direct, mixes

    def forward(self, x, e):
        e = e + torch.tanh(self.edges(torch.cat([x, e], -1)))
        if not self.mixes:
            return x + torch.tanh(x) * e, e
        return x + torch.tanh(self.nodes(torch.cat([x, e], -1) if self.direct else e)), e


class Mesh(nn.Module):
    def __init__(self, **kind):
        super().__init__()
        self.layers = nn.ModuleList(Layer(**kind) for _ in range(4))

    def forward(self, x, e):
        for layer in self.layers:
            x, e = layer(x, e)
        return x, e


class Masked(nn.Module):
    """A bias that the model computes is added to the scores of each layer."""

    def __init__(self):
        super().__init__()
        self.bias, self.layers = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        bias = self.bias(x)
        for layer in self.layers:
            x = x + layer(torch.softmax(x @ x.mT + bias, -1) @ x)
        return x


class Pairs(nn.Module):
    """As in an Evoformer: the second stream gets what the first one makes, and goes on by itself."""

    def __init__(self):
        super().__init__()
        self.to_m, self.to_z, self.own = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(3))

    def forward(self, m, z):
        for to_m, to_z, own in zip(self.to_m, self.to_z, self.own, strict=True):
            m = m + torch.sigmoid(z) * to_m(m)
            z = z + to_z(m)
            z = z + torch.tanh(own(z))
        return m, z


class Scores(nn.Module):
    """As in a RealFormer: the scores of one layer are added to those of the next; or, as in a WaveNet, what no layer reads."""

    def __init__(self, read=True):
        super().__init__()
        self.layers, self.read = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), read

    def forward(self, x):
        total = x @ x.mT
        for layer in self.layers:
            y = layer(x)
            total = total + y @ y.mT
            x = x + torch.tanh(total if self.read else y @ y.mT) @ y
        return x, total


def codes(model):
    return [refusal.code for refusal in passes.plan(torch.fx.symbolic_trace(model)).refusals]


def test_each_add_of_both_is_there():
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    report = mnet_fx.report(Mesh(), inputs)
    assert len(report.adds) == report.residual_adds == 8
    left = [add for add in report.adds if add.code == "two_streams"]
    assert len(left) == 4
    assert all("regions=[...]" in add.hint for add in left)
    named = mnet_fx.momentumize(Mesh(), regions=["layers"])
    named(*inputs)
    assert named.report.rewritten_adds == 4


def test_a_sum_that_knows_of_its_stream_through_the_other_is_there():
    report = mnet_fx.report(Pairs(), (torch.randn(3, 4), torch.randn(3, 4)))
    assert [add.code for add in report.adds].count("two_streams") == 3
    assert len(report.adds) == report.residual_adds == 9


SERIES = {
    "only e": (Mesh(direct=False), 4),
    "a product": (Mesh(mixes=False), 4),
    "scores": (Scores(), 3),
}  # the first scores add to no others


@pytest.mark.parametrize("name", SERIES)
def test_sums_that_follow_each_other_are_there(name):
    """Each knows of the one before through the steps of the chain alone, as in a RevNet."""
    model, number = SERIES[name]
    assert codes(model) == ["two_streams"] * number


@pytest.mark.parametrize("model", [Masked(), Scores(read=False)], ids=["a mask", "a running sum"])
def test_other_sums_are_none(model):
    assert "two_streams" not in codes(model)
