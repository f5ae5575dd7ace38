"""Memory that operations on a CPU take while they run, beyond their results: what no fake tensor shows.

Convolutions go through oneDNN, which puts images and weights in blocks of 16 channels first, and its result back in order after:

    forward    x, w in blocks -> y in blocks | -> y            backward    gy, w, gx in blocks | -> gx | gy, x, gw in blocks -> gw

so the most it holds beside its results follows from the sizes. Where channels are in groups, how many a group has decides what goes through
blocks; of images that are channels-last, weights alone do, and the gradient of a grouped one is summed in blocks of 16 x 16 for each group.
Read off the allocator (torch 2.14, x86 with AVX-512); elsewhere it is an approximation. On GPUs it depends on the algorithm that cuDNN
chooses, and is not counted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["workspace"]

aten = torch.ops.aten
_BLOCK = 16  # channels
_COPIES = 4  # of the gradient of a weight that a thread sums up apart, about
_PRODUCTS = frozenset([aten.mm.default, aten.addmm.default, aten.bmm.default])


def workspace(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that an aten operation takes while it runs, beyond its results; 0 where nothing is known."""
    if func is aten.convolution.default:
        x, w, _, stride, _, _, transposed, _, groups = args
        return _forward(_Convolution(x, w, stride, transposed, groups), _output(x, w, args)) if x.device.type == "cpu" else 0
    if func is aten.convolution_backward.default:
        gy, x, w, _, stride, _, _, transposed, _, groups, mask = args
        return _backward(_Convolution(x, w, stride, transposed, groups), gy, mask) if x.device.type == "cpu" else 0
    if func in _PRODUCTS:
        return sum(_bytes(t) for t in args[-2:] if t.device.type == "cpu" and not _is_matrix(t))
    if func is aten.native_batch_norm_backward.default:
        return _bytes(args[1]) if args[1].device.type == "cpu" else 0
    return 0


def _is_matrix(t: Tensor) -> bool:
    """Whether BLAS can read a matrix, or several, as it lies in memory; others, such as the gradient of a sum, are copied."""
    rows, columns = t.shape[-2:]
    down, right = t.stride()[-2:]
    return (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns))


class _Convolution:
    """Sizes in bytes of one convolution, plain and in blocks."""

    def __init__(self, x: Tensor, w: Tensor, stride: list[int], transposed: bool, groups: int) -> None:
        self.x, self.w, self.groups, self.transposed = x, w, groups, transposed
        self.kernel = math.prod(w.shape[2:])
        self.strided = any(s > 1 for s in stride)
        self.last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        inner, outer = x.shape[1] // groups, w.shape[1] if transposed else w.shape[0] // groups  # channels of a group
        self.depthwise = groups > 1 and inner == outer == 1
        self.grouped = groups > 1 and not self.depthwise
        self.narrow = groups > 1 and max(inner, outer) <= _BLOCK
        self.odd = self.grouped and (inner % 4 or outer % 4) != 0  # only results are put in blocks
        # The gradient of the weight is made from images in blocks. Else each thread has copies of it.
        self.reads_blocks = max(w.shape[2:], default=1) <= 3 if self.depthwise else groups == 1 or inner % 8 == outer % 8 == 0
        self.spread = groups * _padded(inner) * _padded(outer) * self.kernel * w.element_size()  # the weight in blocks for each group
        self.in_blocks = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and self._by_onednn()

    def _by_onednn(self) -> bool:
        return self.strided or self.kernel != 1 or self.x.shape[0] >= 16 or torch.get_num_threads() > 1

    def blocked(self, t: Tensor) -> int:
        """Bytes of an image in blocks."""
        channels = t.shape[1] if self.grouped else _padded(t.shape[1])
        return _bytes(t) // t.shape[1] * channels if t.shape[1] else 0

    @property
    def input(self) -> int:
        """Bytes of the input in blocks; images of few channels are read as they are."""
        return self.blocked(self.x) if self.x.shape[1] >= _BLOCK else 0

    def weight(self, few: bool = False) -> int:
        """Bytes of the weight in blocks; `few`: with the input's channels as they are if they are few."""
        o, c = self.w.shape[:2]
        inner = c if self.groups > 1 or (few and c < _BLOCK) else _padded(c)
        return _padded(o) * inner * self.kernel * self.w.element_size()


def _forward(c: _Convolution, y: int) -> int:
    if not c.in_blocks:
        return 0 if c.kernel == 1 or c.groups > 1 else y * c.x.shape[1] * c.kernel // max(c.w.shape[0], 1)  # columns
    if c.last:
        return c.weight(few=True) + (c.spread if c.odd else 0 if c.depthwise or c.kernel == 1 else c.weight(few=True))
    if c.odd:
        return y
    outputs = c.w.shape[0] if not c.transposed else c.w.shape[1] * c.groups
    blocked = y if c.grouped else y // outputs * _padded(outputs)
    back = blocked + y if c.transposed and c.strided else blocked
    return max(c.input + c.weight(few=True) + blocked - y, back)


def _backward(c: _Convolution, gy: Tensor, mask: list[bool]) -> int:
    gx, gw = _bytes(c.x) if mask[0] else 0, _bytes(c.w) if mask[1] else 0
    return _copied(gy) + _backward_of(c, gy, gx, gw, mask)


def _copied(gy: Tensor) -> int:
    """Bytes of a copy, where a gradient lies in no order of its own, as that of a sum."""
    return _bytes(gy) if gy.numel() > 1 and 0 in gy.stride() else 0


def _backward_of(c: _Convolution, gy: Tensor, gx: int, gw: int, mask: list[bool]) -> int:
    if not c.in_blocks:
        return 0 if c.kernel == 1 or c.groups > 1 else _bytes(gy) * c.x.shape[1] * c.kernel // max(c.w.shape[0], 1)
    if c.last:
        summed = c.spread if mask[1] and not (c.depthwise and c.reads_blocks) else c.weight(few=True)
        return summed + (1 if c.depthwise or c.kernel == 1 else 2) * c.weight(few=True)
    heights = [0]
    if mask[0]:
        few = c.strided and c.x.shape[1] < _BLOCK
        blocked = gx if few else c.blocked(c.x)
        twice = c.strided and not c.transposed and not c.narrow
        heights += [0 if c.odd else c.blocked(gy) + c.weight() + blocked, blocked + (2 if twice else 1) * gx]
    if mask[1] and not c.reads_blocks:
        heights += [gx + gw + _COPIES * torch.get_num_threads() * gw]
    elif mask[1]:
        heights += [gx + c.blocked(gy) + c.input + c.weight(few=True), gx + c.weight(few=True) + gw]
    return max(0, max(heights) - gx - gw)


def _output(x: Tensor, w: Tensor, args: Any) -> int:
    """Bytes of the result of a convolution."""
    _, _, _, stride, padding, dilation, transposed, extra, groups = args
    sizes = []
    for i, size in enumerate(x.shape[2:]):
        at = i if len(stride) > 1 else 0
        reach = dilation[at] * (w.shape[2 + i] - 1)
        sizes.append(
            (size - 1) * stride[at] - 2 * padding[at] + reach + extra[at] + 1
            if transposed
            else (size + 2 * padding[at] - reach - 1) // stride[at] + 1
        )
    channels = w.shape[1] * groups if transposed else w.shape[0]
    return x.shape[0] * channels * math.prod(sizes) * x.element_size()


def _padded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
