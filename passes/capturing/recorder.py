"""Records the forward of one module on proxies, in this thread alone.

    calls of submodules     by an attribute of each, which `nn.Module.__call__` calls in place of hooks and forward
    functions of torch      by a torch function mode, also those of tensors alone: nothing is computed, drawn, or written to
    parameters, buffers     given out as proxies, which know what their tensors can say: shapes, dtypes, single values
    x += f, x[i] = y        as what they are
    a call that fails       undone, and recorded as one call

The modules must be a copy that nobody else uses.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from passes.capturing.torch_layers import opened
from passes.graphs.facts import joined
from passes.graphs.ops import FACTORIES, IN_PLACE_OPERATORS, words

__all__ = ["Recorder", "first_line", "is_leaf"]

_RECORDER = "_compiled_call_impl"  # nn.Module.__call__ calls it in place of forward, hooks and all, if an instance has one
_READS = words("""
    __get__ __len__ __bool__ __int__ __float__ __index__ __iter__ __hash__ __repr__ __format__ __contains__ __array__ item tolist numpy
    shape size dim ndim ndimension numel nelement stride storage_offset element_size dtype device layout requires_grad names itemsize nbytes
    is_cuda is_cpu is_meta is_floating_point is_complex is_contiguous get_device data_ptr is_nonzero equal allclose
""")


def is_leaf(module: nn.Module) -> bool:
    """True where there is nothing to read: a script, and what torch.nn makes, but for sequences and transformers."""
    readable = (
        isinstance(module, nn.Sequential) or opened(module) is not None or not type(module).__module__.startswith(("torch.nn", "torch.ao"))
    )
    return not readable or isinstance(module, torch.jit.ScriptModule)


class _Proxy(fx.Proxy):
    """A proxy that records augmented and item assignments as what they are."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _define_augmented(function: Callable[..., Any]) -> None:
    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{function.__name__}__", assign)


for _function in IN_PLACE_OPERATORS:
    _define_augmented(_function)


class _Known(_Proxy):
    """A parameter, buffer or other tensor attribute: what can be known of it without computing is what the tensor says."""

    def __init__(self, tensor: Tensor, tracer: Recorder) -> None:
        vars(self).update(tensor=tensor, tracer=tracer)

    @property
    def node(self) -> Any:  # type: ignore[override]
        return self.tracer.create_arg(self.tensor)

    def __getattr__(self, k: str) -> Any:
        return getattr(self.tensor, k) if k in _READS else super().__getattr__(k)

    def __repr__(self) -> str:
        return "<tensor>"


for _name in ("__len__", "__bool__", "__int__", "__float__", "__index__", "__iter__", "__contains__"):
    setattr(_Known, _name, lambda self, *args, _name=_name: getattr(self.tensor, _name)(*args))


class Recorder(fx.Tracer):
    """Reads one module.

    Args:
        root: the module; what it holds is replaced while it is read, and put back.

    Attributes:
        opaque: paths of the modules inside that failed and have children, and why.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root, self.graph, self.opaque = root, fx.Graph(), dict[str, str]()
        self.modules = {module: path for path, module in root.named_modules()}
        self.submodule_paths, self.tensor_attrs = self.modules, {}
        self.names: dict[int, str] = {}
        self.constants: dict[str, Tensor] = {}
        self.leaves: set[str] = set()

    def graph_module(self) -> fx.GraphModule:
        """The graph of the root's forward.

        Raises:
            Exception: whatever that raises when it meets proxies.
        """
        if (reason := _replaced(self.root)) is not None:
            raise fx.proxy.TraceError(reason)
        with contextlib.ExitStack() as stack:
            for module, path in self.modules.items():
                stack.callback(module.__dict__.update, self._replace(module, path))
                stack.callback(module.__dict__.clear)
            stack.enter_context(_Mode(self))
            forward = opened(self.root) or self.root.forward
            args, kwargs = self._arguments(forward)
            self.create_node("output", "output", (self.create_arg(forward(*args, **kwargs)),), {})
        targets = dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr"))
        held = {target: self.constants.get(target) for target in targets}
        held = {target: operator.attrgetter(target)(self.root) if value is None else value for target, value in held.items()}
        result = fx.GraphModule(held, self.graph, class_name=type(self.root).__name__)
        result.training = self.root.training
        return result

    def _replace(self, module: nn.Module, path: str) -> dict[str, Any]:
        """Let a module of the copy record calls and give out its tensors as proxies; returns what it held before."""
        before = vars(module).copy()
        own = [] if isinstance(module, torch.jit.ScriptModule) else [*module._parameters.items(), *module._buffers.items()]
        for name, value in [*own, *before.items()]:
            if isinstance(value, Tensor):
                self.names.setdefault(id(value), joined(path, name))
                module.__dict__[name] = _Known(value, self)
        module.__dict__[_RECORDER] = partial(self.called, module)
        return before

    def _arguments(self, forward: Callable[..., Any]) -> tuple[list[fx.Proxy], dict[str, fx.Proxy]]:
        """Proxies for what a caller must give; the rest is left to its defaults."""
        parameters = inspect.signature(forward).parameters.values()
        needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not needed:
            raise fx.proxy.TraceError("forward has no argument that a caller must give, so nothing can be followed")
        values = {p.name: self.create_proxy("placeholder", p.name, (), {}) for p in needed}
        by_name = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
        return [value for name, value in values.items() if name not in by_name], {name: values[name] for name in by_name}

    def called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a module of the copy does in place of its forward: record it, and where that fails, itself."""
        path = self.path_of_module(module)
        last, stack, scope = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy(), copy.copy(self.scope)
        try:
            return self.call_module(module, opened(module) or module.forward, args, kwargs)
        except Exception as error:
            if path in self.leaves:
                raise
            self.leaves.add(path)
            self.opaque = {inner: reason for inner, reason in self.opaque.items() if not inner.startswith(f"{path}.")}
            if next(module.children(), None) is not None:
                self.opaque[path] = first_line(error)
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        self.module_stack, self.scope = stack, scope
        return self.call_module(module, module.forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if (reason := _replaced(m)) is not None and module_qualified_name not in self.leaves:
            raise fx.proxy.TraceError(reason)
        return module_qualified_name in self.leaves or is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy) and a.tracer is not self:
            raise fx.proxy.TraceError("forward keeps a value from one call to the next")
        if isinstance(a, Tensor):
            name = self.names.setdefault(id(a), f"_constant_{len(self.constants)}")
            if name.startswith("_constant_"):
                self.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def torch_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a function of torch, also one of tensors alone; run those that only read a tensor, and drop what sets an attribute."""
        leaves, name = pytree.tree_leaves((args, kwargs)), getattr(function, "__name__", "")
        proxies = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        tensors = any(isinstance(leaf, Tensor) for leaf in leaves)
        if not proxies and (name in _READS or not (tensors or function in FACTORIES)):
            return function(*args, **kwargs)
        if name in ("__set__", "__delete__"):
            return None
        method = getattr(Tensor, name, None) is function
        return self.create_proxy("call_method" if method else "call_function", name if method else function, args, kwargs)


class _Mode(TorchFunctionMode):
    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.torch_call(func, args, kwargs or {})


def _replaced(module: nn.Module) -> str | None:
    """Why the forward of a module's class is not what runs, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule, whose code is not Python"
    return "has a forward set on the instance, which the class does not show" if "forward" in vars(module) else None


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
