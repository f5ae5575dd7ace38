"""Blocks that view the stream differently, and links that are more than one operation, in graphs that record shapes."""

import pytest
import torch
from captures import assert_exact, assert_same_model, steps
from passes_models import by_dynamo
from torch import nn

import mnet_fx
import passes


def levelled(model, *inputs):
    """The graph of a model with its changes of layout moved."""
    gm = by_dynamo(model, *inputs)
    passes.level_layouts(gm)
    return gm


class Windows(nn.Module):
    """Alternates between (batch, height, width, channels), tokens, and channels first, as Swin, DaViT and MaxViT do."""

    def __init__(self, depth=2, shift=1):
        super().__init__()
        self.mlps = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.windows = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.shift = shift

    def forward(self, x):
        for mlp, conv, window in zip(self.mlps, self.convs, self.windows, strict=True):
            b, c, h, w = x.shape
            x = x + torch.tanh(conv(x))
            x = x.flatten(2).transpose(1, 2)
            x = x + torch.tanh(mlp(x))
            x = x.view(b, h, w, c)
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
            x = x + torch.tanh(window(x))
            x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
            x = x.permute(0, 3, 1, 2)
        return x


def images(batch=2):
    return torch.randn(batch, 8, 4, 6, generator=torch.Generator().manual_seed(batch))


def test_blocks_in_three_layouts_are_one_chain():
    model = Windows()
    net = mnet_fx.momentumize(model, (images(),), gamma=0)
    assert steps(net) == [6]
    for batch in (2, 3, 1):
        assert_same_model(model, net, images(batch))
    assert_exact(model, (images(),), images())


def test_a_layout_that_does_not_come_back_changes_the_network_only_where_it_is_the_same():
    """Rolled one way and never back: the stream is another after each block, but still a chain up to a roll."""

    class Rolls(Windows):
        def forward(self, x):
            for mlp in self.mlps:
                x = torch.roll(x, 1, 2)
                x = x + torch.tanh(mlp(x))
            return x

    model, x = Rolls(4), torch.randn(2, 3, 5, 8)
    net = mnet_fx.momentumize(model, (x,), gamma=0)
    assert steps(net) == [4]
    assert_same_model(model, net, x)
    assert_exact(model, (x,), x)


@pytest.mark.parametrize("written", [False, True])
def test_memory_that_is_written_to_is_left_alone(written):
    class Writes(Windows):
        def forward(self, x):
            for mlp in self.mlps:
                x = x + torch.tanh(mlp(x))
                y = x.transpose(1, 2)
                if written:
                    y.mul_(2)
                x = (y + torch.tanh(mlp(y))).transpose(1, 2)
            return x

    model, x = Writes(), torch.randn(2, 3, 5, 8)
    assert [len(region.steps) for region in passes.plan(levelled(model, x)).regions] == ([] if written else [4])
    if not written:
        assert_same_model(model, mnet_fx.momentumize(model, (x,), gamma=0), x)


class Norm(nn.Module):
    """A norm in single operations, as DeBERTa's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + self.bias


class Transposed(nn.Module):
    """A norm between two changes of layout, as SqueezeBERT's."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Mixes(nn.Module):
    """No link: a matrix product between two blocks."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize(
    ("link", "chains"), [(Norm, [3]), (Transposed, [3]), (Mixes, [])], ids=lambda v: v.__name__ if isinstance(v, type) else ""
)
def test_links_that_branch(link, chains):
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.fcs, self.norms = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.ModuleList(link() for _ in range(3))

        def forward(self, x):
            for fc, norm in zip(self.fcs, self.norms, strict=True):
                x = norm(x + torch.tanh(fc(x)))
            return x

    model, x = Post(), torch.randn(2, 5, 8)
    plan = passes.plan(levelled(model, x))
    assert [len(region.steps) for region in plan.regions] == chains
    if chains:
        assert_same_model(model, mnet_fx.momentumize(model, (x,), gamma=0), x)
        assert_exact(model, (x,), x)


@pytest.mark.parametrize(
    "link",
    [
        lambda self, x, m: x * m,
        lambda self, x, m: x.masked_fill(m < 0, 0.5),
        lambda self, x, m: torch.where(m > 0, x, self.norm.bias),
        lambda self, x, m: self.norm(x) * m.sigmoid().mean(-1, keepdim=True),
        lambda self, x, m: (x.mT * m.mT).mT,
        lambda self, x, m: x.mul_(m),
        lambda self, x, m: x.mul_(2).masked_fill_(m < 0, 0.5),
    ],
)
def test_links_with_side_inputs(link):
    """As a mask of padding after each block; the side input has gradients, and all links are steps' ends, the last one too."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fcs, self.norm = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.LayerNorm(8)

        def forward(self, x, m):
            x = x.tanh()
            m = 2 * m
            for fc in self.fcs:
                x = link(self, x + torch.tanh(fc(x)), m)
            return x

    model, x, m = Masked(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    m[0, 0] = 0.0
    plan = passes.plan(levelled(model, x, m))
    assert [len(region.steps) for region in plan.regions] == [3]
    assert [step.form for step in plan.regions[0].steps] == ["block"] * 3
    assert_same_model(model, mnet_fx.momentumize(model, (x, m), gamma=0), x, m)
    assert_exact(model, (x, m), x, m)


@pytest.mark.parametrize(("scale", "steps"), [((8, 1), 3), ((1,), 3), ((2, 8, 5), 2)])
def test_a_skip_times_a_parameter(scale, steps):
    """As in MetaFormer; not where that makes another shape of it, as in the first step of the last."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(3))
            self.scales = nn.ParameterList(torch.rand(scale) + 0.5 for _ in range(3))

        def forward(self, x):
            for conv, scale in zip(self.convs, self.scales, strict=True):
                x = x * scale.view(*scale.shape) + torch.tanh(conv(x))
            return x

    model, x = Scaled(), torch.randn(1, 8, 5)
    (region,) = passes.plan(levelled(model, x)).regions
    assert [step.form for step in region.steps] == ["block"] * steps
    assert_same_model(model, mnet_fx.momentumize(model, (x,), gamma=0), x)
    assert_exact(model, (x,), x)


class Padded(nn.Module):
    """A mask between blocks, and another fill behind the last one."""

    def __init__(self, last, between=0.0):
        super().__init__()
        self.fcs, self.last, self.between = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), last, between

    def forward(self, x, pad):
        x = x.tanh()
        for fc in self.fcs:
            x = self.between(x) if callable(self.between) else x.masked_fill(pad, self.between)
            x = x + torch.tanh(fc(x))
        return self.last(x, pad)


@pytest.mark.parametrize(
    "last",
    [
        lambda x, pad: x.masked_fill(pad, -torch.inf).amax(1),
        lambda x, pad: x.masked_fill(pad, 1.0),
        lambda x, pad: torch.where(pad, -1e9, x).amax(1),
        lambda x, pad: x.masked_fill(torch.stack([pad, ~pad]), 0.0),
    ],
)
def test_a_fill_behind_the_last_block_that_is_not_that_between_blocks_is_no_part_of_the_chain(last):
    """In a stream with one grid for all its elements, -inf would leave no bits for the others."""
    model, x, pad = Padded(last), torch.randn(2, 5, 8), torch.zeros(2, 5, 1, dtype=torch.bool)
    pad[0, 3:] = True
    (region,) = passes.plan(levelled(model, x, pad)).regions
    assert [step.form for step in region.steps] == ["block", "block", "block", "branch"]
    assert_same_model(model, mnet_fx.momentumize(model, (x, pad), gamma=0), x, pad)


@pytest.mark.parametrize("value", [-torch.inf, -1e9, torch.finfo(torch.float32).min, torch.nan])
@pytest.mark.parametrize("full", [False, True])
def test_fills_with_no_number_are_no_links(value, full):
    def between(x):
        return torch.where(x > 2, torch.full((), value), x) if full else x.masked_fill(x > 2, value)

    model, x = Padded(lambda x, pad: x, between), torch.randn(2, 5, 8)
    plan = passes.plan(levelled(model, x, x))
    assert not plan.regions
    assert {refusal.code for refusal in plan.refusals} == {"interrupted"}


def test_a_mask_that_takes_no_gradients_is_a_link_whatever_the_mode():
    """The capture for training has a `detach` there."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for fc in self.fcs:
                x = x + torch.tanh(fc(x))
                with torch.no_grad():
                    keep = (x > 0).to(x)
                x = x * keep
            return x

    model, x = Gated(), torch.randn(2, 5, 8)
    net = mnet_fx.momentumize(model, (x,), gamma=0.9)
    assert [region.steps for region in net.report.regions] == [3]
    with torch.no_grad():
        without = net(x)
    assert torch.equal(net(x), without)
    assert_same_model(model, mnet_fx.momentumize(model, (x,), gamma=0), x)
    assert_exact(model, (x,), x)


@pytest.mark.parametrize("masked", [True, False])
def test_what_a_mask_sets_to_zero_is_zero_if_the_chain_begins_so(masked):
    """As docs/what-to-know.md says, with momentum; the original masks after each block."""

    class After(Padded):
        def forward(self, x, pad):
            for fc in self.fcs:
                x = (x + torch.tanh(fc(x))).masked_fill(pad, 0.0)
            return x

    model, x, pad = After(None), torch.randn(2, 5, 8), torch.zeros(2, 5, 1, dtype=torch.bool)
    pad[0, 3:] = True
    net = mnet_fx.momentumize(model, (x, pad), gamma=0.9)
    assert [region.steps for region in net.report.regions] == [4]
    found = net(x.masked_fill(pad, 0.0) if masked else x, pad)
    assert found[0, 3:].any() != masked


def test_what_a_residual_sum_went_into_is_no_side_input_of_a_link():
    """A gate from the first block: it would be a side input from inside."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            gate = x = x + torch.tanh(self.fcs[0](x))
            for fc in self.fcs[1:3]:
                x = x + torch.tanh(fc(x))
            x = x * gate.sigmoid()
            return x + torch.tanh(self.fcs[3](x))

    model, x = Gated(), torch.randn(2, 8)
    assert [len(region.steps) for region in passes.plan(levelled(model, x)).regions] == [3]
    assert_same_model(model, mnet_fx.momentumize(model, (x,), gamma=0), x)


class TwoAdds(nn.Module):
    """Two single adds with something between them."""

    def __init__(self, between):
        super().__init__()
        self.f, self.g, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

    def forward(self, x):
        x = x + torch.tanh(self.f(x))
        y = self.between(x).transpose(1, 2)
        return y + torch.tanh(self.g(y.transpose(1, 2))).transpose(1, 2)


@pytest.mark.parametrize(("between", "chains"), [(nn.Identity(), [2]), (nn.Linear(8, 8), [])], ids=["layout", "mixing"])
def test_single_adds_are_joined_by_a_change_of_layout_and_by_nothing_that_mixes(between, chains):
    model, x = TwoAdds(between), torch.randn(2, 5, 8)
    if chains:
        assert steps(mnet_fx.momentumize(model, (x,))) == chains
    else:
        with pytest.warns(mnet_fx.MnetWarning, match="no residual chain was rewritten"):
            mnet_fx.momentumize(model, (x,))


def test_a_value_of_two_streams_starts_a_chain():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, y):
            x, y = x + torch.tanh(self.f[0](x)), y + torch.tanh(self.f[1](y))
            z = x * y
            z = z + torch.tanh(self.f[2](z))
            return z + torch.tanh(self.f[3](z))

    plan = passes.plan(levelled(Joined(), torch.randn(2, 8), torch.randn(2, 8)))
    assert [len(region.steps) for region in plan.regions] == [2]


def test_a_value_of_another_shape_starts_a_chain():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.g = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for f in self.f:
                x = x + torch.tanh(f(x))
            x = x[:, :4] * 2
            for g in self.g:
                x = x + torch.tanh(g(x))
            return x

    plan = passes.plan(levelled(Halved(), torch.randn(2, 8)))
    assert ([len(region.steps) for region in plan.regions], plan.refusals) == ([2, 2], ())


def test_a_branch_that_is_broadcast_is_known_as_a_whole():
    class Broadcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

        def forward(self, x):
            for f in self.f:
                x = x + torch.tanh(f(x))
            return x

    model, x = Broadcasts(), torch.randn(2, 8)
    (region,) = passes.plan(levelled(model, x)).regions
    assert [step.form for step in region.steps] == ["block"] * 3


@pytest.mark.parametrize("shift", [0, 1])
def test_a_permutation_that_is_not_its_own_inverse(shift):
    """And once more with a roll behind it, so that sizes come back and elements do not."""

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.h = nn.Linear(8, 8), nn.Linear(3, 3), nn.Linear(8, 8)

        def forward(self, x):
            x = x + torch.tanh(self.f(x))
            y = x.permute(1, 2, 0)
            x = (y + torch.tanh(self.g(y))).permute(2, 0, 1).roll(shift, 1)
            return x + torch.tanh(self.h(x))

    model, x = Turns(), torch.randn(3, 2, 8)
    assert [len(region.steps) for region in passes.plan(levelled(model, x)).regions] == [3]
    assert_same_model(model, mnet_fx.momentumize(model, (x,), gamma=0), x)
