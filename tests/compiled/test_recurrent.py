"""LSTM, GRU and RNN with dropout between their layers: exact, and over any inner compiler what they are in eager mode."""

import copy

import pytest
import torch
from torch import nn

import mnet_fx
from mnet_fx.inner import recurrent

KINDS = [nn.LSTM, nn.GRU, nn.RNN, lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o)]
IDS = ["lstm", "gru", "tanh", "relu"]


class Net(nn.Module):
    """Recurrent layers in the steps, before and after them, or alone."""

    def __init__(self, kind, chain=True):
        super().__init__()
        self.stem, self.head = (kind(4, 4, num_layers=2, dropout=0.4, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(kind(4, 4, num_layers=2, dropout=0.4, batch_first=True) for _ in range(3 if chain else 0))

    def forward(self, x):
        x = self.stem(x)[0]
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)[0]


def outcome(net, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_dropout_between_the_layers_of_a_recurrent_step_is_drawn_again(kind):
    torch.manual_seed(0)
    model, x = Net(kind), torch.randn(2, 5, 4)
    reversible, stored = (outcome(mnet_fx.momentumize(model, backward=way), x) for way in ("reversible", "stored"))
    assert all(torch.equal(a, b) for a, b in zip(reversible, stored, strict=True))
    assert not torch.equal(reversible[0], outcome(mnet_fx.momentumize(copy.deepcopy(model).eval()), x)[0])  # it was drawn at all


@pytest.mark.filterwarnings("ignore:.*no residual chain was rewritten")
@pytest.mark.parametrize("inner", ["aot", "inductor"])
@pytest.mark.parametrize("options", [{}, {"rest": "checkpoint"}, None], ids=["", "rest", "no chain"])
@pytest.mark.parametrize("kind", KINDS[:2], ids=IDS[:2])
def test_an_inner_compiler_leaves_recurrent_layers_as_they_are(kind, options, inner):
    torch.manual_seed(0)
    model, x = Net(kind, chain=options is not None).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    net = mnet_fx.momentumize(model, gamma=0, inner="aot_eager" if inner == "aot" else inner, **(options or {}))
    for expected, found in zip(outcome(model, x), outcome(net, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_which_graphs_are_recurrent():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(4, 4)

        def forward(self, x):
            return self.cell(x)[0]

    seen = []

    def backend(gm, inputs):
        seen.append(recurrent(gm))
        return gm

    with torch._dynamo.config.patch(allow_rnn=True):
        for model in (nn.Sequential(nn.LSTM(4, 4)), Cell(), nn.Linear(4, 4)):
            torch.compile(model, backend=backend)(torch.randn(3, 4))
    assert seen == [True, False, False]
