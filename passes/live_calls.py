"""Watches torch.export run a model: finds the modules that have to stay Python, and puts the calls of those into the graph.

torch.export runs the model
  |-- a module that does what a graph cannot hold, or that fails on fake tensors, is blamed; the export is done again with it `live`
  `-- a live module is one node; what it returns is known from a run on fake tensors, or where it fails on these, from one of the model
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn, overrides
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode, disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from passes.live import LIVE, LOSES, PLAIN, SYMBOLIC, Before, Like, LiveCall, Result, result_of
from passes.tracer import Blame
from passes.watch import Attributes, keeping_python_rng, replacing

__all__ = ["LiveCalls", "LiveError"]


class LiveError(Exception):
    """A module cannot stay Python inside a graph; the message says why, as in "the module {message}"."""


class LiveCalls:
    """Watches the modules of a model while torch.export runs it: records calls of the live ones, and blames more.

    Args:
        root: the module that is exported.
        live: for the path of each module that must stay Python, why.
        results: for the path of a module, what its calls gave in a run of the model, for those that fail on fake tensors; None as long
            as there was no such run.

    Attributes:
        blames: for the path of each module that must be live too, why; "" is the root itself.
        made: the calls in the graph, in order.
    """

    def __init__(self, root: nn.Module, live: Mapping[str, Blame], results: Mapping[str, list[Result]] | None) -> None:
        self.root, self.live, self.results = root, live, results
        self.blames: dict[str, Blame] = {}
        self.made: list[LiveCall] = []
        self._paths = {id(vars(module)): path for path, module in root.named_modules()}  # export hands out proxies with the same __dict__
        self._running = [""]
        self._count: dict[str, int] = {}
        self._off = self._over = False

    def blame(self, reason: str, code: str = "lost_context") -> None:
        """Note that the module whose forward runs now must stay Python; the first reason counts."""
        if not (self._off or self._over):
            self.blames.setdefault(self._running[-1], Blame(code, reason))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sees every call of a module's forward, of this thread, except for the modules of torch.nn."""
        with contextlib.ExitStack() as stack:
            for module in (self.root.get_submodule(path) for path in self.live):
                for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                    stack.callback(vars(module).__setitem__, hooks, vars(module)[hooks])  # they fire around the call of the graph
                    vars(module)[hooks] = type(vars(module)[hooks])()
            for cls in dict.fromkeys(type(module) for path, module in self.root.named_modules() if path):
                forward = inspect.getattr_static(cls, "forward", None)
                if inspect.isfunction(forward) and not cls.__module__.startswith("torch."):
                    replacing(stack, cls, "forward", self._watched(forward, threading.get_ident()))
            yield

    def _watched(self, forward: Callable[..., Any], thread: int) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(id(vars(module)), "")
            if self._off or not path or threading.get_ident() != thread or get_proxy_mode() is None:
                return forward(module, *args, **kwargs)
            run = functools.partial(forward, module, *args, **kwargs)
            if path in self.live:
                return self._recorded(path, run, args, kwargs)
            self._running.append(path)
            try:
                return run()
            except Exception as error:
                self.blame(f"cannot be exported ({type(error).__name__}: {_first_line(error)})", "untraceable")
                if self.results is None:
                    self._over = True
                if self._over:
                    raise
            finally:
                self._running.pop()
            return self._recorded(path, run, args, kwargs)  # so that more can be blamed; this graph is thrown away

        return call

    def _recorded(self, path: str, run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Puts a call into the graph."""
        number = self._count[path] = self._count.get(path, -1) + 1
        leaves, spec = pytree.tree_flatten((args, kwargs))
        try:
            _require_plain((args, kwargs))
            module = self.root.get_submodule(path)
            faked = self._faked(module, run, leaves)
            result = faked or self._from_a_run(path, number)
            if result.fault:
                raise LiveError(result.fault)
        except LiveError as error:
            raise LiveError(f"{path} {error}") from error
        inputs = [leaf for leaf in leaves if isinstance(leaf, SYMBOLIC)]
        likes = [leaf for leaf in result.leaves if isinstance(leaf, Like)]
        sizes = None if faked else [[_size(n, d, leaves) for d, n in enumerate(like.shape)] for like in likes]
        tensors = _put(len(self.made), inputs, sizes, likes, any(p.requires_grad for p in module.parameters()))
        form = tuple("tensor" if isinstance(leaf, Like) else leaf[0] if leaf[0] == "given" else (leaf[1],) for leaf in result.leaves)
        checked = form != ("tensor",) or not result.spec.is_leaf() or sizes is not None
        given = tuple(leaf[1] for leaf in result.leaves if not isinstance(leaf, Like) and leaf[0] == "given")
        self.made.append(LiveCall(path, tuple(leaves), spec, form if checked else None, given))
        rest = iter(tensors)
        found = [next(rest) if isinstance(x, Like) else leaves[x[1]] if x[0] == "given" else x[1] for x in result.leaves]
        return pytree.tree_unflatten(found, result.spec)

    def _faked(self, module: nn.Module, run: Callable[[], Any], leaves: list[Any]) -> Result | None:
        """What the call gives on the fake tensors of the export, unrecorded; None if it fails on them."""
        attributes, before = Attributes(module), Before.of(module, leaves)
        self._off = True
        try:
            with disable_proxy_modes_tracing(), _unrecorded(), _discarding_symbols(leaves), keeping_python_rng():
                output = run()
                result = result_of(module, leaves, before, output)
        except Exception:
            return None
        finally:
            self._off = False
            changed = attributes.restore()
        if changed:
            raise LiveError(LOSES.format(changed[0][1]))
        if any(isinstance(leaf, Like) and None in map(_hint, leaf.shape) for leaf in result.leaves):
            raise LiveError("returns a tensor whose size depends on values")
        return result

    def _from_a_run(self, path: str, number: int) -> Result:
        seen = (self.results or {}).get(path)
        if not seen:
            raise LiveError("fails on the fake tensors of torch.export, and example_inputs do not reach it")
        return seen[min(number, len(seen) - 1)]


def _require_plain(value: Any) -> None:
    """Arguments must be what the code of a graph can write down."""
    if type(value) in (tuple, list):
        for item in value:
            _require_plain(item)
    elif type(value) is dict and all(isinstance(key, str) for key in value):
        for item in value.values():
            _require_plain(item)
    elif not isinstance(value, (*SYMBOLIC, *PLAIN)):
        raise LiveError(f"is called with a {type(value).__name__}, which a graph cannot hold")


@contextlib.contextmanager
def _unrecorded() -> Iterator[None]:
    """Without the modes by which torch.export records what is no operation on tensors: gradient modes, vmap."""
    stack = overrides._get_current_function_mode_stack()
    first = next((i for i, mode in enumerate(stack) if isinstance(mode, PreDispatchTorchFunctionMode)), len(stack))
    with contextlib.ExitStack() as popped:
        for _ in stack[first:]:
            popped.enter_context(overrides._pop_mode_temporarily())
        yield


def _discarding_symbols(leaves: list[Any]) -> Any:
    """Sizes that depend on values are nobody's business outside of the call."""
    fake = next((leaf for leaf in leaves if isinstance(leaf, FakeTensor)), None)
    shape_env = None if fake is None else fake.fake_mode.shape_env
    return contextlib.nullcontext() if shape_env is None else shape_env.ignore_fresh_unbacked_symbols()


def _size(n: int, d: int, leaves: list[Any]) -> Any:
    """What a size of a result, seen in a run, stands for: that of an argument in the same dimension, a free size of one, or itself.

    It is checked at each call, so that a wrong guess is an error.
    """
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
    same = [shape[d] for shape in shapes if len(shape) > d]
    free = [size for shape in shapes for size in shape if isinstance(size, torch.SymInt)]
    return next((size for size in (*same, *free) if _hint(size) == n), n)


def _hint(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else None


def _put(number: int, inputs: list[Any], sizes: list[Any] | None, likes: list[Like], trains: bool) -> list[Tensor]:
    """A node for the call, and the tensors that stand for its results."""
    mode = get_proxy_mode()
    fake = next((leaf for leaf in inputs if isinstance(leaf, FakeTensor)), None)
    if mode is None or fake is None:
        raise LiveError("is called without any tensor")
    needs_grad = torch.is_grad_enabled() and (trains or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in inputs))
    with disable_proxy_modes_tracing(), fake.fake_mode:
        tensors = [_empty(like, None if sizes is None else sizes[i], needs_grad) for i, like in enumerate(likes)]
    tracer: Any = mode.tracer
    arguments = pytree.tree_map(tracer.unwrap_proxy, (number, inputs, sizes))
    proxy = tracer.create_proxy("call_function", LIVE, arguments, {})
    return track_tensor_tree(tensors, proxy, constant=None, tracer=tracer)


def _empty(like: Like, sizes: list[Any] | None, needs_grad: bool) -> Tensor:
    if sizes is None:
        made = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)
    else:
        order = sorted(range(len(sizes)), key=lambda d: -like.stride[d])
        made = torch.empty([sizes[d] for d in order], dtype=like.dtype, device=like.device).permute(
            [order.index(d) for d in range(len(order))]
        )
    if needs_grad and (made.is_floating_point() or made.is_complex()):
        made = made.detach().requires_grad_().clone()  # no leaf of autograd, as what is to come may write to it
    return made


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
