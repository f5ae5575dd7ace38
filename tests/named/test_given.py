"""Objects that layers are given and write to: after a backward pass they are as the forward pass left them."""

import copy

import pytest
import torch
import zoo
from torch import nn

import mnet_fx
from mnet_fx.runtime.attributes import Given


class Notes:
    """What a cache of keys and values, or a record of a model's author, does."""

    def __init__(self):
        self.calls, self.seen, self.total, self.slots, self.flags = 0, [], torch.zeros(()), [Slot() for _ in range(3)], {}


class Slot:
    def __init__(self):
        self.keys = None


class Layer(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.i, self.linear = i, nn.Linear(4, 4)

    def forward(self, x, notes):
        y = self.linear(x)
        notes.calls += 1
        notes.flags[self.i] = notes.calls
        notes.seen.append(y)
        notes.total = notes.total + y.mean()
        slot = notes.slots[self.i]
        slot.keys = y if slot.keys is None else torch.cat([slot.keys, y])
        return x + torch.tanh(slot.keys.mean(0) + y) * notes.total * len(notes.seen)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(3))

    def forward(self, x, notes):
        for layer in self.layers:
            x = layer(x, notes)
        return x


def trained(net, calls=2, through=False):
    """Outputs and gradients of some calls that share their notes; the notes after the last backward pass."""
    generator = torch.Generator().manual_seed(1)
    notes, found = Notes(), []
    for _ in range(calls):
        x = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
        out = net(x, notes)
        if not through:  # as in training by pieces of a text
            (out.square().sum() + notes.total).backward()
            notes.total, notes.seen = notes.total.detach(), [t.detach() for t in notes.seen]
            for slot in notes.slots:
                slot.keys = slot.keys.detach()
            found += [x.grad]
        found += [out]
    if through:
        (sum(out.square().sum() for out in found) + notes.total).backward()
    return [*found, *(p.grad for p in net.parameters())], notes


@pytest.mark.parametrize("through", [False, True], ids=["by pieces", "through all calls"])
@pytest.mark.parametrize("rest", ["store", "checkpoint"])
def test_objects_are_as_the_forward_pass_left_them(through, rest):
    torch.manual_seed(0)
    model = Net().double()
    original, notes = trained(copy.deepcopy(model), through=through)
    for gamma, backward in ((0.0, "reversible"), (0.5, "stored"), (0.5, "reversible")):
        net = mnet_fx.momentumize(copy.deepcopy(model), regions=["layers"], gamma=gamma, backward=backward, rest=rest)
        found, left = trained(net, through=through)
        assert (left.calls, left.flags, len(left.seen)) == (notes.calls, notes.flags, len(notes.seen)) == (6, {0: 4, 1: 5, 2: 6}, 6)
        assert [len(slot.keys) for slot in left.slots] == [10, 10, 10]
        if gamma == 0:
            zoo.assert_near(dict(enumerate(found)), dict(enumerate(original)), 1e-9)
        elif backward == "stored":
            expected = found
        else:
            zoo.assert_identical(dict(enumerate(found)), dict(enumerate(expected)))


def test_histories_are_not_kept():
    """Which would keep a graph alive for as long as the step, which that graph holds."""
    notes = Notes()
    notes.total = torch.ones(2, requires_grad=True).sum()
    notes.seen.append(notes.total)
    given = Given([notes], nn.Identity())
    notes.total = notes.total + 1
    notes.seen.append(notes.total)
    given.let_go()
    held = [t for _, then in given.spaces for t in then.values() if isinstance(t, torch.Tensor)] + [
        t for _, then in given.containers for t in then
    ]
    assert [(t.item(), t.requires_grad, t.grad_fn) for t in held] == [(2.0, True, None)] * 2


def test_an_object_that_holds_the_net_is_taken():
    notes, net = Notes(), mnet_fx.momentumize(Net(), regions=["layers"], gamma=0.5)
    notes.net = net
    net(torch.randn(5, 4), notes).sum().backward()
    assert notes.calls == 3
    assert notes.net is net
