"""Steps compiled by an inner compiler: one artifact for each structure, which serves the forward pass and every rerun.

A compiler that sees the forward and the recomputation of a step together fuses them differently, and the bits differ. So the residual
function of a step is compiled by itself, as `x -> f(x)` with nothing else in sight, and the tape calls that same artifact in both passes.
Steps that differ in their parameters alone share it, so the time to compile does not grow with depth. A step with regions in it is made of
these, which let autograd store what it needs, and of pieces between them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator

import passes
from passes import StepCode
from passes.graphs.ops import package_of

from ..arithmetic.valueless import Effects
from ..inner import recurrent
from ..regions.region import ChainRegion, expanded, sum_dtype
from .compiler import Compiler
from .filling import FakeRun, Filler

__all__ = ["Artifact", "Artifacts"]


_KNOWN = frozenset({"torch", "_operator", "builtins", "math", "passes", "einops"})  # whose functions have no effects but on tensors


class Artifact:
    """A compiled step.

    Attributes:
        run: `run(x, *sides, *attributes, *sizes) -> (y, *extras)` with y = f(x) in the shape of x.
        needs_grad: for each input whether it was compiled to give a gradient.
        has_regions: whether there are regions within the step.
        is_pure: whether it surely draws no random numbers, writes to no tensor, and moves no switch of torch's.
    """

    def __init__(self, run: Callable[..., Any], needs_grad: tuple[bool, ...], has_regions: bool, is_pure: bool) -> None:
        self.run, self.needs_grad, self.has_regions, self.is_pure = run, needs_grad, has_regions, is_pure


class Artifacts:
    """The compiled steps of one graph, made on demand.

    Args:
        compiler: compiles them.
        statics: what bodies read that is no input of the graph: constants, the bodies of higher-order operations, regions within steps.
    """

    def __init__(self, compiler: Compiler, statics: Callable[[str], Any]) -> None:
        self.compiler, self.statics = compiler, statics
        self.known: dict[Hashable, tuple[Artifact, fx.GraphModule, tuple[Any, ...]]] = {}

    def of(self, code: StepCode, inputs: Sequence[Any]) -> tuple[Artifact, tuple[Any, ...]]:
        """The artifact of a step for fake inputs (x, *sides, *attributes, *sizes), and its fake outputs.

        The attributes of the step that are no inputs of the graph are left out; sizes are those of the whole graph.
        """
        key = (self._structure(code), tuple(map(_form, inputs)))
        if key not in self.known:
            self.known[key] = self._made(code, inputs, self._fixed(code))
        artifact, body, outputs = self.known[key]
        if len(outputs) > 1:
            # Were the extras of two steps one fake tensor, what reads them would be compiled as if they were one tensor.
            outputs = tuple(FakeRun(body, self.compiler, self.fill).run(*inputs))
        return artifact, outputs

    def fill(self, region: Any, args: tuple[Any, ...]) -> Any:
        """Compiles the steps of a region for fake arguments, returns fake outputs."""
        return region.compile(self, args[0], args[1:], self.compiler.fake_mode)

    def _fixed(self, code: StepCode) -> dict[str, Any]:
        """What a body reads that is no input of the graph, by its name in the body."""
        attributes = {f"a{i}": self.statics(path) for i, path in enumerate(code.attributes) if self.statics(path) is not None}
        return attributes | {f"m{i}": self.statics(path) for i, path in enumerate(code.modules)}

    def _structure(self, code: StepCode) -> Hashable:
        """Equal for steps that differ in their inputs alone."""
        fixed = tuple((name, self._content(value)) for name, value in sorted(self._fixed(code).items()))
        return id(code.body), code.form, code.written, fixed

    def _content(self, value: Any) -> Hashable:
        """Equal for graph modules of equal code over equal attributes, for regions of equal steps, and for the same object."""
        if isinstance(value, ChainRegion):
            region: Any = value
            places = {path: i for i, path in enumerate(region.reads)}
            steps = ((self._structure(step), step.sides, tuple(places.get(path) for path in step.attributes)) for step in region.bodies)
            return region.factors, region.escapes, *steps
        if not isinstance(value, fx.GraphModule):
            return id(value)
        names = dict.fromkeys(str(node.target) for node in value.graph.nodes if node.op in ("get_attr", "call_module"))
        return value.code, tuple(self._content(getattr(value, name)) for name in names)

    def _made(self, code: StepCode, inputs: Sequence[Any], fixed: dict[str, Any]) -> tuple[Artifact, fx.GraphModule, tuple[Any, ...]]:
        fake_mode = self.compiler.fake_mode
        assert fake_mode is not None
        body = fx.GraphModule(fixed, _with_inputs(code, fixed, len(inputs)))
        y, *_ = FakeRun(body, self.compiler, self.fill).run(*inputs)
        with fake_mode, enable_python_dispatcher():
            _finish(body, code, inputs[0], y)
        seen = all(map(_is_plain, body.graph.nodes)) and not recurrent(body)  # fake tensors have an LSTM written out, without its dropout
        effects = Effects() if seen else None
        outputs = FakeRun(body, self.compiler, self.fill, effects).run(*inputs)
        needs_grad = tuple(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        regions = [name for name, module in fixed.items() if isinstance(module, ChainRegion)]
        run = self._around(regions, body, inputs) if regions else self.compiler(_copied(body), inputs)
        return Artifact(run, needs_grad, bool(regions), effects is not None and effects.none), body, tuple(outputs)

    def _around(self, regions: list[str], body: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The body compiled around its regions."""
        sizes = [node.name for node in body.graph.nodes if node.op == "placeholder" and node.name.startswith("size")]
        joined = passes.pieces(body, regions, sizes)
        Filler(joined, self.compiler, self.fill).run(*inputs)
        return joined


def _is_plain(node: fx.Node) -> bool:
    """Whether a node calls neither another graph nor a function of the user's (`torch._dynamo.allow_in_graph`), into which nobody sees."""
    if node.op == "call_function" and package_of(node.target) not in _KNOWN:
        return False
    return node.op != "call_module" and not isinstance(node.target, HigherOrderOperator)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, for a compiler that may change it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def _with_inputs(code: StepCode, fixed: dict[str, Any], number: int) -> fx.Graph:
    """The body as a graph of that number of inputs: (x, *sides, *attributes, *sizes), the last of which only regions within it read."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in code.body.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(str(node.target))
    for node in code.body.nodes:
        if node.op == "get_attr" and node.target not in fixed:
            values[node] = graph.placeholder(str(node.target))
    sizes = [graph.placeholder(f"size{i}") for i in range(number - len(values))]
    for node in code.body.nodes:
        if node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "call_module" and isinstance(fixed[str(node.target)], ChainRegion):
            values[node].args = (*values[node].args, *sizes)
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
