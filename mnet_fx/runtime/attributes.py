"""The Python attributes of modules: noted before the first run of a step, put back for every rerun, and afterwards as they were again.

What is noted of a module is its `__dict__`: which value each name has, and, where that is a list, dictionary, set or deque, what it
holds, to any depth of those. That includes flags such as `training`, hooks, and the table of children. Parameters and buffers have rules of
their own (see `replay`), as have tensors that are attributes. What other objects hold is not noted. Of the lists, dictionaries, sets and
deques that are globals of the modules' code, a rerun finds what they hold at its time, and leaves no trace in them.

A note must not keep a graph alive, which may hold the notes of an earlier pass, and so on. So of a tensor with a history only the values
are kept, a container of such tensors is left alone, and so is an object that the step itself replaces.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from operator import is_
from types import CodeType, FunctionType, NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["STANDARD", "Attributes", "without_traces"]

STANDARD = frozenset(nn.Module().__dict__)
"""What every module has: hooks, tables of parameters, buffers and children, `training`."""

_CONTAINERS = frozenset([dict, OrderedDict, defaultdict, list, set, deque])
_SIMPLE = _CONTAINERS | {int, float, complex, bool, str, bytes, NoneType, tuple, FunctionType, torch.dtype, torch.device, torch.Size}
_APART = frozenset(["_parameters", "_buffers"])
_LEFT = object()  # in place of a value that stays as it is


class Attributes:
    """The attributes of some modules at the time of the call.

    Attributes:
        dicts: pairs of the `__dict__` of a module and a copy of it.
        noted: pairs of a container that holds something and a copy of it.
        empty: containers that hold nothing.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.dicts = [(module.__dict__, module.__dict__.copy()) for module in modules]
        self.noted: list[tuple[Any, Any]] = []
        self.empty: list[Any] = []
        self.seen: set[int] = set()
        for _, then in self.dicts:
            self._note([value for name, value in then.items() if type(value) in _CONTAINERS and name not in _APART])

    def _note(self, containers: list[Any]) -> None:
        containers = [container for container in containers if id(container) not in self.seen]
        self.seen |= set(map(id, containers))
        self.empty += [container for container in containers if not container]
        for container in filter(None, containers):
            self.noted.append((container, container.copy()))
            if inside := [value for value in _values(container) if type(value) in _CONTAINERS]:
                self._note(inside)

    def generators(self) -> list[torch.Generator]:
        """Those among the attributes."""
        return [value for _, then in self.dicts for value in then.values() if type(value) is torch.Generator]

    def let_go(self) -> None:
        """After the first run: gives up what would keep a graph alive."""
        self.noted = [pair for pair in self.noted if not any(map(_historic, pair))]
        for now, then in self.dicts:
            for name in then.keys() - STANDARD:
                value = then[name]
                if isinstance(value, Tensor):
                    then[name] = value if value.grad_fn is None else value.detach().requires_grad_()
                elif _historic(value) or (type(value) not in _SIMPLE and now.get(name) is not value):
                    then[name] = _LEFT

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Sets the attributes to what they were, and at the end to what they are now, whatever the rerun did to them."""
        now = self if self._holds() else self._now()
        self._restore()
        try:
            yield
        finally:
            now._restore()

    def _holds(self) -> bool:
        """Whether all is as it was."""
        return not any(self.empty) and all(starmap(_same, self.dicts)) and all(starmap(_same, self.noted))

    def _now(self) -> Attributes:
        """A note of all that a rerun may find and change: what there is now, and what there was."""
        now = Attributes(self.modules)
        now._note([container for container, _ in self.noted] + self.empty)
        return now

    def _restore(self) -> None:
        for live, then in self.dicts:
            if not _same(live, then):
                _set(live, then)
        for container, copy in self.noted:
            if not _same(container, copy):
                _refill(container, copy)
        for container in filter(None, self.empty):
            container.clear()


@contextmanager
def without_traces(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the containers that the modules' code names hold what they held before: globals, and attributes of their classes.

    Large ones are left alone: copying them would take longer than the step. Meanwhile no other thread should write to the others.
    """
    classes = {type(module) for module in modules}
    found = [space.get(name) for cls in classes for space, names in _global_names(cls) for name in names]
    found += [value for cls in classes for own in _own_classes(cls) for value in vars(own).values()]
    copies = _copies([value for value in found if type(value) in _CONTAINERS])
    try:
        yield
    finally:
        for container, copy in copies:
            if not _same(container, copy):
                _refill(container, copy)


_MOST = 1000  # items of all containers whose traces are removed


def _copies(containers: list[Any]) -> list[tuple[Any, Any]]:
    """Containers, and those within them, each once with a copy, as far as they are small."""
    copies: dict[int, tuple[Any, Any]] = {}
    left = _MOST
    while containers:
        container = containers.pop()
        if id(container) in copies or len(container) > left:
            continue
        try:
            copy = container.copy()
        except RuntimeError:  # another thread writes to it
            continue
        left -= len(copy)
        copies[id(container)] = (container, copy)
        containers += [value for value in _values(copy) if type(value) in _CONTAINERS]
    return list(copies.values())


def _own_classes(cls: type) -> list[type]:
    """A class and its bases, but for those of torch's, Python's and ours."""
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins", "mnet_fx")]


_GLOBAL_NAMES: WeakKeyDictionary[type, list[tuple[dict[str, Any], list[str]]]] = WeakKeyDictionary()


def _global_names(cls: type) -> list[tuple[dict[str, Any], list[str]]]:
    """The global names in the methods of a class, and in functions of the same module that they name; by the modules' namespaces."""
    if cls not in _GLOBAL_NAMES:
        _GLOBAL_NAMES[cls] = _find_global_names(cls)
    return _GLOBAL_NAMES[cls]


def _find_global_names(cls: type) -> list[tuple[dict[str, Any], list[str]]]:
    todo = [f for c in _own_classes(cls) for f in vars(c).values() if isinstance(f, FunctionType)]
    found: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
    seen: set[FunctionType] = set()
    while todo:
        if (function := todo.pop()) in seen:
            continue
        seen.add(function)
        space, names = function.__globals__, _names_in(function.__code__)
        found.setdefault(id(space), (space, {}))[1].update(dict.fromkeys(names))
        todo += [f for name in names if isinstance(f := space.get(name), FunctionType) and f.__globals__ is space]
    return [(space, list(names)) for space, names in found.values()]


def _names_in(code: CodeType) -> list[str]:
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names_in(constant)]
    return [*code.co_names, *inner]


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _historic(value: Any) -> bool:
    """Whether this is a tensor with a history, or holds one."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    todo, seen = [value], set[int]()
    while todo:
        container = todo.pop()
        if not isinstance(container, (dict, list, set, tuple, deque)) or id(container) in seen:
            continue
        seen.add(id(container))
        for inside in _values(container):
            if isinstance(inside, Tensor) and inside.grad_fn is not None:
                return True
            todo.append(inside)
    return False


def _same(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(map(is_, container.values(), copy.values())) and all(map(is_, container, copy))
    return container == copy if isinstance(container, set) else all(map(is_, container, copy))


def _set(live: dict[str, Any], then: dict[str, Any]) -> None:
    """Makes the attributes of a module those of another time; never without those that stay, as other threads may read them."""
    for name in live.keys() - then.keys():
        del live[name]
    live.update((name, value) for name, value in then.items() if value is not _LEFT)


def _refill(container: Any, copy: Any) -> None:
    """Makes a container hold what the copy holds."""
    container.clear()
    container.extend(copy) if isinstance(container, (list, deque)) else container.update(copy)
