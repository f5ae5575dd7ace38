"""Models whose training steps `estimate.py` predicts and measures: each a function that gives (model, inputs, loss)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torchvision
from models import Encoder
from torch import Tensor, nn

__all__ = ["GPT2", "MODELS", "Translator", "UNet", "WaveNet", "vit"]


class GPT2(nn.Module):
    """GPT-2 of Hugging Face with head and loss."""

    def __init__(self, layers: int = 12, d: int = 256, tokens: int = 256, vocabulary: int = 8192, dropout: float = 0.1) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.lm = GPT2LMHeadModel(
            GPT2Config(
                n_layer=layers,
                n_embd=d,
                n_head=d // 32,
                n_positions=tokens,
                vocab_size=vocabulary,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
                loss_type="ForCausalLM",
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(input_ids=ids, labels=ids).loss


class Translator(nn.Module):
    """nn.Transformer, encoder and decoder, pre-norm."""

    def __init__(self, layers: int = 8, d: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.transformer = nn.Transformer(d, 8, layers, layers, 4 * d, dropout=dropout, norm_first=True, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.transformer(source, target)


class Residual(nn.Module):
    """x + conv(act(norm(x))), twice, for images or sounds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class UNet(nn.Module):
    """A U-Net of residual blocks: three resolutions, four blocks at each, skip connections between the two sides."""

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), blocks: int = 4) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*(Residual(c) for _ in range(blocks))) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(channels))
        self.up = nn.ModuleList(nn.Sequential(*(Residual(c) for _ in range(blocks))) for c in channels[:-1])
        self.leave = nn.Conv2d(channels[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.enter(x), []
        for i, stage in enumerate(self.down):
            x = stage(x)
            if i < len(self.shrink):
                skips.append(x)
                x = self.shrink[i](x)
        for i in reversed(range(len(self.up))):
            x = self.up[i](self.grow[i](x) + skips[i])
        return self.leave(x)


class Gated(nn.Module):
    """One layer of a WaveNet: x + out(tanh(filter(x)) * sigmoid(gate(x))), dilated and causal."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((dilation, 0), 0.0)
        self.filter, self.gate = (nn.Conv1d(channels, channels, 2, dilation=dilation) for _ in range(2))
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = self.pad(x)
        return x + self.out(torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded)))


class WaveNet(nn.Module):
    """Cycles of eight dilated layers."""

    def __init__(self, channels: int = 64, cycles: int = 2) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, channels, 1)
        self.layers = nn.ModuleList(Gated(channels, 2**i) for _ in range(cycles) for i in range(8))
        self.leave = nn.Conv1d(channels, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def _sum(output: Any) -> Tensor:
    return output.sum()


def vit(px: int, layers: int = 12) -> nn.Module:
    """ViT-S/16 of torchvision."""
    return torchvision.models.VisionTransformer(px, patch_size=16, num_layers=layers, num_heads=6, hidden_dim=384, mlp_dim=1536)


MODELS: dict[str, tuple[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], Callable[[Any], Tensor]]] = {
    "encoder": ("transformer", lambda: (Encoder(16), (torch.randn(8, 256, 256),)), _sum),
    "GPT-2": ("transformer", lambda: (GPT2(), (torch.randint(0, 8192, (4, 256)),)), lambda loss: loss),
    "ViT-S/16": ("transformer", lambda: (vit(224), (torch.randn(2, 3, 224, 224),)), _sum),
    "nn.Transformer": ("transformer", lambda: (Translator(), (torch.randn(4, 128, 256), torch.randn(4, 128, 256))), _sum),
    "ResNet-50": ("convolutional", lambda: (torchvision.models.resnet50(), (torch.randn(4, 3, 224, 224),)), _sum),
    "ResNet-101": ("convolutional", lambda: (torchvision.models.resnet101(), (torch.randn(4, 3, 128, 128),)), _sum),
    "U-Net": ("convolutional", lambda: (UNet(), (torch.randn(4, 3, 64, 64),)), _sum),
    "WaveNet": ("convolutional", lambda: (WaveNet(), (torch.randn(4, 1, 4000),)), _sum),
}
