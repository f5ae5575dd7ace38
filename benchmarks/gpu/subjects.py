"""The models that are measured, with random weights, and what a training step of each is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Encoder
from .session import Session

__all__ = ["SUBJECTS", "Subject", "encoder"]


@dataclass
class Subject:
    """A model and a call of it.

    Attributes:
        name: for the table.
        model: in train mode.
        loss: calls what it is given (the model, or a form of it) and gives the loss.
        layers: paths of the layers that `torch.utils.checkpoint` goes around.
        units, unit: how many tokens or images a step takes.
        autocast: dtype, or None.
        regions: for momentumize, where capturing the model takes too long.
        scale: factor of the loss, for float16.
    """

    name: str
    model: nn.Module
    loss: Callable[[Callable[..., Any]], Tensor]
    layers: list[str]
    units: int
    unit: str
    autocast: torch.dtype | None = None
    regions: list[str] | None = None
    scale: float = 1.0

    def forward(self, call: Callable[..., Any]) -> Tensor:
        """The scaled loss of a form of the model."""
        device = next(self.model.parameters()).device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            loss = self.loss(call)
        return loss * self.scale

    def step(self, call: Callable[..., Any]) -> None:
        """Forward and backward, without an optimiser, which takes the same for every form."""
        self.forward(call).backward()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made within is of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def encoder(session: Session, layers: int, batch: int, dtype: torch.dtype, autocast: torch.dtype | None = None, d: int = 1024) -> Subject:
    """Pre-norm encoder, heads of 64, 2048 tokens."""
    d, heads, tokens = (32, 2, 16) if session.tiny else (d, d // 64, 2048)
    with torch.device(session.device), default_dtype(dtype):  # made in it: 400 layers in float32 would take more than they do later
        model, x = Encoder(layers, d, heads), torch.randn(batch, tokens, d)
    how = "bf16" if autocast is None else "autocast bf16"
    paths = [f"layers.{i}" for i in range(layers)]
    name = f"encoder of {layers} layers, d = {d}, {batch} x {tokens} tokens, {how}"
    return Subject(name, model, lambda f: f(x).float().square().mean(), paths, batch * tokens, "tokens", autocast)


def encoder_bf16(session: Session) -> Subject:
    return encoder(session, *((2, 2) if session.tiny else (24, 8)), torch.bfloat16)


def encoder_autocast(session: Session) -> Subject:
    return encoder(session, *((2, 2) if session.tiny else (24, 8)), torch.float32, torch.bfloat16)


def encoder_wide(session: Session) -> Subject:
    """Where the device has more to do than Python."""
    return encoder(session, *((2, 2) if session.tiny else (12, 8)), torch.bfloat16, d=2048)


def gpt2(session: Session) -> Subject:
    """GPT-2 small of Hugging Face with its dropout, parameters in float32 under autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel

    batch, tokens = (2, 16) if session.tiny else (8, 1024)
    small: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**(small if session.tiny else {}))
    model, loss = _language_model(session, GPT2LMHeadModel, config, batch, tokens)
    paths = [f"transformer.h.{i}" for i in range(config.n_layer)]
    name = f"GPT-2 small, {batch} x {tokens} tokens, autocast bf16"
    return Subject(name, model, loss, paths, batch * tokens, "tokens", torch.bfloat16)


def llama(session: Session) -> Subject:
    """1.1 B parameters in bfloat16, the shape of TinyLlama. Its layers are named: to capture 44 adds takes longer than to measure them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, tokens = (2, 16) if session.tiny else (4, 2048)
    sizes = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), (2048, 5632, 22, 32), strict=True))
    small = dict(zip(sizes, (32, 64, 2, 4), strict=True))
    config = LlamaConfig(**(small if session.tiny else sizes), num_key_value_heads=4, vocab_size=100 if session.tiny else 32000)
    model, loss = _language_model(session, LlamaForCausalLM, config, batch, tokens)
    model.to(torch.bfloat16)
    paths = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    name = f"Llama of 1.1 B parameters, {batch} x {tokens} tokens, bf16"
    return Subject(name, model, loss, paths, batch * tokens, "tokens", regions=["model.layers"])


def _language_model(session: Session, kind: Any, config: Any, batch: int, tokens: int) -> tuple[nn.Module, Callable]:
    with torch.device(session.device):
        model = kind(config).train()
        ids = torch.randint(config.vocab_size, (batch, tokens))
    return model, lambda f: f(input_ids=ids, labels=ids, use_cache=False).loss


def _resnet(session: Session, how: str, autocast: torch.dtype | None, layout: torch.memory_format) -> Subject:
    from torchvision.models.resnet import Bottleneck, ResNet

    blocks, batch, pixels = ([3, 1, 1, 1], 2, 32) if session.tiny else ([3, 8, 36, 3], 64, 224)
    with torch.device(session.device):
        model = ResNet(Bottleneck, blocks).to(memory_format=layout)
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))
    images = images.to(memory_format=layout)
    paths = [f"layer{i}.{j}" for i, n in enumerate(blocks, 1) for j in range(n)]
    name = f"ResNet-152, {batch} images, {how}"
    return Subject(name, model, lambda f: nn.functional.cross_entropy(f(images), labels), paths, batch, "images", autocast)


def resnet_float(session: Session) -> Subject:
    """Convolutions in TF32, as torch does by default."""
    return _resnet(session, "float32, convolutions in TF32", None, torch.contiguous_format)


def resnet_autocast(session: Session) -> Subject:
    return _resnet(session, "channels last, autocast bf16", torch.bfloat16, torch.channels_last)


SUBJECTS: dict[str, Callable[[Session], Subject]] = {
    "encoder_bf16": encoder_bf16,
    "encoder_autocast": encoder_autocast,
    "encoder_wide": encoder_wide,
    "gpt2": gpt2,
    "llama": llama,
    "resnet_float": resnet_float,
    "resnet_autocast": resnet_autocast,
}
