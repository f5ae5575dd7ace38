"""Transformers of torch.nn, opened by the symbolic trace: chains, masks, liveness, and what keeps them whole."""

import copy

import pytest
import torch
from test_export import assert_exact, assert_same_model, steps
from torch import nn

import mnet_fx
import passes

D = 16


def encoder(layers=6, norm=True, **options):
    layer = nn.TransformerEncoderLayer(D, 2, 32, **({"batch_first": True} | options))
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(D) if norm else None, enable_nested_tensor=False)


def decoder(**options):
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 32, **({"batch_first": True} | options)), 3, nn.LayerNorm(D))


def tokens(length=5, batch=2):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(length))


def causal(length):
    return nn.Transformer.generate_square_subsequent_mask(length)


class Masked(nn.Module):
    """Hands masks on, as models around these layers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("causal", causal(5))

    def forward(self, x, mask, padding):
        return self.inner(x, mask=mask, src_key_padding_mask=padding)


class Translates(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.Transformer(
            D, 2, num_encoder_layers=3, num_decoder_layers=2, dim_feedforward=32, **({"batch_first": True} | options)
        )
        self.register_buffer("causal", causal(4))

    def forward(self, src, tgt, padding):
        return self.inner(src, tgt, tgt_mask=self.causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}, {"batch_first": False, "dropout": 0.0}], ids=str)
def test_an_encoder_of_six_layers_is_one_chain_of_twelve(options):
    model = encoder(**options)
    net = mnet_fx.momentumize(model, gamma=0)
    assert steps(net) == [12]
    assert [part.front_end for part in net.report.captured] == ["symbolic trace"]
    assert net.report.regions[0].kind == ("pre-activation" if options.get("norm_first") else "post-norm")
    for training in (True, False):
        assert_same_model(model.train(training), net.train(training), tokens())
    assert_exact(model.train(), None, tokens())


@pytest.mark.parametrize("mask", [causal(5), causal(5) < 0, torch.randn(5, 5)], ids=["causal", "bool", "bias"])
@pytest.mark.parametrize("padding", [PADDING, None], ids=["padded", "whole"])
def test_masks_are_applied(mask, padding):
    if padding is not None and mask.dtype != torch.bool:
        padding = torch.zeros(2, 5).masked_fill(padding, float("-inf"))
    model = Masked(encoder(3))
    net = mnet_fx.momentumize(model, gamma=0)
    assert steps(net) == [6]
    assert_same_model(model, net, tokens(), mask, padding)
    other = net(tokens(), torch.zeros(5, 5, dtype=mask.dtype), None)
    assert not torch.allclose(other, net(tokens(), mask, padding))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=str)
def test_encoder_and_decoder_with_the_gradients_of_the_memory(options):
    model = Translates(**options)
    net = mnet_fx.momentumize(model, gamma=0)
    assert steps(net) == [6, 6]
    assert_same_model(model, net, tokens(), tokens(4), PADDING)
    assert_exact(model, None, tokens(), tokens(4), PADDING)


def test_a_decoder_alone():
    model = decoder()
    net = mnet_fx.momentumize(model, gamma=0)
    assert steps(net) == [9]
    assert_same_model(model, net, tokens(4), tokens())


def test_a_mask_given_later_is_captured_then():
    model = encoder(1, norm=False)
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, tokens(), mask=causal(5))


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_layers_inside_stay_live():
    model = encoder(3, dropout=0.0)
    net = mnet_fx.momentumize(model, gamma=0)
    for each in (model, net):
        each.layers[1].linear1 = Doubled(each.layers[1].linear1)
        each.layers[2].self_attn.register_forward_hook(lambda module, args, out: (out[0] * 3, out[1]))
    assert_same_model(model, net, tokens())
    assert not torch.allclose(net(tokens()), encoder(3, dropout=0.0)(tokens()))


@pytest.mark.parametrize("change", ["replace", "hook", "norm_first"])
def test_a_changed_layer_is_an_error(change):
    net = mnet_fx.momentumize(encoder(2))
    if change == "replace":
        net.layers[1] = copy.deepcopy(net.layers[1])
    elif change == "hook":
        net.layers[1].register_forward_hook(lambda module, args, out: out)
    else:
        net.layers[1].norm_first = True
    with pytest.raises(mnet_fx.MnetError, match=r"layers\.1.*since momentumize"):
        net(tokens())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = encoder(2)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_under_a_root_that_stays_python():
    net = mnet_fx.momentumize(Branching())
    assert steps(net) == [4]
    assert [part.path for part in net.report.captured] == ["inner"]


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(src) + 1


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def test_subclasses():
    """A forward of their own is not replaced; other methods are called."""
    own = nn.TransformerEncoder(OwnBlock(D, 2, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False)
    net = mnet_fx.momentumize(own, gamma=0)
    assert steps(net) == [4]
    assert_same_model(own, net, tokens())
    whole = nn.Sequential(OwnForward(D, 2, 32, batch_first=True), nn.Linear(D, D))
    found = passes.capture(whole)
    assert [(refusal.code, refusal.path) for refusal in found.refusals] == [("untraceable", "0")]


def test_a_layer_with_a_hook_stays_whole():
    model = encoder(3)
    model.layers[1].register_forward_hook(lambda module, args, out: out)
    (refusal,) = passes.capture(model).refusals
    assert (refusal.code, refusal.path) == ("opaque_module", "layers.1")
