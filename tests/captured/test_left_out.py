"""Modules whose code Dynamo leaves to Python: their residual adds are in the report, and where they are chains there is a warning."""

import warnings

import pytest
import torch
from torch import nn

import mnet_fx

D = 8


def blocks(depth=3):
    return nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(depth))


class Head(nn.Module):
    """A chain of its own, behind a graph break of the model."""

    def __init__(self, depth=3):
        super().__init__()
        self.blocks, self.error = blocks(depth), None

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        if self.error is not None:
            raise self.error
        return x


class Disabled(Head):
    @torch.compiler.disable
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Net(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(D, D), blocks(), head

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        x = torch.relu(self.stem(x))
        torch._dynamo.graph_break()
        return self.head(x)


def trained(net, x):
    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def paths(net, code):
    return [add.path for add in net.report.adds if add.code == code]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_disabled_module_is_in_the_report(mode):
    net, x = getattr(mnet_fx.momentumize(Net(Disabled())), mode)(), torch.randn(2, D)
    with pytest.warns(mnet_fx.MnetWarning, match="residual blocks of head stay as they are, since Dynamo left their code to Python"):
        net(x)
    assert (net.report.residual_adds, net.report.rewritten_adds) == (6, 3)
    assert paths(net, "left_to_python") == ["head"] * 3
    assert "left_to_python" in str(net.report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)


def test_deep_inside_of_what_python_runs():
    """Modules between, of which some are captured by themselves, are each looked at once."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.first, self.second = nn.Linear(D, D), Head(2), Disabled(4)

        @torch.compiler.disable(recursive=False)
        def forward(self, x):
            x = x + self.linear(x)
            return self.second(self.first(x))

    net = mnet_fx.momentumize(Net(Outer()))
    with pytest.warns(mnet_fx.MnetWarning, match=r"residual blocks of head, head\.second stay"):
        net(torch.randn(2, D))
    assert paths(net, "left_to_python") == ["head", *["head.second"] * 4]
    assert [region.path for region in net.report.regions] == ["", "head.first"]
    assert (net.report.residual_adds, net.report.rewritten_adds) == (3 + 1 + 2 + 4, 5)


def test_nothing_is_said_of_a_single_add_but_in_the_report(recwarn):
    net = mnet_fx.momentumize(Net(Disabled(1)))
    net(torch.randn(2, D))
    assert paths(net, "left_to_python") == ["head"]
    assert not [w for w in recwarn if "left their code" in str(w.message)]


def test_nothing_is_left_where_dynamo_captures_what_follows_a_break(recwarn):
    net = mnet_fx.momentumize(Net(Head()))
    net(torch.randn(2, D))
    assert (net.report.residual_adds, net.report.rewritten_adds) == (6, 6)
    assert not [w for w in recwarn if "left their code" in str(w.message)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
def test_one_that_raises_does_not_leave_its_class_to_python(error):
    """Dynamo leaves code in which an exception came for ever to Python, and code belongs to all models of the class."""
    torch.manual_seed(0)
    bad, good, x = mnet_fx.momentumize(Net(Head())), Net(Head()), torch.randn(2, D)
    bad.head.error = error("mine")
    for _ in range(2):
        with pytest.raises(error, match="mine"):
            bad(x)
        net = mnet_fx.momentumize(good)
        expected = trained(mnet_fx.momentumize(good, backward="stored"), x)
        assert all(map(torch.equal, trained(net, x), expected))
        assert net.report.rewritten_adds == 6
    bad.head.error = None
    trained(bad, x)
    assert bad.report.rewritten_adds == 6


@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
def test_one_that_raised_under_a_torch_compile_of_somebody_elses_is_said():
    class Own(Head):
        pass

    def forward(self, x):
        return Head.forward(self, x)

    Own.forward = forward
    plain, x = torch.compile(Net(Own()), backend="eager"), torch.randn(2, D)
    plain._orig_mod.head.error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        plain(x)
    net = mnet_fx.momentumize(Net(Own()))
    with pytest.warns(mnet_fx.MnetWarning, match="residual blocks of head stay"):
        net(x)
    torch._dynamo.reset()
