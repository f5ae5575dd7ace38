"""Chains within steps that go backwards by themselves: where that lowers the peak, and that it changes nothing else."""

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx


class Block(nn.Module):
    def __init__(self, width, hidden=8):
        super().__init__()
        self.inner = nn.Sequential(
            nn.BatchNorm1d(width), nn.Linear(width, hidden * width), nn.Tanh(), nn.Linear(hidden * width, width), nn.Dropout(0.1)
        )

    def forward(self, x):
        return x + self.inner(x)


class Hourglass(nn.Module):
    """Blocks of one width around a step that holds blocks of another."""

    def __init__(self, widths=(16, 12, 8), blocks=4, again=False):
        super().__init__()
        wide, narrow, *rest = widths
        self.before, self.after = (nn.ModuleList(Block(wide) for _ in range(blocks)) for _ in range(2))
        self.down, self.up = nn.Linear(wide, narrow), nn.Linear(narrow, wide)
        self.middle = Hourglass((narrow, *rest), blocks) if rest else nn.Sequential(*(Block(narrow) for _ in range(blocks)))
        self.again = again

    def forward(self, x):
        for block in self.before:
            x = block(x)
        for _ in range(1 + self.again):
            x = x + self.up(self.middle(self.down(x)))
        for block in self.after:
            x = block(x)
        return x


class Layer(nn.Module):
    """A layer of a deep network, with a chain of its own."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(16, 8), nn.Linear(8, 16)
        self.middle = nn.Sequential(*(Block(8) for _ in range(3)))

    def forward(self, x):
        return x + self.up(self.middle(self.down(x)))


ROWS = 64


def step(net, x=None):
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(2)) if x is None else x
    x = x.to(next(net.parameters()).dtype).requires_grad_()
    out = net(x)
    out.square().sum().backward()
    return {"out": out.detach(), "grad of x": x.grad} | zoo.leftovers(net)


def storages(net):
    return {region.path: region.storage for region in net.report.regions}


def peak(net, rows=ROWS):
    x = torch.randn(rows, 16)
    net(x).sum().backward()
    return mnet_fx.measure(lambda: net(x).sum(), lambda loss: loss.backward()).peak


@pytest.mark.parametrize("gamma", [0.9, 0.05])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_all_is_as_with_stored_activations(gamma, inner):
    torch.manual_seed(0)
    model = Hourglass()
    nets = [mnet_fx.momentumize(copy.deepcopy(model), gamma=gamma, backward=b, inner=inner) for b in ("stored", "reversible")]
    stored, reversible = (zoo.seeded(step, net) for net in nets)
    zoo.assert_identical(reversible, stored)
    assert set(storages(nets[1]).values()) == {"reverse"}
    zoo.assert_identical(*(zoo.seeded(step, copy.deepcopy(net)) for net in nets))


def test_the_peak_is_lower_than_with_a_checkpoint_around_each_block():
    torch.manual_seed(0)
    model = Hourglass(blocks=8)
    theirs = copy.deepcopy(model)
    for block in [m for m in theirs.modules() if isinstance(m, Block)]:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    ours = mnet_fx.momentumize(model)
    assert peak(ours, 1024) < 0.8 * peak(theirs, 1024)
    assert set(storages(ours).values()) == {"reverse"}


def test_two_that_are_alike_are_chosen_together():
    net = mnet_fx.momentumize(Hourglass((16, 12), again=True), (torch.randn(ROWS, 16),))
    assert [region.storage for region in net.report.regions] == ["reverse"] * 3


def test_where_each_of_many_steps_has_one_their_states_would_take_more():
    net = mnet_fx.momentumize(nn.Sequential(*(Layer() for _ in range(12))), (torch.randn(ROWS, 16),))
    assert [region.storage for region in net.report.regions] == ["reverse", *["nested"] * 12]


def test_sizes_that_vary():
    net = mnet_fx.momentumize(Hourglass())
    step(net)
    lower = {}
    for rows in (48, 80):  # captured with a size that varies
        x = torch.randn(rows, 16)
        net(x).sum().backward()
        lower[rows] = mnet_fx.measure(lambda x=x: net(x).sum(), lambda loss: loss.backward()).peak / rows
    assert {storage for _, storage in storages(net).items()} == {"reverse"}
    step(net)
    fixed = mnet_fx.momentumize(Hourglass())
    assert max(lower.values()) < 1.3 * peak(fixed) / ROWS


def test_second_derivatives_and_two_backward_passes():
    found = []
    for backward in ("stored", "reversible"):
        torch.manual_seed(0)
        net = mnet_fx.momentumize(Hourglass().double(), gamma=0.5, backward=backward).eval()
        x = torch.linspace(-1, 1, 16 * 8, dtype=torch.float64).view(8, 16).requires_grad_()
        out = net(x)
        first = torch.autograd.grad(out.square().sum(), [x, *net.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *net.parameters()], retain_graph=True)
        found.append([*first, *second, *torch.autograd.grad(out.sum(), list(net.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_weight_that_changes_in_between_is_named():
    net = mnet_fx.momentumize(Hourglass())
    loss = net(torch.randn(ROWS, 16)).sum()
    with torch.no_grad():
        net.middle.middle[1].inner[1].weight.mul_(2)
    with pytest.raises(mnet_fx.InversionError, match=r"middle\.middle\.1\.inner\.1\.weight"):
        loss.backward()


def test_the_estimate_and_a_plan_know():
    torch.manual_seed(0)
    model, x = Hourglass(blocks=6).eval(), torch.randn(ROWS, 16)
    estimated = mnet_fx.estimate(model, (x,)).momentum
    net = mnet_fx.momentumize(copy.deepcopy(model))
    assert peak(net) == pytest.approx(estimated.peak_bytes, rel=0.03)
    plan = mnet_fx.plan(copy.deepcopy(model), (x,), memory=0.6)
    planned = mnet_fx.momentumize(copy.deepcopy(model), (x,), **plan.options)
    zoo.assert_identical(zoo.seeded(step, planned), zoo.seeded(step, mnet_fx.momentumize(copy.deepcopy(model), rest="checkpoint")))
