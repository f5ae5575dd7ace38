"""Notices, while a module is traced, what passes by the proxies: contexts, gradient modes, custom functions, tensors being made.

Gradient modes and factories are seen by a torch function mode, which is local to the thread. The rest has no such hook: the methods
of `_LOSSES` and the functions of `_ASKS`, `_SEEDS` and `_HOOKS` are replaced for the time of the trace, by ones that behave the same
and act only in the thread that traces.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode

from passes.ops import FACTORIES
from passes.standins import scrubbed

__all__ = ["Attributes", "keeping_python_rng", "python_rng_state", "replacing", "watching", "watching_functions"]

Note = Callable[[str], None]
Make = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_CHECKPOINT = "uses torch.utils.checkpoint or other saved-tensor hooks"
_SAVES_INPUTS = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)  # a function which until torch 2.11 is a part of that
_LOSSES: tuple[tuple[type, str, str], ...] = (
    (torch.autocast, "__enter__", "enters torch.autocast"),
    (torch.inference_mode, "__enter__", "enters torch.inference_mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", _CHECKPOINT),
    (torch.autograd.Function, "apply", "calls a torch.autograd.Function, whose backward a trace would lose"),
)
_ASKS = (
    *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    *("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"),
)
_SEEDS = ("manual_seed", "seed", "set_rng_state", "fork_rng")
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_LOCK = threading.RLock()  # torch.fx patches nn.Module while it traces, so only one thread may


class _Watchers(threading.local):
    """Whom to tell in this thread, innermost last."""

    def __init__(self) -> None:
        self.notes: list[Note] = []


_WATCHERS = _Watchers()


@contextlib.contextmanager
def watching(note: Note, make: Make) -> Iterator[None]:
    """Watch what this thread does that a symbolic trace would lose.

    Args:
        note: called with what was seen, such as "enters torch.autocast".
        make: called instead of a function that makes a tensor, with the function and its arguments; returns what stands for the tensor.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        _WATCHERS.notes.append(note)
        stack.callback(_WATCHERS.notes.pop)
        for owner, name, reason in _LOSSES:
            original = inspect.getattr_static(owner, name)
            replacing(stack, owner, name, _noting(original, reason))
        _watch_torch(stack)
        stack.enter_context(_Mode(note, make))
        yield


@contextlib.contextmanager
def watching_functions(note: Note) -> Iterator[None]:
    """Watch for custom autograd functions and for questions about the modes around a call, which torch.export loses too.

    Args:
        note: called with what was seen.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        _WATCHERS.notes.append(note)
        stack.callback(_WATCHERS.notes.pop)
        owner, name, reason = next(loss for loss in _LOSSES if loss[0] is torch.autograd.Function)
        replacing(stack, owner, name, _noting(inspect.getattr_static(owner, name), reason))
        _watch_torch(stack)
        yield


def _numpy_random() -> Any:
    """numpy.random, if anybody has imported it."""
    return getattr(sys.modules.get("numpy"), "random", None)


def python_rng_state() -> tuple[Any, ...]:
    """State of Python's random module and of NumPy's, comparable."""
    numpy = _numpy_random()
    if numpy is None:
        return (random.getstate(),)
    _, keys, *rest = numpy.get_state()
    return random.getstate(), keys.tobytes(), rest


@contextlib.contextmanager
def keeping_python_rng() -> Iterator[None]:
    """Puts the state of both generators back in the end."""
    state, numpy = random.getstate(), _numpy_random()
    numpy_state = None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.set_state(numpy_state)


def replacing(stack: contextlib.ExitStack, owner: Any, name: str, method: Any) -> None:
    """Gives a class another method, or a module another function, until the stack is left."""
    if name in owner.__dict__:
        stack.callback(setattr, owner, name, owner.__dict__[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, method)


def _noting(original: Any, reason: str) -> Any:
    """The same method, which notes its calls; `original` is as found in the class, a function or some kind of class method."""

    def note(reason: str) -> None:
        if _WATCHERS.notes:
            _WATCHERS.notes[-1](reason)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(reason)
        return original(self, *args, **kwargs)

    def class_method(cls: type, *args: Any, **kwargs: Any) -> Any:
        note(_CHECKPOINT if cls is _SAVES_INPUTS else reason)
        return original.__get__(None, cls)(*args, **kwargs)

    return method if inspect.isfunction(original) else classmethod(class_method)


def _watch_torch(stack: contextlib.ExitStack) -> None:
    """Notes when the model's own code asks for a mode, seeds torch's generator, or hangs a hook on a tensor: a graph would not."""
    importlib.import_module("torch._dynamo")  # has tables of torch's functions, as torch.overrides has: ours should not get into them
    torch.overrides.get_ignored_functions()

    def noting(reason: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if _WATCHERS.notes and caller.partition(".")[0] not in ("torch", "passes"):
                _WATCHERS.notes[-1](reason)
            return function(*args, **kwargs)

        return called

    stack.callback(torch.set_rng_state, torch.get_rng_state())
    for name in _ASKS:
        replacing(stack, torch, name, noting(f"asks torch.{name}, whose answer a graph would bake in", getattr(torch, name)))
    for owner, name in ((owner, name) for owner in (torch, torch.random) for name in _SEEDS if hasattr(owner, name)):
        replacing(stack, owner, name, noting(f"calls torch.{name}, which a graph would not do again", getattr(owner, name)))
    for name in _HOOKS:
        reason = f"calls {name} of a tensor, which a graph would not do again"
        replacing(stack, torch.Tensor, name, noting(reason, getattr(torch.Tensor, name)))


class _Mode(TorchFunctionMode):
    def __init__(self, note: Note, make: Make) -> None:
        super().__init__()
        self.note, self.make = note, make

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self.note("sets the gradient mode (no_grad, enable_grad or set_grad_enabled)")
        elif func in FACTORIES:
            return self.make(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_TENSORS = ("_parameters", "_buffers", "_modules")  # during an export, they hold what stands for them


class Attributes:
    """The Python attributes of all modules of a tree at one moment: a trace runs forwards, which may set some.

    Args:
        root: the tree's root.
    """

    def __init__(self, root: nn.Module) -> None:
        self.before = [
            (path, module, {name: _shallow(value) for name, value in vars(module).items()})
            for path, module in root.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # has only caches of its methods, set when they are first read
        ]

    def restore(self) -> list[tuple[str, str]]:
        """Puts back what has changed since; returns path and name of each attribute that had."""
        changed = []
        for path, module, before in self.before:
            now = vars(module)
            for name in [name for name in now if name not in before]:
                del now[name]
                changed.append((path, name))
            for name, (value, copied) in before.items():
                if name not in now or not _alike(now[name], value):
                    changed.append((path, name))
                elif copied is not value and not _same(value, copied):
                    _refill(value, copied)
                    changed.append((path, name))
                elif name not in _TENSORS and scrubbed(value):
                    changed.append((path, name))
                now[name] = value
        return changed


def _shallow(value: Any) -> tuple[Any, Any]:
    """The value, and a copy of it where it is a plain container (else the value itself)."""
    return value, value.copy() if type(value) in (list, dict, set, OrderedDict) else value  # ordered ones hold the hooks


def _alike(a: Any, b: Any) -> bool:
    """True for the same object, and for equal plain values and containers of such (torch.export leaves copies of containers behind)."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return isinstance(a, (bool, int, float, str, set)) and a == b


def _same(value: Any, copied: Any) -> bool:
    """True if both containers hold the same objects."""
    if len(value) != len(copied):
        return False
    if isinstance(value, dict):
        return all(name in value and value[name] is item for name, item in copied.items())
    return value == copied if isinstance(value, set) else all(a is b for a, b in zip(value, copied, strict=True))


def _refill(value: Any, copied: Any) -> None:
    value.clear()
    value.extend(copied) if isinstance(value, list) else value.update(copied)
