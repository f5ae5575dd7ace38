"""Steps compiled by an inner compiler: one artifact for each structure, which serves the forward pass and every rerun.

A compiler that sees the forward and the recomputation of a step together fuses them differently, and the bits differ. So the residual
function of a step is compiled by itself, as `x -> f(x)` with nothing else in sight, and the tape calls that same artifact in both passes.
Steps that differ in their parameters alone share it, so the time to compile does not grow with depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.fx as fx
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._sympy.symbol import SymT, symbol_is_type

from passes import StepCode

from .region import expanded, sum_dtype

__all__ = ["Artifact", "Artifacts", "Compile", "Compiler", "fake_output"]

_BUDGET = "_region_activation_memory_budget"  # torch.autograd.graph.region_activation_memory_budget, since torch 2.14

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Compiler:
    """An inner compiler, called on parts of one Dynamo graph.

    Args:
        inner: `inner(graph_module, example_inputs) -> callable` that returns a tuple, as `torch.compile` takes it.
        fake_mode: the fake tensor mode of the graph, None where it has no tensors.
    """

    def __init__(self, inner: Compile, fake_mode: FakeTensorMode | None) -> None:
        self.inner, self.fake_mode = inner, fake_mode

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles a part, of which Dynamo's own tracing context knows nothing.

        AOTAutograd must not recompute in it, whatever budget of memory the user gave: it would draw other random numbers for dropout
        (pytorch #190717, #190758), so the gradient would be wrong. The division into forward and backward is made here, also where the
        backward is compiled later.
        """
        _forget_budgets(gm)
        all_kept = functorch_config.patch(activation_memory_budget=1.0)
        for node in gm.graph.nodes:
            if node.op == "placeholder" and not hasattr(node, "_dynamo_source"):
                node._dynamo_source = None
        # The minifier runs a backward pass within a compilation, where none can be compiled; else the first backward pass compiles its own,
        # which then knows whether retain_graph forbids it to overwrite what the forward saved.
        now = torch._dynamo.config.repro_after is not None and hasattr(functorch_config, "force_non_lazy_backward_lowering")  # torch 2.10
        at_once = functorch_config.patch(force_non_lazy_backward_lowering=True) if now else contextlib.nullcontext()
        with tracing(TracingContext(self.fake_mode)), at_once, all_kept, _only_own_floats(inputs, self.fake_mode):
            return self.inner(gm, list(inputs))


def _forget_budgets(gm: fx.GraphModule) -> None:
    """Takes budgets of memory off the nodes, by either of the ways to mark them, as these win over the setting."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("memory_budget", None)
            if _BUDGET in (custom := node.meta.get("custom") or {}):
                node.meta["custom"] = {key: value for key, value in custom.items() if key != _BUDGET}


@contextlib.contextmanager
def _only_own_floats(inputs: Sequence[Any], fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """Keeps AOTAutograd's hands off the floats that are no inputs of a part.

    Of a float that may vary, which Dynamo hands over as a 0-d tensor, it makes a constant where the graph at hand has no use for it, and
    so every other value of it would be compiled for anew. Names in this set it takes to be done with.
    """
    memos = [value.item_memo for value in inputs if isinstance(value, FakeTensor)]
    own = {memo.node._expr for memo in memos if isinstance(memo, torch.SymFloat)}
    shape_env = None if fake_mode is None else fake_mode.shape_env
    name = "backed_var_to_val" if hasattr(shape_env, "backed_var_to_val") else "var_to_val"  # since torch 2.11; before
    known = getattr(shape_env, name, ())  # () without sizes that vary
    others = {str(symbol) for symbol in known if symbol_is_type(symbol, SymT.FLOAT) and symbol not in own}
    others -= TensorifyState.force_specializations
    TensorifyState.force_specializations |= others
    try:
        yield
    finally:
        TensorifyState.force_specializations -= others


def fake_output(gm: fx.GraphModule, inputs: Sequence[Any], fake_mode: FakeTensorMode) -> Any:
    """What a part returns for fake inputs, as fake tensors with the strides and the need for gradients that it will have."""
    sizes = contextlib.nullcontext() if fake_mode.shape_env is None else fake_mode.shape_env.ignore_fresh_unbacked_symbols()
    hidden = saved_tensors_hooks(lambda t: t, lambda t: t)  # from a checkpoint around the call that is being compiled, which counts
    with fake_mode, enable_python_dispatcher(), sizes, hidden:  # the dispatcher for operations on symbolic sizes
        return gm(*inputs)


class Artifact:
    """A compiled step.

    Attributes:
        run: `run(x, *sides, *attributes, *sizes) -> (y, *extras)` with y = f(x) in the shape of x.
        needs_grad: for each input whether it was compiled to give a gradient.
    """

    def __init__(self, run: Callable[..., Any], needs_grad: tuple[bool, ...]) -> None:
        self.run, self.needs_grad = run, needs_grad


class Artifacts:
    """The compiled steps of one graph, made on demand.

    Args:
        compiler: compiles them.
        statics: what bodies read that is no input of the graph: constants, and the bodies of higher-order operations.
    """

    def __init__(self, compiler: Compiler, statics: Callable[[str], Any]) -> None:
        self.compiler, self.statics = compiler, statics
        self.known: dict[Hashable, tuple[Artifact, fx.GraphModule, tuple[Any, ...]]] = {}

    def of(self, code: StepCode, inputs: Sequence[Any]) -> tuple[Artifact, tuple[Any, ...]]:
        """The artifact of a step for fake inputs (x, *sides, *attributes, *sizes), and its fake outputs.

        The attributes of the step that are no inputs of the graph are left out; sizes are those of the whole graph.
        """
        fixed = {f"a{i}": self.statics(path) for i, path in enumerate(code.attributes) if self.statics(path) is not None}
        modules = {f"m{i}": self.statics(path) for i, path in enumerate(code.modules)}
        key = (id(code.body), code.form, code.written, tuple(map(_form, inputs)), _contents(fixed | modules))
        if key not in self.known:
            self.known[key] = self._made(code, inputs, fixed | modules)
        artifact, body, outputs = self.known[key]
        if len(outputs) > 1 and self.compiler.fake_mode is not None:
            # Were the extras of two steps one fake tensor, what reads them would be compiled as if they were one tensor.
            outputs = tuple(fake_output(body, inputs, self.compiler.fake_mode))
        return artifact, outputs

    def _made(self, code: StepCode, inputs: Sequence[Any], fixed: dict[str, Any]) -> tuple[Artifact, fx.GraphModule, tuple[Any, ...]]:
        fake_mode = self.compiler.fake_mode
        assert fake_mode is not None
        body = fx.GraphModule(fixed, _with_inputs(code, fixed, len(inputs)))
        y, *_ = fake_output(body, inputs, fake_mode)
        with fake_mode, enable_python_dispatcher():
            _finish(body, code, inputs[0], y)
        outputs = fake_output(body, inputs, fake_mode)
        needs_grad = tuple(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        return Artifact(self.compiler(_copied(body), inputs), needs_grad), body, tuple(outputs)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, for a compiler that may change it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def _with_inputs(code: StepCode, fixed: dict[str, Any], number: int) -> fx.Graph:
    """The body as a graph of that number of inputs: (x, *sides, *attributes, and more that it does not read)."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in code.body.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(str(node.target))
    for node in code.body.nodes:
        if node.op == "get_attr" and node.target not in fixed:
            values[node] = graph.placeholder(str(node.target))
    for i in range(number - len(values)):
        graph.placeholder(f"size{i}")
    for node in code.body.nodes:
        if node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    return graph


def _finish(body: fx.GraphModule, code: StepCode, x: Tensor, y: Tensor) -> None:
    """Makes the body return f(x) in the shape of x, and in the dtype that makes x + f(x) have that of the original."""
    graph, output = body.graph, body.graph.output_node()
    first = next(node for node in graph.nodes if node.op == "placeholder")
    outputs: Any = output.args[0]
    value, *extras = outputs
    dtype = sum_dtype(code, x, y)
    with graph.inserting_before(output):
        if code.form == "block":
            value, y = graph.call_function(torch.sub, (value, first)), y - x
        if y.shape != x.shape:
            expanded(y, x)
            value = graph.call_method("expand_as", (value, first))
        if torch.promote_types(x.dtype, y.dtype) != dtype:
            value = graph.call_method("to", (value, dtype))
    output.args = ((value, *extras),)
    body.recompile()


def _form(value: Any) -> Hashable:
    """Everything about an input that an artifact depends on."""
    if not isinstance(value, Tensor):
        return type(value), str(value)
    parameter = isinstance(value, nn.Parameter)
    strided = (str(tuple(value.stride())), str(value.storage_offset())) if value.layout is torch.strided else ()
    return str(tuple(value.shape)), strided, value.dtype, value.device, value.requires_grad, parameter, type(value)


def _contents(fixed: dict[str, Any]) -> Hashable:
    """Equal for graph modules of equal code over equal attributes, and for the same object."""
    return tuple((name, _content(value)) for name, value in sorted(fixed.items()))


def _content(value: Any) -> Hashable:
    if not isinstance(value, fx.GraphModule):
        return id(value)
    names = dict.fromkeys(str(node.target) for node in value.graph.nodes if node.op in ("get_attr", "call_module"))
    return value.code, tuple(_content(getattr(value, name)) for name in names)
