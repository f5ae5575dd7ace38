"""The inner compiler: any of `torch.compile`'s, as the steps of a chain need it, that is, with nothing that it recomputes or overwrites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.fx as fx
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .arithmetic.valueless import Effects
from .errors import SettingsError, warn_once

__all__ = [
    "Compile", "Inner", "WholeSteps", "all_kept", "checked_inner", "faking", "mistaken", "recurrent", "rereads", "sized_by_values",
    "value_sized", "with_hook_guards",
]  # fmt: skip

Inner = str | Callable[..., Any]
"""What compiles the parts: the name of a backend of torch.compile, or a callable of its kind."""

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

_OFTEN = frozenset({"eager", "aot_eager", "inductor"})  # to ask for the others imports them
_SYMBOLS = torch.SymInt, torch.SymFloat, torch.SymBool
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_BUDGET = "_region_activation_memory_budget"  # torch.autograd.graph.region_activation_memory_budget, since torch 2.14


def checked_inner(inner: Inner) -> Inner:
    """The option `inner`, if it can be one.

    Raises:
        SettingsError: it is neither the name of a registered backend nor a callable, or it is this package's own.
    """
    if isinstance(inner, str) and inner == "mnet_fx":
        raise SettingsError("inner is what compiles the parts: it cannot be mnet_fx itself; use 'inductor', 'aot_eager' or 'eager'")
    if not isinstance(inner, str) and not callable(inner):
        raise SettingsError(f"inner must be the name of a backend or a callable, got {inner!r}")
    if isinstance(inner, str) and inner not in _OFTEN and inner not in (known := torch._dynamo.list_backends(exclude_tags=())):
        names = ", ".join(map(repr, sorted(known)))
        raise SettingsError(f"inner={inner!r} is no backend of torch.compile; there are {names}, or a callable")
    return inner


@contextlib.contextmanager
def all_kept(gm: fx.GraphModule) -> Iterator[None]:
    """Where a graph may be compiled as a step, or a part of one.

    AOTAutograd must not recompute in it, whatever budget of memory the user gave: it would draw other random numbers for dropout
    (pytorch #190717, #190758), so the gradient would be wrong. The division into forward and backward is made here, also where the
    backward is compiled later.
    """
    _forget_budgets(gm)
    with functorch_config.patch(activation_memory_budget=1.0), _without_graphs():
        yield


class WholeSteps:
    """A backend for `torch.compile` that compiles whole steps of a chain.

    Args:
        inner: a backend by name, or a callable.
        mode, options, dynamic: as for torch.compile.

    Raises:
        SettingsError: inductor would use CUDA graphs.
    """

    def __init__(self, inner: Inner, mode: str | None = None, options: dict[str, Any] | None = None, dynamic: bool | None = None) -> None:
        if inner == "inductor":
            self.inner: Any = torch._TorchCompileInductorWrapper(mode, options, dynamic)
            if self.inner.config.get("triton.cudagraphs"):
                raise SettingsError(
                    f"mode={mode!r}, options={options!r} have CUDA graphs, which overwrite what a recomputed step has saved (pytorch issue "
                    "154306): use mode='max-autotune-no-cudagraphs', or none"
                )
        else:
            self.inner = torch._TorchCompileWrapper(inner, mode, options, dynamic)

    def __eq__(self, other: object) -> bool:
        """By which Dynamo knows that the layers of a list have one compiled function."""
        return isinstance(other, WholeSteps) and self.inner == other.inner

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        recorded = [node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder"]  # fake, as inputs are not here
        if mistaken(gm, recorded):
            return gm
        with all_kept(gm):
            found: Callable[..., Any] = self.inner(gm, inputs)
            return found


def with_hook_guards(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that asks at each call which hooks the modules inside have; else the code of one layer runs for all, without."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        before = dynamo_config.skip_nnmodule_hook_guards
        dynamo_config.skip_nnmodule_hook_guards = False
        try:
            return compiled(*args, **kwargs)
        finally:
            dynamo_config.skip_nnmodule_hook_guards = before

    return guarded


def mistaken(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether AOTAutograd would get a graph wrong, so that it is to be run as it is; arguments as for `rereads`."""
    return recurrent(gm) or sized_by_values(gm) or rereads(gm, inputs)


def recurrent(gm: fx.GraphModule) -> bool:
    """Whether a graph calls an LSTM, GRU or RNN, or a graph in it does.

    AOTAutograd writes them out without their dropout (torch 2.14: `_rnn_helper` compares the number of layers with the index of one), and
    cannot save what an LSTM on the CPU saves. Dynamo, unless it is told otherwise, leaves them to Python.
    """
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    return any(str(getattr(node.target, "__name__", "")).partition(".")[0] in _RECURRENT for graph in graphs for node in graph.nodes)


def sized_by_values(gm: fx.GraphModule) -> bool:
    """Whether a graph has sizes that depend on values, as the number of rows that a mask picks.

    AOTAutograd supposes that such a size is not 1, drops the assertions about it that Dynamo put into the graph, and gives a wrong gradient
    where one row broadcasts (torch 2.14).
    """
    return any(map(value_sized, gm.graph.nodes))


def value_sized(node: fx.Node) -> bool:
    """Whether a node makes such a size, has one, or asserts something of one. One that is equal to a number is recorded as that."""
    if node.target is torch.ops.aten._assert_scalar.default:
        return True
    leaves = [leaf for leaf in tree_leaves(node.meta.get("example_value")) if isinstance(leaf, (Tensor, *_SYMBOLS))]
    symbols = {*(node.meta.get("unbacked_bindings") or ()), *(symbol for leaf in leaves for symbol in free_unbacked_symbols(leaf))}
    return any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in symbols)


@contextlib.contextmanager
def faking(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Where operations on fake tensors give fake tensors with the strides and the need for gradients that the true ones will have."""
    sizes = contextlib.nullcontext() if fake_mode.shape_env is None else fake_mode.shape_env.ignore_fresh_unbacked_symbols()
    # Hidden from a checkpoint around the call that is being compiled, which counts. Detached, as an operation that saved its own result
    # would else be kept by it, in a cycle that the garbage collector does not see.
    hooked = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
    hidden = saved_tensors_hooks(Tensor.detach, lambda t: t) if hooked else contextlib.nullcontext()
    with fake_mode, enable_python_dispatcher(), sizes, hidden:  # the dispatcher for operations on symbolic sizes
        yield


def rereads(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph overwrites an input that it also returns, or computes with, as a counter that it moves and scales by.

    To be run as it is then, as AOTAutograd gets such graphs wrong. It may compute a value again in the backward pass, out of what the input
    holds by then: torch.compile of 2.14 gives a wrong gradient for `y = x * (1 + 0.5 * self.count); self.count.add_(1)`. It may give the
    caller one overwritten input for another. Where an input requires gradients, autograd knows that it was overwritten, and raises.

    Args:
        gm: the graph.
        inputs: fake tensors and numbers, which keep what they know of gradients. Of other inputs nothing is known, which is False.
    """
    fakes = [value for value in inputs if isinstance(value, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else None
    if mode is None:
        return False
    run = _Reads(gm)
    try:
        with faking(mode), torch.no_grad():
            risky = _storages(run.run(*inputs))
    except Exception:  # of the model's own, which compiling it meets as well
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in fakes):
        graded = _storages([t for t in fakes if t.requires_grad])
        risky |= run.early | (run.apart - graded)
    return not run.written.isdisjoint(risky & _storages(fakes))


class _Reads(fx.Interpreter):
    """Runs a graph on fake tensors.

    Attributes:
        written: the storages that some node overwrites.
        apart: those that some node reads, does not overwrite, and fills other memory from.
        early: those of them that it reads before any node has overwritten them.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.written: set[int] = set()
        self.apart: set[int] = set()
        self.early: set[int] = set()
        self.held: list[Any] = []  # as a number is only one storage's while that lives

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        given = _storages(self.fetch_args_kwargs_from_env(n))
        with (effects := Effects()):
            result = super().run_node(n)
        self.held += [result, effects]
        written = {storage for storage in given if effects.wrote_to(storage)}
        if written or not _storages(result) <= given:
            self.apart |= given - written
            self.early |= given - written - self.written
        self.written |= written
        return result


def _storages(values: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout is torch.strided}


def _without_graphs() -> Any:
    """Without inductor's CUDA graphs: what a graph gave is overwritten by its next run, which under a checkpoint comes before the gradient
    (pytorch #154306).
    """
    if not inductor_config.triton.cudagraphs:
        return contextlib.nullcontext()
    warn_once(
        "torch._inductor.config.triton.cudagraphs is on: it is off for the parts of a momentum network, as PyTorch's CUDA graphs overwrite "
        "what a recomputed step has saved (pytorch issue 154306)"
    )
    return inductor_config.patch({"triton.cudagraphs": False})


def _forget_budgets(gm: fx.GraphModule) -> None:
    """Takes budgets of memory off the nodes, by either of the ways to mark them, as these win over the setting."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("memory_budget", None)
            if _BUDGET in (custom := node.meta.get("custom") or {}):
                node.meta["custom"] = {key: value for key, value in custom.items() if key != _BUDGET}
