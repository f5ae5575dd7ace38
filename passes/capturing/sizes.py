"""Sizes that are read from tensors, computed from the symbolic sizes that the graph gets as inputs.

before    a = f(x); n = a.size(0); m = n // 2          every reader of m needs a, which may lie inside a step
after     n = s0 * 4;  m = n // 2                      where a is known to have that many rows
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from passes.graphs.facts import recorded

__all__ = ["Sizes", "is_unread_size"]


class Sizes:
    """Writes sizes into a graph.

    Args:
        placeholders: those of the graph that they are read in.
        values: for each of its nodes that was copied, the copy.
    """

    def __init__(self, placeholders: list[fx.Node], values: dict[fx.Node, fx.Node]) -> None:
        self.inputs = {expr: node for node in placeholders if isinstance(expr := _expression(node), sympy.Symbol)}
        self.values = values
        self.known: dict[sympy.Expr, fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node | int | None:
        """What a node that reads a number from the shape of a tensor gives; None if it is no such node, or not of the inputs' sizes."""
        value = recorded(node)
        if not _reads_a_shape(node) or not isinstance(value, (int, torch.SymInt)):
            return None
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if not expression.free_symbols or expression.free_symbols - self.inputs.keys():
            return None
        if expression not in self.known:
            self.known[expression] = self._written(expression, node)
        return self.known[expression]

    def _written(self, expression: sympy.Expr, node: fx.Node) -> fx.Node:
        symbols = {symbol: fx.Proxy(self.values[self.inputs[symbol]]) for symbol in expression.free_symbols}
        found: Any = sympy_interp(PythonReferenceAnalysis, symbols, expression)
        found.node.meta.setdefault("example_value", node.meta["example_value"])
        node_found: fx.Node = found.node
        return node_found


def is_unread_size(node: fx.Node) -> bool:
    """Whether a node reads the shape of a tensor for nobody."""
    return not node.users and _reads_a_shape(node)


def _reads_a_shape(node: fx.Node) -> bool:
    """`x.size()`, `x.stride(0)` and the like, and one of the numbers that such a call gives."""
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _reads_a_shape(source)
    return node.op == "call_method" and node.target in ("size", "stride", "numel")


def _expression(node: fx.Node) -> sympy.Expr | None:
    """What a symbolic size is made of."""
    value = recorded(node)
    return value.node.expr if isinstance(value, torch.SymInt) else None
