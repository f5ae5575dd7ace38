"""What a storage is for, told from the Python frames in which it is made.

State.__init__, widening     "stream state"        steps and checkpointed blocks    "one step's activations"
spill                        "spilled bits"        all else in a backward pass      "temporaries"
copies of buffers, drawn     "kept for steps"      all else in a forward pass       "outside of chains", with the module's path
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch.fx as fx
from torch import nn

from passes import owner_stack

from ..arithmetic import fixed_point, valueless
from ..arithmetic.kernels import eager
from ..runtime import replay, tape
from .blocks import Block
from .counting import Tag

__all__ = ["Places"]

ACTIVATIONS, OUTSIDE, STATE, SPILLED, STEPS, TEMPORARY = (
    "one step's activations",
    "outside of chains",
    "stream state",
    "spilled bits",
    "kept for steps",
    "temporaries",
)


def _code(function: Callable[..., Any]) -> CodeType:
    return function.__code__


_ROLES: dict[CodeType, str] = {
    _code(eager.spill): SPILLED,
    _code(fixed_point.State.__init__): STATE,
    _code(fixed_point._shifted): STATE,
    _code(tape.StoringTape.push): STATE,  # keeps x[t + 1]
    _code(tape.StoringTape.enter): STATE,
    _code(replay._copied): STEPS,
    _code(valueless.Drawn.get_state): STEPS,
    _code(replay.Conditions.first_run): ACTIVATIONS,
    _code(replay.Conditions.run): ACTIVATIONS,
    _code(Block.__call__): ACTIVATIONS,
    _code(Block.run): ACTIVATIONS,
}


class Places:
    """Gives the tags of one training step.

    Args:
        model: whose modules give the paths.

    Attributes:
        backward: to be set when the backward pass begins.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.backward = False

    def __call__(self) -> Tag:
        frame: FrameType | None = sys._getframe(3)
        path: str | None = None
        while frame is not None:
            code = frame.f_code
            if (role := _ROLES.get(code)) is not None:
                return role, path or ""
            if path is None and not self.backward:
                path = self._path(frame, code)
            frame = frame.f_back
        return (TEMPORARY, "") if self.backward else (OUTSIDE, path or "")

    def _path(self, frame: FrameType, code: CodeType) -> str | None:
        """Path of the module that a frame runs the code of; None where it runs none."""
        if code.co_filename.startswith("<eval_with_key>"):
            module = frame.f_locals.get("self")
            return _path_of_line(module, code, frame.f_lineno) if isinstance(module, fx.GraphModule) else None
        if code.co_name == "forward":
            return self.paths.get(id(frame.f_locals.get("self")))
        return None


def _path_of_line(module: fx.GraphModule, code: CodeType, line: int) -> str | None:
    """Path of the module that a line of a graph's code was captured in."""
    lines: dict[int, int | None] = getattr(module, "_lineno_map", None) or {}
    number = lines.get(line - getattr(module, "_prologue_start", 0))
    nodes = list(module.graph.nodes)
    if number is None or number >= len(nodes):
        return None
    stack = owner_stack(nodes[number])
    return stack[-1] if stack else None
