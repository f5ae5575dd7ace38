"""An independent count of the residual adds of a model, the denominator of `coverage.py`. Shares nothing with `passes`, not even a capture.

The model runs once in eval mode, and every operation that the dispatcher sees becomes a node, if it depends on the values of an input
(zeros_like gives none that does, until something is written to it: where a model returns zeros instead of its attention, for lack of a
CUDA kernel, there is no branch):

    residual    a sum with a term s, its skip, such that another term is computed from s by way of a mixing operation; s and the sum have
                one shape and dtype. A sum that only another sum reads is part of that one
    chained     the skip of the one is the other, or reached from it through operations that keep its shape and dtype, mix nothing, and
                read no second value that depends on an input

Ancestors are bits of one integer for each node, so that nothing here walks as the matcher does. Adds inside the branches of other adds
count like all others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["count"]

_MAKING = re.compile(r".*_like|new_.*")  # tensors of the shape of another one, whose values have nothing to do with it
_MIXING = re.compile(r"conv|linear|mm|addmv|mv|dot|matmul|einsum|attention|pool|lstm|gru|rnn|fft|upsample|grid_sampl")


@dataclass
class _Node:
    name: str  # of the operation, such as "add"
    sources: list[int]
    like: Any  # shape and dtype
    above: int  # bits of all nodes that it is computed from
    mixed: int  # of those, the ones with a mixing operation between
    readers: int = 0


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.made: Any = WeakTensorKeyDictionary()  # tensor -> its node
        self.blank: dict[int, tuple[int, Tensor]] = {}  # memory that was made without values -> its node, and who keeps it alive
        for tensor in inputs:
            self._note(tensor, "input", [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources = [self.made[leaf] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf in self.made]
        results, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        for result in tree_leaves(results) if sources else ():
            if isinstance(result, Tensor):
                makes = _MAKING.fullmatch(name) is not None
                self._note(result, name, [] if makes else sources)
                if makes:
                    self.blank[result.untyped_storage()._cdata] = (self.made[result], result)
        if func._schema.is_mutable and sources and isinstance(args[0], Tensor):
            self._fill(args[0], sources)
        for source in set(sources):
            self.nodes[source].readers += 1
        return results

    def _fill(self, view: Tensor, sources: list[int]) -> None:
        """A write to memory that was made without values, through a view of it."""
        node, _ = self.blank.get(view.untyped_storage()._cdata, (None, None))
        if node is not None:
            above, mixed = self._reached(sources)
            self.nodes[node].above |= above
            self.nodes[node].mixed |= mixed

    def _reached(self, sources: list[int]) -> tuple[int, int]:
        above = mixed = 0
        for source in sources:
            above |= self.nodes[source].above | 1 << source
            mixed |= self.nodes[source].mixed
        return above, mixed

    def _note(self, tensor: Tensor, name: str, sources: list[int]) -> None:
        above, mixed = self._reached(sources)
        self.made[tensor] = len(self.nodes)
        self.nodes.append(_Node(name, sources, (tensor.shape, tensor.dtype), above, above if _MIXING.search(name) else mixed))


def count(model: nn.Module, call: dict[str, Any]) -> dict[str, int]:
    """Counts the residual adds of a model.

    Args:
        model: any module, left in eval mode.
        call: keyword arguments of one call of it.

    Returns:
        `adds`: residual adds; `in_chains`: those chained to another; `chains`: how many chains these make up.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    recorder = _Recorder([leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)])
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # a layer of torch.nn as one operation would show no adds
        with torch.no_grad(), recorder:
            model.eval()(**call)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    skips = _skips(recorder.nodes)
    before = {add: found for add, skip in skips.items() if (found := _link(skip, skips, recorder.nodes)) is not None}
    members = {*before, *before.values()}
    return {"adds": len(skips), "in_chains": len(members), "chains": sum(add not in before for add in members)}


def _skips(nodes: list[_Node]) -> dict[int, int]:
    """The skip of each residual add."""
    found: dict[int, int] = {}
    inner: set[int] = set()
    for i, node in enumerate(nodes):
        if not _is_add(node):
            continue
        terms = _terms(i, nodes)
        reached = 0
        for term in terms:
            reached |= nodes[term].mixed
        skip = next((term for term in terms if reached >> term & 1 and nodes[term].like == node.like), None)
        if skip is not None:
            found[i] = skip
            inner |= {source for source in node.sources if _is_add(nodes[source]) and nodes[source].readers == 1}
    return {add: skip for add, skip in found.items() if add not in inner}


def _is_add(node: _Node) -> bool:
    return node.name in ("add", "add_") and len(node.sources) == 2


def _terms(add: int, nodes: list[_Node]) -> list[int]:
    terms: list[int] = []
    for source in nodes[add].sources:
        terms += _terms(source, nodes) if _is_add(nodes[source]) and nodes[source].readers == 1 else [source]
    return terms


def _link(node: int, skips: dict[int, int], nodes: list[_Node]) -> int | None:
    """The residual add from which a skip is reached, or None."""
    inputs = sum(1 << i for i, found in enumerate(nodes) if found.name == "input")
    while node not in skips:
        found = nodes[node]
        sources = {source for source in found.sources if (nodes[source].above | 1 << source) & inputs}
        if len(sources) != 1 or _MIXING.search(found.name) or nodes[source := sources.pop()].like != found.like:
            return None
        node = source
    return node
