"""`estimate`: what a training step will take, in three ways, before it runs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ..arguments import Call
from ..arithmetic.fake_state import Seen
from ..captured.copies import copied, twin
from ..captured.graph_modules import original
from ..compiled.backend import check_compiled
from ..errors import MnetError, MnetWarning, SettingsError
from ..named.layers import NamedLayer
from ..named.momentum_net import MomentumNet
from ..progress import working
from ..reporting.build import REPORT, TRANSFORMED, report_of
from ..rewrite import momentum_network
from .advice import advice, notes
from .blocks import block_paths, checkpointed, shared_by
from .estimates import Estimate, Way
from .faking import batch_of, call_of, fake_model, fake_optimizer, resized, unpacked
from .fitting import limits
from .seeing import seen
from .sizes import parsed
from .ways import Taken, default_loss, taken
from .work import checked_gpu

__all__ = ["Request", "estimate"]

Loss = Callable[[Any], Tensor]


def estimate(
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: Any = None,
    memory: str | int | None = None,
    loss: Loss | None = None,
    gpu: str | None = None,
    values: bool = False,
    **options: Any,
) -> Estimate:
    """What a training step of a model will take: plain, with a checkpoint around each block, and as a momentum network.

    The model runs once in each way on tensors without memory (torch's FakeTensorMode): but for `values`, nothing is computed and nothing
    is allocated; and the model is left as it was. What is counted is what torch's allocator would be asked for. Against the allocator of a
    CPU: bytes kept to the byte for most models; the peak within a percent for transformers, and a few for convolutional networks, whose
    operations take work space that only sizes tell (`budget.workspace`). For GPUs, work space of cuDNN and fragmentation come on top.

    Args:
        model: any module, on any device (also "meta"); the original, or a network that `momentumize` returned, whose options then count.
        example_inputs: a call of the model, as a tuple of positional arguments or a dict of keyword arguments. Only shapes, dtypes and
            constants count (but for `values`): tensors may be real, fake or on the meta device. The first dimension of the first is taken
            for the batch.
        optimizer: a class such as torch.optim.AdamW, a function that makes one of parameters, or an optimizer of the model's parameters.
        memory: bytes that there are, as a number or a text such as "16GiB". With it, `largest_batch` and `largest_depth_factor` are found.
        loss: a function (output) -> scalar tensor; default the output's own `.loss`, or else the sum of all floating tensors in it.
        gpu: a GPU that torch has a data sheet of, such as "NVIDIA H100"; with it, seconds by its roofline: a lower bound.
        values: run the forward pass of the momentum network once, on the real parameters and inputs, to see how large stream and residuals
            are: they decide when a chain puts one more byte for each element aside. It takes that pass's time and memory, once for each
            gamma, and works on a copy that shares the parameters alone, with seeded random states. Not of chains whose velocity is rotated.
        options: those of `momentumize` for the momentum way: gamma, granularity, regions, ...

    Returns:
        An `Estimate`; print it.

    What it supposes: that `.grad` of all parameters is there; and without `values`, that the stream keeps its magnitude and residuals are
    as large, so that with a small gamma a byte for each element of a chain may be spilled a step earlier or later, and is missing for a
    stream that grows.
    `inner` has no meaning: steps are counted as eager.

    Raises:
        SettingsError: an argument cannot be used, such as `values` for a model or inputs without; the message names it.
        MnetError: the model asks for values of tensors, or Dynamo breaks its graph (then give `regions`), or it cannot be copied.
    """
    began = time.perf_counter()
    request = Request.of(model, example_inputs, optimizer, default_loss if loss is None else loss, options, gpu, values)
    size = None if memory is None else parsed(memory)
    with working(f"estimating {type(model).__name__}"):
        found = request.at(None)
        if size is not None:
            found = request.limited(found, size)
    return replace(found, seconds_taken=time.perf_counter() - began)


@dataclass
class Request:
    """An estimate that was asked for, to be made for any batch."""

    model: nn.Module
    call: Call
    optimizer: Any
    loss: Loss
    gpu: str | None
    options: dict[str, Any]
    values: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Any,
        optimizer: Any,
        loss: Loss,
        options: dict[str, Any],
        gpu: str | None = None,
        values: bool = False,
    ) -> Request:
        """With arguments as users give them."""
        if not callable(loss):
            raise SettingsError(f"loss must be a function (output) -> scalar tensor, got {loss!r}")
        return cls(model, call_of(inputs), optimizer, loss, checked_gpu(gpu), options, values)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise SettingsError(f"estimate takes an nn.Module, got {type(self.model).__name__}")
        if isinstance(self.model, MomentumNet):
            raise SettingsError(
                "a MomentumNet is a momentum network by itself, without an original to compare it with: measure a training step with "
                "mnet_fx.measure"
            )
        check_compiled(self.model)
        if not isinstance(self.values, bool):
            raise SettingsError(f"values must be True or False, got {self.values!r}")
        if TRANSFORMED in self.model.__dict__ and REPORT not in self.model.__dict__:
            raise MnetError("transform_to_momentumnet changed this model in place: estimate the original, with regions=[...]")
        if self.rewritten and self.options:
            raise SettingsError(
                f"the model is a momentum network already, with options of its own: leave out {', '.join(self.options)}, or estimate the "
                "original"
            )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.said: list[str] = []
        self.known: dict[tuple[str, int | None], Taken] = {}

    @property
    def rewritten(self) -> bool:
        return REPORT in self.model.__dict__

    @cached_property
    def original(self) -> nn.Module:
        return fake_model(copied(_before(self.model)), self.mode)

    @cached_property
    def momentum(self) -> nn.Module:
        if self.rewritten:
            return fake_model(self.model, self.mode)
        with self._noted():
            return momentum_network(self.original, **self._options(lambda module: fake_model(module, self.mode)))

    @cached_property
    def seen(self) -> Seen:
        """What values decide, where that is asked for."""
        if not self.values:
            return Seen()
        own = partial(twin, buffers=False)
        with self._noted():
            if self.rewritten:
                return seen(own(self.model), self.call)
            return seen(momentum_network(own(_before(self.model)), **self._options(own) | {"inner": "eager"}), self.call)

    def _options(self, copy: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
        """The options, with copies of modules among them."""
        return {name: copy(value) if isinstance(value, nn.Module) else value for name, value in self.options.items()}

    @cached_property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules that own the steps of chains; to be asked after the momentum network ran."""
        forward = self.momentum.__dict__.get("forward")
        network = getattr(forward, "network", None)
        chains = [] if network is None else sorted(network.chains)
        named = [m.__dict__["forward"].owner for m in self.momentum.modules() if isinstance(m.__dict__.get("forward"), NamedLayer)]
        paths = {id(m): path for path, m in self.momentum.named_modules()}
        return tuple(dict.fromkeys([*(path for chain in chains for path in chain), *(paths[id(m)] for m in named)]))

    @cached_property
    def blocks(self) -> nn.Module | None:
        owners, regions = self.owners, getattr(self.momentum.__dict__.get("forward"), "regions", ())
        steps = [names for region in regions for names in region.step_names]
        if len(owners) < len(steps):  # as of x = x + layer(x), whose sums lie in one module
            owners = tuple(map(shared_by, steps))
        paths = block_paths(self.original, owners)
        return checkpointed(self.original, paths) if paths else None

    def taken(self, name: str, batch: int | None) -> Taken | None:
        """One step in one way."""
        net = {"plain": lambda: self.original, "checkpoint": lambda: self.blocks, "momentum": lambda: self.momentum}[name]()
        if net is None:
            return None
        if (name, batch) not in self.known:
            call = resized(self.call, batch, self.mode)
            captured = name == "momentum" and hasattr(net.__dict__.get("forward"), "network")  # by Dynamo, under which no values are seen
            told = self.seen.told() if name == "momentum" else nullcontext()
            with self._noted(), nullcontext() if captured else unpacked(), told:
                self.known[name, batch] = taken(name, net, call, self.mode, self.loss, self._optimizer, self.gpu)
        return self.known[name, batch]

    def again(self, name: str) -> Taken:
        """One step more in a way, for a net that was changed since."""
        self.known.pop((name, None), None)
        found = self.taken(name, None)
        assert found is not None
        return found

    def _optimizer(self, net: nn.Module) -> torch.optim.Optimizer | None:
        return fake_optimizer(self.optimizer, self.model, net)

    def at(self, batch: int | None) -> Estimate:
        momentum, plain = self.taken("momentum", batch), self.taken("plain", batch)
        other = self.taken("checkpoint", batch)
        assert momentum is not None
        assert plain is not None
        found = Estimate(
            model=type(self.model).__name__,
            plain=plain.way,
            checkpoint=None if other is None else _related(other, plain),
            momentum=_related(momentum, plain),
            batch=batch_of(self.call) if batch is None else batch,
            steps=sum(region.steps for region in report_of(self.momentum).regions if region.storage != "nested"),
            gamma=self._gamma(),
            gpu=self.gpu,
            optimizer=None if self.optimizer is None else _name(self.optimizer),
            _at_batch=None if batch_of(self.call) is None else self.at,
            _at_gamma=None if self.rewritten else self.at_gamma,
            _at_depth=partial(_deeper, [t for t in (plain, other, momentum) if t is not None], self.owners) if self.owners else None,
        )
        return self._told(found)

    def at_gamma(self, gamma: Any) -> Estimate:
        """The estimate for another momentum."""
        return replace(self, options={**self.options, "gamma": gamma}).at(None)

    def limited(self, found: Estimate, memory: int) -> Estimate:
        """The estimate with what fits."""

        self.said += _unscaled(self.call)

        def within(way: Way | None) -> Way | None:
            if way is None:
                return None
            taken_ = self.taken(way.name, None)
            assert taken_ is not None
            deeper = (lambda factor: taken_.deeper(factor, self.owners)) if self.owners else None
            return replace(way, limits=limits(partial(self._total, way.name), found.batch, way.total_bytes, deeper, memory, self.said))

        plain, momentum = within(found.plain), within(found.momentum)
        assert plain is not None
        assert momentum is not None
        found = replace(found, plain=plain, checkpoint=within(found.checkpoint), momentum=momentum, memory=memory)
        return self._told(found)

    def _told(self, found: Estimate) -> Estimate:
        return replace(found, advice=advice(found, report_of(self.momentum), self.handed), notes=notes(found, self.said, self.seen))

    @property
    def handed(self) -> int:
        """Bytes of what the steps of chains give to the outside, all of which is there when a chain ends."""
        momentum = self.taken("momentum", None)
        return 0 if momentum is None else round(max((chain.handed for chain in momentum.chains), default=0.0))

    def _total(self, name: str, batch: int) -> int:
        found = self.taken(name, batch)
        assert found is not None
        return found.way.total_bytes

    def _gamma(self) -> str:
        gammas = dict.fromkeys(str(region.gamma) for region in report_of(self.momentum).regions)
        return ", ".join(gammas) or str(self.options.get("gamma", 0.9))

    def _noted(self) -> Any:
        return _Noted(self.said)


class _Noted(warnings.catch_warnings):
    """Turns our warnings into notes."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(record=True)
        self.said = said

    def __enter__(self) -> Any:
        self.found = super().__enter__()
        warnings.simplefilter("always", MnetWarning)
        return self.found

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for warning in self.found or ():
            if issubclass(warning.category, MnetWarning):
                self.said.append(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _before(model: nn.Module) -> nn.Module:
    """The model, or of a GraphModule that was rewritten what it was."""
    return original(model) if isinstance(model, fx.GraphModule) else model


def _unscaled(call: Call) -> list[str]:
    """A sentence about the inputs that do not grow with the batch, if there are any."""
    batch = batch_of(call)
    shapes = [tuple(t.shape) for t in tree_leaves(call) if isinstance(t, Tensor) and t.dim()]
    others = dict.fromkeys(" x ".join(map(str, shape)) for shape in shapes if shape[0] != batch)
    if batch is None or not others:
        return []
    return [f"The largest batch scales inputs whose first dimension is {batch}, and no others ({', '.join(others)})."]


def _related(found: Taken, plain: Taken) -> Way:
    return replace(found.way, flops_ratio=found.flops / plain.flops if plain.flops else 1.0)


def _name(optimizer: Any) -> str:
    return getattr(optimizer, "__name__", None) or type(optimizer).__name__


def _deeper(taken: Sequence[Taken], owners: tuple[str, ...], factor: float) -> dict[str, int]:
    """Bytes of each way if the chains were so many times as long."""
    return {found.way.name: round(found.deeper(factor, owners)) for found in taken}
