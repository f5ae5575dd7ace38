"""Takes out of the caches of a model's code the proxies that a preview left there, which stand for values.

    @lru_cache                              def table(n): ...        cleared, if it was filled meanwhile
    _TABLES[n] = torch.arange(n)            in a module or a class   the entry is removed
    TABLES.masks["causal"][n] = ...         inside of an attribute   the entry is removed

Otherwise the original model, whose code is the same, would find them there in its next call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.fx as fx
from torch import nn

__all__ = ["Outside"]

_DEEPEST = 4  # containers and objects inside each other that are looked into
_FOREIGN = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "sympy", "passes", "mnet_fx"}


class Outside:
    """What the code of a model keeps outside of the model: the variables of its Python modules and classes, and their caches.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        classes = dict.fromkeys(base for cls in dict.fromkeys(map(type, root.modules())) for base in cls.__mro__)
        names = dict.fromkeys(cls.__module__ for cls in classes if not _foreign(cls.__module__))
        own = [vars(module) for name in names if (module := sys.modules.get(name)) is not None]
        used = [space for variables in own for value in list(variables.values()) if (space := _namespace(value)) is not None]
        spaces = {id(space): space for space in (*own, *used)}
        objects = {id(value): vars(value) for space in spaces.values() for value in list(space.values()) if _is_object(value)}
        self.kept = [(space, dict(space)) for space in (*spaces.values(), *objects.values())]
        self.classes = [cls for cls in classes if not _foreign(cls.__module__)]
        found = [value for space in (*spaces.values(), *map(vars, self.classes)) for value in list(space.values())]
        self.caches = [(cache, cache.cache_info().misses) for cache in map(_cache, found) if cache is not None]

    def clean(self) -> None:
        """Removes what stands for values, and nothing else."""
        for cache, misses in self.caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        for space, before in self.kept:
            for name, value in list(space.items()):
                if not _is_standin(value):
                    _scrub(value)
                elif name in before:
                    space[name] = before[name]
                else:
                    del space[name]
        for cls in self.classes:
            for value in list(vars(cls).values()):
                _scrub(value)


def _scrub(value: Any, depth: int = 0, seen: set[int] | None = None) -> None:
    """Removes from a container, or from the attributes of an object, and from those inside, every entry that stands for a value."""
    seen = set() if seen is None else seen
    entries = _entries(value)
    if entries is None or id(value) in seen or depth == _DEEPEST:
        return
    seen.add(id(value))
    for key, item in entries:
        if _is_standin(key) or _is_standin(item) or (isinstance(item, tuple) and any(map(_is_standin, item))):
            _remove(value, key, item)
        elif isinstance(item, (dict, list, set)) or not isinstance(value, (dict, list, set)):  # a registry may hold thousands of objects
            _scrub(item, depth + 1, seen)


def _entries(value: Any) -> list[tuple[Any, Any]] | None:
    """Keys and items of a container or of the attributes of an object; None for what holds nothing of its own, or is no cache."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, set)):
        return [(None, item) for item in value]
    return list(vars(value).items()) if _is_object(value) else None


def _is_object(value: Any) -> bool:
    """True for what is made of attributes, unless it is a module, a class, a function or one of torch's or Python's own."""
    if isinstance(value, (nn.Module, torch.Tensor, type, ModuleType, FunctionType)) or _foreign(type(value).__module__):
        return False
    return type(getattr(value, "__dict__", None)) is dict


def _remove(value: Any, key: Any, item: Any) -> None:
    if isinstance(value, list):
        value[:] = [kept for kept in value if kept is not item]
    elif isinstance(value, set):
        value.discard(item)
    elif isinstance(value, dict) or hasattr(type(value), key):
        (value if isinstance(value, dict) else vars(value)).pop(key, None)
    else:
        vars(value)[key] = None  # what an attribute that is filled later mostly begins with


def _is_standin(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)  # asks nothing of the object itself


def _foreign(module: str) -> bool:
    return module.partition(".")[0] in _FOREIGN


def _namespace(value: Any) -> dict[str, Any] | None:
    """The variables that a function uses, or those of a module, unless it is one of Python's or torch's own."""
    function = inspect.unwrap(value) if isinstance(value, (FunctionType, functools._lru_cache_wrapper)) else value
    if isinstance(function, FunctionType) and not _foreign(function.__module__ or ""):
        return function.__globals__
    return vars(value) if isinstance(value, ModuleType) and not _foreign(value.__name__) else None


def _cache(value: Any) -> Any:
    """The lru_cache that a value is, perhaps as a static or class method."""
    value = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
    return value if isinstance(value, functools._lru_cache_wrapper) else None
