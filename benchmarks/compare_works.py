"""What `compare.py` has trained: each a model, its inputs and a loss, in full size and small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from budget_models import GPT2, Translator, UNet, WaveNet, vit
from diffusion import DiffusionUNet
from models import MLP, Decoder, Encoder
from torch import Tensor, nn

__all__ = ["SMALL", "WORKS", "LanguageModel", "Work"]


def total(output: Any) -> Tensor:
    return output.sum()


def as_it_is(output: Any) -> Tensor:
    """Of models that give their loss."""
    return output


def ramp(output: Tensor) -> Tensor:
    """Of models that end in a LayerNorm, whose plain sum has no gradient."""
    return (output @ torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum()


@dataclass(frozen=True)
class Work:
    """A model to be trained.

    Attributes:
        name: as the table shows it.
        make: gives the model.
        inputs: batch -> the inputs of a call.
        batch: rows of a call.
        loss: output -> scalar.
        lists: paths of the containers whose elements are the blocks of the model.
        branches: names, within a block, of the modules that are its residual functions; () where these are no modules.
        chain: a block takes the stream alone and returns it, and the model calls the elements of a container one after the other.
        residual: a block is x + f(x) for each of its branches in order, and nothing else.
        nested: there are more residual adds than those of the blocks, around them.
        stays: all blocks of a container keep the shape, also the first.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    batch: int
    loss: Callable[[Any], Tensor] = total
    lists: tuple[str, ...] = ("layers",)
    branches: tuple[str, ...] = ()
    chain: bool = True
    residual: bool = False
    nested: bool = False
    stays: bool = True


def head_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(nn.functional.linear(hidden, weight), target)


class LanguageModel(nn.Module):
    """ids (batch, context + 1) -> the mean cross entropy of each next one."""

    def __init__(self, layers: int, d: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.decoder, self.head = Decoder(layers, d, 6, context, vocabulary), head_loss

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.decoder.hidden(ids[:, :-1]).flatten(0, 1), self.decoder.tokens.weight, ids[:, 1:].flatten())


def mlp(depth: int, batch: int, width: int, hidden: int) -> Work:
    name = f"MLP {depth} x {batch} x {width}" + ("" if hidden == width else f", hidden {hidden}")
    return Work(name, lambda: MLP(depth, width, hidden), lambda n: (torch.randn(n, width),), batch, branches=("f",), residual=True)


def encoder(layers: int, d: int = 256, tokens: int = 256, batch: int = 8) -> Work:
    made = (lambda: Encoder(layers, d)), (lambda n: (torch.randn(n, tokens, d),))
    return Work(f"encoder, {layers} layers, d {d}", *made, batch, branches=("attention", "mlp"), residual=True)


def gpt2(layers: int, d: int, tokens: int, vocabulary: int, batch: int) -> Work:
    made = (lambda: GPT2(layers, d, tokens, vocabulary, 0.0)), (lambda n: (torch.randint(vocabulary, (n, tokens)),))
    return Work(f"GPT-2, {layers} layers, d {d}", *made, batch, as_it_is, ("lm.transformer.h",), ("attn", "mlp"), chain=False)


def language_model(layers: int, d: int, context: int, vocabulary: int, batch: int) -> Work:
    made = (lambda: LanguageModel(layers, d, context, vocabulary)), (lambda n: (torch.randint(vocabulary, (n, context + 1)),))
    name = f"LM, {layers} layers, d {d}"
    return Work(name, *made, batch, as_it_is, ("decoder.encoder.layers",), ("attention", "mlp"), residual=True)


def vision(px: int, layers: int, batch: int) -> Work:
    made = (lambda: vit(px, layers)), (lambda n: (torch.randn(n, 3, px, px),))
    return Work(f"ViT-S, {layers} layers, {px} px", *made, batch, lists=("encoder.layers",), branches=("self_attention", "mlp"))


def resnet(depth: int, px: int, batch: int = 8) -> Work:
    stages = tuple(f"layer{i}" for i in (1, 2, 3, 4))
    made = getattr(torchvision.models, f"resnet{depth}"), (lambda n: (torch.randn(n, 3, px, px),))
    return Work(f"ResNet-{depth}, {px} px", *made, batch, lists=stages, stays=False)


def translator(layers: int, d: int, tokens: int, batch: int) -> Work:
    lists = ("transformer.encoder.layers", "transformer.decoder.layers")
    made = (lambda: Translator(layers, d, 0.0)), (lambda n: (torch.randn(n, tokens, d), torch.randn(n, tokens, d)))
    return Work(f"nn.Transformer, {layers} + {layers}, d {d}", *made, batch, ramp, lists, chain=False)


def unet(channels: tuple[int, ...], blocks: int, px: int, batch: int) -> Work:
    lists = tuple(f"down.{i}" for i in range(len(channels))) + tuple(f"up.{i}" for i in range(len(channels) - 1))
    made = (lambda: UNet(channels, blocks)), (lambda n: (torch.randn(n, 3, px, px),))
    return Work(f"U-Net, {px} px", *made, batch, lists=lists, branches=("body",), residual=True, nested=True)


def diffusion(blocks: int, px: int, batch: int) -> Work:
    made = (lambda: DiffusionUNet(blocks=blocks)), (lambda n: (torch.randn(n, 3, px, px), torch.randint(1000, (n,)).float()))
    return Work(f"diffusion U-Net, {px} px", *made, batch, lists=("down.0", "down.1", "middle", "up.0", "up.1"), chain=False, stays=False)


def wavenet(channels: int, cycles: int, samples: int, batch: int) -> Work:
    made = (lambda: WaveNet(channels, cycles)), (lambda n: (torch.randn(n, 1, samples),))
    return Work(f"WaveNet, {8 * cycles} layers", *made, batch)


def _named(*works: Work) -> dict[str, Work]:
    return {work.name: work for work in works}


WORKS = _named(
    *(mlp(depth, 300, 500, 8) for depth in (10, 50, 200, 1000)),  # momentumnet's own example of a chain
    mlp(16, 2048, 256, 256),
    *(encoder(layers) for layers in (4, 12, 16, 32, 64)),
    gpt2(12, 384, 512, 10_000, batch=2),
    language_model(9, 384, 512, 10_000, batch=4),  # of an independent study of reversible transformers: gpu/study.py
    vision(128, 12, batch=8),
    *(resnet(depth, px) for depth in (50, 101, 152) for px in (96, 160)),
    translator(6, 256, 64, batch=8),
    unet((32, 64, 128), 4, 64, batch=4),
    diffusion(4, 32, batch=4),
    wavenet(64, 2, 4000, batch=4),
)
SMALL = _named(
    mlp(8, 64, 32, 8),
    encoder(3, 64, 32, 4),
    unet((16, 32), 2, 16, batch=2),
    mlp(6, 128, 32, 32),
    gpt2(2, 96, 32, 200, batch=2),
    language_model(2, 96, 32, 200, batch=2),
    vision(32, 2, batch=2),
    resnet(50, 64, batch=2),
    translator(2, 32, 8, batch=2),
    diffusion(2, 16, batch=2),
    wavenet(16, 1, 200, batch=2),
)
"""Small ones of each kind; the first three are those of --quick."""
