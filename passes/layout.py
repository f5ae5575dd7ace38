"""Moves changes of layout out of the stream: blocks that view the same values differently become one chain.

    before    a = x + f(x)                             (batch, channels, height, width)
              s = L(a)                                 (batch, tokens, channels): permute, reshape, roll, in any order
              b = s + g(s)
              y = L'(b);  c = y + h(y)                 where L' undoes L

    after     a = x + f(x)
              b' = a + L^-1(g(L(a)))                   the same values as b, in the layout of the chain
              c = b' + h(b')

For graphs of torch.export, which record shapes. An add s + q with s = L(a) is L(a + L^-1(q)) for every invertible L, so moving is right
whatever q is; where a run of layout operations comes back to the layout it began in is found by running it on numbered elements, for two
assignments of primes to the free sizes. Memory that anything writes to in place is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.node import map_arg

from passes.facts import Facts
from passes.ops import is_add

__all__ = ["level_layouts"]

_ATEN = torch.ops.aten
_PERMUTING = {_ATEN.permute.default, _ATEN.transpose.int, _ATEN.roll.default}
_RESHAPING = {
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN._unsafe_view.default,
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.unsqueeze.default,
}
_COPYING = {_ATEN.contiguous.default, _ATEN.clone.default}
_PRIMES = ((5, 11, 17, 23, 31), (7, 13, 19, 29, 37))
_LARGEST = 2**24  # elements to number
_FARTHEST = 4000  # nodes to look at between a stream value and the sum that may continue it

Path = tuple[fx.Node, ...]


def level_layouts(gm: fx.GraphModule) -> None:
    """Rewrites the graph of `gm` in place.

    Args:
        gm: a graph module of torch.export, which belongs to the caller.
    """
    _Leveller(gm).run()


class _Leveller:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        facts = Facts.of(gm)
        self.position: dict[fx.Node, int] = facts.index
        self.written = {memory for memories in facts.writes.values() for memory in memories}
        self.base = facts.base
        self.origin: dict[fx.Node, tuple[fx.Node, Path]] = {}  # of a value that is another one in another layout
        self.moved = False

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if _is_layout(node) and not self._is_written(node):
                self._follow(node)
                self._simplify(node)
            elif is_add(node) and node.target is _ATEN.add.Tensor:
                self._move(node)
        if self.moved:
            self._clean()

    def _follow(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        root, path = self.origin.get(source, (source, ()))
        self.origin[node] = root, (*path, node)

    def _simplify(self, node: fx.Node) -> None:
        """Uses the root itself where a value is back in the root's layout; only behind a sum that was moved, elsewhere it gains nothing."""
        root, path = self.origin[node]
        if root.meta.get("levelled") and _sizes(root) == _sizes(node) and _is_identity(root, path):
            node.replace_all_uses_with(root)

    def _move(self, add: fx.Node) -> None:
        a, b = add.args[:2]
        if add.kwargs or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or _sizes(a) is None or _sizes(a) != _sizes(b):
            return
        for skip, branch in ((a, b), (b, a)):
            root, path = self.origin.get(skip, (skip, ()))
            if not (path and is_add(root) and _dtype(root) == _dtype(branch) == _dtype(add)):
                continue
            if any(map(self._is_written, (root, *path, branch, add))) or _is_identity(root, path) or not self._descends(branch, root):
                continue
            self._moved(add, root, path, branch)
            return

    def _moved(self, add: fx.Node, root: fx.Node, path: Path, branch: fx.Node) -> None:
        self.moved = True
        with self.graph.inserting_before(add):
            for node in reversed(path):
                branch = self._node(add, *_inverse(node, branch), like=node.args[0])
            value = self._node(add, _ATEN.add.Tensor, (root, branch), like=root)
            value.meta["levelled"] = root.meta["levelled"] = True
            for node in path:
                target: Any = _ATEN.reshape.default if node.target in (_ATEN.view.default, _ATEN._unsafe_view.default) else node.target
                after = self._node(add, target, (value, *node.args[1:]), like=node)
                self.origin[after] = (self.origin[value][0], (*self.origin[value][1], after)) if value in self.origin else (value, (after,))
                value = after
        add.replace_all_uses_with(value)

    def _node(self, add: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], like: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {"val": like.meta["val"]} | {key: add.meta[key] for key in ("nn_module_stack", "stack_trace") if key in add.meta}
        self.position[node] = self.position[add]
        self.base[node] = node
        return node

    def _is_written(self, node: fx.Node) -> bool:
        return self.base[node] in self.written

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
            if node.target is _ATEN.view.default and not self._is_written(node):
                node.target = _ATEN.reshape.default
            if not node.users and (_is_layout(node) or node.target is _ATEN.add.Tensor):
                self.graph.erase_node(node)
        self.graph.lint()
        self.gm.recompile()


def _is_layout(node: fx.Node) -> bool:
    known = node.target in _PERMUTING or node.target in _RESHAPING or node.target in _COPYING
    return known and bool(node.args) and isinstance(node.args[0], fx.Node) and _sizes(node) is not None


def _inverse(node: fx.Node, value: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The operation that undoes a layout operation, applied to `value`."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is _ATEN.permute.default:
        dims = [int(d) % len(node.args[1]) for d in node.args[1]]  # type: ignore[arg-type, union-attr]
        return _ATEN.permute.default, (value, [dims.index(i) for i in range(len(dims))])
    if node.target is _ATEN.transpose.int:
        return _ATEN.transpose.int, (value, *node.args[1:])
    if node.target is _ATEN.roll.default:
        return _ATEN.roll.default, (value, [-int(n) for n in node.args[1]], *node.args[2:])  # type: ignore[arg-type, union-attr]
    return _ATEN.reshape.default, (value, _written_sizes(source))


def _written_sizes(node: fx.Node) -> list[Any]:
    """The sizes of a value as arguments of reshape: numbers, -1 for the one free size, or nodes that read them."""
    sizes = list(node.meta["val"].shape)
    free = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(free) < 2:
        return [size if isinstance(size, int) else -1 for size in sizes]
    return [size if isinstance(size, int) else node.graph.call_function(_ATEN.sym_size.int, (node, i)) for i, size in enumerate(sizes)]


def _sizes(node: fx.Node) -> tuple[Any, ...] | None:
    """Sizes, symbolic ones as expressions, which compare by form."""
    shape = getattr(node.meta.get("val"), "shape", None)
    return None if shape is None else tuple(size if isinstance(size, int) else size.node.expr for size in shape)


def _dtype(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_identity(root: fx.Node, path: Path) -> bool:
    """True if the operations of `path` bring every element of `root` back to its place."""
    if _sizes(root) != _sizes(path[-1]):
        return False
    return all(_comes_back(root, path, primes) for primes in _PRIMES)


def _comes_back(root: fx.Node, path: Path, primes: tuple[int, ...]) -> bool:
    symbols = sorted(
        {
            symbol
            for node in (root, *path)
            for size in node.meta["val"].shape
            if not isinstance(size, int)
            for symbol in size.node.expr.free_symbols
        },
        key=str,
    )
    if len(symbols) > len(primes):
        return False
    assigned = dict(zip(symbols, primes, strict=False))

    def number(size: Any) -> int:
        return int(size) if isinstance(size, int) else int(size.node.expr.subs(assigned))

    def argument(node: fx.Node) -> Any:
        return number(node.meta["val"]) if isinstance(node.meta.get("val"), torch.SymInt) else node

    shape = [number(size) for size in root.meta["val"].shape]
    if math.prod(shape) > _LARGEST:
        return False
    start = value = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    try:
        for node in path:
            target = _ATEN.reshape.default if node.target is _ATEN.view.default else node.target
            arguments = [value, *map_arg(node.args[1:], argument)]
            result = target(*arguments)  # type: ignore[operator]
            assert isinstance(result, Tensor)
            value = result
    except (RuntimeError, TypeError, KeyError, AttributeError):  # sizes that these operations do not take, or not of this kind
        return False
    return torch.equal(value, start) if value.shape == start.shape else False
