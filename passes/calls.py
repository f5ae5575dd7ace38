"""One run of a model: how its submodules are called, and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from passes.live import LOSES, Before, Result, result_of
from passes.watch import Attributes, keeping_python_rng

__all__ = ["Call", "Calls", "InnerCall", "inner_calls"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class InnerCall:
    """One call of a submodule.

    Attributes:
        call: its arguments, with empty tensors.
        result: what it returned, without values.
    """

    call: Call
    result: Result


Calls = dict[str, list[InnerCall]]


def inner_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], warm_up: bool = False) -> Calls:
    """Runs a model once, in its current mode, and notes how its submodules are called; leaves no trace.

    Args:
        model: any module.
        args, kwargs: a call of it.
        warm_up: whether what the model sets up at its first call (hooks, flags) stays, as some models do once and for all.

    Returns:
        For the path of each submodule that ran, its calls in the order in which they began.
    """
    attributes = Attributes(model)  # before there are hooks, which would come back with them
    notes = _Notes()
    hooks = [hook for path, module in model.named_modules() for hook in notes.hooks(path, module)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    changed: list[tuple[str, str]] = []
    try:
        with torch.no_grad(), torch.random.fork_rng(), keeping_python_rng():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        if not warm_up:
            changed = attributes.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return notes.calls(changed)


class _Notes:
    """What hooks on the modules of a model see of one run."""

    def __init__(self) -> None:
        self.entered: list[tuple[str, Call, Result | None]] = []
        self.running: list[tuple[int, nn.Module, Any]] = []

    def hooks(self, path: str, module: nn.Module) -> list[Any]:
        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.running.append((len(self.entered), module, Before.of(module, pytree.tree_leaves((args, kwargs)))))
            self.entered.append((path, _hollow((args, kwargs)), None))

        def leave(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            position, of, before = self.running.pop()
            while of is not module:  # one that ended in an exception
                position, of, before = self.running.pop()
            result = result_of(module, pytree.tree_leaves((args, kwargs)), before, output)
            self.entered[position] = (*self.entered[position][:2], result)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def calls(self, changed: list[tuple[str, str]]) -> Calls:
        found: Calls = {}
        for path, call, result in self.entered:
            own = next((name for owner, name in changed if owner == path or owner.startswith(f"{path}.")), None)
            fault = result.fault if result is not None else "fails"
            if own is not None:
                fault = fault or LOSES.format(own)
            leaves, spec = ((), pytree.tree_flatten(())[1]) if result is None else (result.leaves, result.spec)
            found.setdefault(path, []).append(InnerCall(call, Result(leaves, spec, fault)))
        return found


def _hollow(call: Call) -> Call:
    def empty(leaf: Any) -> Any:
        return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(empty, call)
