"""What a rewritten forward takes for granted about the model, checked at every call.

A captured graph calls the leaves of the model live, by path, but the Python of the modules above them ran once, while tracing. If such a
module is replaced, gets a hook, loses or gains a child, changes an attribute that its forward reads, or is in another mode than the
whole, the graph no longer is what the model's Python would do. Then the call is an error, not a silent difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MnetError

__all__ = ["Guard", "hooked"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_SINCE = "since momentumize, whose graph stands for its forward: momentumize the model as it is now"
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class _Seen:
    """One module that a trace went through, as it was: its children by name, what its forward may read, and its hooks."""

    path: str
    module: nn.Module
    children: tuple[str, ...]
    attributes: dict[str, Any]
    hooks: int


class Guard:
    """Snapshot of the modules of `owner` whose Python a graph replaces.

    Args:
        owner: the captured module.
        leaves: paths of the modules that its graphs call.
        one_mode: whether the graphs of train and eval mode differ, so that all modules must be in the same.
        whole: whether the graphs stand for the insides of torch.nn's modules too, and for one dtype and device of the parameters.
    """

    def __init__(self, owner: nn.Module, leaves: Collection[str], one_mode: bool, whole: bool = False) -> None:
        self.one_mode, self.whole, self.leaves = one_mode, whole, frozenset(leaves)
        self.kinds = _kinds(owner, self.leaves) if whole else {}
        self.seen = [
            _Seen(path, module, _children(module), {name: _kept(vars(module)[name]) for name in _read_attributes(module)}, _hooks(module))
            for path, module in _traced_through(owner, self.leaves, whole)
        ]

    def check(self, owner: nn.Module) -> None:
        """Compares with what is there now.

        Raises:
            MnetError: something that the graph replaces has changed since.
        """
        for seen in self.seen:
            if (found := self._difference(seen, owner)) is not None:
                where = seen.path or type(owner).__name__
                raise MnetError(f"{where} {found}")
        now = _kinds(owner, self.leaves) if self.whole else {}
        for name, kind in self.kinds.items():
            if now.get(name) != kind:
                raise MnetError(f"{name} went from {kind} to {now.get(name, 'nothing')} {_SINCE}")

    def _difference(self, seen: _Seen, owner: nn.Module) -> str | None:
        module = seen.module
        if seen.path:
            parent, _, name = seen.path.rpartition(".")
            if owner.get_submodule(parent)._modules.get(name) is not module:
                return f"was replaced or removed {_SINCE}"
            if _hooks(module) != seen.hooks:
                return f"got a hook {_SINCE}, or put the hook on the layers inside, which are called as they are"
        if _children(module) != seen.children and (isinstance(module, _CONTAINERS) or not set(seen.children) <= set(module._modules)):
            return f"lost or gained a submodule {_SINCE}"
        for name, value in seen.attributes.items():
            if not _alike(vars(module).get(name, _HOOKS), value):
                return f"had its attribute {name} changed from {value!r} {_SINCE}"
        if self.one_mode and module.training != owner.training and not isinstance(module, _CONTAINERS):
            mode = "train" if module.training else "eval"
            return (
                f"is in {mode} mode and {type(owner).__name__} is not, whose forward was captured for one mode of the whole: "
                "put both in the same mode, or freeze parameters with requires_grad_(False) instead"
            )
        return None


def _kept(value: Any) -> Any:
    """A value as it is now: of containers a copy, since they may change inside."""
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    return {key: _kept(item) for key, item in value.items()} if type(value) is dict else value


def _alike(now: Any, kept: Any) -> bool:
    """Whether a value is what it was; objects other than plain ones are compared by identity."""
    if now is kept or type(now) is not type(kept):
        return now is kept
    if type(now) in (list, tuple):
        return len(now) == len(kept) and all(map(_alike, now, kept))
    if type(now) is dict:
        return now.keys() == kept.keys() and all(_alike(now[key], kept[key]) for key in now)
    return isinstance(now, _PLAIN) and bool(now == kept)


def _children(module: nn.Module) -> tuple[str, ...]:
    """Names of the children but for the one that `momentumize` itself adds, after the capture."""
    return tuple(name for name in module._modules if name != "initial_velocity")


def _hooks(module: nn.Module) -> int:
    return sum(len(getattr(module, hooks)) for hooks in _HOOKS)


def hooked(owner: nn.Module) -> list[str]:
    """Paths of the modules inside `owner` that have hooks."""
    return [path for path, module in owner.named_modules() if path and not isinstance(module, torch.jit.ScriptModule) and _hooks(module)]


def _kinds(owner: nn.Module, leaves: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """Dtype and device of every parameter and buffer, which an exported graph may have fixed, but for those of its leaves."""
    named = chain(owner.named_parameters(remove_duplicate=False), owner.named_buffers(remove_duplicate=False))
    return {name: (t.dtype, t.device) for name, t in named if not any(name.startswith(f"{leaf}.") for leaf in leaves)}


def _traced_through(module: nn.Module, leaves: frozenset[str], whole: bool) -> Iterator[tuple[str, nn.Module]]:
    """The module and those inside whose forward ran while tracing; everything that is no leaf and under none."""
    above = {leaf[:i] for leaf in leaves for i, letter in enumerate(leaf) if letter == "."}

    def through(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            is_torch = type(child).__module__.startswith("torch.nn.modules.") and inner not in above
            called = inner in leaves or (is_torch and not whole) or isinstance(child, torch.jit.ScriptModule)
            if not called or isinstance(child, _CONTAINERS):
                yield from through(child, inner)

    yield from through(module, "")


def _read_attributes(module: nn.Module) -> list[str]:
    """Names of the instance attributes that the module's forward, or a method that it calls, reads, but for tensors and modules."""
    read: set[str] = set()
    pending = ["forward"]
    while pending:
        function = inspect.unwrap(getattr(type(module), pending.pop(), None))  # type: ignore[arg-type]
        names = set(_names(getattr(function, "__code__", None))) - read
        read |= names
        pending += [name for name in names if inspect.isfunction(getattr(type(module), name, None))]
    own = vars(module)
    ours = ("training", "_parameters", "_buffers", "_modules", "forward")  # what is in these is looked up at each call
    return sorted(name for name in read if name in own and name not in ours and not isinstance(own[name], (nn.Module, Tensor)))


def _names(code: Any) -> Iterator[str]:
    """Names that code refers to, that of nested functions included."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if inspect.iscode(constant):
                yield from _names(constant)
