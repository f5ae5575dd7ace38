"""Modules that stay Python inside an exported graph, which calls them: what an export would lose of them is kept.

    graph of the export      live(3, (x, mask), None)
    graph of the capture     self.layers.0.experts(x, mask=mask)

A live module must leave alone what it is given, and return memory of its own, since the graph would not know of anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from passes.watch import python_rng_state

__all__ = ["LIVE", "LOSES", "PLAIN", "SYMBOLIC", "Before", "Like", "LiveCall", "Result", "live_results", "result_of"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
SYMBOLIC = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
LOSES = "sets its attribute {}, which the graph around it would not see"


class _Live(HigherOrderOperator):
    """Stands in a graph of torch.export for the call of a live module; it never runs."""

    def __init__(self) -> None:
        super().__init__("mnet_fx_live")

    def __call__(self, number: int, inputs: Any, sizes: Any) -> Any:
        return super().__call__(number, inputs, sizes)


LIVE = _Live()


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Result:
    """What a call of a module gave.

    Attributes:
        leaves: of the structure that it returned: `Like` for a tensor, `("given", i)` for the i-th leaf of its own arguments, and
            `("value", value)` for anything else.
        spec: that structure.
        fault: why a graph cannot stand around such a call, or None.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    fault: str | None


@dataclass(frozen=True)
class LiveCall:
    """One call of a live module in a graph.

    Attributes:
        path: of the module.
        leaves: of its `(args, kwargs)`; the symbolic ones and tensors are in the graph.
        spec: structure of these.
        form: what `live_results` must find; None where the result is one tensor, and nothing about it has to be checked.
        given: positions, among the leaves, of the tensors that it returns as they are.
    """

    path: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    form: tuple[Any, ...] | None
    given: tuple[int, ...]


def live_results(result: Any, form: tuple[Any, ...], sizes: list[list[int]] | None, given: list[Tensor]) -> tuple[Tensor, ...]:
    """The tensors of what a live module returned, if it is what the graph was captured for.

    Args:
        result: what the module returned.
        form: for each leaf, "tensor" for one to return, "given" for one of its arguments, or the value that it must be, in a tuple.
        sizes: for each of the tensors, what its shape must be; None where it follows from the arguments.
        given: those of its arguments that it must return, in order.

    Raises:
        RuntimeError: it is something else.
    """
    leaves, kept = pytree.tree_leaves(result), iter(given)
    alike = len(leaves) == len(form) and all(_fits(leaf, kind, kept) for leaf, kind in zip(leaves, form, strict=True))
    tensors = tuple(leaf for leaf, kind in zip(leaves, form, strict=False) if kind == "tensor")
    if alike and sizes is not None:
        alike = all(list(tensor.shape) == list(shape) for tensor, shape in zip(tensors, sizes, strict=True))
    if not alike:
        found = ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf)[:40] for leaf in leaves)
        wanted = ", ".join(str(tuple(shape)) for shape in sizes or []) or str(form)
        raise RuntimeError(
            f"a module that stays Python inside an exported graph returned {found}, where the graph was captured for {wanted}: "
            "call the model with sizes like those of example_inputs"
        )
    return tensors


def _fits(leaf: Any, kind: Any, given: Iterator[Tensor]) -> bool:
    if kind == "given":
        return leaf is next(given)
    return isinstance(leaf, Tensor) if kind == "tensor" else type(leaf) is type(kind[0]) and bool(leaf == kind[0])


@dataclass(frozen=True)
class Before:
    """What a call must leave alone: tensors, with how often they have been written to, and Python's random numbers."""

    tensors: tuple[tuple[Tensor, int], ...]
    random: Any

    @classmethod
    def of(cls, module: nn.Module, inputs: list[Any]) -> Before:
        given = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        return cls(tuple((tensor, _version(tensor)) for tensor in (*given, *module.parameters())), python_rng_state())

    def fault(self) -> str | None:
        """What it did not leave alone."""
        if any(_version(tensor) != version for tensor, version in self.tensors):
            return "writes in place to what it is given"
        if python_rng_state() != self.random:
            return "draws from Python's random module or NumPy's, which a second run would not repeat"
        return None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def result_of(module: nn.Module, inputs: list[Any], before: Before, output: Any) -> Result:
    """What a call gave.

    Args:
        module: the module.
        inputs: leaves of its arguments.
        before: what there was before the call.
        output: what it returned.
    """
    leaves, spec = pytree.tree_flatten(output)
    fault = before.fault()
    owned = {memory for leaf in (*inputs, *module.parameters(), *module.buffers()) if (memory := _memory(leaf)) is not None}
    found: list[Any] = []
    for leaf in leaves:
        position = next((i for i, given in enumerate(inputs) if given is leaf), None)
        if isinstance(leaf, Tensor) and position is not None:
            found.append(("given", position))
        elif isinstance(leaf, Tensor):
            found.append(Like(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device))
            if _memory(leaf) in owned:
                fault = fault or "returns memory that it was given, or that it owns"
            owned.add(_memory(leaf))
        else:
            found.append(("value", leaf))
            if not isinstance(leaf, PLAIN):
                fault = fault or f"returns a {type(leaf).__name__}, which a graph cannot hold"
    return Result(tuple(found), spec, fault)


def _memory(leaf: Any) -> Any:
    try:
        return leaf.untyped_storage()._cdata if isinstance(leaf, Tensor) else None
    except (NotImplementedError, RuntimeError):  # a sparse tensor or another kind without memory of its own, which may be anybody's
        return "unknown"
