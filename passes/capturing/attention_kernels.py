"""`with torch.nn.attention.sdpa_kernel(...)` as part of each attention within it, so that no node moves a switch, and chains may lie there.

before    _sdpa_kernel([MATH]); a = scaled_dot_product_attention(q, k, v); b = linear(a, w); _sdpa_kernel([FLASH, MATH, ...])
after     a = attention_by(("MATH",), False, q, k, v); b = linear(a, w)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.nn.functional import scaled_dot_product_attention

from passes.capturing.copying import node_copy
from passes.graphs.attention import attention_by

__all__ = ["LostContextError", "with_kernels_written_out"]

_CHANGE, _NAME = "_sdpa_kernel", "_backend_from_string"
_Kernels = tuple[tuple[str, ...], bool]  # their names, and whether the first of them that can is to be taken


class LostContextError(Exception):
    """The graph changes a global state in a way that the passes cannot keep."""


def with_kernels_written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of Dynamo without such blocks; the graph itself where there are none.

    Raises:
        LostContextError: a block does not end, or holds an operation into which nobody sees and which may be attention.
    """
    if not any(_name(node) == _CHANGE for node in gm.graph.nodes):
        return gm
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    around = tuple(kernel.name for kernel in _cur_sdpa_kernel_backends(with_priority=True))
    held: list[_Kernels] = [(around, False)]  # what was chosen so far, of blocks that have not ended
    for node in gm.graph.nodes:
        if _name(node) == _CHANGE:
            _change(held, node)
        elif _name(node) != _NAME:
            values[node] = node_copy(graph, node, values.__getitem__)
            if len(held) > 1:
                _choose(values[node], held[-1])
    if len(held) > 1:
        raise LostContextError("it chooses kernels of attention for what comes after the graph")
    return fx.GraphModule(gm, graph)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _change(held: list[_Kernels], node: Any) -> None:
    """Begins a block, or ends the last one, which gives back what held before it; a graph does not tell one from the other."""
    kernels, in_order = node.args
    names = tuple(kernel.args[0] for kernel in kernels)
    before = held[-2][0] if len(held) > 1 else None
    if before is not None and (names == before if in_order else {*names} == {*before}):
        held.pop()
    else:
        held.append((names, in_order))


def _choose(node: fx.Node, kernels: _Kernels) -> None:
    """Has an operation of a block choose by the kernels of the block."""
    if node.target is scaled_dot_product_attention:
        node.target, node.args = attention_by, (*kernels, *node.args)
    elif node.op == "call_function" and node.target is not torch.ops.higher_order.flex_attention and _may_be_attention(node):
        raise LostContextError(f"it calls {_name(node)} under sdpa_kernel, and the passes cannot keep the two together")


def _may_be_attention(node: fx.Node) -> bool:
    own = isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prim", "prims")
    return own or isinstance(node.target, HigherOrderOperator) or "attention" in _name(node) or "transformer" in _name(node)
