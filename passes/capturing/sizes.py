"""Sizes that are read from tensors, computed from the symbolic sizes that the graph gets as inputs.

before    a = f(x); n = a.size(0); m = n // 2          every reader of m needs a, which may lie inside a step
after     n = s0 * 4;  m = n // 2                      where a is known to have that many rows
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
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
        self.known: dict[sympy.Expr, fx.Node | None] = {}

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

    def _written(self, expression: sympy.Expr, node: fx.Node) -> fx.Node | None:
        symbols = {symbol: fx.Proxy(self.values[self.inputs[symbol]]) for symbol in expression.free_symbols}
        try:
            found: Any = sympy_interp(_OfProxies, symbols, expression)
        except Exception:  # of Python, about an operation that only numbers have
            return None
        found.node.meta.setdefault("example_value", node.meta["example_value"])
        node_found: fx.Node = found.node
        return node_found


def _calling(function: Callable[..., Any]) -> Any:
    return staticmethod(lambda x, dtype: x.tracer.create_proxy("call_function", function, (x,), {}))


class _OfProxies(PythonReferenceAnalysis):
    """With what Python asks a number for, and not a proxy."""

    ceil_to_int, floor_to_int = _calling(math.ceil), _calling(math.floor)
    trunc_to_int, round_to_int = _calling(math.trunc), _calling(round)
    int_truediv = staticmethod(operator.truediv)


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
