"""Which adds are residual, by dataflow: small programs, each with the sums that must be found in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from passes_models import check_same, codes, lengths, linears, planned, program
from torch import nn


def residual(self, x):
    for f in self.f:
        x = x + f(x)
    return x


def test_a_chain_of_plain_adds():
    found = check_same(program(residual, f=linears(3)), torch.randn(2, 4))
    (region,) = found.regions
    assert [step.form for step in region.steps] == ["branch"] * 3
    assert region.kind == "pre-activation"
    assert region.escapes == ()
    assert region.sides == ()


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        torch.add,
        lambda x, y: torch.add(input=y, other=x),
        lambda x, y: x.add(y),
        lambda x, y: y.add_(x),
        lambda x, y: torch.add(x, y, alpha=0.5),
        lambda x, y: x.add(y, alpha=0.5),
    ],
)
def test_every_way_to_write_an_add(add):
    def forward(self, x):
        x = self.stem(x)
        for f in self.f:
            x = add(x, f(x))
        return x

    assert lengths(check_same(program(forward, stem=nn.Linear(4, 4), f=linears(3)), torch.randn(2, 4))) == [3]


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: 0.5 * x + y,
        lambda x, y: y + x / 2,
        lambda x, y: y + -(x * 0.5),
        lambda x, y: torch.add(y, x, alpha=0.5),
        lambda x, y: x * 0.5 + y + y.relu(),
        lambda x, y: x - y,
        lambda x, y: torch.sub(x, y, alpha=2),
        lambda x, y: 0.5 * x - y,
        lambda x, y: torch.addcmul(x, y, y.sigmoid()),
        lambda x, y: x.addcmul(y, torch.ones(4), value=0.3),
        lambda x, y: x.addcdiv(y, y.square() + 1),
        lambda x, y: torch.lerp(x, y, 0.2),
        lambda x, y: torch.addmm(x, x.tanh(), x.new_ones(4, 4)),
    ],
)
def test_sums_of_which_only_the_whole_is_known(add):
    def forward(self, x):
        for f in self.f:
            x = add(x, f(x))
        return x

    found = check_same(program(forward, f=linears(3)), torch.randn(2, 4))
    assert lengths(found) == [3]
    assert {step.form for step in found.regions[0].steps} == {"block"}


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: y - x,  # the skip is not the first operand
        lambda x, y: torch.addcmul(y, x, x),
        lambda x, y: torch.addmm(x, y, x.T @ y, beta=0.5),
        lambda x, y: torch.addmm(x, x.new_ones(2, 4), x.new_ones(4, 4)),  # what is added is not computed from the skip
        lambda x, y: x - x.mean(),  # nothing mixes
        lambda x, y: x * x.sigmoid() + y,  # not scaled by a number
    ],
)
def test_sums_of_other_operations_that_are_not_residual(add):
    def forward(self, x):
        for f in self.f:
            x = add(x, f(x))
        return x

    assert planned(program(forward, f=linears(3))).regions == ()


@pytest.mark.parametrize("name", ["sub_", "addcmul_", "add_"])
def test_in_place_sums_onto_the_stream(name):
    def forward(self, x):
        x = self.stem(x)
        for f in self.f:
            y = f(x.tanh())
            x = getattr(x, name)(*(y, y)[: 1 + (name == "addcmul_")])
        return x

    assert lengths(check_same(program(forward, stem=nn.Linear(4, 4), f=linears(3)), torch.randn(2, 4))) == [3]


def test_a_sum_written_to_out_is_refused():
    def forward(self, x):
        x = self.stem(x)
        for f in self.f:
            torch.add(x, f(x), out=x)
        return x

    model = program(forward, stem=nn.Linear(4, 4), f=linears(3)).requires_grad_(False)
    assert set(codes(check_same(model, torch.randn(2, 4), gradients=False))) == {"inplace_stream"}


def test_augmented_assignment_after_a_stem():
    def forward(self, x):
        x = self.stem(x)
        for f in self.f:
            x += f(x)
        return x

    f = [nn.Sequential(nn.ReLU(), linear) for linear in linears(3)]  # plain autograd refuses a branch that saves x
    found = check_same(program(forward, stem=nn.Linear(4, 4), f=f), torch.randn(2, 4))
    assert lengths(found) == [3]


def test_augmented_assignment_inside_blocks_of_two_adds():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = linears(2)

        def forward(self, x):
            x += self.f(x.relu())
            x += self.g(x.relu())
            return x

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    model = program(forward, stem=nn.Linear(4, 4), blocks=[Block() for _ in range(3)])
    found = check_same(model, torch.randn(2, 4), granularity="module")
    assert lengths(found) == [3]
    assert [step.path for step in found.regions[0].steps] == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_parallel_branches_are_one_add(order):
    def forward(self, x):
        for f, g in zip(self.f, self.g, strict=True):
            a, m = f(x), g(x)
            x = x + a + m if order == 0 else a + (x + m) if order == 1 else (a + m) + x
        return x

    found = check_same(program(forward, f=linears(3), g=linears(3)), torch.randn(2, 4))
    assert lengths(found) == [3]
    assert len(found.residual_adds) == 3
    assert {step.form for step in found.regions[0].steps} == {"branch" if order == 2 else "block"}


def test_post_norm():
    def forward(self, x):
        for f, norm in zip(self.f, self.norm, strict=True):
            x = norm(x + f(x))
        return x

    found = check_same(program(forward, f=linears(3), norm=[nn.LayerNorm(4) for _ in range(3)]), torch.randn(2, 4))
    (region,) = found.regions
    assert (region.kind, len(region.steps)) == ("post-norm", 3)
    assert region.steps[-1].target == "norm_2"


def test_post_activation_with_a_last_pure_add():
    def forward(self, x):
        for f in self.f[:-1]:
            x = F.relu(x + f(x), inplace=True)
        return self.head(x + self.f[-1](x))

    found = check_same(program(forward, f=linears(3), head=nn.Linear(4, 4)), torch.randn(2, 4))
    (region,) = found.regions
    assert (region.kind, [step.form for step in region.steps]) == ("post-activation", ["block", "block", "branch"])


def test_scaling_and_dropout_make_links():
    def forward(self, x):
        for f in self.f:
            x = self.drop((x + f(x)) * 0.5)
        return x

    found = check_same(program(forward, f=linears(3), drop=nn.Dropout(0.1)), torch.randn(2, 4))
    assert lengths(found) == [3]


def test_a_cast_to_the_dtype_of_the_stream_is_no_link():
    """Of the stream it reads no values, and gives another tensor."""

    def forward(self, x):
        for f in self.f:
            x = self.start.type_as(x + f(x))
        return x

    found = check_same(program(forward, f=linears(3), start=torch.randn(2, 4)), torch.randn(2, 4), gradients=False)
    assert (lengths(found), codes(found)) == ([], ["too_short"] * 3)


def test_identity_on_the_skip():
    def forward(self, x):
        for f in self.f:
            x = F.relu(self.skip(x) + f(x))
        return x

    assert lengths(check_same(program(forward, f=linears(3), skip=nn.Identity()), torch.randn(2, 4))) == [3]


def test_side_inputs_and_masks():
    def forward(self, x, memory, mask):
        for q, k in zip(self.q, self.k, strict=True):
            scores = q(x) @ k(memory).transpose(-1, -2) + mask
            x = x + scores.softmax(-1) @ memory
        return x

    model = program(forward, q=linears(3), k=linears(3))
    found = check_same(model, torch.randn(2, 5, 4), torch.randn(2, 6, 4), torch.randn(5, 6))
    (region,) = found.regions
    assert len(found.residual_adds) == 3  # the additive mask, used in every layer, is no skip
    assert region.sides == ("memory", "mask")


def test_parameters_are_attributes_not_sides():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

        def forward(self, x):
            return x + self.gamma.exp() * self.f(x)

    found = check_same(nn.Sequential(*(Scaled() for _ in range(3))), torch.randn(2, 4))
    assert lengths(found) == [3]
    assert found.regions[0].sides == ()


def test_shared_blocks():
    block = program(lambda self, x: x + self.f(x), f=nn.Linear(4, 4))
    found = check_same(nn.Sequential(block, block, block), torch.randn(2, 4))
    assert lengths(found) == [3]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.tanh(0.79 * (x + 0.044 * x**3)),  # the polynomial of gelu
        lambda self, x: self.f(x) + self.position,
        lambda self, x: self.f(x) + self.g(x),
        lambda self, x: x * torch.cos(x) + torch.cat([-x[..., 2:], x[..., :2]], -1) * torch.sin(x),
        lambda self, x: x + self.position[: x.shape[0]] @ self.position.T,
        lambda self, x: self.position * (x / (x.norm() + 1e-6)) + x,
        lambda self, x: x.view(x.shape[0] + x.shape[1] - 4, -1),
    ],
    ids=["gelu", "position", "parallel", "rotary", "shape", "response-norm", "sizes"],
)
def test_sums_that_are_not_residual(forward):
    model = program(forward, f=nn.Linear(4, 4), g=nn.Linear(4, 4), position=nn.Parameter(torch.randn(4, 4)))
    assert planned(model, min_steps=1).residual_adds == ()


def test_a_unet_skip_is_a_long_residual_add():
    def forward(self, x):
        for f in self.down:
            x = x + f(x)
        y = self.middle(x)
        for f in self.up:
            y = y + f(y)
        return y + x

    found = check_same(program(forward, down=linears(2), middle=nn.Linear(4, 4), up=linears(3)), torch.randn(2, 4))
    # The outer skip continues the first chain, whose steps and it would be three adds, as many as the inner chain has.
    assert len(found.residual_adds) == 6
    assert sum(lengths(found)) + len(found.refusals) == 6


def test_nesting_prefers_what_rewrites_more_adds():
    inner = program(lambda self, x: self.out(x + self.f(x)), f=nn.Linear(4, 4), out=nn.Linear(4, 4))
    few = program(residual, f=[inner, inner])
    found = check_same(few, torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([2], ["nested", "nested"])

    many = program(residual, f=[nn.Sequential(nn.Linear(4, 4), program(residual, f=linears(3)), nn.Linear(4, 4)) for _ in range(2)])
    found = check_same(many, torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([3, 3], ["nested", "nested"])


@pytest.mark.parametrize("late", [False, True])
def test_a_stream_that_forks_goes_on_with_the_longer_chain(late):
    def forward(self, x):
        for f in self.f:
            x = x + f(x)
        middle = x
        y = None if late else middle + self.aux(middle)
        for f in self.g:
            x = x + f(x)
        return x, middle + self.aux(middle) if late else y

    found = check_same(program(forward, f=linears(2), g=linears(2), aux=nn.Linear(4, 4)), torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([4], ["too_short"])
    assert found.regions[0].escapes == (2,)


def test_the_sum_written_in_place_may_be_written_again_through_another_name():
    def forward(self, x):
        x = self.stem(x)
        for f in self.f:
            x += f(x.tanh())
            x = x.contiguous().mul_(0.5)
        return x

    assert lengths(check_same(program(forward, stem=nn.Linear(4, 4), f=linears(3)), torch.randn(2, 4))) == [3]


def test_a_skip_through_an_identity_is_the_value_itself():
    def forward(self, x):
        for f in self.f:
            x = self.same(x).contiguous() + f(x)
        return x

    found = check_same(program(forward, same=nn.Identity(), f=linears(3)), torch.randn(2, 4))
    assert [step.form for step in found.regions[0].steps] == ["branch"] * 3


def test_a_parameter_is_no_stream():
    def forward(self, x):
        return self.p + self.f(self.p) * x

    assert planned(program(forward, p=nn.Parameter(torch.randn(4)), f=nn.Linear(4, 4)), min_steps=1).residual_adds == ()


def test_a_fused_sum_with_a_product_of_something_else_is_not_residual():
    def forward(self, x, y):
        for f in self.f:
            x = torch.addmm(f(x), y, y)
        return x

    assert planned(program(forward, f=linears(3)), min_steps=1).residual_adds == ()


def test_mixing_inside_an_inner_residual_add_counts():
    def forward(self, x):
        for f in self.f:
            y = x.tanh()
            x = x + (y + f(y)).relu()
        return x

    found = check_same(program(forward, f=linears(3)), torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([3], ["nested"] * 3)


def test_which_term_an_in_place_sum_is_written_to():
    def forward(self, x):
        x = self.stem(x)
        x = x + self.f[0](x)
        x += self.f[1](x.tanh())
        y = self.f[2](x.tanh())
        y += x
        return y

    found = check_same(program(forward, stem=nn.Linear(4, 4), f=linears(3)), torch.randn(2, 4))
    assert [step.written for step in found.regions[0].steps] == [None, "skip", "branch"]


@pytest.mark.parametrize("mixed", [True, False])
def test_the_last_step_ends_with_the_sum_unless_all_links_go_on_after_it(mixed):
    """Links of two kinds; or of one kind, and an operation of another kind at the end."""

    def forward(self, x):
        x = torch.relu(x + self.f[0](x))
        x = self.norm(x + self.f[1](x)) if mixed else torch.relu(x + self.f[1](x))
        x = x + self.f[2](x)
        return (torch.relu(x), self.norm(x)) if mixed else self.norm(x)

    (region,) = check_same(program(forward, norm=nn.LayerNorm(4), f=linears(3)), torch.randn(2, 4)).regions
    assert region.steps[-1].target == region.steps[-1].adds[-1]


def test_a_chain_that_only_one_step_reads_stays_a_chain():
    def forward(self, x, y):
        x = x + self.f[0](x)
        for g in self.g:
            y = y + g(y)
        x = x + self.f[1](x) * y
        return x + self.f[2](x)

    found = check_same(program(forward, f=linears(3), g=linears(2)), torch.randn(2, 4), torch.randn(2, 4))
    assert sorted(lengths(found)) == [2, 3]


def test_a_write_to_memory_from_outside_stays_outside():
    def forward(self, x, y):
        state = y * 1
        x = x + self.f[0](x)
        doubled = state.mul_(2)
        x = x + self.f[1](x) * doubled
        return x + self.f[2](x), state

    assert lengths(check_same(program(forward, f=linears(3)), torch.randn(2, 4), torch.randn(2, 4))) == [3]


@pytest.mark.parametrize("scale", [None, 0.5], ids=["branch", "block"])
def test_a_reader_before_a_sum_in_place_may_run_after_the_region(scale):
    def forward(self, x):
        x = self.stem(x)
        h = self.f[0](x)
        x = x + h
        z = x * h
        x += self.f[1](x.tanh())
        x = x if scale is None else x * scale
        return x + self.f[2](x.tanh()), z.detach()

    assert lengths(check_same(program(forward, stem=nn.Linear(4, 4), f=linears(3)), torch.randn(2, 4), gradients=False)) == [3]
