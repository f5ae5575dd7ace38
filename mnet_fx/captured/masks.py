"""Transformers of torch.nn look at the values of a mask, to see whether it is a causal one, which breaks Dynamo's graph before the layers.

What they find is but a hint, which lets the attention take another kernel where the caller said nothing. So a caller who said nothing is
taken to have said no, and the mask is applied as what it is.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["read_masks", "unread_masks"]

_FAST = "activation_relu_or_gelu"  # of a TransformerEncoderLayer; 0: it takes no fast path in eval mode, which has no residual adds
_FAST_BEFORE = "_mnet_fx_fast_path"  # what it was


def unread_masks(net: nn.Module) -> None:
    """Gives the encoders and decoders of a model forwards that do not look at the values of masks, if they have none of their own; and
    their layers no fast path."""
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.__dict__[_FAST_BEFORE] = module.__dict__.get(_FAST, 0)
            module.__dict__[_FAST] = 0
        forward = _FORWARDS.get(inspect.getattr_static(type(module), "forward", None))  # static: that of a script is a descriptor
        if forward is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = partial(forward, module)


def read_masks(net: nn.Module) -> None:
    """Undoes `unread_masks`."""
    for module in net.modules():
        if _FAST_BEFORE in module.__dict__:
            module.__dict__[_FAST] = module.__dict__.pop(_FAST_BEFORE)
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func in _FORWARDS.values():
            del module.__dict__["forward"]


def _encoder(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    return nn.TransformerEncoder.forward(self, src, mask, src_key_padding_mask, is_causal is True)


def _decoder(
    self: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
    return nn.TransformerDecoder.forward(self, tgt, memory, *masks, tgt_is_causal is True, memory_is_causal)


_FORWARDS: dict[Any, Any] = {nn.TransformerEncoder.forward: _encoder, nn.TransformerDecoder.forward: _decoder}
