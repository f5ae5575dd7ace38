"""A graph of Dynamo (`torch.compile`) in the form the passes want, and back.

before                                            after `unlift`
placeholder l_self_modules_fc_parameters_weight_  get_attr of a name in `Unlifted.attributes`, as in the other dialects
item = eps.item(); used by several nodes          one item for each user, so that no block depends on the inside of another, nor on a float
no_grad; a; end of it                             a, of detached inputs (`grad_modes`)
enter autocast; a; b; exit                        one call of a module that does all of it

`lift` makes attributes inputs again, in the order they had, and hands those that a region's steps read to the region's call.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from passes.capturing.attention_kernels import LostContextError, with_kernels_written_out
from passes.capturing.copying import node_copy
from passes.capturing.grad_modes import MODE, detached
from passes.capturing.sizes import Sizes, is_unread_size
from passes.graphs.facts import Facts

__all__ = ["LostContextError", "Unlifted", "lift", "modules_run", "state_change", "unlift"]

_ENTER = frozenset({"_enter_autocast", "_enter_inference_mode", "_vmap_increment_nesting"})
_EXIT = frozenset({"_exit_autocast", "_exit_inference_mode", "_vmap_decrement_nesting"})
_MEMBER = re.compile(r"_(?:modules|parameters|buffers)(?:'\])?\['([^']*)'\]")  # also .__dict__['_modules']['fc'], as Dynamo may say
_STATE = re.compile("set_|nesting|enter|exit|seed|push|pop")  # in the names of functions that change a global state


@dataclass(frozen=True)
class Unlifted:
    """A Dynamo graph whose parameters and buffers are attributes.

    Attributes:
        graph_module: the graph.
        inputs: names of all placeholders of the original graph, in order; that of an attribute is its target in `graph_module` too.
        attributes: for each input that became an attribute, the path of the parameter or buffer in the compiled model.
        sizes: names of the inputs that are symbolic sizes.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    attributes: dict[str, str]
    sizes: tuple[str, ...]


def unlift(gm: fx.GraphModule) -> Unlifted:
    """Bring the graph that Dynamo hands to a backend into the form of the other dialects.

    Args:
        gm: the graph, which is not changed.

    Raises:
        LostContextError: it changes a global state across operations in a way that cannot be kept, or is not about plain tensors.
    """
    gm = _with_contexts_as_modules(detached(with_kernels_written_out(gm), _is_attribute))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    attributes = _paths([node for node in placeholders if _is_attribute(node)])
    _check_types(node for node in gm.graph.nodes if node.name not in attributes)
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in sorted(placeholders, key=lambda node: node.name in attributes):
        if node.name in attributes:
            values[node] = graph.create_node("get_attr", node.name, name=node.name)
        else:
            values[node] = graph.node_copy(node)
        values[node].meta = _meta(node)
    scalars, sizes = _scalars(gm), Sizes(placeholders, values)

    def copied(node: fx.Node) -> None:
        if (size := sizes.of(node)) is not None:
            values[node] = size
            return
        for source in node.all_input_nodes:
            if source in scalars:
                copied(source)
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = _meta(node)

    for node in gm.graph.nodes:
        if node.op != "placeholder" and not (node in scalars and node.users):
            copied(node)
    for node in reversed(graph.nodes):
        if is_unread_size(node):
            graph.erase_node(node)
    root = _attributes(gm, graph) | {node.name: node.meta["example_value"] for node in placeholders if node.name in attributes}
    symbolic = (node.name for node in placeholders if isinstance(node.meta.get("example_value"), torch.SymInt))
    return Unlifted(_module(root, graph), tuple(node.name for node in placeholders), attributes, tuple(symbolic))


def modules_run(gm: fx.GraphModule) -> set[str]:
    """Paths of the modules, from the compiled one, whose code a graph of Dynamo holds, also in the bodies of what it calls."""
    graphs = [part.graph for part in gm.modules() if isinstance(part, fx.GraphModule)]
    stacks = [node.meta.get("nn_module_stack") or {} for graph in graphs for node in graph.nodes]
    return {_module_path(name) for name in {str(name) for stack in stacks for name, _ in stack.values()}}


def lift(gm: fx.GraphModule, unlifted: Unlifted, reads: Mapping[str, Sequence[str]]) -> fx.GraphModule:
    """Take `unlift` back, after regions were put in.

    Args:
        gm: a graph over the same inputs and attributes.
        unlifted: where it came from.
        reads: for the target of each region, the attributes that its calls are given after their other arguments; all symbolic sizes come
            after those, since a compiler has to be told what a size of s * 4 is made of.

    Returns:
        A graph with the inputs of Dynamo's.
    """
    old = {node.name: node for node in unlifted.graph_module.graph.nodes}
    graph = fx.Graph()
    inputs: dict[str, fx.Node] = {}
    for name in unlifted.inputs:
        inputs[name] = graph.placeholder(name)
        inputs[name].meta = dict(old[name].meta)
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        name = node.name if node.op == "placeholder" else str(node.target)
        if name in inputs and node.op in ("placeholder", "get_attr"):
            values[node] = inputs[name]
            continue
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "call_module" and node.target in reads:
            values[node].args = (*values[node].args, *(inputs[name] for name in (*reads[node.target], *unlifted.sizes)))
    return _module(_attributes(gm, graph), graph)


def _module(root: Mapping[str, Any], graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule(dict(root), graph)


def _attributes(gm: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    """What of `gm` the nodes of a graph refer to, by target."""
    targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return {target: getattr(gm, target) for target in targets if hasattr(gm, target)}  # Dynamo's names have no dots


def _check_types(nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        if is_traceable_wrapper_subclass(value := node.meta.get("example_value")):
            raise LostContextError(f"%{node.name} is a {type(value).__name__}, and a chain carries plain tensors")


def _is_attribute(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of a module."""
    if isinstance(node.meta.get("example_value"), nn.Parameter):
        return True
    if "_dynamo_static_input_type" not in (node.meta.get("tensor_dict") or {}):
        return False
    name = _source_name(node)  # such a type have also inputs that went through mark_static_address
    return name is None or any(f"{table}['" in name or f"{table}']['" in name for table in ("_buffers", "_parameters"))


def _scalars(gm: fx.GraphModule) -> set[fx.Node]:
    """Floats read from a 0-d tensor with `item`, into which Dynamo turns a float that may vary, and what is computed from them.

    No compiled part takes such a number as an input, so each user works it out from the tensor, which nothing may write to.
    """
    scalars = [node for node in gm.graph.nodes if node.op != "placeholder" and _is_float(node)]
    facts = Facts.of(gm) if scalars else Facts((), {})
    written = {memory for memories in facts.writes.values() for memory in memories}
    for node in scalars:
        if any(not written.isdisjoint(facts.shares[source]) for source in node.all_input_nodes):
            raise LostContextError(f"%{node.name} is a float read from a tensor that is written to")
    return set(scalars)


def _is_float(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymFloat)


def _paths(nodes: Sequence[fx.Node]) -> dict[str, str]:
    """The paths of parameters and buffers by the names of their nodes; no two have the same, as modules that hide in lists would."""
    paths = {node.name: _path(node) for node in nodes}
    found = Counter(paths.values())
    return {name: path if found[path] == 1 else name for name, path in paths.items()}


def _path(node: fx.Node) -> str:
    """Path of a parameter or buffer, as far as Dynamo's name of it tells: L['self']._modules['fc']._parameters['weight'] is fc.weight."""
    return ".".join(re.findall(_MEMBER, _source_name(node) or "")) or node.name


def _source_name(node: fx.Node) -> str | None:
    """Where Dynamo found the value of a placeholder, as Python code, if it says so."""
    source: Any = getattr(node, "_dynamo_source", None)
    try:
        return source.name
    except Exception:  # not every source has a name
        return None


def _meta(node: fx.Node) -> dict[str, Any]:
    """Its meta data, with the paths of modules as they are from the compiled module: L['self'].layers.0 is layers.0."""
    meta = dict(node.meta)
    if stack := meta.get("nn_module_stack"):
        meta["nn_module_stack"] = {key: (_module_path(value[0]), value[1]) for key, value in stack.items()}
    return meta


def _module_path(name: str) -> str:
    name = name.replace(".forward.args[0]", "")  # where the forward is a partial of the module's
    name = name.replace("._compiled_call_impl.module", "")  # where the module has a door (`captured.doors`)
    while name != (name := re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", name)):  # where a name is no identifier
        pass
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", name)
    path = re.sub(rf"(?:__dict__\[')?{_MEMBER.pattern}", r"\1", path)
    return re.sub(r"\['?([^'\]]*)'?\]", r".\1", path).strip(".")


def _with_contexts_as_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """Each block under another autocast or grad mode as one call of a module."""
    blocks = _blocks(gm.graph)
    if not blocks:
        return gm
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    root: dict[str, Any] = {}
    inside = {node: block for block in blocks for node in block}
    for node in gm.graph.nodes:
        block = inside.get(node)
        if block is None:
            values[node] = node_copy(graph, node, values.__getitem__)
        elif node is block[-1]:
            name = f"context_{len(root)}"
            root[name], inputs, outputs = _block_module(gm, block)
            call = graph.create_node("call_module", name, tuple(values[node] for node in inputs))
            for i, output in enumerate(outputs):
                values[output] = graph.call_function(operator.getitem, (call, i))
                values[output].meta = dict(output.meta)
    return _module(_attributes(gm, graph) | root, graph)


def _blocks(graph: fx.Graph) -> list[list[fx.Node]]:
    """Runs of nodes from where a context is entered to where it is left."""
    blocks: list[list[fx.Node]] = []
    depth, ambient = 0, torch.is_grad_enabled()
    enabled, open_ = ambient, False
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == MODE:
            enabled = bool(node.args[0])
        elif name in _ENTER:
            depth += 1
        elif name in _EXIT:
            depth -= 1
        elif not open_ and _sets_state(node, name):
            raise LostContextError(f"it calls {name}, which changes a state that the passes do not know")
        if not open_ and (depth or enabled != ambient):
            blocks.append([])
        open_now = bool(depth) or enabled != ambient
        if open_ or open_now:
            blocks[-1].append(node)
        open_ = open_now
    if open_:
        raise LostContextError("it enters a context that it does not leave, such as torch.no_grad() around a graph break")
    return blocks


def state_change(graph: fx.Graph) -> str | None:
    """The first call in a graph that changes a global state of torch's, which no node may cross; None if there is none."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == MODE or name in _ENTER or name in _EXIT or _sets_state(node, name):
            return name
    return None


def _sets_state(node: fx.Node, name: str) -> bool:
    """A call for its effect on something other than a tensor, such as _vmap_increment_nesting or manual_seed."""
    return not node.users and not node.all_input_nodes and _STATE.search(name) is not None


def _block_module(gm: fx.GraphModule, block: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The module of a block, the nodes it reads, and the nodes of it that are read elsewhere."""
    inside = set(block)
    inputs = _in_order(source for node in block for source in node.all_input_nodes if source not in inside and source.op != "get_attr")
    outputs = [node for node in block if any(user not in inside for user in node.users)]
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        values[node] = graph.placeholder(node.name)
    for node in block:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                values[source] = graph.node_copy(source)
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = _meta(node)
    graph.output(tuple(values[node] for node in outputs))
    return _module(_attributes(gm, graph), graph), inputs, outputs


def _in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))
