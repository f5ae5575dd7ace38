"""Real models through `torch.compile(model, backend="mnet_fx")`.

The default run takes three of them and inner="aot_eager", which compiles quickly. All of them, by inductor (many minutes):

    MNET_FX_INNER=inductor pytest -n 0 tests/compiled/test_backend_models.py
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from torch import nn
from torch.utils._pytree import tree_map
from torchvision import models
from torchvision.models.swin_transformer import SwinTransformer
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx

INNER = os.environ.get("MNET_FX_INNER", "aot_eager")
QUICK = None if "MNET_FX_INNER" in os.environ else {"gpt2", "bert", "vit_b_16"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
WAVES: dict[str, Any] = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}


@dataclass(frozen=True)
class Case:
    """A model, a call of it, and the lengths of its chains, graph by graph."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    chains: tuple[tuple[int, ...], ...]
    output: Callable[[Any], torch.Tensor] = lambda y: y


def tokens(**more):
    ids = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids} | more


def pixels(size, batch=2):
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def loss(y):
    return y.loss


CASES = {
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)),
        lambda: tokens(use_cache=False),
        ((6,), ()),
        loss,
    ),
    "bert": Case(lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), tokens, ((6,),), loss),
    "llama": Case(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), lambda: tokens(use_cache=False), ((6,),), loss),
    "t5": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, vocab_size=60, decoder_start_token_id=0)
        ),
        lambda: tokens(use_cache=False),
        ((6, 9),),
        loss,
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8)),
        lambda: {"pixel_values": pixels(32)[0], "labels": torch.tensor([0, 1])},
        ((6,),),
        loss,
    ),
    "wav2vec2": Case(
        lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SMALL, **WAVES)),
        lambda: {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)},
        (),  # breaks into a graph for each layer, as layerdrop is drawn in Python
        lambda y: y.last_hidden_state,
    ),
    "resnet50": Case(lambda: models.resnet50(num_classes=5), lambda: pixels(64), ((2, 3, 5, 2),)),
    "vit_b_16": Case(lambda: models.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=5), lambda: pixels(32), ((6,),)),
    "swin_t": Case(
        lambda: SwinTransformer([4, 4], 16, [2, 2, 6, 2], [1, 1, 2, 2], [4, 4], num_classes=5, stochastic_depth_prob=0.1),
        lambda: pixels(64, batch=1),
        ((4, 4, 12, 4),),
    ),
}


NAMES = [name for name in sorted(CASES) if QUICK is None or name in QUICK]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    mnet_fx.reset_reports()


def step(function, model, case, dtype=torch.float64):
    """All that one training step gives and leaves."""
    torch.manual_seed(7)
    inputs = tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, case.inputs())
    out = case.output(function(**inputs) if isinstance(inputs, dict) else function(*inputs))
    (out.square().sum() if out.dim() else out).backward()
    return {"output": out.detach()} | zoo.leftovers(model)


def built(case, dtype=torch.float64):
    torch.manual_seed(0)
    return case.build().to(dtype).train()


def compiled(model, **options):
    model = copy.deepcopy(model)
    return torch.compile(model, backend=mnet_fx.backend(inner=INNER, **options)), model


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "gpt2" else name for name in NAMES])
def test_gamma_zero_is_the_inner_compiler_alone(name):
    case = CASES[name]
    model = built(case)
    found = step(*compiled(model, gamma=0), case)
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    zoo.assert_near(found, step(torch.compile(plain, backend=INNER), plain, case), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_chain_is_rewritten_and_reversible_is_stored(name):
    case = CASES[name]
    model = built(case, torch.float32)
    found = step(*compiled(model), case, torch.float32)
    reports = mnet_fx.reports()
    torch._dynamo.reset()
    zoo.assert_identical(found, step(*compiled(model, backward="stored"), case, torch.float32))
    chains = tuple(tuple(region.steps for region in report.regions) for report in reports)
    assert chains == case.chains or (not case.chains and sum(report.rewritten_adds for report in reports) >= 6), chains
    left = [refusal.code for report in reports for refusal in report.refusals]
    assert set(left) <= {"projection_shortcut", "graph_break", "too_short"}


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("resnet50", "vit_b_16", "bert")])
def test_it_is_the_network_of_momentumize(name):
    case = CASES[name]
    model = built(case).eval()
    found = step(*compiled(model), case)
    inputs = case.inputs()
    net = zoo.rewritten(model, example_inputs=inputs if isinstance(inputs, dict) else None)
    zoo.assert_near(found, step(net, net, case), 1e-5)
