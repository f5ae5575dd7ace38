"""What a node does to memory: what it overwrites, whose memory its result may share, what it leaves in another state.

Known are the ways of Python, of torch's functions and methods, and the schemas of torch.ops. Of a module or function that is none of
torch's nothing is known.
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

from passes.ops import IN_PLACE_OPERATORS, kind, operands, package_of, word_of, words

__all__ = ["is_hook", "is_unknown", "may_alias", "moved", "written"]


def written(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, ...]:
    """The values that a node overwrites in place.

    Known are augmented assignments, item assignments, names that end in an underscore, `inplace=True`, `out=`, what the schema of an
    operation of torch.ops says, the statistics of functional batch and instance norms, and Dynamo's `register_hook`, which changes the
    gradient of its input. An unknown function or module whose result nobody reads is taken to write to all its inputs, since
    it must have been called for some effect. The statistics and inputs that are buffers of a module do not count: a rerun restores those.
    """
    if node.op == "call_function" and node.target in _RUNNING:
        return _running_statistics(node)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return tuple(dict.fromkeys(value for value, a in _arguments(node) if a.alias_info is not None and a.alias_info.is_write))
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return (out,)
    if is_hook(node):
        return tuple(value for value in node.args[:1] if isinstance(value, fx.Node))
    if _in_place(node, modules):
        return tuple(value for value in operands(node)[:1] if isinstance(value, fx.Node))
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


def _running_statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    _, flag, default = _RUNNING[node.target]
    updating = node.args[flag] if len(node.args) > flag else node.kwargs.get("training", node.kwargs.get("use_input_stats", default))
    return tuple(value for value in _statistics(node) if value.op != "get_attr") if updating is not False else ()


def _statistics(node: fx.Node) -> list[fx.Node]:
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
    return tuple(str(value.target) for value in _statistics(node) if value.op == "get_attr")


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
    lift_fresh_copy _to_copy constant_pad_nd native_channel_shuffle
    clone cat concat concatenate stack hstack vstack pad roll flip repeat tile repeat_interleave index_select gather take_along_dim
    masked_select pixel_shuffle pixel_unshuffle channel_shuffle rot90 tril triu index_add index_copy scatter
""")


def may_alias(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The input whose memory the result of a node may share, or None when the result is fresh memory."""
    if _in_place(node, modules) or is_hook(node) or "out" in node.kwargs:
        return written(node, modules)[0] if written(node, modules) else None
    first = operands(node)[0] if operands(node) else None
    if not isinstance(first, fx.Node) or kind(node, modules) not in ("dropout", "identity", "cast", "layout"):
        return None
    return None if node.op != "call_module" and word_of(node.target) in _COPIES else first
