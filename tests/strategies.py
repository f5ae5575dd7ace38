"""Random residual programs, drawn as short lists of small specs, so that a failing one shrinks to a block or two.

    Block("scaled"), Block("early_exit"), Block("two_input")      --Program-->      a module that applies one after the other

`KINDS` says what each kind of block does to the stream and which refusal it must meet, if any.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4


@dataclass(frozen=True)
class Block:
    """One block of a program.

    Attributes:
        kind: a key of `KINDS`.
        back: how many blocks back the block is whose branch this one shares; 0 for a branch of its own.
    """

    kind: str
    back: int = 0


class Branch(nn.Module):
    """tanh, a mixing layer, and what the kind asks for around it. tanh comes first since its gradient does not need the stream, which may
    be overwritten in place."""

    def __init__(self, kind: str, conv: bool) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        if kind == "batch_norm":
            self.norm = nn.BatchNorm2d(WIDTH) if conv else nn.BatchNorm1d(WIDTH)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if conv else nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3) if kind == "dropout" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.mix(self.norm(torch.tanh(x))))


@dataclass
class Values:
    """What the blocks of a program hand on besides the stream."""

    side: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None


class Applied(nn.Module):
    """A block: the stream after it, from the stream before it."""

    def __init__(self, kind: str, branch: Branch, conv: bool) -> None:
        super().__init__()
        self.kind, self.branch = kind, branch
        if kind in ("projection", "plain", "parallel", "nested", "chain_inside"):
            self.other = Branch("linear", conv)
        if kind == "scaled":
            self.scale = nn.Parameter(torch.rand(WIDTH, *(1, 1)[: 2 * conv]))
        if kind == "post_norm":
            self.after = nn.GroupNorm(1, WIDTH)
        if kind == "post_dropout":
            self.after = nn.Dropout(0.3)

    def residual(self, x: Tensor, side: Tensor) -> Tensor:
        """f(x) of the kinds that are x + f(x); as plain mathematics, nothing in place."""
        if self.kind == "two_input":
            return self.branch(x * side)
        y = self.branch(x)
        if self.kind == "scaled":
            return self.scale * y
        if self.kind == "parallel":
            return y + self.other(x)
        if self.kind == "scaled_skip":
            return y - 0.5 * x
        if self.kind in ("minus", "in_place_minus"):
            return -y
        if self.kind == "addcmul":
            return 0.5 * side * y
        return {"scaled_number": 0.3 * y, "alpha": 0.5 * y}.get(self.kind, y)

    def forward(self, x: Tensor, values: Values) -> Tensor:
        return getattr(self, f"_{self.kind}", self._linear)(x, values)

    def _linear(self, x: Tensor, values: Values) -> Tensor:
        return x + self.branch(x)

    def _two_input(self, x: Tensor, values: Values) -> Tensor:
        return self.branch(x * values.side) + x

    def _projection(self, x: Tensor, values: Values) -> Tensor:
        return self.other.mix(x) + self.branch(self.branch(x))

    def _plain(self, x: Tensor, values: Values) -> Tensor:
        return self.other(x)

    def _scaled(self, x: Tensor, values: Values) -> Tensor:
        return x + self.scale * self.branch(x)

    def _scaled_number(self, x: Tensor, values: Values) -> Tensor:
        return x + 0.3 * self.branch(x)

    def _post_activation(self, x: Tensor, values: Values) -> Tensor:
        return nn.functional.gelu(x + self.branch(x))  # not relu, which needs its result, that the next block may overwrite

    def _post_norm(self, x: Tensor, values: Values) -> Tensor:
        return self.after(x + self.branch(x))

    def _post_dropout(self, x: Tensor, values: Values) -> Tensor:
        return self.after(x + self.branch(x))

    def _parallel(self, x: Tensor, values: Values) -> Tensor:
        return x + self.branch(x) + self.other(x)

    def _nested(self, x: Tensor, values: Values) -> Tensor:
        y = self.branch(x)
        return x + (y + self.other(x + y))

    def _chain_inside(self, x: Tensor, values: Values) -> Tensor:
        y = self.branch(x)
        y = y + self.other(y)
        y = y + self.other(y * values.side)
        return x + self.branch.mix(y)

    def _early_exit(self, x: Tensor, values: Values) -> Tensor:
        x = x + self.branch(x)
        values.outputs.append(x)
        return x

    def _shows_branch(self, x: Tensor, values: Values) -> Tensor:
        values.hidden = self.branch(x)
        values.outputs.append(values.hidden)
        return x + values.hidden

    def _reads_hidden(self, x: Tensor, values: Values) -> Tensor:
        return x + self.branch(x if values.hidden is None else x * values.hidden)

    def _torch_add(self, x: Tensor, values: Values) -> Tensor:
        return torch.add(x, self.branch(x))

    def _method_add(self, x: Tensor, values: Values) -> Tensor:
        return self.branch(x).add(x)

    def _alpha(self, x: Tensor, values: Values) -> Tensor:
        return torch.add(x, self.branch(x), alpha=0.5)

    def _scaled_skip(self, x: Tensor, values: Values) -> Tensor:
        return 0.5 * x + self.branch(x)

    def _minus(self, x: Tensor, values: Values) -> Tensor:
        return x - self.branch(x)

    def _addcmul(self, x: Tensor, values: Values) -> Tensor:
        return torch.addcmul(x, values.side, self.branch(x), value=0.5)

    def _in_place_minus(self, x: Tensor, values: Values) -> Tensor:
        x -= self.branch(x)
        return x

    def _in_place_add(self, x: Tensor, values: Values) -> Tensor:
        x += self.branch(x)
        return x

    def _method_in_place_add(self, x: Tensor, values: Values) -> Tensor:
        return x.add_(self.branch(x))

    def _into_branch(self, x: Tensor, values: Values) -> Tensor:
        y = self.branch(x)
        y += x
        return y

    def _in_place_relu(self, x: Tensor, values: Values) -> Tensor:
        return x + self.branch.mix(torch.relu_(x))

    def _in_place_scale(self, x: Tensor, values: Values) -> Tensor:
        x *= 0.5
        return x + self.branch(x)

    def _set_item(self, x: Tensor, values: Values) -> Tensor:
        y = self.branch(x)
        x[:, :1] = 1.0
        return x + y

    def _mutated_side(self, x: Tensor, values: Values) -> Tensor:
        return x + self.branch(values.side.add_(x.sum_to_size(values.side.shape)) * 0.5)


# Steps that are exactly x + f(x, side), whatever way they are written.
ADDITIVE = [
    "linear",
    "batch_norm",
    "dropout",
    "two_input",
    "scaled",
    "scaled_number",
    "parallel",
    "early_exit",
    "shows_branch",
    "torch_add",
    "method_add",
    "alpha",
    "scaled_skip",
    "minus",
    "addcmul",
    "in_place_minus",
    "into_branch",
    "in_place_add",
    "method_in_place_add",
]
POST = ["post_activation", "post_norm", "post_dropout"]  # a link stands between one add and the next
BREAKS = ["projection", "plain", "reads_hidden", "nested", "in_place_scale"]  # the chain, or part of it, stays as it is
ILLEGAL = {"in_place_relu": "inplace_stream", "set_item": "inplace_stream", "mutated_side": "mutated_side"}
KINDS = (*ADDITIVE, *POST, *BREAKS, "chain_inside")


class Program(nn.Module):
    """x, side -> the stream after all blocks, and whatever blocks let out on the way.

    Args:
        specs: the blocks.
        conv: images instead of vectors.
    """

    def __init__(self, specs: tuple[Block, ...], conv: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(WIDTH, WIDTH, 1) if conv else nn.Linear(WIDTH, WIDTH)
        self.entry = nn.Linear(WIDTH, WIDTH)
        branches: list[Branch] = []
        for i, spec in enumerate(specs):
            shared = 0 < spec.back <= i
            branches.append(branches[i - spec.back] if shared else Branch(spec.kind, conv))
        self.blocks = nn.ModuleList([Applied(spec.kind, branch, conv) for spec, branch in zip(specs, branches, strict=True)])

    def side(self, side: Tensor) -> Tensor:
        """The side input that all blocks read, in a shape that multiplies the stream."""
        return self.entry(side).view(-1, WIDTH, *(1, 1)[: 2 * isinstance(self.stem, nn.Conv2d)])

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        values = Values(self.side(side))
        for block in self.blocks:
            x = block(x, values)
        return (x, *values.outputs)


def inputs(conv: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x and side for a `Program`, which want gradients."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, WIDTH, *((3, 3) if conv else ()), generator=generator, dtype=torch.float64)
    side = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), side.to(dtype).requires_grad_()


def programs(kinds=KINDS, max_size: int = 7) -> st.SearchStrategy[tuple[Block, ...]]:
    """Lists of blocks of some kinds; they shrink towards one "linear" that shares nothing."""
    block = st.builds(Block, st.sampled_from(list(kinds)), st.sampled_from([0, 0, 0, 1, 2]))
    return st.lists(block, min_size=1, max_size=max_size).map(tuple)


class _Rising:
    """A schedule that pickles: gamma rises from one value to another."""

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = first, last

    def __call__(self, t: int, steps: int) -> float:
        return self.first + (self.last - self.first) * t / max(steps - 1, 1)

    def __repr__(self) -> str:
        return f"rising from {self.first} to {self.last}"


gammas = st.sampled_from([0.9, 0.0, 0.05, 0.5, 0.99, _Rising(0.0, 0.9), _Rising(0.95, 0.3)])


@dataclass(frozen=True)
class Options:
    """Options of `momentumize` as data; the velocity module is made anew for each model."""

    gamma: object = 0.9
    weights: str = "momentum"
    initial_velocity: str = "zero"
    granularity: str | int = "add"

    def arguments(self, conv: bool = False) -> dict:
        velocity = self.initial_velocity
        if velocity == "module":
            torch.manual_seed(11)
            velocity = nn.Conv2d(WIDTH, WIDTH, 1) if conv else nn.Linear(WIDTH, WIDTH)
        return {"gamma": self.gamma, "weights": self.weights, "initial_velocity": velocity, "granularity": self.granularity}


def options() -> st.SearchStrategy[Options]:
    """Every combination that `momentumize` takes: "matched" needs v[0] = 0."""
    either = st.sampled_from(["zero", "first", "module"])
    granularity = st.sampled_from(["add", "module"])
    momentum = st.builds(Options, gammas, st.just("momentum"), either, granularity)
    return st.one_of(momentum, st.builds(Options, gammas, st.just("matched"), st.sampled_from(["zero", "first"]), granularity))


def is_chain(spec: tuple[Block, ...]) -> bool:
    """All blocks are steps of one chain. (Where the caller gets a value of the stream, nothing may overwrite it later.)"""
    kinds = {block.kind for block in spec}
    return (
        len(spec) >= 2
        and kinds <= set(ADDITIVE)
        and not ("early_exit" in kinds and kinds & {"in_place_add", "method_in_place_add", "in_place_minus"})
    )
