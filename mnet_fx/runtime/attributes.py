"""The Python attributes of modules: noted before the first run of a step, put back for every rerun, and afterwards as they were again.

What is noted of a module is its `__dict__`: which value each name has, and, where that is a list, dictionary, set or deque, an object of
a class of the user's, or a module that is no child, what it holds, to any depth of those (see `reach`). That includes flags such as
`training`, hooks, and the table of children. Parameters and buffers have rules of their own (see `replay`), as have tensors that are
attributes; here it is noted which there are. Lists and objects that functions close over, and attributes of tensors, are not noted. Of the
lists, dictionaries, sets and deques that are globals of the modules' code, a rerun finds what they hold at its time, and leaves no trace in
them. Objects that a step is given, as a cache of keys and values, are put back as far as its first run changed them (`Given`).

A note must not keep a graph alive, which may hold the notes of an earlier pass, and so on. So of a tensor with a history only the values
are kept, a container or an object that holds such tensors is left alone, and so is an object that the step itself replaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import starmap
from operator import is_
from types import CodeType, FunctionType, NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .generators import Generator, named_by_code
from .reach import CONTAINERS, Reached, is_historic, is_theirs, reached, values_of
from .sides import leaves

__all__ = ["STANDARD", "Attributes", "without_traces"]

STANDARD = frozenset(nn.Module().__dict__)
"""What every module has: hooks, tables of parameters, buffers and children, `training`."""

_SIMPLE = CONTAINERS | {int, float, complex, bool, str, bytes, NoneType, tuple, FunctionType, torch.dtype, torch.device, torch.Size}
_LEFT = object()  # in place of a value that stays as it is


class Attributes:
    """The attributes of some modules at the time of the call, and what they reach.

    Args:
        modules: those of the step, which comes first.
        also: what has to be noted besides: what was reached then.
        sides: the side inputs of the step.

    Attributes:
        given: the objects among those, or None.
        dicts: pairs of the `__dict__` of a module or object and a copy of it.
        noted: pairs of a container that holds something and a copy of it.
        empty: containers that hold nothing.
        tables: pairs of a module's table of buffers and a copy of it.
        tensors: those that containers and objects hold, and hidden modules; without those with a history.
        generators: of random numbers, wherever they are, and those of Python and NumPy that the modules' code may draw from.
    """

    dicts: list[tuple[dict[str, Any], dict[str, Any]]]
    noted: list[tuple[Any, Any]]
    empty: list[Any]
    generators: list[Any]
    tables: list[tuple[dict[str, Any], dict[str, Any]]]

    def __init__(self, modules: Sequence[nn.Module], also: Attributes | None = None, sides: Sequence[Any] = ()) -> None:
        self.modules = modules
        objects = [side for side in leaves(tuple(sides)) if is_theirs(type(side)) and not isinstance(side, nn.Module)]
        self.given = Given(objects, modules[0]) if objects else None
        found = reached(modules)
        spaces = [module.__dict__ for module in modules] + found.spaces
        if also is not None:
            found.go_into([container for container, _ in also.noted] + also.empty)
            known = set(map(id, spaces))
            spaces += [space for space, _ in also.dicts if id(space) not in known]
        self.dicts = [(space, space.copy()) for space in spaces]
        self.noted = [(container, container.copy()) for container in found.containers if container]
        self.empty = [container for container in found.containers if not container]
        self.tables = [
            (module._buffers, module._buffers.copy()) for module in modules if isinstance(module._buffers, dict)
        ]  # no ScriptModule's
        self.tensors = [t for t in found.tensors if t.grad_fn is None]
        self.generators = [*found.generators, *(source for cls in {type(module) for module in modules} for source in _drawn_by(cls))]
        self.cached = _cached()

    def let_go(self) -> None:
        """After the first run: gives up what would keep a graph alive."""
        if self.given is not None:
            self.given.let_go()
        self.noted = [pair for pair in self.noted if not any(map(is_historic, pair))]
        for _, table in self.tables:
            table.update({name: value.detach() for name, value in table.items() if isinstance(value, Tensor) and is_historic(value)})
        own = {id(module.__dict__) for module in self.modules}
        self.dicts = [pair for pair in self.dicts if id(pair[0]) in own or not any(map(is_historic, pair))]
        for now, then in self.dicts:
            for name in then.keys() - STANDARD:
                value = then[name]
                if isinstance(value, Tensor):
                    then[name] = value if value.grad_fn is None else value.detach().requires_grad_()
                elif is_historic(value) or (type(value) not in _SIMPLE and now.get(name) is not value):
                    then[name] = _LEFT

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Sets the attributes to what they were, and at the end to what they are now, whatever the rerun did to them."""
        now = self if self._holds() else Attributes(self.modules, self)
        self._restore(_fill)
        try:
            with nullcontext() if self.given is None else self.given.put_back(), _with_cached(self.cached):
                yield
        finally:
            now._restore(_set)

    def _holds(self) -> bool:
        """Whether all is as it was."""
        return not any(self.empty) and all(all(starmap(_same, pairs)) for pairs in (self.dicts, self.tables, self.noted))

    def _restore(self, tabulate: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        for live, then in self.dicts:
            if not _same(live, then):
                _set(live, then)
        for table, then in self.tables:
            if not _same(table, then):
                tabulate(table, then)
        for container, copy in self.noted:
            if not _same(container, copy):
                _refill(container, copy)
        for container in filter(None, self.empty):
            container.clear()


def _cached() -> frozenset[Any] | None:
    """What `parametrize.cached` keeps by now, by its keys; None where it is not on. Its values have histories."""
    return frozenset(parametrize._cache) if parametrize._cache_enabled else None


@contextmanager
def _with_cached(keys: frozenset[Any] | None) -> Iterator[None]:
    """Has `parametrize.cached` on or off as it was, and keep of what it keeps no more than it did: what the step cached it makes again."""
    if keys is None and not parametrize._cache_enabled:
        yield
        return
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = int(keys is not None), {k: cache[k] for k in keys or () if k in cache}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@contextmanager
def without_traces(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the containers that the modules' code names hold what they held before: globals, and attributes of their classes.

    Large ones are left alone: copying them would take longer than the step. Meanwhile no other thread should write to the others.
    """
    classes = {type(module) for module in modules}
    found = [space.get(name) for cls in classes for space, names in _global_names(cls) for name in names]
    found += [value for cls in classes for own in _own_classes(cls) for value in vars(own).values()]
    copies = _copies([value for value in found if type(value) in CONTAINERS])
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
        containers += [value for value in values_of(copy) if type(value) in CONTAINERS]
    return list(copies.values())


def _own_classes(cls: type) -> list[type]:
    """A class and its bases, but for those of torch's, Python's and ours."""
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in ("torch", "builtins", "mnet_fx")]


_GLOBAL_NAMES: WeakKeyDictionary[type, list[tuple[dict[str, Any], list[str]]]] = WeakKeyDictionary()
_DRAWN_BY: WeakKeyDictionary[type, list[Generator]] = WeakKeyDictionary()


def _global_names(cls: type) -> list[tuple[dict[str, Any], list[str]]]:
    """The global names in the methods of a class, and in functions of the same module that they name; by the modules' namespaces."""
    if cls not in _GLOBAL_NAMES:
        _GLOBAL_NAMES[cls] = _find_global_names(cls)
    return _GLOBAL_NAMES[cls]


def _drawn_by(cls: type) -> list[Generator]:
    """What the code of a class may draw from besides torch's generators."""
    if cls not in _DRAWN_BY:
        _DRAWN_BY[cls] = named_by_code((name, space.get(name)) for space, names in _global_names(cls) for name in names)
    return _DRAWN_BY[cls]


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


def _fill(table: dict[str, Any], then: dict[str, Any]) -> None:
    """Makes a table of buffers have those names that it had, and a tensor where it had one: which one is up to others."""
    for name in table.keys() - then.keys():
        del table[name]
    table.update({name: value for name, value in then.items() if value is None or table.get(name) is None})


def _refill(container: Any, copy: Any) -> None:
    """Makes a container hold what the copy holds."""
    container.clear()
    container.extend(copy) if isinstance(container, (list, deque)) else container.update(copy)


class Given:
    """Objects that a step is given, and what they reach, as they were before its first run. Writes into their tensors are not noted.

    Args:
        objects: of classes of the user's.
        step: modules that contain it are not gone into.
    """

    def __init__(self, objects: Sequence[Any], step: nn.Module) -> None:
        found = Reached()
        found.go_into(objects, step)
        self.spaces = [(space, space.copy()) for space in found.spaces]
        self.containers = [(container, container.copy()) for container in found.containers]

    def let_go(self) -> None:
        """After the first run: keeps what it changed, without histories."""
        self.spaces = [(live, _plain(then)) for live, then in self.spaces if not _same(live, then)]
        self.containers = [(live, _plain(then)) for live, then in self.containers if not _same(live, then)]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """As `Attributes.put_back`."""
        spaces = [(live, live.copy()) for live, _ in self.spaces]
        containers = [(live, live.copy()) for live, _ in self.containers]
        _set_all(self.spaces, self.containers)
        try:
            yield
        finally:
            _set_all(spaces, containers)


def _set_all(spaces: list[tuple[Any, Any]], containers: list[tuple[Any, Any]]) -> None:
    for live, then in spaces:
        _set(live, then)
    for live, then in containers:
        _refill(live, then)


def _plain(container: Any) -> Any:
    """A copy of a container, of whose tensors with a history there are only the values."""
    copy = container.copy()
    if isinstance(copy, dict):
        for key, value in container.items():  # no update, by which a Counter adds
            copy[key] = _value(value)
    elif not isinstance(copy, set):
        _refill(copy, list(map(_value, container)))
    return copy


def _value(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.grad_fn is not None else value
