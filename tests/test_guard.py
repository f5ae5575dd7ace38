"""What a rewritten forward takes for granted: a change it would not see is an error, and its regions are in nobody's way."""

import pytest
import torch
from torch import nn

from mnet_fx import MnetError, SettingsError, momentumize, report


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), 0.5
        self.sizes, self.act = {"powers": [1.0, (2.0, 1)]}, torch.tanh

    def forward(self, x):
        return x + self.scale * self.act(self.linear(x)) ** self.sizes["powers"][1][1]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x):
        return self.blocks(x)


def changed_scale(net):
    net.blocks[1].scale = 0.1


def changed_inside_a_container(net):
    net.blocks[1].sizes["powers"][1] = (2.0, 2)


def another_container(net):
    net.blocks[1].sizes = {"powers": [1.0, (2.0, 2)]}


def another_function(net):
    net.blocks[1].act = torch.sin


def hook_on_a_block(net):
    net.blocks[1].register_forward_hook(lambda *a: None)


def another_block(net):
    net.blocks[1] = Block()


def one_block_more(net):
    net.blocks.append(Block())


def one_block_less(net):
    del net.blocks[3]


CHANGES = [changed_scale, changed_inside_a_container, another_container, another_function]


@pytest.mark.parametrize("change", [*CHANGES, hook_on_a_block, another_block, one_block_more, one_block_less])
def test_a_change_that_the_graph_does_not_see_is_an_error(change):
    net, x = momentumize(Model()), torch.randn(2, 4)
    net(x)
    change(net)
    with pytest.raises(MnetError, match="momentumize the model as it is now"):
        net(x)
    again = momentumize(net, gamma=0.0)
    assert (again(x) - Model.forward(net, x)).abs().max() < 1e-6


def test_changes_that_the_graph_does_see_are_none():
    net, x = momentumize(Model()), torch.randn(2, 4)
    before = net(x)
    net.blocks[1].linear = nn.Linear(4, 4)
    net.blocks[2].linear.register_forward_hook(lambda m, i, out: 2 * out)
    net.register_forward_hook(lambda *a: None)
    net.something = 3
    net.blocks[1].sizes = {"powers": [1.0, (2.0, 1)]}
    assert not torch.equal(net(x), before)


class Looping(nn.Module):
    """Python that no tracer reads, around a container that it loops over."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x):
        if x.sum() > 1e9:
            x = x * 2
        for block in self.blocks:
            x = block(x)
        return x


def test_regions_are_no_submodules_so_loops_over_children_do_not_meet_them():
    x = torch.randn(2, 4)
    model = Looping()
    net = momentumize(model, gamma=0.0)
    assert torch.equal(net(x), model(x))
    sequential = momentumize(model.blocks)
    assert len(sequential) == 4
    assert isinstance(sequential[-1], Block)
    assert list(sequential.state_dict()) == list(model.blocks.state_dict())


def test_names_that_the_model_has_already_are_left_alone():
    class Named(Model):
        def __init__(self):
            super().__init__()
            self.report = nn.Linear(4, 4)

        def forward(self, x):
            return self.report(self.blocks(x))

    model, x = Named(), torch.randn(2, 4)
    net = momentumize(model, gamma=0.0)
    assert (net(x) - model(x)).abs().max() < 1e-6
    assert report(net).rewritten_adds == 4
    model.initial_velocity = nn.Linear(4, 4)
    with pytest.raises(SettingsError, match="initial_velocity"):
        momentumize(model, initial_velocity=nn.Linear(4, 4))
    assert momentumize(momentumize(model)).initial_velocity is not None
