"""What a rewritten forward takes for granted: a change it would not see is an error, and its regions are in nobody's way."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn

from mnet_fx import MnetError, SettingsError, momentumize, report


class Config:
    def __init__(self):
        self.shift, self.output_twice, self.dtype = 0.5, False, None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale, self.function, self.config = nn.Linear(4, 4), 0.5, torch.tanh, Config()
        self.sizes, self.cache = {"powers": [1.0, (2.0, 1)]}, {"cpu": torch.zeros(4)}

    def residual(self, x):
        assert not self.training or len(self.cache) < 2
        return self.scale * self.function(self.linear(x)) ** self.sizes["powers"][1][1] + self.config.shift

    def forward(self, x):
        x = x + self.residual(x)
        key = "twice"
        return 2 * x.to(x.dtype) if getattr(self.config, f"output_{key}") else x.to(x.dtype)


class Other(Block):
    def residual(self, x):
        return -x


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
    net.blocks[1].function = torch.sigmoid


def an_entry_of_the_config(net):
    net.blocks[1].config.shift = 0.0


def an_entry_of_the_config_by_a_computed_name(net):
    net.blocks[1].config.output_twice = True


def a_forward_of_its_own(net):
    net.blocks[1].forward = lambda x: x


def a_method_of_its_own(net):
    net.blocks[1].residual = types.MethodType(Other.residual, net.blocks[1])


def another_class(net):
    net.blocks[1].__class__ = Other


def hook_on_a_block(net):
    net.blocks[1].register_forward_hook(lambda *a: None)


def another_block(net):
    net.blocks[1] = Block()


def one_block_more(net):
    net.blocks.append(Block())


def one_block_less(net):
    del net.blocks[3]


CHANGES = [
    *(changed_scale, changed_inside_a_container, another_container, another_function),
    *(an_entry_of_the_config, an_entry_of_the_config_by_a_computed_name),
    *(a_forward_of_its_own, a_method_of_its_own, another_class),
    *(hook_on_a_block, another_block, one_block_more, one_block_less),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("copied", [None, copy.deepcopy], ids=["itself", "copy"])
def test_a_change_that_the_graph_does_not_see_is_an_error(change, copied):
    net, x = momentumize(Model()), torch.randn(2, 4)
    net(x)
    net = net if copied is None else copied(net)
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
    net.blocks[2].cache.clear()  # as models do that keep tensors for the eval mode
    net.blocks[1].sizes = {"powers": [1.0, (2.0, 1)]}
    net.blocks[3].config.dtype = "float32"  # which forward reads of others only, as save_pretrained does to a model of Hugging Face
    net.blocks[3].linear.forward = lambda x: 0 * x
    assert not torch.equal(net(x), before)


def test_a_class_that_is_patched_later_is_an_error_but_not_in_another_process(monkeypatch):
    net, x = momentumize(Model()), torch.randn(2, 4)
    expected = net(x)
    saved = pickle.dumps(net)
    monkeypatch.setattr(Block, "residual", lambda self, x: -x)
    with pytest.raises(MnetError, match=r"blocks\.0 had its method residual replaced"):
        net(x)
    assert torch.equal(pickle.loads(saved)(x), expected)


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


def test_a_tensor_that_is_no_buffer_may_be_replaced():
    class Tabled(Model):
        def __init__(self):
            super().__init__()
            self.table = torch.ones(4)

        def forward(self, x):
            return self.blocks(x + self.table)

    model, x = Tabled(), torch.randn(2, 4)
    net = momentumize(model, gamma=0.0)
    net.table = model.table = torch.arange(4.0)
    torch.testing.assert_close(net(x), model(x))


def test_a_guarded_lstm_pickles():
    """It holds weak references to its weights, which no pickle takes."""
    torch.manual_seed(0)
    net, x = momentumize(nn.Sequential(Model(), nn.LSTM(4, 4))), torch.randn(2, 4)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x)[0], net(x)[0])
