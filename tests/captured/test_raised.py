"""A call in which the model raises, which a training loop survives: the next one runs the momentum network again."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mnet_fx
from mnet_fx import MnetError


class Block(nn.Module):
    def __init__(self, longest=99):
        super().__init__()
        self.linear, self.longest = nn.Linear(8, 8), longest

    def forward(self, x):
        if x.shape[0] > self.longest:
            raise ValueError(f"a sequence of {x.shape[0]} is too long")
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Raises at the end where targets are missing; in its layers where the input is too long; runs out of range in the loss."""

    def __init__(self, stem, error=ValueError):
        super().__init__()
        self.stem = nn.Linear(8, 8) if stem else nn.Identity()
        self.layers = nn.ModuleList(Block(6) for _ in range(4))
        self.error = error

    def forward(self, x, targets=None):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        if targets is None and self.training:
            raise self.error("targets are missing")
        return x if targets is None else nn.functional.cross_entropy(x, targets)


GOOD = (torch.linspace(-1, 1, 48).view(6, 8), torch.arange(6))
BAD = {"at the end": GOOD[:1], "in a layer": (torch.ones(7, 8), torch.arange(7)), "out of range": (GOOD[0], GOOD[1] + 5)}


def trained(net, *batch):
    net.zero_grad()
    loss = net(*batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(o, marks=pytest.mark.long) for o in ({"rest": "checkpoint"}, {"example_inputs": GOOD}))]
)
def test_the_next_call_is_the_momentum_network_again(options, bad, stem, first):
    torch.manual_seed(0)
    model = Net(stem)
    expected = trained(mnet_fx.momentumize(model, backward="stored", **options), *GOOD)
    net = mnet_fx.momentumize(model, **options)
    if not first:
        trained(net, *GOOD)
    for _ in range(2):
        with pytest.raises((ValueError, IndexError)):
            net(*BAD[bad])
        assert all(map(torch.equal, trained(net, *GOOD), expected))
    net.eval()
    assert torch.equal(net(GOOD[0]), mnet_fx.momentumize(model).eval()(GOOD[0]))


@pytest.mark.parametrize("error", [KeyError, AttributeError, TypeError, NotImplementedError, StopIteration, KeyboardInterrupt, SystemExit])
def test_whatever_it_raises(error):
    net, expected = (mnet_fx.momentumize(Net(True, error)) for _ in range(2))
    expected.load_state_dict(net.state_dict())
    with pytest.raises((error, RuntimeError)):
        net(GOOD[0])
    assert all(map(torch.equal, trained(net, *GOOD), trained(expected, *GOOD)))


def test_a_forward_that_python_runs_is_never_taken_for_the_last_one_captured():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(4))

        def forward(self, x):
            for weight in self.weights:
                x = x + torch.tanh(x @ weight)
            return x

    net = mnet_fx.momentumize(Direct())
    net(GOOD[0])
    for code in (net.forward.compiled[0].__code__, Direct.forward.__code__):
        torch._dynamo.eval_frame.skip_code(code)
    with pytest.raises(MnetError, match="left the whole forward to Python"):
        net(GOOD[0])


@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
def test_what_was_captured_in_a_call_that_raised_is_looked_at_in_the_next():
    class Breaks(Block):
        def forward(self, x):
            y = super().forward(x)
            if not self.training:
                print(end="", flush=bool(y.mean() > 9))
            return y

    net = Net(False)
    net.layers = nn.ModuleList(Breaks() for _ in range(4))
    net = mnet_fx.momentumize(net)
    trained(net, *GOOD)
    net.eval()
    with pytest.raises(IndexError):
        net(*BAD["out of range"])
    net.forward.spoilt = False  # else nothing that was captured then is left
    for _ in range(2):
        with pytest.raises(MnetError, match="another momentum network"):
            net(*GOOD)


@pytest.mark.parametrize("stem", [False, True])
def test_operations_are_counted_before_the_first_call(stem):
    torch.manual_seed(0)
    model = Net(stem)
    net, counted, plain = mnet_fx.momentumize(model), FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counted:
        net(*GOOD)
    with plain:
        model(*GOOD)
    assert counted.get_total_flops() == plain.get_total_flops() > 0
    assert all(map(torch.equal, trained(net, *GOOD), trained(mnet_fx.momentumize(model, backward="stored"), *GOOD)))
