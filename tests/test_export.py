"""Capture by torch.export, with example inputs: what symbolic tracing cannot read, calls of other kinds, and what export would lose."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import mnet_fx
import passes


class Block(nn.Module):
    """A block that no proxy can run: it looks at shapes and at its optional arguments."""

    def __init__(self, width=8, p=0.1):
        super().__init__()
        self.norm, self.fc, self.out, self.p = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width), p

    def forward(self, x, bias=None, scale=1.0):
        if x.size(-1) != self.fc.in_features:
            raise ValueError("wrong width")
        y = self.fc(self.norm(x)).view(x.size(0), -1, 2, 4).transpose(1, 2).flatten(2).reshape_as(x)
        if bias is not None:
            y = y + bias
        return x + F.dropout(self.out(torch.tanh(y)), self.p, self.training) * scale


@dataclass
class Output:
    last: torch.Tensor
    hidden: tuple | None = None


torch.export.register_dataclass(Output)


class Stack(nn.Module):
    """Depth and head depend on the arguments; returns a dataclass."""

    def __init__(self, depth=4, p=0.1):
        super().__init__()
        self.blocks = nn.ModuleList(Block(p=p) for _ in range(depth))
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x, bias=None, *, scale=1.0, hidden=False):
        if x.dim() != 3:
            raise ValueError("x must be batch x tokens x width")
        kept = [x]
        for block in self.blocks:
            x = block(x, bias=bias, scale=scale)
            kept.append(x)
        with torch.no_grad():
            centre = x.mean() + torch.tensor([1.0, 2.0, 3.0]) + self.offset
        return Output(self.head(x) + centre, tuple(kept) if hidden else None)


def tokens(batch=2, length=5):
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch))


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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("example", [(tokens(),), {"x": tokens()}, tokens()], ids=["tuple", "dict", "tensor"])
def test_an_untraceable_model_is_exported_and_gamma_0_is_the_model(example, training):
    model = Stack().train(training)
    net = mnet_fx.momentumize(model, example, gamma=0)
    report = mnet_fx.report(net)
    assert steps(net) == [4]
    assert [(part.path, part.front_end) for part in report.captured] == [("", "torch.export")]
    assert "torch.export" in str(report)
    assert list(net.state_dict()) == list(model.state_dict())
    for batch, length in [(2, 5), (3, 7), (1, 1)]:
        assert_same_model(model, net, tokens(batch, length))


def test_reversible_gradients_are_those_of_stored():
    assert_exact(Stack(), (tokens(),), tokens(3, 4))


@pytest.mark.parametrize(
    "call",
    [{"bias": tokens(1, 1)}, {"scale": 0.5}, {"hidden": True}, {"bias": tokens(2, 5), "scale": 2.0, "hidden": True}],
    ids=lambda c: "-".join(c),
)
def test_a_call_with_other_arguments_is_captured_when_it_comes(call):
    model = Stack()
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert_same_model(model, net, tokens(), **call)
    assert_same_model(model, net, tokens())
    assert len(net.forward.variants) == 2


def test_positional_keyword_and_default_arguments_are_the_same_call():
    net = mnet_fx.momentumize(Stack(), (tokens(),), gamma=0)
    assert torch.equal(run(net, tokens())[0].last, run(net, x=tokens(), bias=None, scale=1.0, hidden=False)[0].last)
    assert len(net.forward.variants) == 1


def test_a_traced_model_takes_arguments_that_its_trace_fixed():
    class Traced(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, bias=None):
            for block in self.blocks:
                y = torch.tanh(block(x))
                x = x + (y if bias is None else y * bias)
            return x

    model = Traced()
    net = mnet_fx.momentumize(model, gamma=0)
    assert [part.front_end for part in net.report.captured] == ["symbolic trace"]
    assert_same_model(model, net, tokens())
    assert_same_model(model, net, tokens(), bias=tokens(1, 1))
    assert_same_model(model, net, tokens())  # as before
    assert_same_model(model, net, tokens(), bias=2.0)
    assert_same_model(model, net, tokens(), bias=tokens(1, 1))
    net = mnet_fx.momentumize(model, {"x": tokens(), "bias": tokens(1, 1)}, gamma=0)
    assert [part.front_end for part in net.report.captured] == ["torch.export"]
    assert_same_model(model, net, tokens(), bias=tokens(2, 5))


def test_another_network_is_refused_rather_than_run():
    """An argument that changes how many steps there are makes another momentum network of it."""

    class Depth(Stack):
        def forward(self, x, depth=4):
            for block in self.blocks[:depth]:
                x = block(x)
            return x

    net = mnet_fx.momentumize(Depth(), (tokens(),))
    run(net, tokens())
    with pytest.raises(mnet_fx.MnetError, match=r"\[3\] steps, not \[4\], which is another momentum network"):
        net(tokens(), depth=3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tokens().unsqueeze(0), "x must be batch x tokens x width"),
        (torch.randn(2, 5, 6), "wrong width"),
    ],
    ids=["rank", "width"],
)
def test_a_call_that_cannot_be_captured_says_why(x, message):
    net = mnet_fx.momentumize(Stack(), (tokens(),))
    with pytest.raises(mnet_fx.MnetError, match=message):
        net(x)


def test_example_inputs_that_do_not_fit_are_an_error():
    with pytest.raises(mnet_fx.SettingsError, match="example_inputs do not fit"):
        mnet_fx.momentumize(Stack(), {"y": tokens()})


def test_copies_and_pickles():
    model = Stack(p=0.0)
    net = mnet_fx.momentumize(model, (tokens(),))
    expected = run(net, tokens())[0].last
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), mnet_fx.momentumize(net, (tokens(),))):
        assert torch.equal(run(other, tokens(2, 5))[0].last, expected)
    with pytest.raises(mnet_fx.MnetError, match="give momentumize example_inputs like this call"):
        pickle.loads(pickle.dumps(net))(tokens(), scale=2.0)


# ---- what an exported graph cannot follow


def change_hook(net):
    net.blocks[1].fc.register_forward_hook(lambda *args: None)


def change_module(net):
    net.blocks[1].fc = nn.Linear(8, 8)


def change_attribute(net):
    net.blocks[1].norm.eps = 1e-3


def change_dtype(net):
    net.double()


def change_mode(net):
    net.blocks[1].eval()


@pytest.mark.parametrize("change", [change_hook, change_module, change_attribute, change_dtype, change_mode], ids=lambda f: f.__name__)
def test_a_change_that_the_graph_would_not_follow_is_an_error(change):
    net = mnet_fx.momentumize(copy.deepcopy(Stack()), (tokens(),))
    run(net, tokens())
    change(net)
    with pytest.raises(mnet_fx.MnetError, match=r"since momentumize|put both in the same mode"):
        net(tokens())


def test_a_new_parameter_is_used():
    model = Stack(p=0.0)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    net.blocks[1].fc.weight = nn.Parameter(torch.randn(8, 8))
    other = copy.deepcopy(model)
    other.blocks[1].fc.weight = net.blocks[1].fc.weight
    torch.testing.assert_close(run(net, tokens())[0].last, run(other, tokens())[0].last)


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return x * 1


class Draws(nn.Module):
    def forward(self, x):
        import random

        return x * random.choice([1.0, 1.0])


@pytest.mark.parametrize(
    ("odd", "reason"),
    [(Counts, "sets its attribute calls"), (Draws, "random")],
    ids=["attribute", "python random"],
)
def test_what_export_would_lose_is_left_in_python_and_the_rest_is_rewritten(odd, reason):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.odd = Stack(p=0.0), odd()

        def forward(self, x):
            if x.dim() == 3 and x.size(0) > 0:
                return self.odd(self.trunk(x).last)
            raise ValueError

    model = Two()
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [4]
    assert [part.path for part in net.report.captured] == ["trunk"]
    assert any(reason in refusal.explanation and refusal.path == "" for refusal in net.report.refusals)
    assert_same_model(model, net, tokens())


def test_batch_statistics_move_once():
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(3))

        def forward(self, x):
            if x.dim() != 4:
                raise ValueError
            for block in self.blocks:
                x = x + block(x).relu()
            return x

    model, x = Convolutional(), torch.randn(2, 4, 5, 5)
    twin = copy.deepcopy(model)
    net = mnet_fx.momentumize(model, (x,), gamma=0)
    assert steps(net) == [3]
    assert [part.front_end for part in net.report.captured] == ["torch.export"]
    run(net, x), run(twin, x)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert model.blocks[0][1].num_batches_tracked == 1


def test_capture_leaves_the_model_and_the_generators_as_they_were():
    model = Stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    mnet_fx.momentumize(model, (tokens(),))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("warm_up", [False, True])
def test_noting_how_parts_are_called_leaves_no_hooks_behind(warm_up):
    model = Stack()
    model.blocks[0].register_forward_pre_hook(own := lambda module, args: None)
    calls = passes.inner_calls(model, (tokens(),), {}, warm_up)
    assert set(calls) == {path for path, module in model.named_modules() if path != "blocks"}
    assert [hook for module in model.modules() for hook in module._forward_pre_hooks.values()] == [own]


def test_hooks_of_an_exported_model():
    """Its own fire around the graph, once; those inside are part of the graph, with a warning."""
    model, seen = Stack(p=0.0), []
    model.register_forward_pre_hook(lambda module, args: (seen.append("root"), 2 * args[0])[1:])
    model.register_forward_hook(lambda module, args, out: Output(3 * out.last))
    model.blocks[1].register_forward_hook(lambda module, args, out: (seen.append("block"), 1.5 * out)[1])
    with pytest.warns(mnet_fx.MnetWarning, match="blocks.1 of an exported part have hooks"):
        net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [4]
    assert_same_model(model, net, tokens())
    seen.clear()
    net(tokens())
    assert seen == ["root"]


def test_autocast_around_the_call_is_followed():
    net = mnet_fx.momentumize(Stack(p=0.0), (tokens(),), gamma=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(tokens()).last
    full = net(tokens()).last
    assert half.dtype == torch.bfloat16 or not torch.equal(half, full)
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.1)


def test_sizes_read_inside_a_block_do_not_tie_the_blocks_together():
    """torch.export reads each size once; where the first block reads it, the others must not depend on that block."""
    gm, interface, constants = passes.exporting.export(Stack(), (tokens(),), {}, "held")
    sizes = [node for node in gm.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert sizes
    assert all(node.args[0].op == "placeholder" for node in sizes)
    assert interface.flat((tokens(4, 9),), {})[0].shape == (4, 9, 8)
    assert all(name in gm.code for name in constants)


# ---- Hugging Face


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


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_model_whose_config_changes(tmp_path):
    model, example = tiny("bert")
    net = mnet_fx.momentumize(model, example, gamma=0).eval()
    expected = net(**example)[0]
    net.save_pretrained(tmp_path)  # writes into the config, nothing that forward reads
    assert torch.equal(net(**example)[0], expected)
    net.config.output_hidden_states = True
    with pytest.raises(mnet_fx.MnetError, match=r"config\.output_hidden_states changed from False since momentumize"):
        net(**example)


@pytest.mark.filterwarnings("ignore")
def test_a_call_with_a_cache_is_refused_with_a_way_out():
    model, example = tiny("gpt2")
    report = mnet_fx.momentumize(model, {"input_ids": example["input_ids"]}).report
    assert report.rewritten_adds == 0
    assert "Give example inputs" not in str(report)
    assert "use_cache=False among the example_inputs" in str(report)


@pytest.mark.parametrize(
    ("name", "chains"),
    [("gpt2", [6]), ("bert", [6]), ("llama", [6]), ("t5", [4, 6]), ("vit", [6])],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_models(name, chains):
    model, example = tiny(name)
    net = mnet_fx.momentumize(model, example, gamma=0)
    assert steps(net) == chains
    for training in (True, False):
        assert_same_model(model.train(training), net.train(training), **example)
    assert_same_model(model, net, **{key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in example.items()})
    assert_exact(model, example, **example)
    assert_same_model(model.eval(), net.eval(), **example, output_hidden_states=True)
