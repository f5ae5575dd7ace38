"""What a rewritten forward takes for granted about the model, checked at every call.

A captured graph calls the leaves of the model live, by path, but the Python of the modules above them ran once, while tracing. If such a
module is replaced, gets a hook, loses or gains a child, changes an attribute that its forward reads, or is in another mode than the
whole, the graph no longer is what the model's Python would do. Then the call is an error, not a silent difference.
"""

from __future__ import annotations

import dis
import enum
import inspect
import types
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MnetError

__all__ = ["Guard", "hooked"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_OURS = {"training", "forward", "_parameters", "_buffers", "_modules"}  # what is in these is looked up at each call
_SINCE = "since momentumize, whose graph stands for its forward: momentumize the model as it is now"
_PLAIN = (
    *(bool, int, float, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device),
    *(types.FunctionType, types.BuiltinFunctionType),
)

_LIVE = (nn.Module, Tensor, weakref.ref)  # what a module holds of these in no dictionary of torch's is no constant, or seen elsewhere


@dataclass(frozen=True)
class _Seen:
    """One module that a trace went through, as it was: its children by name, what its forward may read, its hooks and its methods."""

    path: str
    module: nn.Module
    children: tuple[str, ...]
    attributes: dict[str, Any]
    hooks: int
    code: _Code


class _Code:
    """The code of a module's forward and of the methods that it names, by name. Stays behind when pickled: another process has its own."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self.by_name = {name: _codes(function) for name, function in functions.items()}

    def changed(self, module: nn.Module, owner: bool) -> str | None:
        """Name of a method that is no longer what it was; the forward of the owner itself is ours."""
        for name, codes in self.by_name.items():
            patched = name in vars(module) and not (owner and name == "forward")
            if patched or _codes(getattr(type(module), name, None)) != codes:
                return name
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Code:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Code, ({},)


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
        self.seen = [_seen(path, module, path in self.leaves) for path, module in _traced_through(owner, self.leaves, whole)]

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
        if (method := seen.code.changed(module, owner=not seen.path)) is not None:
            return f"had its method {method} replaced {_SINCE}"
        for name, value in seen.attributes.items():
            if not _alike(_kept(_attribute(module, name)), value):
                return f"had its attribute {name} changed from {value!r} {_SINCE}"
        if self.one_mode and module.training != owner.training and not isinstance(module, _CONTAINERS):
            mode = "train" if module.training else "eval"
            return (
                f"is in {mode} mode and {type(owner).__name__} is not, whose forward was captured for one mode of the whole: "
                "put both in the same mode, or freeze parameters with requires_grad_(False) instead"
            )
        return None


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


def _kept(value: Any) -> Any:
    """A value as it is now: `...` for what is no constant of a graph; of containers a copy without such, since they may change inside."""
    if isinstance(value, _LIVE):
        return ...
    if type(value) in (list, tuple):
        return type(value)(kept for item in value if (kept := _kept(item)) is not ...)
    return {key: kept for key, item in value.items() if (kept := _kept(item)) is not ...} if type(value) is dict else value


def _alike(now: Any, kept: Any) -> bool:
    """Whether a value, as `_kept`, is what it was; objects other than plain ones are compared by identity."""
    if kept is ... or now is kept or type(now) is not type(kept):
        return kept is ... or now is kept
    if type(now) in (list, tuple):
        return len(now) == len(kept) and all(map(_alike, now, kept))
    if type(now) is dict:
        return now.keys() == kept.keys() and all(_alike(now[key], kept[key]) for key in now)
    return isinstance(now, _PLAIN) and bool(now == kept)


def _seen(path: str, module: nn.Module, called: bool) -> _Seen:
    """The module as it is: with the attributes that its forward, or a method that this calls, reads, and with those methods.

    Of one that the graph calls, methods may change.
    """
    read: set[str] = set()
    methods: dict[str, Any] = {}
    codes: list[Any] = []
    pending = ["forward"]
    while pending:
        name = pending.pop()
        methods[name] = getattr(type(module), name, None)
        codes += _codes(methods[name])
        names = {found for code in _codes(methods[name]) for found in _names(code)} - read
        read |= names
        pending += [name for name in names if inspect.isfunction(getattr(type(module), name, None))]
    own = vars(module)
    attributes: dict[str, Any] = {}
    for name in sorted(read & own.keys() - _OURS):
        attributes |= {name: _kept(own[name])} | _entries(name, own[name], codes)
    watched = {} if called else {name: method for name, method in methods.items() if name == "forward" or name not in own}
    return _Seen(path, module, _children(module), attributes, _hooks(module), _Code(watched))


def _entries(name: str, value: Any, codes: list[Any]) -> dict[str, Any]:
    """The plain attributes of an object that a module holds as `name`, such as a config, of those that code reads from it.

    That is self.config.entry, getattr(self.config, "entry"), or, by its beginning, getattr(self.config, f"en{key}").
    """
    if isinstance(value, (*_PLAIN, *_LIVE)) or not hasattr(value, "__dict__"):
        return {}
    read = {entry for code in codes for holder, entry in _read_in_turn(code) if holder == name}
    starts = tuple(found for found in read if found.endswith("_"))
    entries = {entry: now for entry, now in vars(value).items() if entry in read or entry.startswith(starts)}
    return {f"{name}.{entry}": _kept(now) for entry, now in entries.items()}


@cache
def _read_in_turn(code: Any) -> frozenset[tuple[str, str]]:
    """Pairs of an attribute and the attribute or string that code loads right after it; those of nested functions included."""
    if not inspect.iscode(code):
        return frozenset()
    loads = [(i.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")), i.opname == "LOAD_CONST", i.argval) for i in dis.get_instructions(code)]
    pairs = {(one[2], two[2]) for one, two in pairwise(loads) if one[0] and (two[0] or two[1]) and isinstance(two[2], str)}
    return frozenset(pairs).union(*map(_read_in_turn, code.co_consts))


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute, or that of an object which the module holds; `_HOOKS` where there is none."""
    holder, _, entry = name.rpartition(".")
    return getattr(vars(module).get(holder), "__dict__", {}).get(entry, _HOOKS) if holder else vars(module).get(entry, _HOOKS)


def _codes(function: Any) -> list[Any]:
    """The code of a function, and of those that it wraps."""
    codes = []
    while function is not None:
        codes.append(getattr(function, "__code__", function))
        function = getattr(function, "__wrapped__", None)
    return codes


def _names(code: Any) -> Iterator[str]:
    """Names that code refers to, those of nested functions included."""
    if inspect.iscode(code):
        yield from code.co_names
        for constant in code.co_consts:
            yield from _names(constant)
