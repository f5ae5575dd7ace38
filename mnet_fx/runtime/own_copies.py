"""Side inputs and buffers that somebody overwrites after a step of a named region has read them.

No graph tells of such a write, so the region learns it: the first call of a layer keeps copies of them all, the backward pass sees which
of the originals have changed, and later calls keep copies of those alone. A rerun reads a copy only where the original has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .guise import is_ordinary

__all__ = ["Learnt", "OwnCopies", "is_copyable"]


@dataclass
class Learnt:
    """What a region knows of such writes.

    Attributes:
        overwritten: by layer and name, whether it ever was; what is not in here is still to have its first backward pass.
        sizes: by the name that the report uses, bytes of each that was; 0 where it shares the copy of another layer.
    """

    overwritten: dict[tuple[str, str], bool] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class OwnCopies:
    """The copies that one chain keeps.

    Args:
        learnt: by its region, which learns from this chain too.
    """

    def __init__(self, learnt: Learnt) -> None:
        self.learnt = learnt
        self.copies: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}  # by id and fingerprint; with the original, whose id it is
        self.counted: set[int] = set()  # copies whose bytes the report has

    def wanted(self, layer: str, name: str) -> bool:
        """Whether a copy is to be kept of that side input or buffer."""
        return self.learnt.overwritten.get((layer, name), True)

    def shared(self, t: Tensor, print_: Any) -> Tensor:
        """A copy of t as it is now, with that fingerprint; the same one for every layer that reads t so.

        If the fingerprint is on a device, where nobody reads it yet, t._version stands for it.
        """
        key = (id(t), (None if t.is_inference() else t._version) if isinstance(print_, Tensor) else print_)
        if key not in self.copies:
            self.copies[key] = (t, _copy(t))
        return self.copies[key][1]

    def lesson(self, layer: str, copies: dict[str, Tensor]) -> Callable[[Set[str]], None]:
        """What is to be called with the names of the side inputs and buffers of a layer that were overwritten since its first run.

        It notes them: one that ever was is copied from then on. It keeps no tensors, as it may be called when the tape is gone.

        Args:
            layer: the step's name in the region.
            copies: those that were copied.
        """
        return partial(_learn, self.learnt, self.counted, layer, {name: (id(copy), _bytes(copy)) for name, copy in copies.items()})


def _learn(learnt: Learnt, counted: set[int], layer: str, copied: dict[str, tuple[int, int]], overwritten: Set[str]) -> None:
    """See `OwnCopies.lesson`. copied: by name, which copy it is and its bytes."""
    known = learnt.overwritten
    if unforeseen := overwritten - copied.keys():  # what was believed unchanged is overwritten: all such beliefs are given up
        learnt.overwritten = {key: True for key, was in known.items() if was} | {(layer, name): True for name in unforeseen}
        return
    for name, (which, size) in copied.items():
        key = (layer, name)
        label = f"{name} of {layer.rstrip('.')}" if name.startswith("side") else name
        if name in overwritten and label not in learnt.sizes:
            learnt.sizes[label] = 0 if which in counted else size
            counted.add(which)
        known[key] = known.get(key, False) or name in overwritten


def _bytes(t: Tensor) -> int:
    return t.untyped_storage().nbytes() if is_ordinary(t) else 0


def is_copyable(t: Any) -> bool:
    """Whether it is a tensor of numbers, and no parameter."""
    return isinstance(t, Tensor) and is_ordinary(t) and t.numel() > 0 and not (t.is_leaf and t.requires_grad)


def _copy(t: Tensor) -> Tensor:
    """The same values in other memory, with the strides of t (expanded ones too), which choose kernels; requires gradients if t does."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    with torch.no_grad():
        if extent > t.numel():  # a view of a larger tensor
            return t.detach().clone().requires_grad_(t.requires_grad)
        copy = t.detach().as_strided((extent,), (1,)).clone().as_strided(t.shape, t.stride(), 0)
    return copy.requires_grad_(t.requires_grad)
