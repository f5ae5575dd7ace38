"""regions="auto": which lists of layers are found, in whose models, and what a wrong guess says."""

import pytest
import torch
import zoo
from captures import assert_same_model, run, tiny
from torch import nn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx
from mnet_fx.named.marks import marked_containers

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def hugging_face(name):
    """A tiny model with random weights, and a call of it."""
    import transformers

    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    text = {"input_ids": IDS, "use_cache": False}
    if name == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, num_key_value_heads=2)), text
    if name == "mixtral":
        config = transformers.MixtralConfig(**common, num_key_value_heads=2, num_local_experts=4)
        return transformers.MixtralForCausalLM(config), text
    if name != "whisper":
        return tiny(name)
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "vocab_size": 50}
    sizes |= {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **tokens))
    return model, {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": IDS, "use_cache": False}


FOUND = {
    "bert": {"encoder.layer": 3},
    "gpt2": {"transformer.h": 3},
    "llama": {"model.layers": 3},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "vit": {"layers": 3},
    "qwen2": {"model.layers": 3},
    "mixtral": {"model.layers": 3},
    "whisper": {"model.encoder.layers": 2, "model.decoder.layers": 2},
}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", FOUND)
def test_models_of_hugging_face(name):
    """With gamma = 0 the original; reversible as stored, bit for bit."""
    model, call = hugging_face(name)
    model.train()
    net = mnet_fx.momentumize(model, regions="auto", gamma=0.0)
    assert regions(net) == FOUND[name]
    assert_same_model(model, net, **call)
    forms = [run(mnet_fx.momentumize(model, regions="auto", backward=backward), **call) for backward in ("reversible", "stored")]
    for a, b in zip(*([*tensors, *(g for g in grads if g is not None)] for _, tensors, grads in forms), strict=True):
        assert torch.equal(a, b)


def regions(net):
    return {region.path: region.steps for region in mnet_fx.report(net).regions}


def blocks(n, width=8):
    return [Block(width) for _ in range(n)]


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Model(nn.Module):
    """A stem, lists of blocks that run one after the other, or beside each other."""

    def __init__(self, parallel=False, **lists):
        super().__init__()
        self.stem, self.parallel, self.names = nn.Linear(4, 8), parallel, list(lists)
        for name, layers in lists.items():
            setattr(self, name, layers)

    def forward(self, x):
        x = self.stem(x)
        for name in self.names:
            x = self.beside(name, x) if self.parallel else self.through(name, x)
        return x

    def through(self, name, x):
        for layer in getattr(self, name):
            x = layer(x)
        return x

    def beside(self, name, x):
        return sum(layer(x) for layer in getattr(self, name))


class Timm(Model):
    def set_grad_checkpointing(self):
        pass


LISTS = {
    "equal blocks": (Model(layers=nn.ModuleList(blocks(3))), {"layers": 3}),
    "linears and norms": (Model(layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), more=nn.ModuleList(blocks(2))), {"more": 2}),
    "timm": (Timm(blocks=nn.Sequential(*blocks(3)), rest=nn.ModuleList(blocks(2))), {"blocks": 3}),
    "torch": (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 3, enable_nested_tensor=False), {"layers": 3}),
    "within one": (Model(layers=nn.ModuleList(nn.Sequential(*blocks(2)) for _ in range(2)), more=nn.ModuleList(blocks(2))), {"more": 2}),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_are_found(name):
    model, expected = LISTS[name]
    net = mnet_fx.momentumize(model, regions="auto", gamma=0.0)
    assert regions(net) == expected
    assert [part.front_end for part in net.report.captured] == ["named"]
    zoo.assert_agree(zoo.seeded(net, torch.ones(2, 3, 4)), zoo.seeded(model, torch.ones(2, 3, 4)))


class GradientCheckpointingLayer(Block):
    """As transformers names it."""


def marked(*widths):
    return nn.ModuleList(GradientCheckpointingLayer(width) for width in widths)


def test_lists_that_are_not_layers_of_one_chain():
    """Another width, layers of torch.nn beside each other, lists of lists."""
    attentions = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(3))
    rows = Timm(blocks=nn.Sequential(*(nn.Sequential(*blocks(2)) for _ in range(3))))
    assert marked_containers(Model(a=marked(8, 8), b=marked(8, 4))) == ["a"]
    assert marked_containers(Model(a=attentions)) == marked_containers(rows) == []
    assert marked_containers(Model(b=marked(8, 4), c=nn.ModuleList(blocks(3)))) == []  # what is marked tells that c is not (SAM's decoder)


class Other(GradientCheckpointingLayer):
    """Another class of layers of the same list, as attention and state-space layers in turn."""

    def __init__(self, width=8):
        super().__init__(width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        return x + self.scale * super().forward(x)


def test_marked_layers_of_several_classes_are_one_chain():
    model = Model(layers=nn.ModuleList([GradientCheckpointingLayer(), Other(), GradientCheckpointingLayer(), Other()]))
    net = mnet_fx.momentumize(model, regions="auto", gamma=0.0)
    assert (regions(net), net.report.refusals) == ({"layers": 4}, ())
    zoo.assert_agree(zoo.seeded(net, torch.ones(2, 3, 4)), zoo.seeded(model, torch.ones(2, 3, 4)))


def test_lists_that_are_left_are_in_the_report():
    """Of another width, and not marked; what is within a list, around one, or of bare Linears is none of them."""
    inside = nn.ModuleList(nn.Sequential(*blocks(2)) for _ in range(2))
    model = Model(a=marked(8, 8), b=marked(8, 4), c=nn.ModuleList(blocks(3)), d=nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), e=inside)
    found = mnet_fx.report(model, regions="auto")
    reasons = [(refusal.path, refusal.code, refusal.explanation) for refusal in found.refusals]
    shapes, library = (
        "its layers have parameters of one name and of several shapes",
        "the model's library marks other lists as layers, and not this one",
    )
    assert reasons == [("b", "list_left", shapes), ("c", "list_left", library)]
    assert "beside the others: momentumize(model, regions=[...])" in str(found)
    assert mnet_fx.report(model, regions=["a"]).refusals == ()  # named by the user, who left the others


NONE = {
    "other first block": Model(layers=nn.ModuleList([Block(), *[nn.Sequential(b) for b in blocks(2)]])),
    "too few": Model(layers=nn.ModuleList(blocks(1))),
    "sequential": Model(layers=nn.Sequential(*blocks(3))),  # as in a ResNet: the capture sees more than its lists
}


@pytest.mark.parametrize("name", NONE)
@pytest.mark.filterwarnings("ignore:.*no residual chain")
def test_without_a_list_the_model_is_captured(name):
    net = mnet_fx.momentumize(NONE[name], torch.ones(2, 4), regions="auto", rest="checkpoint")
    assert "named" not in [part.front_end for part in net.report.captured]
    assert [region.steps for region in net.report.regions] == ([] if name == "too few" else [3])


def test_torchvision_resnet_is_captured():
    torchvision = pytest.importorskip("torchvision")
    net = mnet_fx.report(torchvision.models.resnet18(), regions="auto")
    assert net.captured[0].front_end != "named"


def test_a_list_whose_layers_do_not_follow_each_other_is_an_error():
    net = mnet_fx.momentumize(Model(parallel=True, heads=nn.ModuleList(blocks(3))), regions="auto")
    with pytest.raises(mnet_fx.StreamError, match=r"heads.1 was called with another tensor than heads.0 returned: leave regions out"):
        net(torch.ones(2, 4))


def test_a_first_layer_that_is_skipped_at_times_is_none():
    model = Model(layers=nn.ModuleList(blocks(3)))
    net = mnet_fx.momentumize(model, regions="auto")
    net(torch.ones(2, 4))
    del net.names[0]
    with pytest.warns(mnet_fx.MnetWarning, match=r"layers.1 was called with another tensor"):
        net.layers[2](net.layers[1](net(torch.ones(2, 4))))


def test_options_that_it_forbids_or_passes_on():
    model = Model(layers=nn.ModuleList(blocks(3)))
    assert mnet_fx.report(model, regions="auto").regions[0].path == "layers"
    assert mnet_fx.estimate(model, torch.ones(2, 4), regions="auto").ways
    graph = mnet_fx.momentumize(torch.fx.symbolic_trace(model), regions="auto")
    assert [part.front_end for part in graph.report.captured] == ["GraphModule"]
