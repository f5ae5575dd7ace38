"""A residual that is written into a tensor made for it is found, and right: y = zeros_like(x); y[m] = f(x[m]); return x + y."""

import pytest
import torch
from captures import assert_exact, assert_same_model
from torch import nn

import mnet_fx

ROWS = torch.tensor([0, 2])


def masked(x, f, g):
    m, y = x[:, 0] > 0, torch.zeros_like(x)
    y[m] = f(x[m])
    return x + y


def branch_first(x, f, g):
    m, y = x[:, 0] > 0, torch.zeros_like(x)
    y[m] = f(x[m])
    return y + x


def rows(x, f, g):
    y = torch.zeros_like(x)
    y[:2] = f(x[:2]).tanh()
    y[2:] = g(x[2:])
    return x + y


def experts(x, f, g):
    y, chosen = torch.zeros_like(x), x[:, :2].argmax(-1)
    for i, expert in enumerate((f, g)):
        mine = (chosen == i).nonzero().squeeze(-1)
        y.index_add_(0, mine, expert(x[mine]))
    return x + y


def filled_by(write):
    def block(x, f, g):
        y = torch.zeros_like(x)
        write(y, x, f(x))
        return x + y

    return block


def through_a_view(x, f, g):
    y = x.new_zeros(x.shape)
    flat = y.view(-1)
    flat[:8] = f(x).view(-1)[:8]
    return x + y


def as_a_view(x, f, g):
    y = x.new_zeros(12)
    y[:] = f(x).view(-1)
    return x + y.view(3, 4)


def columns(x, f, g):
    y = torch.empty_like(x)
    y[:, :2].copy_(f(x)[:, :2])
    y[:, 2:].copy_(g(x)[:, 2:])
    return x + y


def made_before_the_skip(x, f, g):
    y = torch.zeros_like(x)
    z = x + y
    y.add_(f(x))
    return z + y


def in_place(x, f, g):
    y = torch.zeros_like(x)
    y[:2] = f(2 * x[:2])
    x = x.clone()
    x += y
    return x


def cleared_afterwards(x, f, g):
    y = torch.zeros_like(x)
    y[:2] = f(x[:2]).tanh()
    z = x + y
    y.zero_()
    return z


def scaled(x, f, g):
    y = torch.zeros_like(x)
    y[:2] = f(x[:2]).tanh()
    return torch.add(x, y, alpha=0.5)


def subtracted(x, f, g):
    y = torch.zeros_like(x)
    y[:2] = f(x[:2]).tanh()
    return x - y


PLAIN = [masked, branch_first, rows, experts, through_a_view, as_a_view, columns, made_before_the_skip, in_place, cleared_afterwards]
FILLS = {block.__name__: block for block in [*PLAIN, scaled, subtracted]} | {
    "index_put_": filled_by(lambda y, x, z: y.index_put_((ROWS,), z[ROWS])),
    "index_add_": filled_by(lambda y, x, z: y.index_add_(0, ROWS, z[ROWS])),
    "index_copy_": filled_by(lambda y, x, z: y.index_copy_(0, ROWS, z[ROWS])),
    "copy_": filled_by(lambda y, x, z: y.copy_(z)),
    "add_": filled_by(lambda y, x, z: y.add_(z)),
    "addmm_": filled_by(lambda y, x, z: y.addmm_(z, torch.ones(4, 4))),
    "scatter_": filled_by(lambda y, x, z: y.scatter_(0, torch.tensor([[0, 1, 2, 0]]), z[:1])),
    "masked_scatter_": filled_by(lambda y, x, z: y.masked_scatter_(x > 0, z)),
    "foreach": filled_by(lambda y, x, z: torch._foreach_add_([y], [z])),
}


def aliased(x, f, g):
    y = x.view(3, 4)
    y.add_(f(2 * x))
    return x + y


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.stem = block, nn.Linear(4, 4)
        self.f, self.g = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for f, g in zip(self.f, self.g, strict=True):
            x = self.block(x, f, g)
        return x


@pytest.mark.parametrize("name", FILLS)
def test_a_filled_branch_is_found_and_right(name):
    model, x = Net(FILLS[name]), torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, x)
    assert net.report.residual_adds == sum(region.steps for region in net.report.regions) >= 3
    assert_exact(model, (x,), x)


def test_a_skip_less_what_is_filled_is_no_scaled_skip():
    assert [region.steps for region in mnet_fx.report(Net(subtracted), torch.randn(3, 4)).regions] == [3]


@pytest.mark.filterwarnings("ignore::mnet_fx.MnetWarning")
def test_a_fill_of_the_stream_itself_is_listed():
    model, x = Net(aliased), torch.randn(3, 4)
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, x)
    assert {refusal.code for refusal in net.report.refusals} >= {"inplace_stream"}


@pytest.mark.filterwarnings("ignore::mnet_fx.MnetWarning")
def test_a_fill_of_a_buffer_is_listed():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.register_buffer("y", torch.zeros(3, 4))

        def forward(self, x):
            for f in self.f:
                self.y.copy_(f(x).detach())
                x = x + self.y
            return x * self.f[0].weight.sum()

    net = mnet_fx.momentumize(Buffered(), gamma=0)
    net(torch.randn(3, 4))
    assert [refusal.code for refusal in net.report.refusals] == ["mutated_side"] * 3
