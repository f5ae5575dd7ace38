"""The model zoos of `coverage.py`: name -> a function that builds the model and one call of it.

Random weights throughout. Names of torchvision and timm stand for the real architectures with few classes; models of transformers are
built from tiny configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import Any
from unittest import mock

import torch
from torch import nn

__all__ = ["ZOOS", "Built"]

Built = tuple[nn.Module, dict[str, Any]]  # model and keyword arguments of a call
_TOO_LARGE = {  # more than 1.5 GB of parameters
    "regnet_y_128gf",
    "vit_h_14",
    "deepseek_vit_412m",
    "deepseek_vit_412m_enc",
    "deepseek_vit_412m_align",
    "samvit_huge_patch16",
    "gemma4_vit_570m",
    "naflexvit_so400m_patch16_siglip",
}
_LARGE = 60_000_000  # parameters
_TOKENS = (2, 16)


def _revived(model: nn.Module) -> nn.Module:
    """Gives weights that start at zero or next to it (LayerScale, zero-initialised norms) a size at which mistakes behind them show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.dim() and parameter.abs().max() < 1e-2:
                is_scale = any(word in name for word in ("gamma", "layer_scale", "lambda", "ls1", "ls2", "weight"))
                parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.2) if parameter.dim() == 1 and is_scale else parameter.normal_(
                    std=0.02
                )
    return model


def _tied(model: nn.Module) -> nn.Module:
    """Lets parameters of the same name and shape be one in a large model: its graph stays what it is, its memory does not grow with depth."""
    if sum(parameter.numel() for parameter in model.parameters()) < _LARGE:
        return model
    first: dict[Any, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = first.setdefault((path.rpartition(".")[2], name, parameter.shape), parameter)
    return model


def torchvision_zoo() -> dict[str, Callable[[], Built]]:
    import torchvision.models as tv

    return {name: partial(_torchvision, name) for name in tv.list_models() if name not in _TOO_LARGE}


def _torchvision(name: str) -> Built:
    import torchvision.models as tv

    float_only = {"quantize": False} if name.startswith("quantized_") else {}
    module = tv.get_model_builder(name).__module__
    if "detection" in module:
        model = tv.get_model(name, weights=None, weights_backbone=None, num_classes=5)
        size = 300 if name == "ssd300_vgg16" else 96
        return _revived(model.backbone), {_first_argument(model.backbone): torch.randn(2, 3, size, size)}
    if "segmentation" in module:
        model = _revived(tv.get_model(name, weights=None, weights_backbone=None, num_classes=5))
        return model, {_first_argument(model): torch.randn(2, 3, 64, 64)}
    if "optical_flow" in module:
        return tv.get_model(name), {"image1": torch.randn(1, 3, 128, 128), "image2": torch.randn(1, 3, 128, 128), "num_flow_updates": 3}
    if "video" in module:
        if name.startswith("mvit"):
            return _revived(_small_mvit(name)), {"x": torch.randn(1, 3, 8, 64, 64)}
        size = (16, 224, 224) if name == "s3d" else (8, 64, 64)
        return _tied(_revived(tv.get_model(name, num_classes=10))), {"x": torch.randn(1 if name == "s3d" else 2, 3, *size)}
    size = 224 if name.startswith("maxvit") else 299 if "inception" in name else 128 if "googlenet" in name else 64
    extra = {"image_size": 64 if name != "vit_h_14" else 56} if name.startswith("vit") else {}
    size = extra.get("image_size", size)
    model = tv.get_model(
        name, num_classes=10, **extra, **float_only, **({"init_weights": False} if "net" in name and "inception" in name else {})
    )
    return _tied(_revived(model)), {_first_argument(model): torch.randn(2, 3, size, size)}


def _small_mvit(name: str) -> nn.Module:
    """Its builder fixes the size of the videos, which decides minutes."""
    import torchvision.models as tv

    build = tv.video.mvit._mvit
    with mock.patch.object(tv.video.mvit, "_mvit", lambda **options: build(**(options | {"spatial_size": (64, 64), "temporal_size": 8}))):
        return tv.get_model(name, num_classes=10)


def _first_argument(model: nn.Module) -> str:
    import inspect

    return next(iter(inspect.signature(model.forward).parameters))


_SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xxtiny",
    "xtiny",
    "tiny",
    "_xs",
    "_ti_",
    "small",
    "_s",
    "18",
    "26",
    "050",
    "b0",
    "lite",
)


def timm_zoo() -> dict[str, Callable[[], Built]]:
    """Two architectures of each family (one where it has but one), the smallest by name."""
    import timm

    chosen: list[list[str]] = []
    for family in timm.list_modules():
        models = [name for name in timm.list_models(module=family) if not name.startswith("test_") and name not in _TOO_LARGE]
        rank = {name: next((i for i, word in enumerate(_SMALL) if word in name), len(_SMALL)) for name in models}
        chosen.append(sorted(models, key=lambda name: (rank[name], len(name), name))[:2])
    names = dict.fromkeys(name for nth in zip_longest(*chosen) for name in nth if name)
    return {name: partial(_timm, name) for name in names}


_NARROWER: dict[str, dict[str, Any]] = {name: {"mlp_ratio": 0.125} for name in ("vgg11", "vgg13")}  # of 7 x 7 x 4096 weights


def _timm(name: str) -> Built:
    """At the smallest of a few image sizes that the model can be built for, or called with."""
    model = _timm_model(name)
    channels, height, width = model.default_cfg["input_size"]
    if height > 96:
        fixed = model.default_cfg.get("fixed_input_size")
        for size in (96, 128, 160, 192) if fixed or height > 240 else (64, 128):
            try:
                smaller = _timm_model(name, img_size=size) if fixed else model
                with torch.no_grad():
                    smaller.eval()(torch.randn(1, channels, size, size))
            except Exception:
                continue
            model, height, width = smaller, size, size
            break
        else:
            height, width = (height, width) if fixed or height <= 256 else (224, 224)
    return _tied(_revived(model.train())), {_first_argument(model): torch.randn(2, channels, height, width)}


def _timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **(_NARROWER.get(name, {}) | options))


_TEXT = [
    "albert",
    "bert",
    "big_bird",
    "camembert",
    "convbert",
    "data2vec-text",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "flaubert",
    "fnet",
    "funnel",
    "ibert",
    "layoutlm",
    "longformer",
    "luke",
    "megatron-bert",
    "mobilebert",
    "mpnet",
    "mra",
    "nystromformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "splinter",
    "squeezebert",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
    "yoso",
    "modernbert",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "gpt_bigcode",
    "gpt_neox_japanese",
    "opt",
    "bloom",
    "codegen",
    "ctrl",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "falcon",
    "mpt",
    "stablelm",
    "starcoder2",
    "olmo",
    "olmo2",
    "cohere",
    "granite",
    "persimmon",
    "biogpt",
    "xglm",
    "openai-gpt",
    "rwkv",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "smollm3",
    "nemotron",
    "glm",
    "helium",
]
_TRANSLATORS = [
    "t5",
    "mt5",
    "umt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "blenderbot-small",
    "m2m_100",
    "led",
    "longt5",
    "prophetnet",
    "switch_transformers",
]
_VISION = [
    "vit",
    "deit",
    "beit",
    "swin",
    "swinv2",
    "convnext",
    "convnextv2",
    "dinov2",
    "segformer",
    "poolformer",
    "pvt",
    "levit",
    "mobilevit",
    "regnet",
    "resnet",
    "bit",
    "data2vec-vision",
    "vit_msn",
    "yolos",
    "cvt",
    "focalnet",
    "hiera",
]
_AUDIO = ["wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio"]
_TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3,
    "num_layers": 3, "num_decoder_layers": 3, "encoder_layers": 3, "decoder_layers": 3, "num_encoder_layers": 3, "num_attention_heads": 2,
    "n_head": 2, "n_heads": 2, "num_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "d_ff": 64, "n_inner": 64, "hidden_dim": 64, "d_kv": 16, "head_dim": 16, "ffn_hidden_size": 64, "max_position_embeddings": 64,
    "embedding_size": 32, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "rotary_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "conv_dim": (16, 16), "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "use_cache": False, "state_size": 8, "num_feat_extract_layers": 2, "d_inner": 64, "hidden_groups": 1, "attention_hidden_size": 32,
}  # fmt: skip


def transformers_zoo() -> dict[str, Callable[[], Built]]:
    names = dict.fromkeys(_TEXT, "text") | dict.fromkeys(_TRANSLATORS, "translator")
    names |= dict.fromkeys(_VISION, "vision") | dict.fromkeys(_AUDIO, "audio") | {"whisper": "speech"}
    return {name: partial(_transformers, name, kind) for name, kind in names.items()}


def _transformers(name: str, kind: str) -> Built:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.CONFIG_MAPPING[name]()
    skipped = {"hidden_size", "num_heads", "num_attention_heads"} if kind == "vision" and not hasattr(config, "image_size") else set()
    skipped |= {"num_hidden_layers"} if hasattr(config, "num_stages") else set()  # which it stands for
    for key, value in _TINY.items():
        present = getattr(config, key, None)
        if present is not None and key not in skipped and not (isinstance(present, (list, tuple)) and not isinstance(value, tuple)):
            try:
                setattr(config, key, value)
            except Exception:
                continue
    if kind == "vision" and isinstance(getattr(config, "depths", None), (list, tuple)):
        config.depths = [2] * len(config.depths)
    if "layer_types" in vars(config) and config.layer_types is not None:
        config.layer_types = config.layer_types[:3]
    if getattr(config, "num_key_value_heads", 2) is None:
        config.num_key_value_heads = 2
    if name == "mamba2":
        config.num_heads, config.head_dim, config.n_groups = 4, 16, 1
    if hasattr(config, "attention_types"):
        config.attention_types, config.attention_layers = [[["global", "local"], 1], [["global"], 1]], ["global", "local", "global"]
    if name == "xmod":
        config.default_language = "en_XX"
    if name == "esm":
        config.vocab_size, config.pad_token_id, config.mask_token_id = 64, 1, 32
    if name == "funnel":
        config.block_sizes, config.d_head, config.d_inner, config.architectures = [2, 2], 16, 64, ["FunnelModel"]
    model = transformers.AutoModel.from_config(config)
    ids = torch.randint(3, 60, _TOKENS)
    if kind in ("text", "translator"):
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name in ("rwkv", "mamba", "mamba2", "falcon_mamba", "fnet"):
            del call["attention_mask"]
        if kind == "translator":
            call["decoder_input_ids"] = ids
        return model, call
    if kind == "audio":
        return model, {"input_values": torch.randn(2, 800)}
    if kind == "speech":
        config.num_mel_bins, config.max_source_positions, config.max_target_positions = 16, 20, 32
        model = transformers.AutoModel.from_config(config)
        return model, {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids}
    size = getattr(config, "image_size", 64)
    size = size if isinstance(size, int) else size[0]
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


def misc_zoo() -> dict[str, Callable[[], Built]]:
    d, heads = 32, 2

    def layers(kind: str, **options: Any) -> Built:
        options = {"d_model": d, "nhead": heads, "dim_feedforward": 64} | options
        src, tgt = torch.randn(2, 7, d), torch.randn(2, 5, d)
        if not options.get("batch_first", False):
            src, tgt = src.transpose(0, 1).contiguous(), tgt.transpose(0, 1).contiguous()
        if kind == "encoder":
            return nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 6, enable_nested_tensor=False), {"src": src}
        if kind == "decoder":
            return nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 3), {"tgt": tgt, "memory": src}
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return nn.Transformer(num_encoder_layers=3, num_decoder_layers=3, **options), {"src": src, "tgt": tgt, "tgt_mask": mask}

    def vit_pytorch(module: str, cls: str, **options: Any) -> Built:
        import importlib

        common = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 4, "heads": 2, "mlp_dim": 64}
        model = getattr(importlib.import_module(f"vit_pytorch.{module}"), cls)(**(common | options))
        return model, {_first_argument(model): torch.randn(2, 3, 32, 32)}

    zoo: dict[str, Callable[[], Built]] = {}
    for kind in ("encoder", "decoder", "transformer"):
        for norm_first in (False, True):
            zoo[f"nn {kind} {'pre' if norm_first else 'post'}-norm"] = partial(layers, kind, norm_first=norm_first, batch_first=norm_first)
    zoo["nn encoder gelu no dropout"] = partial(layers, "encoder", activation="gelu", dropout=0.0, batch_first=True)
    for module, cls, options in [
        ("vit", "ViT", {}), ("simple_vit", "SimpleViT", {}), ("deepvit", "DeepViT", {}), ("parallel_vit", "ViT", {}), ("vit_for_small_dataset", "ViT", {}),
        ("cait", "CaiT", {"cls_depth": 2}), ("rvt", "RvT", {}), ("sep_vit", "SepViT", {"image_size": None}),
    ]:  # fmt: skip
        if options.get("image_size", 1) is not None:
            zoo[f"vit_pytorch {module}"] = partial(vit_pytorch, module, cls, **options)
    return zoo


ZOOS: dict[str, Callable[[], dict[str, Callable[[], Built]]]] = {
    "torchvision": torchvision_zoo,
    "timm": timm_zoo,
    "transformers": transformers_zoo,
    "misc": misc_zoo,
}
