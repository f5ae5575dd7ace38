"""What Dynamo decides once and neither repeats nor guards, as far as the code of a model shows it.

- a `random.Random` of the model's own: each of its draws would be the first one for ever. Refused by name.
- `os.getenv` in a forward: its answer is kept (`os.environ[...]` is guarded). A warning by name.
- whether an argument is a leaf of autograd or a view (`is_leaf`, `grad_fn`, `_base`): likewise.
- that a key is missing in the dict of a module's attributes (`vars(self).get(...)`, `"..." in self.__dict__`): likewise.
- `torch.compiler.is_compiling()`: it is true. The libraries that ask it mean just that, so nothing is said here; see docs/any-model.md.
"""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..errors import MnetError, MnetWarning

__all__ = ["check_unseen"]


def check_unseen(model: nn.Module) -> None:
    """Looks through the modules of a model: what they hold, and what their own methods name.

    Raises:
        MnetError: one holds, or names, a `random.Random` object.
    """
    for path, module in model.named_modules():
        named = dict(vars(module))
        for function in _own_functions(type(module)):
            named |= _globals(function)
        owner = path or type(model).__name__
        for name, value in named.items():
            if type(value) is random.Random:
                raise MnetError(
                    f"{owner} has {name}, a random.Random of its own, whose first draw Dynamo would keep for every call: draw from torch's "
                    "generator or from Python's module random, or name the list of layers with regions=[...], which needs no capture"
                )
            if value is os.getenv:
                _warn(f"{owner} asks os.getenv, and Dynamo keeps the answer of the first call; os.environ[...] is asked at each")
        for name in sorted(_OF_TENSORS & _all_names(type(module))):
            _warn(
                f"{owner} asks a tensor's {name}, and where that is an argument of the model, Dynamo keeps the answer of the first call; "
                "requires_grad is asked at each"
            )
        if not {"vars", "__dict__"}.isdisjoint(_names_on_the_way(type(module))):
            _warn(
                f"{owner} reads the dict of a module's attributes, and where a key is missing in it, Dynamo keeps that of the first call; "
                "getattr is asked at each"
            )


_OF_TENSORS = {"is_leaf", "grad_fn", "_base", "_is_view"}


def _warn(text: str) -> None:
    warnings.warn(text, MnetWarning, stacklevel=5)


def _own_functions(cls: type) -> Iterator[FunctionType]:
    for base in cls.__mro__:
        if not base.__module__.startswith("torch."):
            for name, value in vars(base).items():
                if isinstance(value, FunctionType) and name != "__init__":
                    yield inspect.unwrap(value)


def _all_names(cls: type) -> set[str]:
    return set().union(*(_names(function.__code__) for function in _own_functions(cls)))


def _names_on_the_way(cls: type) -> set[str]:
    """What the code names of a forward, and of the methods of its class that it may call."""
    codes = {function.__name__: _names(function.__code__) for function in reversed([*_own_functions(cls)])}
    found, new = set[str](), {"forward"}
    while new:
        found |= new
        new = set().union(*(codes.get(name, set()) for name in new)) - found
    return found


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that the code of a function names, and `os.getenv` if it may be among the attributes that it names."""
    names = _names(function.__code__)
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return found | ({"getenv": os.getenv} if "getenv" in names and found.get("os") is os else {})


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
