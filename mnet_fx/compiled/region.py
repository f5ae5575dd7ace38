"""The module that a graph compiled by `torch.compile(..., backend="mnet_fx")` calls in place of a residual chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

import passes
from passes import RegionCode, StepCode

from ..arithmetic.kernels.eager import Kernels
from ..errors import MnetError
from ..regions.region import ChainRegion
from ..settings import Settings
from .artifacts import Artifact, Artifacts
from .filling import Unseen

__all__ = ["CompiledRegion", "CompiledStep", "Reading", "lies_under_no_grad"]


class Reading:
    """Has steps read what the regions within them read.

        body(x):  y = self.a0 * x;  return (self.m0(y),)               m0 is a region, whose steps read self.fc.weight
        becomes:  y = self.a0 * x;  return (self.m0(y, self.a1),)      with a1 = fc.weight an attribute of the step

    So these are inputs of the step, which a rerun pins and proves as any other. Steps that shared a body still do.

    Args:
        regions: those made so far, by name.
    """

    def __init__(self, regions: Mapping[str, CompiledRegion]) -> None:
        self.regions = regions
        self.bodies: dict[Hashable, tuple[fx.Graph, fx.Graph]] = {}  # the old one with the new one, as an id is only its own while it lives

    def of(self, code: RegionCode) -> RegionCode:
        return dataclasses.replace(code, steps=tuple(map(self._step, code.steps)))

    def _step(self, code: StepCode) -> StepCode:
        inner = {f"m{i}": self.regions[path].reads for i, path in enumerate(code.modules) if path in self.regions}
        if not inner:
            return code
        attributes = tuple(dict.fromkeys((*code.attributes, *(path for reads in inner.values() for path in reads))))
        places = {name: tuple(map(attributes.index, reads)) for name, reads in inner.items()}
        key = (id(code.body), tuple(places.items()))
        if key not in self.bodies:
            self.bodies[key] = code.body, _given(code.body, places)
        return dataclasses.replace(code, body=self.bodies[key][1], attributes=attributes)


def _given(body: fx.Graph, places: Mapping[str, tuple[int, ...]]) -> fx.Graph:
    """A body in which the calls of some modules are given attributes, by their numbers, as further arguments."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    reads: dict[str, fx.Node] = {}
    for node in body.nodes:
        if node.op == "call_module" and node.target in places:
            names = [f"a{i}" for i in places[str(node.target)]]
            reads |= {name: graph.create_node("get_attr", name) for name in dict.fromkeys(names) if name not in reads}
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].args += tuple(reads[name] for name in names)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "get_attr":
            reads[str(node.target)] = values[node]
    return graph


class CompiledStep(nn.Module):
    """One step: its artifact and the parameters and buffers that it reads, which each call gives to a copy of its own.

    Args:
        artifact: of the step.
        names: paths in the model of the parameters and buffers.
        velocity: the module that regions within the step begin with, or None.
    """

    def __init__(self, artifact: Artifact, names: list[str], velocity: nn.Module | None) -> None:
        super().__init__()
        self.velocity = velocity
        self.stateless, self.is_pure = velocity is None, artifact.is_pure
        self._artifact, self._names = artifact, names
        self._keys = tuple(f"a{i}" for i in range(len(names)))
        self._sizes: tuple[int, ...] = ()

    def bound(self, tensors: Sequence[Any], sizes: tuple[int, ...]) -> CompiledStep:
        """A copy that holds the tensors and sizes of one call, without the detours of Module.__init__, which would take longer than it."""
        step = CompiledStep.__new__(CompiledStep)
        parameters, buffers = dict(zip(self._keys, tensors, strict=True)), dict[str, Any]()
        if {*map(type, tensors)} != {nn.Parameter}:
            buffers = {key: tensor for key, tensor in parameters.items() if not isinstance(tensor, nn.Parameter)}
            parameters = {key: tensor for key, tensor in parameters.items() if key not in buffers}
        step.__dict__.update(self.__dict__, _parameters=parameters, _buffers=buffers, _sizes=sizes)
        return step

    def path_of(self, name: str) -> str:
        """Path in the model of a parameter or buffer of this step."""
        kind, _, rest = name.partition(".")
        return f"initial_velocity.{rest}" if rest else self._names[int(kind[1:])]

    def forward(self, x: Tensor, *sides: Any) -> tuple[Any, ...]:
        tensors = self._parameters | self._buffers
        inputs = (x, *sides, *(tensors[key] for key in self._keys), *self._sizes)
        for i, (value, needed) in enumerate(zip(inputs, self._artifact.needs_grad, strict=True)) if torch.is_grad_enabled() else ():
            if not needed and isinstance(value, Tensor) and value.requires_grad:
                raise MnetError(f"input {i} of a compiled step needs a gradient that it was not compiled for; please report this")
        return tuple(self._artifact.run(*inputs))


class CompiledRegion(Unseen, ChainRegion):
    """A region of a Dynamo graph. Its call gets the parameters and buffers of its steps, and all symbolic sizes, after the side inputs.

    Args:
        code, settings, arithmetic: as in `ChainRegion`.
        attributes: for each parameter and buffer of the graph, by its name there, its path in the model.
        is_off: whether the model runs it under `no_grad`.
    """

    def __init__(
        self, code: RegionCode, settings: Settings, arithmetic: Kernels | None, attributes: Mapping[str, str], is_off: bool = False
    ) -> None:
        super().__init__(code, settings, arithmetic)
        self.is_off = is_off
        if code.region.backward == "stored":
            self.backward = "stored"  # the step around it is run again as a whole
        self.attributes = attributes
        self.bodies = code.steps
        self.sides = len(code.region.sides)
        self.reads = list(dict.fromkeys(path for step in code.steps for path in self._own(step)))
        self.artifacts: list[Artifact] = []

    def _own(self, step: StepCode) -> list[str]:
        return [path for path in step.attributes if path in self.attributes]

    @property
    def step_names(self) -> list[list[str]]:
        """For each step the paths of its parameters and buffers in the model."""
        return [[self.attributes[path] for path in self._own(step)] for step in self.bodies]

    def _split(self, sides: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Of what follows the side inputs, the parameters and buffers by name, and the sizes."""
        end = self.sides + len(self.reads)
        return dict(zip(self.reads, sides[self.sides : end], strict=True)), sides[end:]

    def compile(self, artifacts: Artifacts, x: Tensor, sides: tuple[Any, ...], fake_mode: FakeTensorMode) -> Any:
        """Compiles the steps for fake inputs, once; returns fake outputs."""
        inputs, sizes = self._split(sides)
        self.artifacts = []
        with fake_mode, enable_python_dispatcher(), self._mode():
            moving = self.velocity is not None and any(p.requires_grad for p in self.velocity.parameters())
            needs_grad = torch.is_grad_enabled() and (x.requires_grad or moving)
            x = torch.empty_like(x, requires_grad=False).requires_grad_(needs_grad)
            escaped, extras, running = [], [], self.totals.start(sides)
            for t, step in enumerate(self.bodies):
                if t in self.escapes:
                    escaped.append(x)
                own = [inputs[path] for path in self._own(step)]
                artifact, (y, *more) = artifacts.of(step, [x, *(sides[i] for i in step.sides), *own, *sizes])
                self.artifacts.append(artifact)
                extras += running.without(t, more)
                needs_grad = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
                x = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype), requires_grad=False).requires_grad_(needs_grad)
            extras += running.values
            x, *escaped = (stream.clone() for stream in (x, *escaped))  # no leaves of autograd, as what is to come may write to them
        return (x, *escaped, *extras) if escaped or extras else x

    def _mode(self) -> AbstractContextManager[Any]:
        return torch.no_grad() if self.is_off else nullcontext()

    def run(self, x: Tensor, steps: list[tuple[nn.Module, tuple[Any, ...]]], backward: str, sides: tuple[Any, ...]) -> Any:
        with self._mode():
            return super().run(x, steps, backward, sides)

    def bound(self, sides: tuple[Any, ...]) -> list[tuple[nn.Module, tuple[Any, ...]]]:
        sizes = sides[self.sides + len(self.reads) :]
        return [
            (step.bound([sides[i] for i in places], sizes), tuple([sides[i] for i in code.sides])) for code, places, step in self._steps
        ]

    def dtypes(self, step: nn.Module) -> Iterable[torch.dtype]:
        return [parameter.dtype for parameter in step._parameters.values() if parameter is not None]  # but for v[0], it has none inside

    @cached_property
    def _steps(self) -> list[tuple[StepCode, list[int], CompiledStep]]:
        """For each step its code, the places of what it reads among the inputs of the region after x, and the step without these."""
        found, places = [], {path: self.sides + i for i, path in enumerate(self.reads)}
        for code, artifact in zip(self.code, self.artifacts, strict=True):
            paths = self._own(code)
            velocity = self.velocity if artifact.has_regions else None
            found.append(
                (code, [places[path] for path in paths], CompiledStep(artifact, [self.attributes[path] for path in paths], velocity))
            )
        return found


def lies_under_no_grad(gm: fx.GraphModule, code: RegionCode, settings: Settings) -> bool:
    """Whether a chain lies under `no_grad` in the model, and nothing that its steps give besides the stream needs a gradient.

    Raises:
        MnetError: part of it does, and its v[0] learns, which could not be told from there.
    """
    named = {node.name: node for node in gm.graph.nodes}
    extras = [any(passes.needs_gradient(named[name]) for name in step.extras) for step in code.region.steps]
    off = [passes.is_off(named[step.target]) and not graded for step, graded in zip(code.region.steps, extras, strict=True)]
    if any(off) and not all(off) and settings.velocity is not None and any(p.requires_grad for p in settings.velocity.parameters()):
        raise MnetError(
            f"the chain in {code.region.path or 'the root'} lies under torch.no_grad in part, and initial_velocity has parameters that "
            "learn: freeze those, or set requires_grad_(False) on the layers in the place of no_grad around them"
        )
    return all(off)
