"""Blocks under `torch.no_grad` as operations on detached values, so that they are nothing but operations, and chains may lie in them.

before    set_grad_enabled(False); n = linear(x, weight); set_grad_enabled(True)
after     d = x.detach(); w = weight.detach(); n = linear(d, w)

What takes no part in a gradient and reads only what takes none needs no mode to stay so. The nodes are marked: a region of such nodes
alone runs without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._pytree import tree_leaves

from passes.capturing.copying import node_copy

__all__ = ["MODE", "detached", "is_off", "needs_gradient"]

MODE = "_set_grad_enabled"
_OFF = "passes_without_gradients"
_FLIPS = ("detach_", "requires_grad_")  # after which what was recorded of a value is not what it was before


def is_off(node: fx.Node) -> bool:
    """Whether a node was under `no_grad`."""
    return _OFF in node.meta


def detached(gm: fx.GraphModule, is_attribute: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """A graph without changes of the grad mode; the graph itself where there are none, or where they cannot be done without.

    Args:
        gm: a graph with recorded values, which is not changed.
        is_attribute: whether a placeholder is a parameter or buffer: each of its readers detaches it by itself, as part of its step.
    """
    off = _under_no_grad(gm.graph)
    if not off or not _can_do_without(off):
        return gm
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    known: dict[fx.Node, fx.Node] = {}

    def given(source: fx.Node, reader: fx.Node) -> fx.Node:
        """What a node under no_grad reads in the place of another."""
        if source in off or not needs_gradient(source):
            return values[source]
        if source not in known or is_attribute(source):
            known[source] = graph.call_method("detach", (values[source],))
            known[source].meta = {"example_value": source.meta["example_value"].detach(), _OFF: True}
            if stack := reader.meta.get("nn_module_stack"):
                known[source].meta["nn_module_stack"] = stack
        return known[source]

    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == MODE:
            known.clear()  # by the next block, another value may have been written there
            continue
        values[node] = node_copy(graph, node, partial(given, reader=node) if node in off else values.__getitem__)
        if node in off:
            values[node].meta[_OFF] = True
            values[node] = _itself(values[node])
    return fx.GraphModule(gm, graph)


def _itself(node: fx.Node) -> fx.Node:
    """What buffer.mul_(2) gives is the buffer: its readers read that, so that no part compiled by itself gets one memory by two names."""
    first = node.args[0] if node.args else None
    writes = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).startswith("__")
    return first if writes and isinstance(first, fx.Node) and first.op == "placeholder" and _form(first) == _form(node) else node


def _form(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else node


def _under_no_grad(graph: fx.Graph) -> set[fx.Node]:
    """The nodes under no_grad of a graph that runs with gradients; none where it does not, ends in such a block, or is not to be read."""
    off, enabled = set[fx.Node](), torch.is_grad_enabled()
    if not enabled or any(node.target in _FLIPS for node in graph.nodes):
        return off
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") == MODE:
            enabled = bool(node.args[0])
        elif not enabled:
            off.add(node)
    return off if enabled else set()


def _can_do_without(off: set[fx.Node]) -> bool:
    """Whether all that others read of nodes under no_grad is new, or detached: what writes to a value that needs a gradient returns it."""
    read = (node for node in off if any(user not in off for user in node.users))
    inputs = {source for node in off for source in node.all_input_nodes if source.op != "get_attr"}
    return not any(map(needs_gradient, read)) and all("example_value" in node.meta for node in inputs)


def needs_gradient(node: fx.Node) -> bool:
    """Whether what a node of Dynamo's gives, or any of it, was recorded to require a gradient."""
    value: Any = node.meta.get("example_value")
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value))
