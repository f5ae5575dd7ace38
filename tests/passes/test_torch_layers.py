"""Transformers of torch.nn: chains, masks, both modes, and changes to their layers after momentumize."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mnet_fx

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


def run(net, *args, **kwargs):
    """Output, and gradients of a random projection of it, with the same random numbers each time."""
    torch.manual_seed(0)
    net.zero_grad(set_to_none=True)
    out = net(*args, **kwargs)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return out.detach(), [p.grad.clone() for p in net.parameters()]


def assert_same_model(model, net, *args, **kwargs):
    """The oracle of gamma = 0: output and gradients."""
    (expected, expected_grads), (found, found_grads) = run(model, *args, **kwargs), run(net, *args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    largest = max(g.abs().max().item() for g in expected_grads)
    for a, b in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * largest)


def assert_exact(model, *args, **kwargs):
    """In train mode, with dropout: bit for bit what stored activations give."""
    reversible, stored = (mnet_fx.momentumize(model, backward=backward).train() for backward in ("reversible", "stored"))
    (out, grads), (out_, grads_) = run(reversible, *args, **kwargs), run(stored, *args, **kwargs)
    assert torch.equal(out, out_)
    assert all(map(torch.equal, grads, grads_))


def steps(net):
    """Lengths of the chains that were captured."""
    assert {part.front_end for part in net.report.captured} == {"Dynamo"}
    return [region.steps for region in net.report.regions]


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
    assert [(region.steps, region.path) for region in net.report.regions] == [(12, "layers")]  # a preview
    for training in (True, False):
        assert_same_model(model.train(training), net.train(training), tokens())
    assert steps(net) == [12]
    assert net.report.regions[0].kind == ("pre-activation" if options.get("norm_first") else "post-norm")
    assert_exact(model, tokens())


@pytest.mark.parametrize("mask", [causal(5), causal(5) < 0, torch.randn(5, 5)], ids=["causal", "bool", "bias"])
@pytest.mark.parametrize("padding", [PADDING, None], ids=["padded", "whole"])
def test_masks_are_applied(mask, padding):
    if padding is not None and mask.dtype != torch.bool:
        padding = torch.zeros(2, 5).masked_fill(padding, float("-inf"))
    model = Masked(encoder(3))
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, tokens(), mask, padding)
    assert steps(net) == [6]
    other = net(tokens(), torch.zeros(5, 5, dtype=mask.dtype), None)
    assert not torch.allclose(other, net(tokens(), mask, padding))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=str)
def test_encoder_and_decoder_with_the_gradients_of_the_memory(options):
    model = Translates(**options)
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, tokens(), tokens(4), PADDING)
    assert steps(net) == [6, 6]
    assert_exact(model, tokens(), tokens(4), PADDING)


def test_a_decoder_alone():
    model = decoder()
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, tokens(4), tokens())
    assert steps(net) == [9]


def test_a_mask_given_later_is_captured_then():
    model = encoder(2, norm=False)
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, tokens())
    assert_same_model(model, net, tokens(), mask=causal(5))


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("change", ["inside", "replace", "hook", "norm_first", "method"])
def test_layers_may_change_after_a_call(change):
    model = encoder(3, dropout=0.0)
    net = mnet_fx.momentumize(model, gamma=0)
    before = run(net, tokens())[0]
    torch.manual_seed(3)
    twin, ff = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, dropout=0.0), nn.Linear(D, 32)
    for each in (model, net):
        layer = each.layers[1]
        if change == "inside":
            layer.linear1 = Doubled(ff)
        elif change == "replace":
            each.layers[1] = twin
        elif change == "hook":
            layer.self_attn.register_forward_hook(lambda module, args, out: (out[0] * 3, out[1]))
            layer.register_forward_hook(lambda module, args, out: out * 2)
        elif change == "norm_first":
            layer.norm_first = True
        else:
            layer._ff_block = lambda x, layer=layer: 2 * nn.TransformerEncoderLayer._ff_block(layer, x)
    assert_same_model(model, net, tokens())
    assert not torch.allclose(before, run(net, tokens())[0])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = encoder(2)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_inside_of_a_branch_on_values():
    model = Branching()
    net = mnet_fx.momentumize(model, gamma=0)
    for x in (tokens(), -tokens()):
        assert_same_model(model, net, x)
    assert steps(net) == [4]


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(src) + 1


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


@pytest.mark.parametrize("kind", [OwnForward, OwnBlock])
def test_subclasses_compute_what_they_say(kind):
    model = nn.TransformerEncoder(kind(D, 2, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False)
    net = mnet_fx.momentumize(model, gamma=0)
    for training in (True, False):
        assert_same_model(model.train(training), net.train(training), tokens())
    assert steps(net) == [4]


def test_a_layer_that_had_a_hook_before():
    model = encoder(3)
    model.layers[1].register_forward_hook(lambda module, args, out: 2 * out)
    net = mnet_fx.momentumize(model, gamma=0)
    assert_same_model(model, net, tokens())
    assert copy.deepcopy(net).report == net.report
    assert sum(steps(net)) == 6


def test_a_masked_encoder_is_copied_pickled_and_rewritten_again():
    model = Masked(encoder(2)).eval()
    net = mnet_fx.momentumize(model, gamma=0.5)
    expected = net(tokens(), causal(5) < 0, PADDING)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), mnet_fx.momentumize(net, gamma=0.5)):
        assert twin.inner.forward.args[0] is twin.inner
        assert torch.equal(twin(tokens(), causal(5) < 0, PADDING), expected)
    assert "forward" not in vars(model.inner)
    named = mnet_fx.momentumize(net, regions=["inner.layers"])
    assert "forward" not in vars(named.inner)
