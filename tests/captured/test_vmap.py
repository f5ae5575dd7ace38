"""Models that call torch.vmap in their forward: within steps, and outside of chains."""

import copy

import pytest
import torch
from torch import nn

import mnet_fx

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.dropout(torch.tanh(self.linear(self.norm(x))), 0.2, self.training)


class InSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.vmap(lambda row: row * row.mean() * self.scale)(block(x))
        return x


class InRest(InSteps):
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x * torch.vmap(lambda row: (row * self.scale).mean())(x)[:, None, None]


class Drawing(InSteps):
    """Random numbers within, others for each row."""

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.vmap(lambda row: nn.functional.dropout(row * self.scale, 0.3), randomness="different")(block(x))
        return x


def outcome(net, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


def entered(n=3):
    return torch.randn(n, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(o, marks=pytest.mark.long) for o in ({"inner": "aot_eager"}, {"rest": "checkpoint"}))], ids=str
)
@pytest.mark.parametrize("model", [InSteps, InRest, Drawing], ids=lambda cls: cls.__name__)
def test_the_original_at_gamma_zero_and_exact(model, options):
    torch.manual_seed(0)
    original = model().double()
    zero = mnet_fx.momentumize(copy.deepcopy(original), gamma=0.0, **options)
    for n in (3, 2):
        for a, b in zip(outcome(zero, entered(n)), outcome(original, entered(n)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert [region.steps for region in zero.report.regions] == [4]
    nets = [mnet_fx.momentumize(copy.deepcopy(original), gamma=0.9, backward=b, **options) for b in ("reversible", "stored")]
    ours, theirs = (outcome(net, entered()) for net in nets)
    assert all(map(torch.equal, ours, theirs))


def test_chains_under_vmap_are_reported():
    class Under(InSteps):
        def forward(self, x):
            return torch.vmap(self.rows)(x)

        def rows(self, x):
            for block in self.blocks:
                x = x + block.linear(x)
            return x

    net = mnet_fx.momentumize(Under().eval())
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        net(torch.randn(3, 5, WIDTH))
    assert {refusal.code for refusal in net.report.refusals} == {"lost_context"}
