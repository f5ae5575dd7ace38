"""Steps that draw no random numbers, write to nothing and move no switch are run with less care; which those are is seen beforehand."""

import pytest
import torch
from torch import nn

import mnet_fx
from mnet_fx.compiled.artifacts import Artifact


@torch.library.custom_op("mnet_fx_tests::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


@noisy.register_fake
def _(x):
    return torch.empty_like(x)


def _backward(ctx, grad):
    return grad * 0.5


noisy.register_autograd(_backward)


def chosen(h):
    return torch.cond(h.sum() > 0, lambda h: h.tanh() * torch.rand_like(h), lambda h: h.cos() * torch.rand_like(h), (h,))


def overwritten(h):
    y = h.sin()
    y.mul_(2)
    return y


def unrecorded(h):
    with torch.no_grad():
        scale = h.tanh()
    return h * scale


@torch.library.custom_op("mnet_fx_tests::turning", mutates_args=())
def turning(x: torch.Tensor) -> torch.Tensor:
    """What it gives depends on a switch, which it moves."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not was)
    return x * (2 if was else 3)


@turning.register_fake
def _(x):
    return torch.empty_like(x)


turning.register_autograd(_backward)


@torch._dynamo.allow_in_graph
def unseen(h):
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if was == "highest" else "highest")
    return h * (1.5 if was == "highest" else 1.25)


@pytest.fixture(autouse=True)
def switches_as_before():
    was = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(was)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 2 * torch.rand_like(h)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


PURE = {
    "tanh": torch.tanh,
    "no_grad": unrecorded,
    "attention": lambda h: nn.functional.scaled_dot_product_attention(h[None], h[None], h[None])[0],
}
OTHERS = {
    "dropout": lambda h: nn.functional.dropout(h, 0.3),
    "draws": lambda h: h * torch.rand_like(h),
    "draws from a distribution": lambda h: h * torch.distributions.Normal(0.0, 1.0).sample(h.shape),
    "an operation of somebody's own": lambda h: noisy(h),
    "a branch": chosen,
    "a function of its own": Twice.apply,
    "writes": overwritten,
    "moves a switch": lambda h: turning(h),
    "a function into which Dynamo does not look": unseen,
}


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return x + self.function(self.linear(x))


def trained(net, x):
    """What a step gives and leaves."""
    torch.manual_seed(7)
    net.zero_grad()
    x = x.clone().requires_grad_()
    out = net(x)
    forward = torch.rand(3)
    out.square().sum().backward()
    return [out.detach(), forward, x.grad, torch.get_rng_state(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*PURE, *OTHERS])
def test_pure_steps_and_others(kind, monkeypatch):
    made = []

    class Seen(Artifact):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.is_pure)

    monkeypatch.setattr("mnet_fx.compiled.artifacts.Artifact", Seen)
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = nn.Sequential(*(Block((PURE | OTHERS)[kind]) for _ in range(4)))
    nets = [mnet_fx.momentumize(model, backward=backward) for backward in ("reversible", "stored")]
    for net in nets:
        trained(net, x)  # the capture itself comes first
    assert all(map(torch.equal, *(trained(net, x) for net in nets)))
    assert nets[0].report.regions
    assert made
    assert set(made) == {kind in PURE}


def test_operations_that_take_a_generator_say_that_they_draw():
    """All of torch's own, but for those that are made of others."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    found = []
    for name in names:
        operation, _, overload = name.removeprefix("aten::").partition(".")
        call = getattr(getattr(torch.ops.aten, operation, None), overload or "default", None)
        made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        if call is not None and not made_of_others and any("Generator" in str(a.type) for a in call._schema.arguments):
            found.append((name, torch.Tag.nondeterministic_seeded in call.tags))
    assert len(found) > 50
    assert [name for name, says in found if not says] == []
