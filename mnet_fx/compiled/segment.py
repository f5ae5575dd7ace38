"""What a compiled graph calls in the place of a part outside of chains that is run again in the backward pass: `rest="checkpoint"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from passes import COST, PROOF, Cost, owner_stack

from ..runtime.segment import run_segment
from ..runtime.surroundings import exported, transformed
from .artifacts import Artifact
from .filling import Unseen
from .region import CompiledStep

__all__ = ["CompiledSegment"]


class CompiledSegment(Unseen):
    """A piece of a graph, run under a checkpoint where gradients may be asked for.

    Args:
        piece: the graph of the piece, whose meta data say that it can be run again.
        run: the piece, compiled.
        attributes: for each input that is a parameter or buffer, by its name, its path in the model.
        on_drift: what is done about a rerun that differs.
    """

    def __init__(self, piece: fx.GraphModule, run: Callable[..., Any], attributes: Mapping[str, str], on_drift: str) -> None:
        super().__init__()
        names = [str(node.target) for node in piece.graph.nodes if node.op == "placeholder"]
        self.name, self.on_drift, self.proof = f"the segment {_where(piece)}", on_drift, piece.meta[PROOF]
        self.cost: Cost | None = piece.meta[COST]
        self.stored = 0  # 1: autograd stores what it saves
        self._run = run
        self._own = [i for i, name in enumerate(names) if name in attributes]
        self._sides = [i for i, name in enumerate(names) if name not in attributes]
        order = [*self._sides, *self._own]
        self._places = [order.index(i) for i in range(len(names))]
        paths = [attributes[names[i]] for i in self._own]
        self._step = CompiledStep(Artifact(self._in_order, (True,) * (1 + len(names)), has_regions=False, is_pure=False), paths, None)

    @property
    def title(self) -> str:
        """For people."""
        return self.name

    def _in_order(self, _: Tensor, *given: Any) -> Any:
        return self._run(*(given[i] for i in self._places))

    def forward(self, *args: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if not needs_grad or self.stored or transformed() or exported():
            return self._run(*args)
        step = self._step.bound([args[i] for i in self._own], ())
        x = next((t for t in tensors if t.device.type != "cpu"), tensors[0])  # a number may lie on the CPU
        return run_segment(self.name, self.on_drift, step, x, [args[i] for i in self._sides], self.proof)


def _where(piece: fx.GraphModule) -> str:
    """From which module to which the code of a piece reaches."""
    paths = [stack[-1] for node in piece.graph.nodes if (stack := owner_stack(node)) and node.op != "placeholder"]
    ends = dict.fromkeys([*paths[:1], *paths[-1:]])
    return " to ".join(ends) or "of the root"
