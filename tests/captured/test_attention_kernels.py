"""Blocks under torch.nn.attention.sdpa_kernel within a forward: each attention takes the kernels that it takes in the original."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import mnet_fx

MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:-1], 6, 8).transpose(-3, -2).chunk(3, -3)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(-3, -2).flatten(-2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(5))


class Around(Model):
    def forward(self, x):
        with sdpa_kernel(MATH):
            for layer in self.layers:
                x = x + layer(x)
        return x


class Within(Model):
    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if i % 2:
                with sdpa_kernel([MATH]):
                    x = x + layer(x)
            else:
                x = x + layer(x)
        return x


class Across(Model):
    """A block that begins and ends between steps, with another one within it."""

    def forward(self, x):
        first, *rest, last = self.layers
        x = x + first(x)
        with sdpa_kernel([MATH, FLASH], set_priority=True):
            x = x + rest[0](x)
            with sdpa_kernel([FLASH]):
                x = x + rest[1](x)
            x = x + rest[2](x)
        return x + last(x)


class Kernels(TorchDispatchMode):
    """Which run, and which may."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in ("aten::_safe_softmax", "aten::_scaled_dot_product_flash_attention_for_cpu"):
            self.found.append((func.overloadpacket._qualified_op_name, *_cur_sdpa_kernel_backends(with_priority=True)))
        return func(*args, **(kwargs or {}))


def kernels(net, x):
    with Kernels() as mode:
        net(x)
    return mode.found


@pytest.mark.parametrize("model", [Around, Within, Across])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_each_attention_takes_the_kernels_that_it_takes_in_the_original(model, inner):
    torch.manual_seed(0)
    model, x = model(), torch.randn(2, 8, 16)
    expected, found = kernels(model, x), []
    for backward in ("reversible", "stored"):
        net = mnet_fx.momentumize(model, (x,), backward=backward, inner=inner)
        assert [region.steps for region in net.report.regions] == [5]
        assert kernels(net, x) == expected
        input_ = x.clone().requires_grad_()
        found.append(torch.autograd.grad(net(input_).square().sum(), [input_, *net.parameters()]))
    assert all(map(torch.equal, *found))
    net = mnet_fx.momentumize(model, (x,), gamma=0.0)
    assert torch.allclose(net(x), model(x), atol=1e-6)


def test_it_is_what_the_original_takes_whatever_holds_around_the_call():
    torch.manual_seed(0)
    model, x = Within(), torch.randn(2, 8, 16)
    net = mnet_fx.momentumize(model)
    for around in ([MATH], [MATH, FLASH], [FLASH]):
        with sdpa_kernel(around):
            assert kernels(net, x) == kernels(model, x)


@torch.library.custom_op("mnet_fx_tests::own_mixing", mutates_args=())
def own_mixing(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@own_mixing.register_fake
def _(x):
    return torch.empty_like(x)


own_mixing.register_autograd(lambda ctx, grad: grad)


class Own(Model):
    def forward(self, x):
        for layer in self.layers:
            with sdpa_kernel(MATH):
                x = x + own_mixing(layer(x))
        return x


def test_an_operation_into_which_nobody_sees_is_said():
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain was rewritten"):
        net = mnet_fx.momentumize(Own(), (torch.randn(2, 8, 16),))
    assert "own_mixing.default under sdpa_kernel" in " ".join(str(net.report).split())
