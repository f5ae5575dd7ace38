"""Finds linear layers that give the logits of a cross entropy, and has that computed by a module, which need not hold all of it at once.

logits = linear(h, weight, bias)                 becomes      momentum_head_0(h, weight, bias, target, class weights, None)
loss = cross_entropy(logits.view(-1, n), target)

Where others read the logits too, as a model does that returns them, the layer stays, and the module is given what it gives.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from passes.graphs.effects import is_measured, work_of
from passes.graphs.facts import recorded
from passes.rewriting.segments import Cost, Memory, saved_by

__all__ = ["Head", "chunked_heads", "heads"]

_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)
_KEEPING = ("contiguous", "float", "double", "half", "bfloat16", "to", "view", "reshape", "flatten")
_SIGNATURE = inspect.signature(torch.nn.functional.cross_entropy)


@dataclass(frozen=True)
class Head:
    """A linear layer and the cross entropy of what it gives.

    Attributes:
        nodes: names of all its nodes, from the loss back to the linear layer.
        shared: whether others read the logits too.
        hidden, weight, bias, target, class_weight: names of what they read; None for none.
        slices: what of the hidden values along all but their last dimension is read; None: all.
        dtype: to which the logits are converted before the cross entropy; None: as they are.
        ignore_index, reduction, label_smoothing: as of `torch.nn.functional.cross_entropy`.
        cost: what it takes to keep the logits, and what that saves; None: that is not known.
    """

    nodes: tuple[str, ...]
    shared: bool
    hidden: str
    weight: str
    bias: str | None
    target: str
    class_weight: str | None
    slices: tuple[Any, ...] | None
    dtype: torch.dtype | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    cost: Cost | None

    @property
    def linear(self) -> str:
        """Name of the linear layer's node."""
        return self.nodes[-1]

    def loss(self, logits: Tensor, target: Tensor, class_weight: Tensor | None, reduction: str) -> Tensor:
        """The cross entropy of some rows of logits."""
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        wide = logits if self.dtype is None else logits.to(self.dtype)
        return torch.nn.functional.cross_entropy(wide, target, class_weight, reduction=reduction, **options)


def heads(graph: fx.Graph, inside: Collection[str] = ()) -> Iterator[Head]:
    """The heads of a graph that records fake tensors, whose logits take more memory than their weights and hidden values.

    Args:
        graph: whose nodes' effects have been noted.
        inside: names of nodes that are left out.
    """
    losses = [node for node in graph.nodes if node.target is torch.nn.functional.cross_entropy and node.name not in inside]
    memory = Memory.of(graph, ()) if losses else None
    for loss in losses:
        assert memory is not None
        if (found := _head(loss, memory)) is not None and found.linear not in inside:
            yield found


def _head(loss: fx.Node, memory: Memory) -> Head | None:
    given = _SIGNATURE.bind(*loss.args, **loss.kwargs)
    given.apply_defaults()
    known: dict[str, Any] = given.arguments
    target, reduction = known["target"], known["reduction"]
    way = _back_to_linear(known["input"], loss)
    legacy = known["size_average"] is not None or known["reduce"] is not None
    if way is None or legacy or reduction not in ("mean", "sum") or not _are_classes(target):
        return None
    nodes, slices = way
    linear = nodes[-1]
    shared = len(linear.users) > 1
    named = inspect.signature(_linear).bind(*linear.args, **linear.kwargs).arguments
    hidden, weight, bias = named["input"], named["weight"], named.get("bias")
    reads = [hidden, weight, bias, target, known["weight"], *([linear] if shared else [])]
    if not _pays(hidden, weight, linear) or _changed(reads, linear, memory):
        return None
    options = (known["ignore_index"], reduction, known["label_smoothing"])
    if not all(isinstance(value, (int, float, str)) for value in options):
        return None
    names = tuple(node.name for node in (loss, *nodes))
    dtype = recorded(nodes[0]).dtype
    cast = None if dtype == recorded(linear).dtype else dtype
    cost = _cost([loss, *nodes], hidden, memory)
    return Head(names, shared, hidden.name, weight.name, _name(bias), target.name, _name(known["weight"]), slices, cast, *options, cost)


def _cost(nodes: list[fx.Node], hidden: fx.Node, memory: Memory) -> Cost | None:
    if not is_measured(nodes):
        return None
    kept = memory.of_node(hidden)  # in any case
    sizes = saved_by(nodes, memory)
    return Cost(sum(size for number, size in sizes.items() if number not in kept), sum(map(work_of, nodes)))


def _linear(input: Any, weight: Any, bias: Any = None) -> None:
    """The signature of `torch.nn.functional.linear`, which is a builtin."""


def _name(node: Any) -> str | None:
    return node.name if isinstance(node, fx.Node) else None


def _back_to_linear(node: Any, reader: fx.Node) -> tuple[list[fx.Node], tuple[Any, ...] | None] | None:
    """The nodes from a table of one row for each target back to the linear layer that gives it, and the slices of that that were taken."""
    slices: tuple[Any, ...] | None = None
    if not isinstance(node, fx.Node) or not isinstance(recorded(node), Tensor) or recorded(node).dim() != 2:
        return None
    nodes: list[fx.Node] = []
    classes, dtypes = recorded(node).shape[-1], [recorded(node).dtype]
    while isinstance(node, fx.Node) and (node.target in _LINEAR or set(node.users) == {reader}):
        value = recorded(node)
        if not isinstance(value, Tensor) or value.shape[-1] != classes:
            return None
        nodes.append(node)
        dtypes += [value.dtype] if value.dtype != dtypes[-1] else []
        if node.target in _LINEAR:
            return (nodes, slices) if len(dtypes) <= 2 else None
        source: Any = node.args[0] if node.args else None
        before = recorded(source) if isinstance(source, fx.Node) else None
        if not isinstance(before, Tensor) or before.device != value.device:
            return None
        places: Any = node.args[1] if len(node.args) > 1 else None
        if slices is None and _is_slice(node, places, before.dim()):
            slices = places
        elif node.op != "call_method" or node.target not in _KEEPING or (slices is not None and value.shape != before.shape):
            return None
        reader, node = node, source
    return None


def _is_slice(node: fx.Node, places: Any, rank: int) -> bool:
    """Whether a node takes slices along all but the last dimension of a tensor, as in `logits[..., :-1, :]`."""
    if node.target is not operator.getitem or not isinstance(places, tuple) or not places or places[-1] != slice(None):
        return False
    plain = (slice, type(...))
    numbers = all(isinstance(n, (int, type(None))) for s in places if isinstance(s, slice) for n in (s.start, s.stop, s.step))
    return all(isinstance(place, plain) for place in places) and numbers and (... in places or len(places) == rank)


def _are_classes(target: Any) -> bool:
    value = recorded(target) if isinstance(target, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1


def _pays(hidden: fx.Node, weight: fx.Node, linear: fx.Node) -> bool:
    """Whether there are more classes than features, and the logits have gradients."""
    matrix, logits = recorded(weight), recorded(linear)
    sizes = isinstance(matrix, Tensor) and matrix.dim() == 2 and all(isinstance(size, int) for size in matrix.shape)
    return sizes and matrix.shape[0] > matrix.shape[1] and isinstance(recorded(hidden), Tensor) and logits.requires_grad


def _changed(values: list[Any], linear: fx.Node, memory: Memory) -> bool:
    """Whether what a head reads is overwritten after its linear layer."""
    numbers = [number for value in values if isinstance(value, fx.Node) for number in memory.of_node(value)]
    return any(memory.last_write.get(number, -1) > memory.index[linear] for number in numbers)


def chunked_heads(gm: fx.GraphModule, build: Callable[[Head], nn.Module], linear: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Replaces the heads of a graph, which is changed.

    Args:
        gm: the graph.
        build: makes the module of a head, called as `head(hidden, weight, bias, target, class_weight, logits)`; logits: None unless shared.
        linear: makes the module that gives those, called as `linear(hidden, weight, bias)`: by itself, so that it is no part of a rerun.

    Returns:
        The modules by their targets in the graph.
    """
    named = {node.name: node for node in gm.graph.nodes}
    made: dict[str, nn.Module] = {}
    for i, head in enumerate(list(heads(gm.graph))):
        loss, target = named[head.nodes[0]], f"momentum_head_{i}"
        made[target] = build(head)
        gm.add_module(target, made[target])
        if head.shared:
            made[f"momentum_logits_{i}"] = linear()
            gm.add_module(f"momentum_logits_{i}", made[f"momentum_logits_{i}"])
            _stand_alone(gm.graph, named, head, f"momentum_logits_{i}")
        with gm.graph.inserting_before(loss):
            reads = (head.hidden, head.weight, head.bias, head.target, head.class_weight)
            given = (*reads, head.linear if head.shared else None)
            call = gm.graph.call_module(target, tuple(None if name is None else named[name] for name in given))
        call.meta = dict(loss.meta)
        loss.replace_all_uses_with(call)
        for name in head.nodes[:-1] if head.shared else head.nodes:
            gm.graph.erase_node(named[name])
    if made:
        gm.recompile()
    return made


def _stand_alone(graph: fx.Graph, named: dict[str, fx.Node], head: Head, target: str) -> None:
    """Calls a module in place of a linear layer's function."""
    layer = named[head.linear]
    with graph.inserting_before(layer):
        call = graph.call_module(target, tuple(None if name is None else named[name] for name in (head.hidden, head.weight, head.bias)))
    call.meta = dict(layer.meta)
    layer.replace_all_uses_with(call)
    graph.erase_node(layer)
    named[head.linear] = call
