"""Streams that are more than numbers in memory: subclasses of `Tensor`, which steps meet in every run, and what no chain can carry.

The tape works on numbers alone. A subclass that only adds Python to them (methods, attributes, a `__torch_function__`) is taken off before,
and put on again after. What x[t+1] is, the subclass itself decides: it is what its own x + y would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import StreamError

__all__ = ["Guise", "check_carried", "dressed", "is_ordinary", "plain"]


@dataclass(frozen=True)
class Guise:
    """The class of a tensor, and the attributes of that tensor."""

    kind: type[Tensor]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, t: Tensor) -> Guise | None:
        """None for tensors that are nothing more."""
        return None if not _is_dressed(t) else cls(type(t), dict(t.__dict__))

    @classmethod
    def of_sum(cls, x: Tensor, y: Tensor, region: str) -> Guise | None:
        """That of x + y.

        Raises:
            StreamError: the sum is one that no chain can carry.
        """
        if not _is_dressed(x) and not _is_dressed(y):
            return None
        total = x.detach() + y.detach()
        check_carried(region, total)
        return cls.of(total)


def dressed(t: Tensor, guise: Guise | None) -> Tensor:
    """A tensor of the same memory in that guise; of the same history, if it has none."""
    if guise is None:
        return t
    result = Tensor._make_subclass(guise.kind, t)
    result.__dict__.update(guise.attributes)
    return result


def plain(t: Tensor) -> Tensor:
    """The numbers of a tensor alone, without history where that takes a subclass off."""
    if not _is_dressed(t):
        return t
    with torch._C.DisableTorchFunction():
        return t.detach().as_subclass(Tensor)


def _is_dressed(t: Tensor) -> bool:
    """Whether a tensor is numbers in memory, and Python around them."""
    return type(t) not in (Tensor, nn.Parameter) and type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_ordinary(t: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in memory, with strides."""
    return type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_quantized and not t.is_nested


def check_carried(region: str, x: Tensor) -> None:
    """
    Raises:
        StreamError: x has no numbers in memory of its own: it wraps other tensors, or keeps them in another layout.
    """
    wrapped = (
        type(x) not in (Tensor, nn.Parameter, FakeTensor) and not _is_dressed(x) and not hasattr(x, "trigger_wait")
    )  # of a collective: numbers, soon
    if x.is_nested:
        found, remedy = "is a nested tensor, whose rows differ in length", "pad it (torch.nested.to_padded_tensor) and mask the padding"
    elif hasattr(x, "to_local"):
        found, remedy = "is a DTensor", "give the chain x.to_local(), and make a DTensor of its result (DTensor.from_local)"
    elif wrapped:
        found, remedy = f"is a {type(x).__name__}, which wraps other tensors", "give the chain the tensor inside"
    elif x.layout is not torch.strided:
        found, remedy = f"has the layout {x.layout}", "give the chain x.to_dense()"
    else:
        return
    raise StreamError(
        f"{region}: the stream {found}, and a momentum chain carries numbers in memory only: {remedy}, or leave these layers out"
    )
