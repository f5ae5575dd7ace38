"""Modules that stay Python inside an exported graph, which calls them: what an export would lose of them is kept.

torch.export runs the model
  |-- a module that does what a graph cannot hold, or that fails on fake tensors, is blamed; the export is done again with it `live`
  `-- a live module is one node; what it returns is known from a run on fake tensors, or where it fails on these, from one of the model

    graph of the export: live(3, (x, mask), ...)      graph of the capture: self.layers.0.experts(x, mask=mask)

A live module must leave alone what it is given, and return memory of its own, since the graph would not know of anything else.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

from passes.tracer import Blame
from passes.watch import Attributes, keeping_python_rng, python_rng_state, replacing

__all__ = ["LIVE", "Like", "LiveCall", "LiveCalls", "LiveError", "Result", "live_results", "result_of", "versions"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LOSES = "sets its attribute {}, which the graph around it would not see"


class _Live(HigherOrderOperator):
    """Stands in a graph of torch.export for the call of a live module; it never runs."""

    def __init__(self) -> None:
        super().__init__("mnet_fx_live")

    def __call__(self, number: int, inputs: Any, sizes: Any) -> Any:
        return super().__call__(number, inputs, sizes)


LIVE = _Live()


class LiveError(Exception):
    """A module cannot stay Python inside a graph; the message says why, as in "the module {message}"."""


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Result:
    """What a call of a module gave.

    Attributes:
        leaves: of the structure that it returned: `Like` for a tensor, `("given", i)` for the i-th leaf of its own arguments, and
            `("value", value)` for anything else.
        spec: that structure.
        fault: why a graph cannot stand around such a call, or None.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    fault: str | None


@dataclass(frozen=True)
class LiveCall:
    """One call of a live module in a graph.

    Attributes:
        path: of the module.
        leaves: of its `(args, kwargs)`; the symbolic ones and tensors are in the graph.
        spec: structure of these.
        form: what `live_results` must find; None where the result is one tensor, and nothing about it has to be checked.
    """

    path: str
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    form: tuple[Any, ...] | None


def live_results(result: Any, form: tuple[Any, ...], sizes: list[list[int]] | None) -> tuple[Tensor, ...]:
    """The tensors of what a live module returned, if it is what the graph was captured for.

    Args:
        result: what the module returned.
        form: for each leaf, "tensor" for one to return, "given" for one of its arguments, or the value that it must be, in a tuple.
        sizes: for each of the tensors, what its shape must be; None where it follows from the arguments.

    Raises:
        RuntimeError: it is something else.
    """
    leaves = pytree.tree_leaves(result)
    tensors = [leaf for leaf, kind in zip(leaves, form, strict=False) if kind == "tensor"]
    alike = len(leaves) == len(form) and all(map(_fits, leaves, form))
    if alike and sizes is not None:
        alike = all(list(tensor.shape) == list(shape) for tensor, shape in zip(tensors, sizes, strict=True))
    if not alike:
        found = ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf)[:40] for leaf in leaves)
        wanted = ", ".join(str(tuple(shape)) for shape in sizes or []) or str(form)
        raise RuntimeError(
            f"a module that stays Python inside an exported graph returned {found}, where the graph was captured for {wanted}: "
            "call the model with sizes like those of example_inputs"
        )
    return tuple(tensors)


def _fits(leaf: Any, kind: Any) -> bool:
    if kind in ("tensor", "given"):
        return isinstance(leaf, Tensor)
    return type(leaf) is type(kind[0]) and bool(leaf == kind[0])


def versions(module: nn.Module, inputs: list[Any]) -> list[tuple[Tensor, int]]:
    """The tensors that a call of the module must not write to, with how often they have been written to."""
    given = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    return [(tensor, _version(tensor)) for tensor in (*given, *module.parameters())]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def result_of(module: nn.Module, inputs: list[Any], before: list[tuple[Tensor, int]], output: Any) -> Result:
    """What a call gave.

    Args:
        module: the module.
        inputs: leaves of its arguments.
        before: what `versions` gave before the call.
        output: what it returned.
    """
    leaves, spec = pytree.tree_flatten(output)
    fault = "writes in place to what it is given" if any(_version(tensor) != version for tensor, version in before) else None
    owned = {memory for leaf in (*inputs, *module.parameters(), *module.buffers()) if (memory := _memory(leaf)) is not None}
    found: list[Any] = []
    for leaf in leaves:
        position = next((i for i, given in enumerate(inputs) if given is leaf), None)
        if isinstance(leaf, Tensor) and position is not None:
            found.append(("given", position))
        elif isinstance(leaf, Tensor):
            found.append(Like(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device))
            if _memory(leaf) in owned:
                fault = fault or "returns memory that it was given, or that it owns"
            owned.add(_memory(leaf))
        else:
            found.append(("value", leaf))
            if not isinstance(leaf, _PLAIN):
                fault = fault or f"returns a {type(leaf).__name__}, which a graph cannot hold"
    return Result(tuple(found), spec, fault)


def _memory(leaf: Any) -> Any:
    try:
        return leaf.untyped_storage()._cdata if isinstance(leaf, Tensor) else None
    except (NotImplementedError, RuntimeError):  # a sparse tensor or another kind without memory of its own, which may be anybody's
        return "unknown"


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
        inputs = [leaf for leaf in leaves if isinstance(leaf, (Tensor, *_SYMBOLS))]
        likes = [leaf for leaf in result.leaves if isinstance(leaf, Like)]
        sizes = None if faked else [[_size(n, d, leaves) for d, n in enumerate(like.shape)] for like in likes]
        tensors = _put(len(self.made), inputs, sizes, likes, any(p.requires_grad for p in module.parameters()))
        form = tuple("tensor" if isinstance(leaf, Like) else leaf[0] if leaf[0] == "given" else (leaf[1],) for leaf in result.leaves)
        checked = form != ("tensor",) or not result.spec.is_leaf() or sizes is not None
        self.made.append(LiveCall(path, tuple(leaves), spec, form if checked else None))
        rest = iter(tensors)
        found = [next(rest) if isinstance(x, Like) else leaves[x[1]] if x[0] == "given" else x[1] for x in result.leaves]
        return pytree.tree_unflatten(found, result.spec)

    def _faked(self, module: nn.Module, run: Callable[[], Any], leaves: list[Any]) -> Result | None:
        """What the call gives on the fake tensors of the export, unrecorded; None if it fails on them."""
        attributes, before, drawn = Attributes(module), versions(module, leaves), python_rng_state()
        self._off = True
        try:
            with disable_proxy_modes_tracing(), _discarding_symbols(leaves), keeping_python_rng():
                output = run()
                result = result_of(module, leaves, before, output)
                drew = python_rng_state() != drawn
        except Exception:
            return None
        finally:
            self._off = False
            changed = attributes.restore()
        if changed:
            raise LiveError(_LOSES.format(changed[0][1]))
        if drew:
            raise LiveError("draws from Python's random module or NumPy's, which a second run would not repeat")
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
    elif not isinstance(value, (Tensor, *_SYMBOLS, *_PLAIN)):
        raise LiveError(f"is called with a {type(value).__name__}, which a graph cannot hold")


def _discarding_symbols(leaves: list[Any]) -> Any:
    """Sizes that depend on values are nobody's business outside of the call."""
    fake = next((leaf for leaf in leaves if isinstance(leaf, FakeTensor)), None)
    shape_env = None if fake is None else fake.fake_mode.shape_env
    return contextlib.nullcontext() if shape_env is None else shape_env.ignore_fresh_unbacked_symbols()


def _size(n: int, d: int, leaves: list[Any]) -> Any:
    """The free size of an argument that a size of a result, seen in a run, stands for; the same dimension is looked at first."""
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
    candidates = [*(shape[d] for shape in shapes if len(shape) > d), *(size for shape in shapes for size in shape)]
    return next((size for size in candidates if isinstance(size, torch.SymInt) and size.node.has_hint() and size.node.hint == n), n)


def _put(number: int, inputs: list[Any], sizes: list[Any] | None, likes: list[Like], trains: bool) -> list[Tensor]:
    """A node for the call, and the tensors that stand for its results."""
    mode = get_proxy_mode()
    fake = next((leaf for leaf in inputs if isinstance(leaf, FakeTensor)), None)
    if mode is None or fake is None:
        raise LiveError("is called without any tensor")
    needs_grad = torch.is_grad_enabled() and (trains or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in inputs))
    with disable_proxy_modes_tracing(), fake.fake_mode:
        tensors = [_empty(like, None if sizes is None else sizes[i], needs_grad) for i, like in enumerate(likes)]
    arguments = pytree.tree_map(mode.tracer.unwrap_proxy, (number, inputs, sizes))
    proxy = mode.tracer.create_proxy("call_function", LIVE, arguments, {})
    return track_tensor_tree(tensors, proxy, constant=None, tracer=mode.tracer)


def _empty(like: Like, sizes: list[Any] | None, needs_grad: bool) -> Tensor:
    if sizes is None:
        made = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)
    else:
        order = sorted(range(len(sizes)), key=lambda d: -like.stride[d])
        made = torch.empty([sizes[d] for d in order], dtype=like.dtype, device=like.device).permute([order.index(d) for d in range(len(order))])
    if needs_grad and (made.is_floating_point() or made.is_complex()):
        made = made.detach().requires_grad_().clone()  # no leaf of autograd, as what is to come may write to it
    return made


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
