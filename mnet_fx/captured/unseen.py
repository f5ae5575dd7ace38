"""What Dynamo decides once and neither repeats nor guards, as far as the code of a model shows it.

- a `random.Random` of the model's own, `random.sample` and `random.shuffle`: each draw would be the first one for ever. Refused by name.
- a deque of bounded length to which a forward appends: nothing falls out at its other end until the call is over. Refused by name.
- `os.getenv` in a forward: its answer is kept (`os.environ[...]` is guarded). A warning by name.
- whether an argument is a leaf of autograd or a view (`is_leaf`, `grad_fn`, `_base`): likewise.
- that a key is missing in the dict of a module's attributes (`vars(self).get(...)`, `"..." in self.__dict__`), or an attribute, where an
  `except AttributeError` tells: likewise.
- `torch.compiler.is_compiling()`: it is true. The libraries that ask it mean just that, so nothing is said here; see docs/any-model.md.
"""

from __future__ import annotations

import dis
import inspect
import os
import random
import warnings
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..errors import MnetError, MnetWarning

__all__ = ["check_unseen"]


def check_unseen(model: nn.Module) -> None:
    """Looks through the modules of a model: what they hold, and what their own methods name.

    Raises:
        MnetError: one holds, or names, a `random.Random` object; its forward draws by `random.sample` or `random.shuffle`, or appends to a
            bounded deque.
    """
    for path, module in model.named_modules():
        named = dict(vars(module))
        for function in _own_functions(type(module)):
            named |= _globals(function)
        owner = path or type(model).__name__
        for name, value in named.items():
            if type(value) is random.Random:
                raise MnetError(
                    f"{owner} has {name}, a random.Random of its own, whose first draw Dynamo would keep for every call: draw from "
                    "torch's generator, or by random.randrange and its like, or name the list of layers with regions=[...], which needs "
                    "no capture"
                )
            if value is os.getenv:
                _warn(f"{owner} asks os.getenv, and Dynamo keeps the answer of the first call; os.environ[...] is asked at each")
        for name in sorted(_OF_TENSORS & _all_names(type(module))):
            _warn(
                f"{owner} asks a tensor's {name}, and where that is an argument of the model, Dynamo keeps the answer of the first call; "
                "requires_grad is asked at each"
            )
        _check_the_way(owner, module)


def _check_the_way(owner: str, module: nn.Module) -> None:
    """Looks at what a forward may call."""
    functions = _on_the_way(type(module))
    names = set().union(*(_names(function.__code__) for function in functions))
    if not {"vars", "__dict__"}.isdisjoint(names):
        _warn(
            f"{owner} reads the dict of a module's attributes, and where a key is missing in it, Dynamo keeps that of the first call; "
            "getattr is asked at each",
            level=8,
        )
    if any(_follows(code, {"AttributeError"}, {"CHECK_EXC_MATCH"}) for function in functions for code in _codes(function.__code__)):
        _warn(
            f"{owner} catches AttributeError, and where an attribute is missing, Dynamo keeps that of the first call; "
            "getattr(self, name, None) and hasattr are asked at each",
            level=8,
        )
    for function in functions:
        _check_draws(owner, function)
        _check_deques(owner, module, function)


def _check_draws(owner: str, function: FunctionType) -> None:
    drawn = {"sample": random.sample, "shuffle": random.shuffle}
    for name, value in _globals(function).items():
        by_module = value is random and any(_follows(code, {name}, set(drawn)) for code in _codes(function.__code__))
        if by_module or any(value is one for one in drawn.values()):
            raise MnetError(
                f"{owner} draws by random.sample or random.shuffle in {function.__name__}, whose first draw Dynamo would keep for every "
                "call: draw by torch.randperm, or by random.randrange and its like, or name the list of layers with regions=[...], which "
                "needs no capture"
            )


def _check_deques(owner: str, module: nn.Module, function: FunctionType) -> None:
    found = vars(module) | {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    bounded = {name for name, value in found.items() if isinstance(value, deque) and value.maxlen is not None}
    if not {"pop", "popleft"}.isdisjoint(_names(function.__code__)):
        return
    if bounded and any(_follows(code, bounded, _GROWING) for code in _codes(function.__code__)):
        raise MnetError(
            f"{owner} appends to {', '.join(sorted(bounded))}, a deque of bounded length, in {function.__name__}, and Dynamo has nothing "
            "fall out at its other end before the call is over: take that out by popleft first, or name the list of layers with "
            "regions=[...], which needs no capture"
        )


_GROWING = {"append", "appendleft", "extend", "extendleft"}


_OF_TENSORS = {"is_leaf", "grad_fn", "_base", "_is_view"}


def _warn(text: str, level: int = 7) -> None:
    warnings.warn(text, MnetWarning, stacklevel=level)


def _own_functions(cls: type) -> Iterator[FunctionType]:
    for base in cls.__mro__:
        if not base.__module__.startswith("torch."):
            for name, value in vars(base).items():
                if isinstance(value, FunctionType) and name != "__init__":
                    yield inspect.unwrap(value)


def _all_names(cls: type) -> set[str]:
    return set().union(*(_names(function.__code__) for function in _own_functions(cls)))


def _on_the_way(cls: type) -> list[FunctionType]:
    """A forward, and what it may call of the methods of its class and of the functions of its file, which may call others."""
    methods = {function.__name__: function for function in reversed([*_own_functions(cls)])}
    files = {function.__module__ for function in methods.values()}
    found, new = dict[FunctionType, None](), [methods[name] for name in ("forward",) if name in methods]
    while new:
        found |= dict.fromkeys(new)
        named = [(name, function) for function in new for name in _names(function.__code__)]
        called = [methods.get(name) or function.__globals__.get(name) for name, function in named]
        new = [one for one in called if isinstance(one, FunctionType) and one not in found and one.__module__ in files]
    return [*found]


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that the code of a function names, and `os.getenv` if it may be among the attributes that it names."""
    names = _names(function.__code__)
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return found | ({"getenv": os.getenv} if "getenv" in names and found.get("os") is os else {})


def _names(code: CodeType) -> set[str]:
    return set().union(*(one.co_names for one in _codes(code)))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of the functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _follows(code: CodeType, names: set[str], next_: set[str]) -> bool:
    """Whether the code reads one of some names and goes on with one of others: an attribute of it, or an operation."""
    if names.isdisjoint(code.co_names):
        return False
    steps = [(str(one.argval), one.opname) for one in dis.get_instructions(code) if one.opname not in ("BUILD_TUPLE", "CACHE")]
    return any(name in names and not next_.isdisjoint(then) for (name, _), then in pairwise(steps))
