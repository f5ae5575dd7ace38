"""The examples of momentumnet's documentation, word for word but for the import, and then trained on.

`momentumize(resnet101())` is in test_families.py.
"""

import gc

import pytest
import torch
import zoo
from torch import nn


@pytest.fixture(autouse=True)
def _freed():
    yield
    gc.collect()


def gradients(net, *inputs):
    """Output and gradients of a step; the buffers are then as before."""
    buffers = [b.clone() for b in net.buffers()]
    net.zero_grad()
    torch.manual_seed(0)
    out = net(*inputs)
    out.square().mean().backward()
    for b, old in zip(net.buffers(), buffers, strict=True):
        b.data.copy_(old)
    return [out.detach(), *(p.grad for p in net.parameters())]


def assert_same_bits(found, expected):
    assert all(map(torch.equal, found, expected))
    assert all(g.isfinite().all() for g in found)


def test_quick_start():
    # fmt: off
    from mnet_fx import MomentumNet

    hidden = 8
    d = 500
    function = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, d))
    mresnet = MomentumNet([function,] * 10, gamma=0.9)
    # fmt: on
    x = torch.randn(10, d)
    assert mresnet(x).shape == x.shape
    reversible = MomentumNet([function] * 10, gamma=0.9, use_backprop=False)
    assert_same_bits(gradients(reversible, x), gradients(mresnet, x))


def test_resnet101():
    from torchvision.models import resnet101

    from mnet_fx import transform_to_momentumnet

    resnet = resnet101()  # with pretrained=True there: the weights change nothing
    mresnet101 = transform_to_momentumnet(resnet, gamma=0.9, use_backprop=False)
    images = torch.randn(2, 3, 32, 32)
    assert list(mresnet101.state_dict()) == list(resnet.state_dict())
    assert sum(p.numel() for p in mresnet101.parameters()) == sum(p.numel() for p in resnet.parameters())
    stored = transform_to_momentumnet(resnet, gamma=0.9, use_backprop=True)
    assert_same_bits(gradients(mresnet101, images), gradients(stored, images))
    del mresnet101, stored
    same = transform_to_momentumnet(resnet, gamma=0.0).eval()
    zoo.assert_agree(same(images), resnet.eval()(images))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer():
    from mnet_fx import transform_to_momentumnet

    transformer = torch.nn.Transformer(num_encoder_layers=6, num_decoder_layers=6)
    mtransformer = transform_to_momentumnet(
        transformer, sub_layers=["encoder.layers", "decoder.layers"], gamma=0.9, use_backprop=False, keep_first_layer=False
    )
    src, tgt = torch.rand((6, 2, 512)), torch.rand((4, 2, 512))
    stored = transform_to_momentumnet(
        transformer, sub_layers=["encoder.layers", "decoder.layers"], gamma=0.9, use_backprop=True, keep_first_layer=False
    )
    assert_same_bits(gradients(mtransformer, src, tgt), gradients(stored, src, tgt))


def test_a_container_of_residual_functions_and_another_transform():
    from mnet_fx import transform_to_momentumnet

    class ResLayer(nn.Module):
        def __init__(self, functions):
            super().__init__()
            self.functions = nn.Sequential(*functions)

        def forward(self, x):
            for f in self.functions:
                x = f(x)
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.res_layer1 = ResLayer([nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 10)) for _ in range(4)])
            self.layer2 = nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(3)))

        def forward(self, x):
            return self.layer2(self.res_layer1(x))

    net, x = Net(), torch.randn(3, 10)
    found = []
    for use_backprop in (False, True):
        mnet = transform_to_momentumnet(net, sub_layers=["res_layer1.functions"], is_residual=True, use_backprop=use_backprop)
        mnet = transform_to_momentumnet(mnet, sub_layers=["layer2"], is_residual=False, use_backprop=use_backprop)
        found.append(gradients(mnet, x))
    assert_same_bits(*found)
    functions = mnet.res_layer1.functions
    assert len(functions) == 2  # the first, and one network of the others
    assert functions[0] is next(iter(functions))
    zoo.assert_agree(functions[1](functions[0](x)), mnet.res_layer1(x))
    zoo.assert_agree(functions[-1](x), functions[1:][0](x))
    with pytest.raises(IndexError):
        functions[2]
