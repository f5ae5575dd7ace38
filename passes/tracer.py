"""One symbolic trace that knows what it loses.

`torch.fx.Tracer` records operations on proxies and silently loses everything else. This tracer notices it, names the innermost module
that did it, and carries on; `capture` then traces again with that module as a leaf, which keeps its Python as it is.

    what plain tracing does                                        here
    x += f recorded as x + f                                       recorded as operator.iadd, so that aliasing can be analysed
    x[i] = y refused                                               recorded as operator.setitem
    autocast, no_grad, checkpoint, custom backward: lost           blamed
    hooks of modules it descends into: run while tracing, baked    a leaf
    tensors and random numbers made in forward: baked              recorded, so that they are made in each call
    buffers read in forward: taken as constants                    recorded, also when they are written
    mask=None: a proxy, so "is not None" is baked as true          pinned to the default
    a submodule fails: the trace fails                             blamed, the rest is traced
    transformers of torch.nn: leaves                               opened
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.proxy import Attribute
from torch.utils import _pytree as pytree

from passes.torch_layers import opened
from passes.watch import keeping_python_rng, python_rng_state, watching

__all__ = ["Blame", "ChainTracer"]


@dataclass(frozen=True)
class Blame:
    """Why a module has to stay opaque to the tracer.

    Attributes:
        code: "untraceable", "lost_context" or "opaque_module".
        reason: what was found, such as "TraceError: ..." or "enters torch.autocast".
    """

    code: str
    reason: str


@dataclass
class _Call:
    """A module whose forward runs now."""

    path: str
    blame: Blame | None = None


class _InPlace(fx.Proxy):
    """A proxy that records augmented and item assignments as what they are."""

    def __getattr__(self, name: str) -> Attribute:
        return _Attribute(self, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`isinstance` asks for this where the real type is not the one it looks for: user code that does would get a wrong answer."""
        frame = sys._getframe(1)
        if frame.f_code.co_name == "is_tensor":
            frame = frame.f_back or frame
        if not frame.f_globals.get("__name__", "").startswith(("torch.", "torch", "passes.", "inspect", "copy", "typing")):
            object.__getattribute__(self, "tracer").blame("lost_context", "asks for the type of a value, which is another while tracing")
        return type(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise fx.proxy.TraceError(f"forward sets the attribute {name!r} of a tensor")
        super().__setattr__(name, value)

    def __str__(self) -> str:
        """Messages of assertions quote shapes; a text without node names keeps the steps of a chain alike."""
        return "<known at run time>"


class _Attribute(_InPlace, Attribute):
    pass


def _define_augmented(name: str) -> None:
    function = getattr(operator, name)

    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_InPlace, f"__{name}__", assign)


for _name in ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"]:
    _define_augmented(_name)


class ChainTracer(fx.Tracer):
    """Traces a module, noting every submodule that must become a leaf.

    Attributes:
        leaves: paths of modules to keep opaque.
        blames: for each module that must become a leaf too before the graph can be trusted, why; "" is the traced module itself.
        pinned: arguments of forward that were fixed to their defaults.
    """

    def __init__(self, leaves: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.leaves = leaves
        self.blames: dict[str, Blame] = {}
        self.pinned: dict[str, Any] = {}
        self.calls = [_Call("")]
        self._python_rng: Any = None

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, whose arguments with a default are pinned to it.

        Args:
            root: the module.
            concrete_args: must be None, the tracer pins arguments by itself.

        Returns:
            The graph; it is sound only if `blames` is empty.

        Raises:
            Exception: whatever the root's own forward raises when it meets proxies.
        """
        assert isinstance(root, nn.Module)
        tensors = [*root.named_parameters(), *root.named_buffers()]
        self._attributes: dict[int, str] = {id(tensor): name for name, tensor in reversed(tensors)}
        self._python_rng = python_rng_state()
        with keeping_python_rng(), watching(lambda reason: self.blame("lost_context", reason), self._make):
            graph = super().trace(root)
            self._watch_python_rng()
            return graph

    def blame(self, code: str, reason: str) -> None:
        """Note that the innermost module of the trace must stay opaque; the first reason counts."""
        self.blames.setdefault(self.calls[-1].path, Blame(code, reason))

    def _make(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        """Record the making of a tensor, which would otherwise happen once, while tracing."""
        return self.create_proxy("call_function", factory, args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlace(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = super().is_leaf_module(m, module_qualified_name) and opened(m) is None
        return module_qualified_name in self.leaves or own or reads_mode(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._watch_python_rng()
        if (reason := replaced_reason(m) or hook_reason(m)) is not None:
            self.blames.setdefault(path, Blame("opaque_module", reason))
            return self._as_leaf(path, args, kwargs)
        self.calls.append(_Call(path))
        depth, scope = list(self.module_stack.items()), (self.scope.module_path, self.scope.module_type)
        try:
            result = super().call_module(m, opened(m) or forward, args, kwargs)
            self._watch_python_rng()
            return result
        except Exception as error:
            self.blame("untraceable", f"{type(error).__name__}: {_first_line(error)}")
            self.module_stack = OrderedDict(depth)
            self.scope.module_path, self.scope.module_type = scope
        finally:
            self.calls.pop()
        return self._as_leaf(path, args, kwargs)

    def _as_leaf(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        """Go on with the trace: it is thrown away, but may show more modules to blame."""
        return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """As the base class, without its search through all parameters for each access."""
        if not isinstance(attr_val, torch.Tensor) or id(attr_val) not in self._attributes:
            return attr_val
        name = self._attributes[id(attr_val)]
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and id(a) in self._attributes:
            return self.create_node("get_attr", self._attributes[id(a)], (), {})
        if isinstance(a, torch.Tensor) and a not in self.tensor_attrs:
            # The base class would store it as a new attribute of the user's model.
            raise fx.proxy.TraceError("forward uses a tensor that is neither a parameter, a buffer nor an attribute of a module")
        if isinstance(a, (torch.Generator, torch.ScriptObject, pytree.TreeSpec)) and a not in self.tensor_attrs:
            raise fx.proxy.TraceError(f"forward uses a {type(a).__name__}, which a graph cannot hold")  # stored likewise
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, ([(key, self.create_arg(value)) for key, value in a.items()],), {})
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what a caller must give; defaults for the rest, whose placeholders stay unused so that the signature stays."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.VAR_KEYWORD:
                self.pinned[parameter.name] = () if parameter.kind is parameter.VAR_POSITIONAL else {}
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = self._argument(parameter)
            else:
                positional.append(self._argument(parameter))
        if not any(isinstance(value, fx.Proxy) for value in (*positional, *keywords.values())):
            raise fx.proxy.TraceError("forward has no argument that a caller must give, so nothing can be traced")

        forward = opened(self.root) or partial(root_fn, self.root)

        def call():  # type: ignore[no-untyped-def]  # the graph would inherit an annotation
            return forward(*positional, **keywords)

        return call, []

    def _argument(self, parameter: inspect.Parameter) -> Any:
        if parameter.default is parameter.empty:
            return self.create_proxy("placeholder", parameter.name, (), {})
        if isinstance(parameter.default, torch.Tensor):
            raise fx.proxy.TraceError(f"argument {parameter.name} has a tensor as its default")
        self.pinned[parameter.name] = parameter.default
        self.create_proxy("placeholder", parameter.name, (parameter.default,), {})
        return parameter.default

    def _watch_python_rng(self) -> None:
        state = python_rng_state()
        if state != self._python_rng:
            self._python_rng = state
            self.blame("lost_context", "draws from Python's random module or NumPy's, whose result a trace would bake in")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def reads_mode(module: nn.Module) -> bool:
    """True for a module without children whose forward reads `self.training`: StochasticDepth, DropPath and their kin."""
    code = getattr(inspect.getattr_static(type(module), "forward", None), "__code__", None)  # static: that of a script is a descriptor
    return code is not None and "training" in code.co_names and next(module.children(), None) is None


_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


def replaced_reason(module: nn.Module) -> str | None:
    """Why the forward of a module's class is not what runs, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule, whose code is not Python"
    if "forward" in module.__dict__:
        return "has a forward set on the instance, which the class does not show"
    return None


def hook_reason(module: nn.Module) -> str | None:
    """Which hooks of a module a trace through it would lose or bake in, or None."""
    return next((f"has {name}, which a trace would lose" for hooks, name in _HOOKS.items() if getattr(module, hooks, None)), None)
