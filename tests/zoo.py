"""Models that several tests share, and how two of them are run and compared; nothing in here looks inside the runtime."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mnet_fx


@dataclass(frozen=True)
class Family:
    """One model of torchvision, and what is to be found in it.

    Attributes:
        name: function of `torchvision.models`.
        pixels: height and width of the images it is tried on.
        steps: steps of each region, in order.
        projections: how many residual-looking adds have a projection shortcut.
        short: how many are in chains of one step.
        adds_per_block: steps that become one with granularity="module".
    """

    name: str
    pixels: int
    steps: tuple[int, ...]
    projections: int = 0
    short: int = 0
    adds_per_block: int = 1

    @property
    def adds(self) -> int:
        return sum(self.steps) + self.projections + self.short

    def build(self) -> nn.Module:
        """The model with random weights, of which none hides what it multiplies: no zero heads, no LayerScale of 1e-6."""
        options = {"image_size": self.pixels, "dropout": 0.1, "attention_dropout": 0.1} if self.name.startswith("vit") else {}
        model = getattr(torchvision.models, self.name)(num_classes=20, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("layer_scale"):
                    parameter.uniform_(0.2, 0.8)
                elif not parameter.any():
                    parameter.normal_(std=0.02)
        return model

    def images(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(1))


FAMILIES = [
    Family("resnet18", 64, (2,), projections=3, short=3),
    Family("resnet101", 64, (2, 3, 22, 2), projections=4),
    Family("resnext50_32x4d", 64, (2, 3, 5, 2), projections=4),
    Family("wide_resnet50_2", 64, (2, 3, 5, 2), projections=4),
    Family("regnet_y_400mf", 64, (2, 5, 5), projections=4),
    Family("vit_b_16", 32, (24,), adds_per_block=2),
    Family("convnext_tiny", 64, (3, 3, 9, 3)),
    Family("swin_t", 64, (4, 4, 12, 4), adds_per_block=2),
    Family("efficientnet_b0", 64, (2, 2, 3), short=2),
    Family("mobilenet_v2", 64, (2, 3, 2, 2), short=1),
    Family("mobilenet_v3_small", 64, (2, 2), short=2),
]
QUICK = frozenset({"resnet18", "swin_t", "efficientnet_b0"})  # one for each way to write a block; the others take minutes together


class Recurrent(nn.Module):
    """LayerNorm, LSTM, dropout, linear, over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.lstm = nn.LayerNorm(width), nn.LSTM(width, width, batch_first=True)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.lstm(self.norm(x))[0]))


class Perceptron(nn.Module):
    """BatchNorm over tokens, linear, GELU, dropout, linear, and a learnt scale that no module of its own holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.drop, self.fc2 = (
            nn.BatchNorm1d(width),
            nn.Linear(width, 2 * width),
            nn.Dropout(0.2),
            nn.Linear(2 * width, width),
        )
        self.scale = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(0, 1)).view(x.shape)
        return self.scale * self.fc2(self.drop(nn.functional.gelu(self.fc1(y))))


class Everyday(nn.Module):
    """Two kinds of step in one chain: an LSTM and a perceptron with BatchNorm, both with dropout.

    Args:
        pairs: the chain has twice as many steps.
        extra: residual branches to put at the end of the chain.
    """

    def __init__(self, pairs: int = 3, extra: Iterable[nn.Module] = (), width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList([*(kind(width) for _ in range(pairs) for kind in (Recurrent, Perceptron)), *extra])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def tokens(seed: int = 1, batch: int = 4, width: int = 6) -> Tensor:
    """An input of `Everyday`."""
    return torch.randn(batch, 5, width, generator=torch.Generator().manual_seed(seed))


class Bottleneck(nn.Module):
    """Convolutions with BatchNorm and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.2), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Convolutional(nn.Module):
    """A chain of `Bottleneck`s."""

    def __init__(self, steps: int = 5, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([Bottleneck(width) for _ in range(steps)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class ConvolutionalBlock(nn.Module):
    """A residual block with statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For tests of small models: a second thread would only wait, and on a busy machine for long."""
    torch.set_num_threads(1)


def rewritten(model: nn.Module, **options) -> nn.Module:
    """`momentumize` without its warning that nothing was rewritten."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mnet_fx.MnetWarning)
        return mnet_fx.momentumize(model, **options)


def twins(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """The reversible and the stored form of a model, which share nothing."""
    return tuple(rewritten(copy.deepcopy(model), backward=kind, **options) for kind in ("reversible", "stored"))


def seeded(run: Callable, *args):
    """run(*args) with torch's random numbers from the start."""
    torch.manual_seed(7)
    return run(*args)


def leftovers(net: nn.Module, copied: bool = True) -> dict[str, Tensor | None]:
    """What a training step leaves in a model: gradients and buffers, both as copies (gradients only where asked for)."""
    grads = {f"grad of {name}": p.grad.clone() if copied and p.grad is not None else p.grad for name, p in net.named_parameters()}
    return grads | {f"buffer {name}": b.detach().clone() for name, b in net.named_buffers()}


def assert_identical(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Every tensor has the same bits (and no NaN, of which nothing could be said)."""
    assert list(found) == list(expected)
    assert any(t is not None for t in expected.values())
    different = []
    for name, t in expected.items():
        if t is None or found[name] is None:
            if found[name] is not t:
                different.append(f"{name}: {found[name]} for {t}")
        elif found[name].dtype is not t.dtype or not torch.equal(found[name], t):
            different.append(f"{name}: {found[name].dtype}, {t.dtype}, {(found[name] - t).abs().max():.2g} off {t.abs().max():.2g}")
    assert not different, "\n".join(different)


def assert_near(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Every tensor differs by at most `tolerance` times its own largest element.

    Tensors a million times smaller than the largest are taken to be zero but for rounding, such as the gradient of a bias in front of a
    BatchNorm, and may differ by `tolerance` times a millionth of the largest.
    """
    assert list(found) == list(expected)
    floats = {name: t for name, t in expected.items() if t is not None and t.is_floating_point() and t.numel()}
    floor = 1e-6 * max(t.abs().max().item() for t in floats.values())
    for name, t in expected.items():
        if t is None or name not in floats:
            assert found[name] is t or torch.equal(found[name], t), name
        else:
            error, size = (found[name] - t).abs().max().item(), max(t.abs().max().item(), floor)
            assert error <= tolerance * size, f"{name}: {error:.2g} off {size:.2g}, allowed {tolerance:.0e} of it"


def assert_agree(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Two structures of tensors are the same but for rounding: no entry differs by more than `tolerance` times the largest of all.

    For float32 and oracles that are the original, on any processor: how far one entry is off depends on the condition of the sum that it
    is, hence on the order in which a processor adds; how far it is off the largest entry does not. 1e-5 is 170 times the rounding of one.
    """
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    assert len(ours) == len(theirs)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(b, Tensor)]
    assert all(a == b for a, b in zip(ours, theirs, strict=True) if not isinstance(b, Tensor))
    assert all(a.shape == b.shape and a.dtype is b.dtype for a, b in pairs)
    exact = [(a, b) for a, b in pairs if not (b.is_floating_point() or b.is_complex())]
    assert all(torch.equal(a, b) for a, b in exact)
    floats = [(a.detach(), b.detach()) for a, b in pairs if (b.is_floating_point() or b.is_complex()) and b.numel()]
    largest = max((b.abs().max().item() for _, b in floats), default=0.0)
    for a, b in floats:
        error = (a - b).abs().max().item()
        assert error <= tolerance * largest, f"{error:.2g} off, of {largest:.2g} at most; allowed {tolerance:.0e} of it"
