"""A graph of `torch.export` in the form the passes want.

before                                          after
forward(x) through pytree specs                 flat placeholders, a flat tuple as output
self.module.conv.weight                         self.conv.weight, by its path in the captured module
self.lifted_tensor_0                            self.<holder>.lifted_tensor_0
n = sym_size(norm_1, 0)  inside some block      n = sym_size(x, 0), right after the first value that has this size
assertions about dtypes                         gone: autocast around a later call may change them
live(3, (x, mask), None)                        self.experts(x, mask=mask), what a module that stays Python was called with
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn

from passes.live import LIVE, SYMBOLIC, LiveCall, live_results

__all__ = ["WRAPPED", "attribute", "rebuilt"]

WRAPPED = "module"  # attribute of the wrapper under which torch.export saw the captured module
_CHECKS = ("_assert_tensor_metadata",)


def rebuilt(gm: fx.GraphModule, module: nn.Module, holder: str, live: Sequence[LiveCall]) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Bring an exported graph into that form.

    Args:
        gm: what `ExportedProgram.module()` gave for the wrapped module.
        module: the module itself.
        holder: name under which the new graph looks for what the module does not have.
        live: the calls of modules that stay Python, by number.

    Returns:
        The new graph over the module's own parameters, and what belongs under `holder`, by name.
    """
    rebuilder = _Rebuilder(gm, module, holder, live)
    for node in gm.graph.nodes:
        rebuilder.copy(node)
    result = fx.GraphModule(rebuilder.attributes, rebuilder.graph, class_name=type(module).__name__)
    return result, rebuilder.constants


class _Rebuilder:
    def __init__(self, gm: fx.GraphModule, module: nn.Module, holder: str, live: Sequence[LiveCall]) -> None:
        self.gm, self.module, self.holder, self.live = gm, module, holder, live
        self.single: dict[fx.Node, fx.Node] = {}  # calls of live modules that return one tensor
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self.attributes: dict[str, Any] = {}  # by target in the new graph
        self.values: dict[fx.Node, fx.Node] = {}
        self.first: dict[Any, tuple[fx.Node, int]] = {}  # by symbolic size: the first value that has it, and in which dimension
        self.sizes: dict[Any, fx.Node] = {}
        self.last_input: fx.Node | None = None

    def copy(self, node: fx.Node) -> None:
        if node.op == "call_module" or _is_check(node) or (node.op == "get_attr" and not node.users):
            return
        if node.op == "output":
            self.graph.output(tuple(self.values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]))  # type: ignore[union-attr]
            return
        if node.target is torch.ops.aten.sym_size.int and (known := self._size(node)) is not None:
            self.values[node] = known
            return
        if node.target is operator.getitem and node.args[0] in self.single:
            new = self.values[node] = self.single[node.args[0]]  # type: ignore[index]
            new.meta["val"] = node.meta["val"]
        else:
            new = self.values[node] = self._live_call(node) if node.target is LIVE else self.graph.node_copy(node, self.values.__getitem__)
            _keep_stack(new, node)
        self._note_sizes(new)
        if node.op == "placeholder":
            self.last_input = new
        if node.op == "get_attr":
            self._bind(new)

    def _live_call(self, node: fx.Node) -> fx.Node:
        """The call of a module that stays Python, and if need be the check of what it returns."""
        arguments: Any = fx.node.map_arg(node.args, self.values.__getitem__)
        number, inputs, sizes = arguments
        call, given = self.live[number], iter(inputs)
        leaves = [next(given) if isinstance(leaf, SYMBOLIC) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        self.attributes[call.path] = self.module.get_submodule(call.path)
        new = self.graph.create_node("call_module", call.path, args, kwargs)
        if call.form is None:
            self.single[node] = new
            return new
        _keep_stack(new, node)
        return self.graph.call_function(live_results, (new, call.form, sizes, [leaves[i] for i in call.given]))

    def _bind(self, node: fx.Node) -> None:
        """Points a get_attr node to the module's own attribute, or to the holder."""
        old = str(node.target)
        node.target = path = _path(old)
        if not _has(self.module, path):
            name = old.replace(".", "_")
            self.constants[name] = attribute(self.gm, old)
            node.target = f"{self.holder}.{name}"
            self.attributes[node.target] = self.constants[name]
        else:
            self.attributes[path] = attribute(self.module, path)

    def _note_sizes(self, node: fx.Node) -> None:
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if isinstance(size, torch.SymInt):
                self.first.setdefault(size.node.expr, (node, dim))

    def _size(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads this size, so that no block depends on the inside of another for the shape of a view."""
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt) or size.node.expr not in self.first:
            return None
        expression = size.node.expr
        if expression not in self.sizes:
            source, dim = self.first[expression]
            after = self.last_input if source.op == "placeholder" else source
            with self.graph.inserting_after(after):
                self.sizes[expression] = self.graph.create_node("call_function", torch.ops.aten.sym_size.int, (source, dim))
            self.sizes[expression].meta = {"val": size}
        return self.sizes[expression]


def _keep_stack(new: fx.Node, old: fx.Node) -> None:
    """The modules that were running, by their paths in the captured module."""
    if stack := old.meta.get("nn_module_stack"):
        inner = [(key, (_path(value[0]), value[1])) for key, value in stack.items() if str(value[0]).startswith(WRAPPED)]
        new.meta["nn_module_stack"] = dict(inner)


def _is_check(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__ in _CHECKS


def _path(path: str) -> str:
    return path.removeprefix(WRAPPED).removeprefix(".")


def attribute(root: Any, path: str) -> Any:
    """What a graph means by the target of a get_attr node."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _has(module: nn.Module, path: str) -> bool:
    try:
        attribute(module, path)
    except AttributeError:
        return False
    return True
