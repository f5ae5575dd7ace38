"""Models that several benchmarks and tests measure."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["MLP", "Attention", "Decoder", "Encoder", "Layer", "Skip", "checkpointed", "checkpointed_layers"]


class Attention(nn.Module):
    """Pre-norm self-attention without the skip: x (batch, tokens, d) -> the same shape."""

    def __init__(self, d: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Pre-norm transformer layer, two residual adds."""

    def __init__(self, d: int, heads: int, dropout: float, causal: bool = False) -> None:
        super().__init__()
        self.attention = Attention(d, heads, causal)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(x))
        return x + self.dropout(self.mlp(x))


class Encoder(nn.Module):
    """Pre-norm transformer encoder over embedded tokens (batch, tokens, d), in plain Python."""

    def __init__(self, layers: int, d: int = 256, heads: int = 8, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d, heads, dropout, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Causal pre-LN language model with a tied head: ids (batch, tokens) -> logits (batch, tokens, vocabulary)."""

    def __init__(self, layers: int, d: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.encoder, self.norm = Encoder(layers, d, heads, causal=True), nn.LayerNorm(d)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head is given: (batch, tokens, d)."""
        return self.norm(self.encoder(self.tokens(ids) + self.places.weight[: ids.shape[1]]))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.hidden(ids), self.tokens.weight)


class Skip(nn.Module):
    """x + f(x)"""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class MLP(nn.Module):
    """A chain of x + f(x) on (batch, width), each f linear, tanh, linear."""

    def __init__(self, depth: int, width: int, hidden: int) -> None:
        super().__init__()
        functions = (nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)) for _ in range(depth))
        self.layers = nn.Sequential(*map(Skip, functions))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def checkpointed_layers(encoder: Encoder, x: Tensor) -> Tensor:
    """The encoder with `torch.utils.checkpoint` around each layer: the usual way to save its memory."""
    for layer in encoder.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def checkpointed(encoder: Encoder, x: Tensor) -> Tensor:
    """The encoder with `torch.utils.checkpoint` around each residual function: what is run again at once is as in a momentum step."""
    for layer in encoder.layers:
        for branch in (layer.attention, layer.mlp):
            x = x + layer.dropout(checkpoint(branch, x, use_reentrant=False))
    return x
