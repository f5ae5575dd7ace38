"""Moves changes of layout out of the stream: blocks that view the same values differently become one chain.

    before    a = x + f(x)                             (batch, channels, height, width)
              s = L(a)                                 (batch, tokens, channels): permute, reshape, roll, in any order
              b = s + g(s)
              y = L'(b);  c = y + h(y)                 where L' undoes L

    after     a = x + f(x)
              b' = a + L^-1(g(L(a)))                   the same values as b, in the layout of the chain
              c = b' + h(b')

For graphs that record shapes: of torch.export and of Dynamo. An add s + q with s = L(a) is L(a + L^-1(q)) for every invertible L, so moving
is right whatever q is. Where a run of layout operations comes back to the layout it began in is found from sizes and strides, or by running
it on numbered elements, for two assignments of primes to the free sizes. Memory that anything writes to in place is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.fx as fx

from passes.capturing.layout_ops import Operation, Path, again, inverse, is_identity, is_layout, recorded_dtype, sizes_of
from passes.graphs.effects import forget_effect
from passes.graphs.facts import Facts, recorded
from passes.graphs.ops import is_add, operands

__all__ = ["level_layouts"]

_FARTHEST = 4000  # nodes to look at between a stream value and the sum that may continue it
_RECORDS = ("val", "example_value")


def level_layouts(gm: fx.GraphModule) -> None:
    """Rewrites the graph of `gm` in place.

    Args:
        gm: a graph module that belongs to the caller; nothing happens where it records no shapes.
    """
    _Leveller(gm).run()


class _Leveller:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        facts = Facts.of(gm)
        self.position: dict[fx.Node, int] = facts.index
        self.writes, self.shares = facts.writes, facts.shares
        self.written = {memory for memories in facts.writes.values() for memory in memories}
        self.origin: dict[fx.Node, tuple[fx.Node, Path]] = {}  # of a value that is another one in another layout
        self.sizes: dict[Any, fx.Node] = {}  # the inputs that are symbolic sizes
        self.moved = False

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and isinstance(size := recorded(node), torch.SymInt):
                self.sizes[size.node.expr] = node
            elif is_layout(node) and not self._is_written(node):
                self._follow(node)
                self._simplify(node)
            elif is_add(node):
                self._move(node)
        if self.moved:
            self._clean()
            for node in self.graph.nodes:
                forget_effect(node)

    def _follow(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        root, path = self.origin.get(source, (source, ()))
        self.origin[node] = root, (*path, node)

    def _simplify(self, node: fx.Node) -> None:
        """Uses the root itself where a value is back in the root's layout; only behind a sum that was moved, elsewhere it gains nothing."""
        root, path = self.origin[node]
        if root.meta.get("levelled") and is_identity(root, path):
            node.replace_all_uses_with(root)

    def _move(self, add: fx.Node) -> None:
        a, b, *more = operands(add)
        if more or add.kwargs.keys() - {"input", "other"} or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            return
        if sizes_of(a) is None or sizes_of(a) != sizes_of(b):
            return
        for skip, branch in ((a, b), (b, a)):
            root, path = self.origin.get(skip, (skip, ()))
            if not (path and is_add(root) and recorded_dtype(root) == recorded_dtype(branch) == recorded_dtype(add)):
                continue
            if any(map(self._is_written, (root, *path, branch, add))) or is_identity(root, path) or not self._descends(branch, root):
                continue
            self._moved(add, root, path, branch)
            return

    def _moved(self, add: fx.Node, root: fx.Node, path: Path, branch: fx.Node) -> None:
        self.moved = True
        with self.graph.inserting_before(add):
            for node in reversed(path):
                branch = self._node(add, inverse(node, branch, self._written_sizes), like=node.args[0])
            value = self._node(add, ("call_function", operator.add, (root, branch), {}), like=root)
            value.meta["levelled"] = root.meta["levelled"] = True
            for node in path:
                after = self._node(add, again(node, value), like=node)
                self.origin[after] = (self.origin[value][0], (*self.origin[value][1], after)) if value in self.origin else (value, (after,))
                value = after
        add.replace_all_uses_with(value)

    def _node(self, add: fx.Node, operation: Operation, like: Any) -> fx.Node:
        node = self.graph.create_node(*operation)
        node.meta = {key: like.meta[key] for key in _RECORDS if key in like.meta}
        return self._noted(node, add)

    def _noted(self, node: fx.Node, add: fx.Node) -> fx.Node:
        node.meta |= {key: add.meta[key] for key in ("nn_module_stack", "stack_trace") if key in add.meta}
        self.position[node] = self.position[add]
        self.shares[node] = (node,)
        return node

    def _written_sizes(self, node: fx.Node) -> list[Any]:
        """The sizes of a value as arguments of reshape: numbers, -1 for the one free size, or nodes."""
        sizes = sizes_of(node) or ()
        free = [size for size in sizes if not isinstance(size, int)]
        if len(free) < 2:
            return [size if isinstance(size, int) else -1 for size in sizes]
        return [size if isinstance(size, int) else self._size(node, i) for i, size in enumerate(sizes)]

    def _size(self, node: fx.Node, i: int) -> fx.Node:
        """An input that is this size, or a node that reads it."""
        size = recorded(node).shape[i]
        if size.node.expr in self.sizes:
            return self.sizes[size.node.expr]
        found = self.graph.call_method("size", (node, i))
        found.meta = {key: size for key in _RECORDS if key in node.meta}
        return self._noted(found, node)

    def _is_written(self, node: fx.Node) -> bool:
        return not self.written.isdisjoint(self.shares[node])

    def _descends(self, node: fx.Node, from_node: fx.Node) -> bool:
        """True if `node` is computed from `from_node`."""
        return any(found is from_node for found in islice(self._ancestors(node, self.position[from_node]), _FARTHEST))

    def _ancestors(self, node: fx.Node, oldest: int) -> Iterator[fx.Node]:
        seen, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in seen and self.position[source] >= oldest:
                    seen.add(source)
                    stack.append(source)
                    yield source

    def _clean(self) -> None:
        """Views may not be possible any more after a move; what is no longer read goes."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node not in self.writes and (is_layout(node) or is_add(node)):
                self.graph.erase_node(node)
            elif is_layout(node) and not self._is_written(node):
                node.op, node.target, node.args, node.kwargs = again(node, node.args[0])
        self.graph.lint()
        self.gm.recompile()
