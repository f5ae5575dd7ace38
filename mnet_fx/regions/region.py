"""The module that a rewritten graph calls in place of a residual chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from passes import RegionCode, StepCode

from ..arithmetic.device_planes import Reserve
from ..arithmetic.kernels.eager import Kernels
from ..errors import UNCOMPILED, StreamError
from ..runtime.reads import Reads
from ..runtime.start import Recurrence
from ..runtime.steps import run_chain
from ..runtime.unreturned import Leaving
from ..settings import Settings
from .program import Program
from .totals import Totals

__all__ = ["ChainRegion", "MomentumRegion", "expanded", "sum_dtype"]

_COMPILED = fx.Graph()  # in place of a body of which there is a program: a graph of torch.ops does not pickle


class _Step(nn.Module):
    """One step, bound to the live modules of this moment: (x, *sides) -> (y, *extras) with y = f(x) in the shape of x."""

    def __init__(self, owner: nn.Module, code: StepCode, program: Program) -> None:
        super().__init__()
        self._program, self._code = program, code
        for i, path in enumerate(code.modules):
            module = owner.get_submodule(path)
            self._modules[f"m{i}"] = _Within(module) if isinstance(module, MomentumRegion) else module
        for i, path in enumerate(code.attributes):
            self._bind(f"a{i}", owner, path)

    def path_of(self, name: str) -> str:
        """Path in the model of a parameter or buffer of this step; of its own for no name."""
        if not name:
            return self._code.path
        first, _, rest = name.partition(".")
        if isinstance(within := self._modules.get(first), _Within):
            return within.path_of(rest)
        path = (self._code.modules if first[0] == "m" else self._code.attributes)[int(first[1:])]
        return f"{path}.{rest}" if rest else path

    def _bind(self, name: str, owner: nn.Module, path: str) -> None:
        parent, _, leaf = path.rpartition(".")
        value = getattr(owner.get_submodule(parent), leaf)
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, Tensor):
            self._buffers[name] = value
        else:
            setattr(self, name, value)

    def forward(self, x: Tensor, *sides: Any) -> tuple[Any, ...]:
        y, *extras = self._program(self, x, *sides)
        dtype = sum_dtype(self._code, x, y)
        if self._code.form == "block":
            y = y - x
        if y.shape != x.shape:
            y = expanded(y, x)
        if torch.promote_types(x.dtype, y.dtype) != dtype:
            y = y.to(dtype)
        return y, *extras


class _Within(nn.Module):
    """A region within a step of another, bound to the live modules of this moment, so that these belong to the step.

    The step is run again as a whole, so this region need not go backwards: autograd stores its activations, for as long as the gradients
    of the one step take.
    """

    def __init__(self, region: MomentumRegion) -> None:
        super().__init__()
        self._region, self._sides = (region,), [code.sides for code in region.code]
        self.steps = nn.ModuleList(region.steps())
        self.velocity = region.velocity

    def path_of(self, name: str) -> str:
        """Path in the model of a parameter or buffer of one of its steps."""
        kind, _, rest = name.partition(".")
        if kind == "velocity":
            return f"initial_velocity.{rest}"
        t, _, rest = rest.partition(".")
        return self.steps[int(t)].path_of(rest)  # type: ignore[operator]

    def forward(self, x: Tensor, *sides: Any) -> Any:
        steps = [(step, tuple(sides[i] for i in own)) for step, own in zip(self.steps, self._sides, strict=True)]
        return self._region[0].run(x, steps, "stored", sides)


def sum_dtype(code: StepCode, x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype that x[t+1] has in the original model, for a body that gave y.

    Raises:
        StreamError: it is narrower than that of x.
    """
    of_branch = code.form == "block" or code.written == "branch"
    dtype = y.dtype if of_branch else x.dtype if code.written == "skip" else torch.result_type(x, y)
    if torch.promote_types(x.dtype, dtype) == dtype:
        return dtype
    if torch.is_autocast_enabled(x.device.type):  # autocast brings about any mixture; the wider dtype does no harm
        return x.dtype
    raise StreamError(
        f"a step turns a stream of {x.dtype} into one of {dtype}; a momentum chain keeps its dtype or widens it: "
        "cast the input of the chain, or cast inside the branch"
    )


def expanded(y: Tensor, x: Tensor) -> Tensor:
    """y in the shape of x.

    Raises:
        StreamError: it has no such shape.
    """
    try:
        return y.expand(x.shape)
    except RuntimeError:
        raise StreamError(
            f"a residual of shape {tuple(y.shape)} is added to a stream of shape {tuple(x.shape)}, which would change the stream's "
            "shape; a momentum chain keeps one shape: rewrite a smaller part of the model"
        ) from None


class ChainRegion(nn.Module):
    """A chain of residual steps x[t+1] = x[t] + f[t](x[t], *sides), run as the momentum recurrence and reversibly. Abstract.

        v[t+1] = g[t] * v[t] + b[t] * f[t](x[t], *sides)
        x[t+1] = x[t] + v[t+1]

    Args:
        code: the chain, from `passes.rewrite`.
        settings: the recurrence.
        arithmetic: the loops over elements.

    Called as `region(x, *sides)` with x of any shape and real floating dtype; returns x[T], or a tuple that starts with it.

    Raises:
        StreamError: x cannot be carried, or a step changes it in place or changes its shape.
        InversionError: in the backward pass, see `mnet_fx.InversionError`.
    """

    def __init__(self, code: RegionCode, settings: Settings, arithmetic: Kernels | None = None) -> None:
        super().__init__()
        self.name, self.factors = code.region.name, settings.factors(len(code.steps))  # not the settings, whose gamma may not pickle
        self.backward, self.on_drift, self.held, self.arithmetic = settings.backward, settings.on_drift, settings.held, arithmetic
        self.reserve, self.offload = Reserve(), settings.offload
        self.leaving: Leaving | None = None
        self.stored = 0  # of how many steps, the last ones, autograd stores the activations
        paths = tuple(step.path for step in code.region.steps)
        self.weights, self.read_maps = settings.weights, Reads(settings.calibration, paths, settings.weights == "signed")
        self.escapes, self.totals = code.region.escapes, Totals(code.region)
        self.code = tuple(dataclasses.replace(step, body=_COMPILED) for step in code.steps)
        self._velocity, self._path = (settings.velocity,), code.region.path

    @property
    def title(self) -> str:
        """For people."""
        return f"steps of the chain in {self._path or 'the root'}"

    @property
    def velocity(self) -> nn.Module | None:
        """The module that gives v[0] from x[0]; None for v[0] = 0."""
        return self._velocity[0]

    def bound(self, sides: tuple[Any, ...]) -> list[tuple[nn.Module, tuple[Any, ...]]]:
        """Each step as a module `(x, *sides) -> (y, *extras)` that owns the tensors of this moment, and its side inputs."""
        raise NotImplementedError

    def dtypes(self, step: nn.Module) -> Iterable[torch.dtype]:
        """Those of the parameters of a step."""
        return (parameter.dtype for parameter in step.parameters())

    @torch.compiler.disable(reason=UNCOMPILED)
    def forward(self, x: Tensor, *sides: Any) -> Any:
        if isinstance(x, fx.Proxy):  # torch.fx traces the module that it is part of: a region is one call there
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, *sides), {})
        return self.run(x, self.bound(sides), self.backward, sides)

    def run(self, x: Tensor, steps: list[tuple[nn.Module, tuple[Any, ...]]], backward: str, sides: tuple[Any, ...]) -> Any:
        """The region on steps bound before, with the given kind of backward pass, and all its side inputs."""
        if not isinstance(x, Tensor):
            raise StreamError(f"{self.name}: the stream must be a tensor, got {type(x).__name__}")
        dtypes = {dtype for step, _ in steps for dtype in self.dtypes(step)}
        widest = {dtype for dtype in dtypes if dtype.is_floating_point} | (set() if self.held is None else {self.held})
        recurrence = Recurrence(
            self.name,
            self.factors,
            backward,
            self.on_drift,
            self.velocity,
            widest,
            self.arithmetic,
            reserve=self.reserve,
            reads=self.read_maps,
            stored=self.stored,
            leaving=self.leaving,
            offload=self.offload,
        )
        running = self.totals.start(sides)
        last, escaped, extras = run_chain(recurrence.start(x), steps, self.escapes, running.without)
        return (last, *escaped, *extras, *running.values) if escaped or any(step.extras for step in self.code) else last

    def extra_repr(self) -> str:
        return f"{len(self.factors)} steps, gamma={self.factors[-1][0]:g}, backward={self.backward!r}"


class MomentumRegion(ChainRegion):
    """A region whose steps call the modules of the model it is part of, by path, as they are at the time of the call.

    It owns no parameters.

    Args:
        code, settings: as in `ChainRegion`.
        owner: the module that paths start from.
    """

    def __init__(self, code: RegionCode, settings: Settings, owner: nn.Module) -> None:
        super().__init__(code, settings)
        self.leaving = Leaving()  # its steps call modules, which may have hooks
        self._owner = (owner,)  # in a tuple, so as not to be a submodule: a cycle, and a second path to the same parameters
        programs = {id(step.body): Program(step.body) for step in {id(step.body): step for step in code.steps}.values()}
        self._programs = [programs[id(step.body)] for step in code.steps]

    def bound(self, sides: tuple[Any, ...]) -> list[tuple[nn.Module, tuple[Any, ...]]]:
        return [(step, tuple(sides[i] for i in code.sides)) for step, code in zip(self.steps(), self.code, strict=True)]

    def steps(self) -> list[_Step]:
        """Each step with the modules of this moment."""
        return [_Step(self._owner[0], code, program) for code, program in zip(self.code, self._programs, strict=True)]
