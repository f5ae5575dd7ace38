"""Bodies of `torch.utils.checkpoint` in a graph of Dynamo, written out where they stand.

before    y = tag_activation_checkpoint(body, x, weight); z = y[0]
after     h = linear(x, weight); z = relu(h)                           with the nodes of the body

A step of a chain is run again as a whole, so a checkpoint in it, or around it, has nothing left to save.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.fx as fx

from passes.capturing.copying import node_copy

__all__ = ["checkpoints", "written_out"]


def checkpoints(gm: fx.GraphModule) -> list[str]:
    """Names of the nodes of a graph that run a body under a checkpoint."""
    return [node.name for node in gm.graph.nodes if _is_checkpoint(node)]


def written_out(gm: fx.GraphModule, names: Collection[str]) -> tuple[fx.GraphModule, dict[str, set[str]]]:
    """Write out the bodies of some checkpoints.

    Args:
        gm: a graph of Dynamo, not changed.
        names: of the nodes that run them, see `checkpoints`.

    Returns:
        The new graph, and for each of these names those of the nodes that the body became. Checkpoints within bodies are written out too.
    """
    graph, root = fx.Graph(), dict[str, Any]()
    values: dict[fx.Node, Any] = {}
    made: dict[str, set[str]] = {}
    for node in gm.graph.nodes:
        if node.name in names:
            values[node], made[node.name] = _body(graph, root, gm, node, values)
        elif node.target is operator.getitem and node.args[0].name in names:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = node_copy(graph, node, values.__getitem__)
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")} - set(root)
    result = fx.GraphModule(root | {target: getattr(gm, target) for target in targets}, graph)
    unread = [node for node in graph.nodes if node.op == "get_attr" and not node.users]
    for node in unread:
        graph.erase_node(node)
    result.recompile()
    return result, made


def _body(
    graph: fx.Graph, root: dict[str, Any], gm: fx.GraphModule, call: fx.Node, values: dict[fx.Node, Any]
) -> tuple[tuple[Any, ...], set[str]]:
    """Copies the body of a checkpoint. Returns the values of its outputs, and the names of the new nodes."""
    body = getattr(gm, str(call.args[0].target))  # type: ignore[union-attr]
    body, _ = written_out(body, checkpoints(body))
    inner: dict[fx.Node, Any] = {}
    given = iter(call.args[1:])
    made: set[str] = set()
    for node in body.graph.nodes:
        if node.op == "placeholder":
            argument = next(given)
            inner[node] = values[argument] if isinstance(argument, fx.Node) else argument
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], inner.__getitem__), made
        else:
            inner[node] = graph.node_copy(node, inner.__getitem__)
            made.add(inner[node].name)
            if node.op in ("get_attr", "call_module"):
                inner[node].target = f"{call.name}_{node.target}"
                root[inner[node].target] = getattr(body, str(node.target))
    raise AssertionError("a graph ends in its output")


def _is_checkpoint(node: fx.Node) -> bool:
    return node.target is torch.ops.higher_order.tag_activation_checkpoint
