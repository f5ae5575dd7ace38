"""What a node does to memory as far as tables tell: what it overwrites, whose memory its result may share, what it leaves in another state.

For graphs that record no fake tensors; of others it is observed (`effects`). Known are the ways of Python, of torch's functions and
methods, and the schemas of torch.ops. A result is fresh memory only where that is known. Of a module or function that is none of torch's
nothing is known.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from passes.graphs.attention import attention_by
from passes.graphs.ops import IN_PLACE_OPERATORS, kind, operands, package_of, word_of, words

__all__ = ["is_hook", "is_unknown", "may_alias", "moved", "overwritten", "running_statistics", "statistics", "written"]


def written(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, ...]:
    """The values that a node overwrites in place.

    Known are augmented assignments, item assignments, names that end in an underscore, `inplace=True`, `out=`, what the schema of an
    operation of torch.ops says, the statistics of functional batch and instance norms, and Dynamo's `register_hook`, which changes the
    gradient of its input. An unknown function or module whose result nobody reads is taken to write to all its inputs, since
    it must have been called for some effect. The statistics and inputs that are buffers of a module do not count: a rerun restores those.
    """
    if node.op == "call_function" and node.target in _RUNNING:
        return running_statistics(node)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return tuple(dict.fromkeys(value for value, a in _arguments(node) if a.alias_info is not None and a.alias_info.is_write))
    if out := _nodes_in(node.kwargs.get("out")):
        return out
    if targets := overwritten(node, modules):
        return targets
    if not node.users and kind(node, modules) == "mix" and not _known(node, modules):
        return tuple(value for value in node.all_input_nodes if value.op != "get_attr")
    return ()


_RUNNING: dict[Any, tuple[int, int, bool]] = {  # norms: positions of the running mean and of the flag that says to update it, its default
    torch.nn.functional.batch_norm: (1, 5, False),
    torch.nn.functional.instance_norm: (1, 5, True),
    torch.batch_norm: (3, 5, False),
    torch.instance_norm: (3, 5, True),
    torch.ops.aten.batch_norm.default: (3, 5, False),
    torch.ops.aten.instance_norm.default: (3, 5, True),
}


def overwritten(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, ...]:
    """The values that a node overwrites in place by its name: what it is called on, or given first."""
    if is_hook(node):
        return tuple(value for value in node.args[:1] if isinstance(value, fx.Node))
    if not _in_place(node, modules):
        return ()
    return _nodes_in(operands(node)[:1])


def _nodes_in(argument: Any) -> tuple[fx.Node, ...]:
    """The nodes in an argument, which may be a list of them."""
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return tuple(found)


def running_statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The statistics that a batch or instance norm moves, of which its schema does not tell, and that are no buffers of a module."""
    if node.op != "call_function" or node.target not in _RUNNING:
        return ()
    _, flag, default = _RUNNING[node.target]
    updating = node.args[flag] if len(node.args) > flag else node.kwargs.get("training", node.kwargs.get("use_input_stats", default))
    return tuple(value for value in statistics(node) if value.op != "get_attr") if updating is not False else ()


def statistics(node: fx.Node) -> list[fx.Node]:
    """The running mean and variance that a batch or instance norm is given."""
    if node.op != "call_function" or node.target not in _RUNNING:
        return []
    mean = _RUNNING[node.target][0]
    given = (*node.args[mean : mean + 2], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
    return [value for value in given if isinstance(value, fx.Node)]


def is_hook(node: fx.Node) -> bool:
    """Whether a node hooks a function onto the gradient of its first argument, which it returns as it is: Dynamo's `x.register_hook(f)`."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "register_hook"


def _arguments(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """The nodes among the arguments of an operation of torch.ops, each with what the schema says about it (each schema of a packet)."""
    target: Any = node.target
    overloads = [target] if isinstance(target, torch._ops.OpOverload) else [getattr(target, name) for name in target.overloads()]
    given: list[tuple[Any, Any]] = []
    for arguments in (overload._schema.arguments for overload in overloads):
        given += zip(node.args, arguments, strict=False)
        given += ((node.kwargs[a.name], a) for a in arguments if a.name in node.kwargs)
    return [(value, argument) for value, argument in given if isinstance(value, fx.Node)]


def is_unknown(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for the call of a module or function of which nothing is known: what it returns may be memory that it was given."""
    return node.op in ("call_module", "call_function") and kind(node, modules) == "mix" and not _known(node, modules)


def moved(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Paths of what a call may leave in another state for the next one: the buffers of a module; running statistics."""
    if node.op == "call_module":
        return tuple(f"{node.target}.{name}" for name, _ in modules[str(node.target)].named_buffers())
    if node.op != "call_function" or node.target not in _RUNNING:
        return ()
    return tuple(str(value.target) for value in statistics(node) if value.op == "get_attr")


def _known(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__module__.startswith("torch.")
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # runs any code
        return False
    return isinstance(node.target, str) or package_of(node.target) in ("torch", "_operator", "builtins", "math", "passes")


def _in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in (
            "__setitem__",
            "__iadd__",
            "__isub__",
            "__imul__",
            "__itruediv__",
        )
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.target in IN_PLACE_OPERATORS or node.target is operator.setitem:
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return node.target not in (operator.and_, operator.or_, operator.not_, operator.is_)
    position = _inplace_position(node.target)
    given = node.args[position] if position is not None and position < len(node.args) else node.kwargs.get("inplace", False)
    return given is not False


@cache
def _inplace_position(target: Any) -> int | None:
    try:
        return list(inspect.signature(target).parameters).index("inplace")
    except (TypeError, ValueError):  # a builtin without a signature, or a function without the parameter
        return None


_COPIES = words("""
    lift_fresh_copy _to_copy constant_pad_nd
    clone cat concat concatenate stack hstack vstack pad roll flip repeat tile repeat_interleave index_select gather take_along_dim
    masked_select rot90 tril triu index_add index_copy scatter
""")
_FRESH_KINDS = words("norm activation scale elementwise reduce convolution linear pool add shape create")
_VIEWS = words("einsum pos as_tensor sum_to_size")  # of kinds whose others make fresh memory
_ALIASING = words("dropout identity cast layout")  # kinds that may return memory of their first operand


def may_alias(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, ...]:
    """The inputs whose memory the result of a node may share; none where it is known to be fresh memory.

    What a module returns is taken to be fresh but for those of kinds that may return their input (see also `is_unknown`).
    """
    if _in_place(node, modules) or is_hook(node) or "out" in node.kwargs:
        return written(node, modules)
    if node.op not in ("call_module", "call_function", "call_method"):
        return ()
    found = kind(node, modules)
    first = tuple(value for value in operands(node)[:1] if isinstance(value, fx.Node))
    if node.op == "call_module":
        return first if found in _ALIASING else ()
    word = word_of(node.target)
    if word in _COPIES or (found in _FRESH_KINDS and word not in _VIEWS) or is_unknown(node, modules):
        return ()
    if found in _ALIASING and first:
        return first
    return () if _makes_fresh(node.target, word) else tuple(node.all_input_nodes)


@cache
def _makes_fresh(target: Any, word: str) -> bool:
    """Whether the operation of torch.ops.aten of that name makes fresh memory, by its schema, and not by way of other operations."""
    packet = getattr(torch.ops.aten, word, None) if not isinstance(target, torch._ops.OpOverload) else target.overloadpacket
    if packet is None:
        return target in (torch.nn.functional.scaled_dot_product_attention, attention_by)
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return not any(
        any(result.alias_info is not None for result in overload._schema.returns) or _is_composite(overload) for overload in overloads
    )


def _is_composite(overload: Any) -> bool:
    """Whether it is made of other operations; so are those of TorchScript alone, such as aten::as_tensor, which no dispatcher knows."""
    try:
        return bool(overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))
    except RuntimeError:
        return True
