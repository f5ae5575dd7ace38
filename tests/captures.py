"""What tests of captured models compare: outputs and gradients of a model, of its rewritten form, and of that with stored activations."""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mnet_fx


class Checked(nn.Module):
    """A layer of several blocks; where it is trained, Dynamo breaks its graph behind it, as behind those of DETR's encoder."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        x = self.blocks(x)
        if self.training and not torch.isfinite(x).all():
            x = x.clamp(-9, 9)
        return x


def run(net, *args, **kwargs):
    """Outputs, and gradients of a random projection of them, with the same random numbers each time."""
    torch.manual_seed(0)
    net.zero_grad(set_to_none=True)
    out = net(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    weights = torch.Generator().manual_seed(1)
    sum((t.float() * torch.randn(t.shape, generator=weights)).sum() for t in tensors if t.requires_grad).backward()
    return out, tensors, [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_same_model(model, net, *args, **kwargs):
    """The oracle of gamma = 0: outputs, their types, and gradients."""
    (out, tensors, grads), (out_, tensors_, grads_) = run(model, *args, **kwargs), run(net, *args, **kwargs)
    assert type(out) is type(out_)
    for a, b in zip(tensors, tensors_, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * max(a.abs().max().item(), 1e-3))
    largest = max(g.abs().max().item() for g in grads if g is not None)
    for a, b in zip(grads, grads_, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * largest)


def assert_exact(model, example, *args, **kwargs):
    results = [run(mnet_fx.momentumize(model, example, gamma=0.9, backward=b).train(), *args, **kwargs) for b in ("reversible", "stored")]
    for a, b in zip(*(tensors + [g for g in grads if g is not None] for _, tensors, grads in results), strict=True):
        assert torch.equal(a, b)


def steps(net):
    return [region.steps for region in mnet_fx.report(net).regions]


def tiny(name):
    import transformers

    transformers.logging.set_verbosity_error()
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    text = {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long()}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config), text | {"use_cache": False}
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**common)), text
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=2)), text | {"use_cache": False}
    if name == "t5":
        config = transformers.T5Config(d_model=32, num_layers=2, num_heads=2, d_ff=64, d_kv=16, vocab_size=50)
        return transformers.T5ForConditionalGeneration(config), text | {"decoder_input_ids": ids, "use_cache": False}
    config = transformers.ViTConfig(**{k: v for k, v in common.items() if k != "vocab_size"}, image_size=32, patch_size=8)
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
