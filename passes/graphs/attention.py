"""An operation of our own that captured graphs may hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attention_by"]


def attention_by(names: tuple[str, ...], in_order: bool, *args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention(*args, **kwargs)` by one of some kernels.

    Args:
        names: those of `torch.nn.attention.SDPBackend`.
        in_order: whether the first of them that can is to be taken.
    """
    with sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=in_order):
        return scaled_dot_product_attention(*args, **kwargs)
