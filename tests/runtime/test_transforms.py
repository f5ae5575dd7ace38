"""torch.func's transforms, forward-mode differentiation, inference mode and batched gradients: served, or one clear error.

The oracle is the recurrence in plain float64, put through the same transform.
"""

from functools import partial

import pytest
import torch
import zoo
from oracles import recurrence
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from mnet_fx import MnetError, MomentumNet, momentumize
from mnet_fx.runtime.float_tape import FloatTape

STEPS, GAMMA = 4, 0.8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(3), nn.Linear(3, 3)

    def branch(self, x):
        return torch.tanh(self.fc(self.norm(x)))

    def forward(self, x):
        return x + self.branch(x)


class Branch(Block):
    def forward(self, x):
        return self.branch(x)


class Stack(nn.Sequential):
    def __init__(self):
        super().__init__(*(Block() for _ in range(STEPS)))


class Recurrence(Stack):
    def forward(self, x):
        return recurrence(x, [block.branch for block in self], [(GAMMA, 1 - GAMMA)] * STEPS)[-1]


def momentum_net(stack, backward):
    net = MomentumNet([Branch() for _ in stack], GAMMA, use_backprop=backward == "stored").double()
    net.load_state_dict(stack.state_dict())
    return net


KINDS = {
    "traced": lambda stack, backward: momentumize(stack, gamma=GAMMA, backward=backward),
    "named": lambda stack, backward: momentumize(stack, gamma=GAMMA, backward=backward, regions=[""]),
    "MomentumNet": momentum_net,
}


@pytest.fixture(params=KINDS)
def forms(request):
    """(oracle, stored form, reversible form) of one stack."""
    stack = Stack().double()
    oracle = Recurrence().double()
    oracle.load_state_dict(stack.state_dict())
    return oracle, *(KINDS[request.param](stack, backward) for backward in ("stored", "reversible"))


def points():
    return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def weights(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def loss(net):
    return lambda values, x: functional_call(net, values, (x,)).square().sum()


def by_dual_numbers(net):
    """Tangents of input and parameters at once, without torch.func."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(points(), torch.ones(2, 3).double())
        values = {name: forward_ad.make_dual(p, p.cos()) for name, p in weights(net).items()}
        return forward_ad.unpack_dual(functional_call(net, values, (x,))).tangent.detach()


def tangent_of_parameters(net):
    """No tensor that the chain starts with has a tangent, only what its steps read."""
    with forward_ad.dual_level():
        values = {name: forward_ad.make_dual(p, p.cos()) for name, p in weights(net).items()}
        return forward_ad.unpack_dual(functional_call(net, values, (points(),))).tangent.detach()


TRANSFORMS = {
    "grad": lambda net: grad(loss(net))(weights(net), points()),
    "vjp": lambda net: vjp(net, points())[1](points())[0],
    "jvp": lambda net: jvp(net, (points(),), (points().cos(),))[1],
    "vmap": lambda net: vmap(net)(points()[:, None]),
    "gradient of each sample": lambda net: vmap(grad(loss(net)), (None, 0))(weights(net), points()[:, None]),
    "jacrev": lambda net: jacrev(net)(points()),
    "jacfwd": lambda net: jacfwd(net)(points()),
    "hessian": lambda net: hessian(lambda x: net(x).square().sum())(points()),
    "dual numbers": by_dual_numbers,
    "dual parameters": tangent_of_parameters,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_stored_serves_every_transform_and_reversible_says_so(forms, name):
    oracle, stored, reversible = forms
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(stored), transform(oracle), rtol=1e-9, atol=1e-9)
    with pytest.raises(MnetError, match="backward='stored'"):
        transform(reversible)


def test_without_gradients_reversible_serves_too(forms):
    oracle, _, reversible = forms
    with torch.no_grad():
        torch.testing.assert_close(vmap(reversible)(points()[:, None])[:, 0], oracle(points()), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(by_dual_numbers(reversible), by_dual_numbers(oracle), rtol=1e-9, atol=1e-9)


def test_a_transform_of_part_of_a_chain_is_an_error():
    net = momentumize(Stack().double(), gamma=GAMMA, backward="stored", regions=[""])
    x = net[0](points())
    with pytest.raises(MnetError, match="began or ended since"):
        grad(lambda values: functional_call(net[1], values, (x,)).sum())(weights(net[1]))


def test_bfloat16_under_a_transform_keeps_its_dtype():
    net = momentumize(Stack(), gamma=GAMMA, backward="stored")
    x = points().bfloat16()
    out = vmap(net.bfloat16())(x[:, None])[:, 0]
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, net(x), rtol=0, atol=0.03)


def noisy():
    """A chain whose steps draw random numbers, so that a rerun must not run under vmap."""
    return nn.Sequential(*(nn.Sequential(Block(), nn.Dropout(0.3)) for _ in range(STEPS)))


def backwards():
    """Ways to go back through a graph that was made outside of any transform."""
    eye = torch.eye(6).view(6, 2, 3)
    return {
        "batched": lambda out, inputs: torch.autograd.grad(out, inputs, eye, is_grads_batched=True),
        "vmap": lambda out, inputs: vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True))(eye),
        "inference mode": in_inference_mode,
    }


def in_inference_mode(out, inputs):
    with torch.inference_mode():
        return torch.autograd.grad(out, inputs, torch.ones(2, 3))


@pytest.mark.parametrize("way", backwards())
@pytest.mark.parametrize("gamma", [0.9, 0.0], ids=["reverse", "inputs"])
@pytest.mark.parametrize("options", [{}, {"regions": [""]}], ids=["traced", "named"])
def test_backward_under_vmap_and_in_inference_mode_is_that_of_stored(way, gamma, options):
    def gradients(net):
        x = points().float().requires_grad_()
        return [*backwards()[way](net(x), [x, *net.parameters()])]

    found = [zoo.seeded(gradients, net) for net in zoo.twins(noisy(), gamma=gamma, **options)]
    assert found[0][0].any()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_functions_of_torch_autograd_functional(vectorize):
    x = points().float()
    for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        found = []
        for net in zoo.twins(Stack(), gamma=0.5):
            run = net if function is torch.autograd.functional.jacobian else lambda x, net=net: net(x).square().sum()
            found.append(function(run, x, vectorize=vectorize))
        assert torch.equal(*found)


# ---- graphs of a rewritten model


@pytest.mark.parametrize("record", ["export", "jit.trace", "make_fx real", "make_fx symbolic"])
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_exported_programs_are_plain_graphs_that_give_the_same(forms, record):
    """Of either form; with the recurrence in floating point, and a batch size that is free."""
    oracle, *nets = forms
    for net in nets:
        net.eval()
        if record == "export":
            found = torch.export.export(net, (points(),), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
        elif record == "jit.trace":
            found = torch.jit.trace(net, (points(),))
        else:
            run = partial(functional_call, net)
            found = partial(make_fx(run, tracing_mode=record.split()[1])(weights(net), points()), weights(net))
        x = torch.cat([points(), points().cos()])
        torch.testing.assert_close(found(x), oracle(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net(x), oracle(x), rtol=1e-6, atol=1e-6)


def test_fake_tensors_show_shape_and_dtype(forms):
    for net in forms[1:]:
        with FakeTensorMode(allow_non_fake_inputs=True):
            out = net(torch.empty(5000, 3, dtype=torch.float64))
        assert (out.shape, out.dtype, out.requires_grad) == ((5000, 3), torch.float64, True)


@pytest.mark.parametrize("kind", KINDS)
def test_where_hooks_for_saved_tensors_are_forbidden(kind):
    """Which recompute a step: an error that says so; stored activations need none."""
    torch.manual_seed(0)
    stack, x = Stack().double(), torch.randn(2, 3, dtype=torch.float64)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        with pytest.raises(MnetError, match="disable_saved_tensors_hooks surrounds the call"):
            KINDS[kind](stack, "reversible")(x)
        stored = KINDS[kind](stack, "stored")(x)
    zoo.assert_identical({"y": stored.detach()}, {"y": KINDS[kind](stack, "reversible")(x).detach()})


def test_in_floating_point_a_short_dtype_has_its_velocity_in_float32():
    x, y = torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 1 / 3, dtype=torch.bfloat16)
    after, v = FloatTape("chain", ((0.9, 0.1),)).advance(0, x, None, y)
    assert (after.dtype, v.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(v, 0.1 * y.float())
