"""The transformers of torch.nn as a symbolic trace can read them, down to the attention and linear layers, which stay live.

Their own forwards look at dimensions, at the values of masks and for a fast path, all of which a trace cannot follow and none of which
changes what they compute: masks are brought to one dtype by the attention itself, and whether a mask is causal is a hint that lets it use
another kernel. Left out are checks of sizes, and what the fast path (eval mode, no gradients) does to padded tokens: it makes them zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

__all__ = ["opened"]


def opened(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of a transformer of torch.nn in a form that can be traced; None for any other module."""
    forward = _FORWARDS.get(inspect.getattr_static(type(module), "forward", None))
    return None if forward is None else partial(forward, module)


def _transformer(
    self: nn.Transformer,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
        tgt_is_causal=tgt_is_causal,
        memory_is_causal=memory_is_causal,
    )


def _encoder(self: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Any:
    for layer in self.layers:
        src = layer(src, src_mask=mask, is_causal=is_causal is True, src_key_padding_mask=src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


def _decoder(
    self: nn.TransformerDecoder,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: Any = False,
) -> Any:
    for layer in self.layers:
        tgt = layer(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal is True,
            memory_is_causal=memory_is_causal,
        )
    return tgt if self.norm is None else self.norm(tgt)


def _encoder_layer(
    self: nn.TransformerEncoderLayer, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = False
) -> Any:
    attend = partial(self._sa_block, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
    return _applied(self.norm_first, src, (self.norm1, attend), (self.norm2, self._ff_block))


def _decoder_layer(
    self: nn.TransformerDecoderLayer,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: Any = False,
    memory_is_causal: Any = False,
) -> Any:
    attend = partial(self._sa_block, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
    cross = partial(
        self._mha_block, mem=memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal
    )
    return _applied(self.norm_first, tgt, (self.norm1, attend), (self.norm2, cross), (self.norm3, self._ff_block))


def _applied(norm_first: bool, x: Any, *blocks: tuple[Callable[[Any], Any], Callable[[Any], Any]]) -> Any:
    for norm, block in blocks:
        x = x + block(norm(x)) if norm_first else norm(x + block(x))
    return x


_FORWARDS: dict[Any, Callable[..., Any]] = {
    nn.Transformer.forward: _transformer,
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerDecoder.forward: _decoder,
    nn.TransformerEncoderLayer.forward: _encoder_layer,
    nn.TransformerDecoderLayer.forward: _decoder_layer,
}
