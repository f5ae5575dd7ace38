"""What steps give to others and these add up is added up while the chain runs: no peak grows with depth, and no bit changes."""

import copy

import pytest
import torch
from captures import run, steps
from torch import nn

import mnet_fx
import passes

D = 8


class Block(nn.Module):
    """A step, and a skip output: by a layer of its own, or a half of what one layer gives."""

    def __init__(self, kind):
        super().__init__()
        self.f, self.r, self.k, self.both = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2 * D)
        self.kind = kind

    def forward(self, x):
        h = torch.tanh(self.f(x))
        if self.kind == "half":
            r, k = self.both(h).chunk(2, -1)
            return x + r, k
        return x + self.r(h), self.k(h)


def added(x, blocks):
    total = 0
    for block in blocks:
        x, k = block(x)
        total = total + k
    return x, total


def added_in_place(x, blocks):
    total = 0
    for block in blocks:
        x, k = block(x)
        total += k
    return x, total


def added_to_zeros(x, blocks):
    total = torch.zeros_like(x)
    for block in blocks:
        x, k = block(x)
        total += k
    return x, total


def added_to_the_input(x, blocks):
    total = x.tanh()
    for block in blocks:
        x, k = block(x)
        total = k + total
    return x, total * total


def added_from_none(x, blocks):
    total = None
    for block in blocks:
        x, k = block(x)
        total = k if total is None else total + k
    return x, total


def summed(x, blocks):
    found = []
    for block in blocks:
        x, k = block(x)
        found.append(k)
    return x, sum(found)


def two_sums(x, blocks):
    total, loss = 0, 0
    for block in blocks:
        x, k = block(x)
        total, loss = total + k, loss + k.square().mean()
    return x, total, loss


def every_other(x, blocks):
    even, odd = 0, torch.zeros(())
    for t, block in enumerate(blocks):
        x, k = block(x)
        even, odd = (even + k, odd) if t % 2 == 0 else (even, odd + k)
    return x, even, odd


SUMS = {f.__name__: f for f in (added, added_in_place, added_to_zeros, added_to_the_input, added_from_none, summed, two_sums, every_other)}


class Net(nn.Module):
    def __init__(self, sums, kind="layer", depth=5):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(depth))
        self.sums = SUMS.get(sums, sums)

    def forward(self, x):
        x, *totals = self.sums(self.stem(x), self.blocks)
        return self.out(x), *totals


def totals(model, x):
    """The sums of each region, by Dynamo's graph of a model."""
    found = []

    def look(gm, inputs):
        found.extend(tuple(len(total.terms) + (total.begins >= 0) for total in region.totals) for region in passes.plan(gm).regions)
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=look)(x)
    return found


def assert_right(model, *call, **options):
    """gamma = 0 is the model, in float64; at 0.9 the bits are those of stored activations."""
    model, call = model.double(), [x.double() for x in call]
    net, exact = mnet_fx.momentumize(copy.deepcopy(model), gamma=0, **options), []
    (_, want, want_grads), (_, got, got_grads) = run(model, *call), run(net, *call)
    for a, b in zip([*want, *want_grads], [*got, *got_grads], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.requires_grad == b.requires_grad
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    for backward in ("reversible", "stored"):
        _, tensors, grads = run(mnet_fx.momentumize(copy.deepcopy(model), gamma=0.9, backward=backward, **options), *call)
        exact.append([t for t in (*tensors, *grads) if t is not None])
    assert all(map(torch.equal, *exact))
    return net


@pytest.mark.parametrize("kind", ["layer", "half"])
@pytest.mark.parametrize("sums", SUMS)
def test_sums_of_skip_outputs_are_formed_in_the_region(sums, kind):
    x = torch.randn(3, D)
    net = assert_right(Net(sums, kind), x)
    assert steps(net) == [5]
    assert totals(Net(sums, kind), x) == {"every_other": [(2, 3)]}.get(sums, [(5,)])  # of two_sums that of the losses, which read k too


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("sums", ["added", "added_in_place", "added_to_zeros", "summed"])
def test_the_peak_does_not_grow_with_depth(sums, inner):
    found = []
    for depth in (4, 16):
        net, x = mnet_fx.momentumize(Net(sums, depth=depth), inner=inner), torch.randn(4096, D)

        def step(net=net, x=x):
            y, total = net(x)
            (y.square().mean() + total.square().mean()).backward()

        step()
        found.append(mnet_fx.measure(step).peak)
    assert found[1] < found[0] + 12 * 8000, found  # twelve blocks more, of 6 KiB of gradients each; one k has 128 KiB


@pytest.mark.parametrize("sums", ["added_in_place", "added_to_the_input", "every_other"])
def test_graph_modules_form_them_too(sums):
    x = torch.randn(3, D)
    traced = torch.fx.symbolic_trace(Net(sums))
    exported = torch.export.export(Net(sums), (x,)).module()
    for gm in (traced, exported):
        assert sum(len(total.nodes) for total in passes.plan(gm).regions[0].totals) >= 3
        assert_right(gm, x)


def watched(x, blocks):
    """Somebody else looks at a sum on the way."""
    total, seen = 0, None
    for t, block in enumerate(blocks):
        x, k = block(x)
        total = total + k
        if t == 2:
            seen = total.tanh()
    return x, total, seen


def with_a_hook(x, blocks):
    total = 0
    for t, block in enumerate(blocks):
        x, k = block(x)
        total = total + k
        if t == 2:
            total.register_hook(lambda grad: 2 * grad)
    return x, total


def metered(x, blocks):
    """A figure that no gradient comes from, and one that adds to what needs one."""
    total, meter = 0, x.new_zeros(())
    for block in blocks:
        x, k = block(x)
        total = total + k
        with torch.no_grad():
            meter = meter + k.abs().mean()
    return x, total, meter


def of_another_dtype(x, blocks):
    """In place the sum stays float32, and out of place it would not."""
    total = torch.zeros_like(x, dtype=torch.float32)
    for block in blocks:
        x, k = block(x)
        total += k
    return x, total


def of_another_shape(x, blocks):
    total = torch.zeros(1, D, dtype=x.dtype)
    for block in blocks:
        x, k = block(x)
        total = total + k
    return x, total


def seen_in_part(x, blocks):
    """A view of what is added to in place."""
    total = torch.zeros_like(x)
    part = total[:1]
    for block in blocks:
        x, k = block(x)
        total += k
    return x, part * 2, total


def of_two_names(x, blocks):
    total = torch.zeros_like(x)
    other = total
    for block in blocks:
        x, k = block(x)
        total += k
    return x, total, other * 2


def of_two_names_from_the_middle(x, blocks):
    total, other = torch.zeros_like(x), None
    for t, block in enumerate(blocks):
        x, k = block(x)
        total += k
        other = total if t == 2 else other
    return x, total, other * 2


def overwritten_between(x, blocks):
    total = torch.zeros_like(x)
    for t, block in enumerate(blocks):
        x, k = block(x)
        total += k
        if t == 2:
            total.mul_(0.5)
    return x, total


def fed_back(x, blocks):
    """The sum enters the chain again, so that it is two chains, or none."""
    total = 0
    for t, block in enumerate(blocks):
        x, k = block(x)
        total = total + k
        if t == 2:
            x = x * torch.sigmoid(total)
    return x, total


def after_the_end(x, blocks):
    """What the sum begins with is the end of the chain."""
    found = []
    for block in blocks:
        x, k = block(x)
        found.append(k)
    total = x
    for k in found:
        total = total + k
    return x, total


def backwards(x, blocks):
    found = []
    for block in blocks:
        x, k = block(x)
        found.append(k)
    return x, sum(reversed(found))


def doubled(x, blocks):
    total = 0
    for block in blocks:
        x, k = block(x)
        total = total + (k + k)
        total = torch.add(total, k, alpha=2)
    return x, total


def scaled(x, blocks):
    total = torch.zeros_like(x)
    for block in blocks:
        x, k = block(x)
        total = torch.add(total, k, alpha=2)
    return x, total


def under_no_grad_with_a_flag_set(x, blocks):
    """Where the blocks cannot be written without their grad mode."""
    total, seen, probe = 0, torch.zeros_like(x), torch.ones_like(x).requires_grad_()
    for block in blocks:
        x, k = block(x)
        total = total + k
        with torch.no_grad():
            seen = seen + x.tanh()
    return x * probe, total, seen


def of_a_chain_without_gradients(x, blocks):
    """What the sum begins with has a gradient."""
    total, y = blocks[0].k.bias.expand_as(x) * 2, x
    with torch.no_grad():
        found = []
        for block in blocks:
            y, k = block(y)
            found.append(k)
    for k in found:
        total = total + k
    return y, total


def drawn_in_between(x, blocks):
    """Random numbers are drawn in the chain, and then before its sum is formed."""
    found = []
    for block in blocks:
        x, k = block(x)
        x = torch.nn.functional.dropout(x, 0.2)
        found.append(k)
    noise = torch.rand(3, D, dtype=x.dtype)
    return x, sum(found) + noise


ODD = [
    watched,
    with_a_hook,
    metered,
    of_another_dtype,
    of_another_shape,
    seen_in_part,
    of_two_names,
    of_two_names_from_the_middle,
    overwritten_between,
    fed_back,
    after_the_end,
    backwards,
    doubled,
    scaled,
    under_no_grad_with_a_flag_set,
    of_a_chain_without_gradients,
    drawn_in_between,
]


@pytest.mark.parametrize("sums", ODD, ids=lambda f: f.__name__)
def test_what_cannot_move_stays(sums):
    assert_right(Net(sums), torch.randn(3, D))


@pytest.mark.parametrize("sums", [seen_in_part, of_two_names, of_another_dtype], ids=lambda f: f.__name__)
def test_none_is_formed_where_the_bits_might_be_others(sums):
    assert totals(Net(sums).double(), torch.randn(3, D, dtype=torch.float64)) == [()]


def test_a_sum_that_somebody_looks_at_ends_there():
    assert totals(Net(watched), torch.randn(3, D)) == [(3,)]


def test_the_order_is_that_of_the_model():
    assert totals(Net(backwards), torch.randn(3, D)) == [(2,)]  # of the last two, of which the order is all one


def test_two_chains_add_to_one_sum():
    class Twice(Net):
        def forward(self, x):
            x, total = added(self.stem(x), self.blocks[:3])
            x = self.out(x)
            for block in self.blocks[3:]:
                x, k = block(x)
                total = total + k
            return self.out(x), total

    x = torch.randn(3, D)
    assert totals(Twice("added"), x) == [(3,), (2,)]
    assert_right(Twice("added"), x)


@pytest.mark.parametrize("frozen", ["blocks", "stem", "k"])
def test_frozen_parts(frozen):
    """Of terms that no gradient comes to, or that alone have one."""
    model = Net("added_to_the_input")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name.split("."))
    assert_right(model, torch.randn(3, D))


def test_under_checkpointed_rest_and_without_gradients():
    x = torch.randn(3, D)
    for sums in ("added_in_place", "added_to_zeros"):
        assert_right(Net(sums), x, rest="checkpoint")
        net, model = mnet_fx.momentumize(Net(sums), gamma=0).eval(), Net(sums).eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for a, b in zip(net(x), model(x), strict=True):
                    torch.testing.assert_close(a, b)
