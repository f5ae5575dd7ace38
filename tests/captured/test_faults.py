"""What goes wrong in momentumnet 0.10, memcnn 1.5 and RevTorch 0.2, and does not here: a test for each fault that was found in them.

Where other tests hold a fault off already, they are listed; the rest is below.

momentumnet:
- torch.nn.Transformer fails (no attribute self_attn), or drops its masks:
  test_momentum_net::test_a_transformer_as_in_the_documentation_of_momentumnet
- gradients wrong with dropout, deep chains, low gamma: test_momentum_net::test_reversible_is_stored_bit_for_bit, and test_everyday
- state not restored; gamma rounded; bit store overflows; values wrap around: test_tape::test_state_comes_back_...,
  test_fixed_point (against integers of any size)
- backward recomputes outside of autocast: test_everyday::test_bfloat16_autocast_with_the_backward_outside
- bfloat16 and float16 fail, float64 is rounded to float32: test_dtypes
- keyword arguments dropped, misspelt ones accepted: test_momentum_net::test_other_arguments_reach_every_function
- functional_call uses other weights in its backward: test_everyday::test_functional_call_with_the_backward_after_the_call
- parameters changed before the backward give wrong gradients: test_everyday::test_a_parameter_changed_before_the_backward_raises
- transforms of torch.func; torch.export and jit.trace fail: test_transforms
- deepcopy after a forward, pickles that grow: test_everyday::test_copies_..., and below
- state_dict keys renamed: test_momentum_net::test_a_resnet_as_in_the_documentation_of_momentumnet
- inf and NaN hidden: test_tape::test_nan_in_a_step_comes_out_and_does_not_reach_the_next_batch, and below
- memory grows with the parameters: test_memory
- torch.compile fails or runs uncompiled: test_backend

memcnn and RevTorch:
- two runs of dropout differ; the global random state is changed: test_everyday::compare looks at both
- batch statistics counted two or three times a step: test_everyday::test_a_training_step
- autograd.grad refused, or parameters not in the graph: test_everyday::test_a_partial_grad_then_the_full_one_then_again
- an input without grad does not train: test_everyday::test_input_without_grad
- backward twice, double backward: test_everyday::test_backward_twice_with_retain_graph, test_double_backward
- extra arguments refused: test_named::test_gamma_0_is_the_model_and_reversible_is_stored
- DDP with find_unused_parameters fails: test_distributed
"""

import copy
import pickle

import pytest
import torch
import torchvision
import zoo
from test_momentum_net import assert_same_bits, functions, gradients, points
from torch import nn

import mnet_fx
from mnet_fx import MomentumNet, transform_to_momentumnet


def both(fs, gamma=0.9, **options):
    """(reversible, stored) networks of the same functions."""
    return [MomentumNet(fs, gamma, use_backprop=b, **options) for b in (False, True)]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.fc(self.norm(x)))


def test_batch_norm_counts_once_and_its_statistics_are_right():
    fs = [Normed() for _ in range(4)]
    nets = [copy.deepcopy(net) for net in both(fs)]
    for net in nets:
        gradients(net, points())
    for (name, a), b in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b), name
    assert {f.norm.num_batches_tracked.item() for f in nets[0].functions} == {1}


def test_forward_hooks_fire_again_in_the_backward_as_under_checkpoint():
    """Known, and documented: a hook that counts sees two runs."""
    net, calls = both(functions(3))[0], []
    net.functions[1].register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    gradients(net, points())
    assert calls == [True, True]


@pytest.mark.parametrize("frozen", [[0], [1], [3], [0, 1], [1, 2], [0, 1, 2, 3]], ids=str)
def test_frozen_functions(frozen):
    fs = functions(4)
    for i in frozen:
        fs[i].requires_grad_(False)
    fs[2][0].bias.requires_grad_(False)
    found = [gradients(net, points()) for net in both(fs)]
    assert_same_bits(*found)
    assert [g is not None for g in found[0][2:]] == [p.requires_grad for f in fs for p in f.parameters()]


class Unused(Normed):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(6, 6)


def test_an_unused_parameter_has_no_gradient():
    fs = [Normed(), Unused(), Normed()]
    found = [gradients(net, points()) for net in both(fs)]
    assert_same_bits(*found)
    assert sum(g is None for g in found[0]) == 2


class Scaled(nn.Module):
    """Takes anything besides x."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, a=None, b=1, flag=False, extra=()):
        y = torch.tanh(self.fc(x)) * b
        return -y if flag else y + sum(extra) + (0 if a is None else a)


ARGUMENTS = [(None,), (None, 2), (0.5, 3, True), (None, 2.5, False, (1, 0.5)), (torch.ones(6), 1, False, [torch.ones(6)])]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_that_are_no_tensors(arguments):
    fs = [Scaled() for _ in range(3)]
    found = [gradients(net, points(), *arguments) for net in both(fs)]
    assert_same_bits(*found)
    assert arguments == (None,) or not torch.equal(found[0][0], both(fs)[0](points()))


@pytest.mark.parametrize("use_backprop", [False, True])
def test_a_function_that_begins_in_place_is_an_error_and_never_wrong(use_backprop):
    fs = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)) for _ in range(3)]
    with pytest.raises(mnet_fx.StreamError, match="writes to the stream in place"):
        MomentumNet(fs, use_backprop=use_backprop)(points())
    late = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)) for _ in range(3)]
    assert_same_bits(*(gradients(net, points()) for net in both(late)))


def test_gradcheck_and_gradgradcheck():
    """In float64; the grid is finer than the differences."""
    net = MomentumNet(functions(3, d=2), 0.5, use_backprop=False).double()
    x = points(2)[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(net, x, eps=1e-4, atol=1e-6, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(net, x, eps=1e-4, atol=1e-6, nondet_tol=0.0)


def test_backward_twice_and_a_gradient_penalty():
    found = []
    for net in both(functions()):
        x = points().requires_grad_()
        loss = net(x).square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        again = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(slope, again)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *net.parameters()], allow_unused=True))
    assert_same_bits(*found)


class Speed(nn.Module):
    """Gives its own parameter, or a tensor of a subclass, as the initial velocity."""

    def __init__(self, subclass):
        super().__init__()
        self.speed, self.subclass = nn.Parameter(torch.randn(5, 6)), subclass

    def forward(self, x):
        return self.speed.as_subclass(self.subclass) if self.subclass else self.speed


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("subclass", [None, Tagged], ids=["parameter", "subclass"])
def test_an_initial_velocity_of_another_type(subclass):
    speed = Speed(subclass)
    found = [gradients(net, points()) for net in both(functions(), init_speed=True, init_function=speed)]
    assert_same_bits(*found)
    assert speed.speed.grad.any()


def test_copies_and_pickles_after_a_forward_hold_no_batch():
    net = both(functions(), init_speed=True, init_function=nn.Linear(6, 6))[0]
    before = len(pickle.dumps(net))
    expected = gradients(net, torch.randn(4096, 6))
    net.zero_grad()
    assert len(pickle.dumps(net)) < before + 1000
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same_bits(gradients(other, points()), gradients(net, points()))
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("use_backprop", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen(use_backprop, bad):
    net = MomentumNet(functions(3), use_backprop=use_backprop)
    with torch.no_grad():
        net.functions[1][-1].bias[2] = bad
    out = net(points())
    assert not out.isfinite().any() or out[:, 2].isnan().all()
    assert out.isnan().any()


def test_a_velocity_of_any_size():
    """2048 wraps around there."""
    for size in (2047.0, 2049.0, 1e4, 1e30):
        f = nn.Linear(6, 6)
        nn.init.zeros_(f.weight)
        nn.init.constant_(f.bias, size)
        for net in both([f] * 3, gamma=0.5):
            zoo.assert_agree(net(torch.zeros(2, 6)), torch.full((2, 6), size * (0.5 + 0.75 + 0.875)))


def test_one_function_and_none():
    f = functions(1)
    assert_same_bits(*(gradients(net, points()) for net in both(f)))
    zoo.assert_agree(both(f, 0.0)[0](points()), points() + f[0](points()))
    model = nn.Sequential(nn.Sequential(functions(1)[0]), nn.Linear(6, 6))
    with pytest.raises(mnet_fx.SettingsError, match="keep_first_layer"):
        transform_to_momentumnet(model, ["0"])
    same = transform_to_momentumnet(model, ["0"], keep_first_layer=False, gamma=0)
    zoo.assert_agree(same(points()), model(points()))


def test_a_vision_transformer_at_gamma_0_is_the_original():
    """The recipe there loses the last norm."""
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5).eval()
    nn.init.normal_(vit.heads.head.weight)
    net = transform_to_momentumnet(vit, ["encoder.layers"], keep_first_layer=False, gamma=0)
    images = torch.randn(2, 3, 16, 16)
    zoo.assert_agree(net(images), vit(images))


# ---- what works there has to work here

INPUTS = {
    "not contiguous": lambda: points(12)[:, ::2],
    "transposed": lambda: torch.randn(6, 5).t(),
    "expanded": lambda: points()[:1].expand(5, 6),
    "one sample": lambda: points()[:1],
    "no samples": lambda: points()[:0],
    "more dimensions": lambda: torch.randn(2, 3, 4, 6),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_any_layout(name):
    x, fs = INPUTS[name](), functions()
    found = [gradients(net, x) for net in both(fs, 0.5)]
    assert_same_bits(*found)
    v, expected = 0, x
    for f in fs:
        v = 0.5 * v + 0.5 * f(expected)
        expected = expected + v
    zoo.assert_agree(found[0][0], expected.detach())


def test_channels_last():
    fs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
    x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    assert_same_bits(*(gradients(net, x) for net in both(fs)))
    assert both(fs)[0](x).is_contiguous(memory_format=torch.channels_last)


def test_accumulated_gradients_and_inputs_without_grad():
    found = []
    for net in zoo.twins(nn.Sequential(*(nn.Sequential(Residual(), Residual()) for _ in range(2))), gamma=0.9):
        for scale in (1.0, 2.0):
            net(points() * scale).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert_same_bits(*found)


class Residual(Normed):
    def forward(self, x):
        return x + super().forward(x)
