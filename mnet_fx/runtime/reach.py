"""What modules reach through their attributes, beside their parameters, buffers and children: what a rerun of them must find as it was.

    self.history = [tensor]      a container, and a tensor in it
    self.teacher = [module]      a hidden module: one that is no child
    self.state = State(count=0)  an object of a class that is neither Python's nor torch's, and its attributes
    self.act = lambda x: m(x)    a module or tensor that a function closes over

To any depth of these. A module that contains the step, as a reference to a parent does, is not gone into: it has steps of its own.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, NoneType
from typing import Any
from weakref import ProxyTypes, WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

__all__ = ["CONTAINERS", "Reached", "is_historic", "is_theirs", "reached", "values_of"]

CONTAINERS = frozenset([dict, OrderedDict, defaultdict, Counter, list, set, deque])
_APART = frozenset(["_parameters", "_buffers"])
_NOT_THEIRS = sys.stdlib_module_names | {"torch", "numpy", "mnet_fx", "passes"}
_PLAIN = frozenset([int, float, complex, bool, str, bytes, NoneType, type, BuiltinFunctionType])
_CALLED = frozenset([FunctionType, MethodType, partial])
_ANY = float("inf")
_MOST = 1000  # attributes of an object that is gone into, and items of a container that it holds


@dataclass
class Reached:
    """What was found.

    Attributes:
        containers: lists, dictionaries, sets and deques.
        spaces: the `__dict__` of each object and hidden module.
        tensors: those in containers and spaces.
        generators: likewise.
        hidden: modules that are no children.
        seen: ids of all that was gone into.
    """

    containers: list[Any] = field(default_factory=list)
    spaces: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)
    hidden: list[nn.Module] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def go_into(self, values: Iterable[Any], around: nn.Module | None = None) -> None:
        """Adds what values reach.

        Args:
            values: to begin with.
            around: the step; modules that contain it are left.
        """
        todo = [(value, _ANY) for value in values if type(value) not in _PLAIN]
        while todo:
            value, most = todo.pop()
            if id(value) in self.seen:
                continue
            self.seen.add(id(value))
            inside = self._inside(value, most, around)
            most = most if type(value) in CONTAINERS else _MOST
            todo += [(value, most) for value in inside if type(value) not in _PLAIN]

    def _inside(self, value: Any, most: float, around: nn.Module | None) -> Iterable[Any]:
        if isinstance(value, tuple):
            return value
        if type(value) in ProxyTypes:  # holds nothing
            return ()
        if type(value) in _CALLED:
            return _closed_over(value)
        if type(value) in CONTAINERS:
            if len(value) > most:
                return ()
            self.containers.append(value)
            return values_of(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return ()
        if isinstance(value, torch.Generator):
            self.generators.append(value)
            return ()
        if isinstance(value, nn.Module):
            if _contains(value, around):
                return ()
            self.hidden.append(value)
        elif not is_theirs(type(value)) or len(vars(value)) > _MOST:
            return ()
        self.spaces.append(vars(value))
        return vars(value).values()


def reached(modules: Sequence[nn.Module], apart: Iterable[Any] = ()) -> Reached:
    """What the attributes of some modules reach, the first of which is the step; `apart`: objects that are not gone into."""
    found = Reached(seen={*map(id, modules), *map(id, apart)})
    further = []
    for module in modules:
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _PLAIN or name in _APART:
                continue
            if kind in CONTAINERS and (not value or name == "_modules"):  # most of them; children have their turn
                found.containers.append(value)
            elif not isinstance(value, Tensor):
                further.append(value)
    found.go_into(further, modules[0])
    return found


def _closed_over(function: Any) -> list[Any]:
    """The modules, tensors and functions that a function has at hand besides globals: what else it closes over is its caller's."""
    if isinstance(function, MethodType):
        found = [function.__self__]
    elif isinstance(function, partial):
        found = [function.func, *function.args, *function.keywords.values()]
    else:
        found = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return [value for value in found if isinstance(value, (nn.Module, Tensor, torch.Generator, *_CALLED))]


def values_of(container: Any) -> Any:
    """What a container holds; of a dictionary, its values."""
    return container.values() if isinstance(container, dict) else container


def is_historic(value: Any) -> bool:
    """Whether this is a tensor with a history, or holds one."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    todo, seen = [value], set[int]()
    while todo:
        container = todo.pop()
        if not isinstance(container, (dict, list, set, tuple, deque)) or id(container) in seen:
            continue
        seen.add(id(container))
        for inside in values_of(container):
            if isinstance(inside, Tensor) and inside.grad_fn is not None:
                return True
            todo.append(inside)
    return False


_THEIRS: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def is_theirs(cls: type) -> bool:
    """Whether instances of a class are objects of the user's with attributes."""
    if cls not in _THEIRS:
        own = cls.__module__.partition(".")[0] not in _NOT_THEIRS or cls.__name__ == "SimpleNamespace"
        _THEIRS[cls] = own and cls.__dictoffset__ != 0 and not issubclass(cls, type)
    return _THEIRS[cls]


_WITHIN: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def _contains(module: nn.Module, step: nn.Module | None) -> bool:
    if step is None:
        return False
    if module not in _WITHIN:
        _WITHIN[module] = WeakSet(module.modules())
    return any(part in _WITHIN[module] for part in (step, *step.children()))
