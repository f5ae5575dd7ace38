"""A U-Net as diffusion models have it: residual blocks that read the time, attention in the middle, a decoder on concatenated skips."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DiffusionUNet"]


class Block(nn.Module):
    """x (batch, channels, height, width) and the time (batch, features) -> the same with `out` channels."""

    def __init__(self, channels: int, out: int, features: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(features, out)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """x + attention over the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(8, channels), nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(x.shape)


class DiffusionUNet(nn.Module):
    """Images (batch, 3, height, width) and times (batch) -> images.

    Args:
        channels: of each resolution.
        blocks: at each resolution on the way down; one more on the way up.
        features: of the embedded time.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64), blocks: int = 4, features: int = 64) -> None:
        super().__init__()
        self.enter, c, skips = nn.Conv2d(3, channels[0], 3, padding=1), channels[0], [channels[0]]
        self.embed = nn.Sequential(nn.Linear(32, features), nn.SiLU(), nn.Linear(features, features))
        self.down, self.shrink, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, out in enumerate(channels):
            self.down.append(nn.ModuleList(Block(c if j == 0 else out, out, features) for j in range(blocks)))
            c, skips = out, skips + [out] * blocks
            if i < len(channels) - 1:
                self.shrink.append(nn.Conv2d(out, out, 3, 2, 1))
                skips.append(out)
        self.middle = nn.ModuleList(PixelAttention(c) if j % 2 else Block(c, c, features) for j in range(5))
        for out in reversed(channels):
            self.up.append(nn.ModuleList(Block((c if j == 0 else out) + skips.pop(), out, features) for j in range(blocks + 1)))
            c = out
        self.leave = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        angles = times[:, None] * torch.exp(-math.log(1e4) * torch.arange(16, dtype=x.dtype, device=x.device) / 16)
        time = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.enter(x)
        skips = [x]
        for i, stage in enumerate(self.down):
            for block in stage:
                x = block(x, time)
                skips.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
                skips.append(x)
        for block in self.middle:
            x = block(x, time)
        for i, stage in enumerate(self.up):
            for block in stage:
                x = block(torch.cat([x, skips.pop()], 1), time)
            if i < len(self.up) - 1:
                x = F.interpolate(x, scale_factor=2.0)
        return self.leave(x)
