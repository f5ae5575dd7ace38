"""A rewritten network as `verify` tries it: run again and again from the same state, with its regions set one way or another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..budget.blocks import shared_by
from ..budget.undoing import SEED, undone
from ..budget.ways import default_loss, own_loss
from ..captured.copies import copied
from ..captured.graph_modules import original
from ..compiled.region import CompiledRegion
from ..errors import MnetError, SettingsError
from ..named.layers import NamedLayer, NamedRegion
from ..regions.region import ChainRegion, MomentumRegion
from ..reporting.build import REPORT

__all__ = ["Outcome", "Subject", "Undecided", "off_by"]

Region = ChainRegion | NamedRegion


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        outputs: the floating tensors of the output.
        gradients: by the name of the parameter or input; None where it has none. Empty if none were asked for.
    """

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]


class Undecided(Exception):
    """What a check needs cannot be had; the text says why."""


class Subject:
    """A network, and a call of it.

    Args:
        net: what `momentumize` returned.
        args, kwargs: the call; floating tensors are taken as inputs that need gradients.
        loss: output -> scalar, or None for a sum with random weights.

    Raises:
        SettingsError: `net` is no rewritten network.
    """

    def __init__(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any], Tensor] | None) -> None:
        if not isinstance(net, nn.Module) or REPORT not in net.__dict__:
            raise SettingsError(f"verify takes a network that mnet_fx.momentumize returned, got {type(net).__name__}")
        self.net, self.loss = net, loss or _weighted
        self.default: torch.dtype | None = None  # dtype of tensors that the model makes without naming one; None: as it is
        self.call = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs))

    @property
    def regions(self) -> list[Region]:
        """All regions of the net; of captured ones, those of the captures so far."""
        found: list[Region] = [m for m in self.net.modules() if isinstance(m, MomentumRegion)]
        found += getattr(self.net.__dict__.get("forward"), "regions", [])
        named = [m.__dict__["forward"].region for m in self.net.modules() if isinstance(m.__dict__.get("forward"), NamedLayer)]
        return found + list({id(region): region for region in named}.values())

    def original(self) -> nn.Module:
        """The network before it was rewritten, sharing its tensors."""
        return copied(original(self.net) if isinstance(self.net, fx.GraphModule) else self.net)

    def doubled(self) -> Subject:
        """A copy in float64, which was run once.

        Raises:
            Undecided: the model does not run in float64, as it makes tensors of other dtypes by itself.
        """
        net = copy.deepcopy(self.net).double()
        args, kwargs = pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, self.call)
        found = Subject(net, args, kwargs, self.loss)
        found.default = torch.float64
        try:
            found.run(gradients=False)  # captures
        except (MnetError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise Undecided(f"the model does not run in float64 ({_in_short(error)})") from error
        return found

    @contextmanager
    def set(self, gamma: float | None = None, **attributes: Any) -> Iterator[None]:
        """Sets attributes of all regions for a time, such as backward="stored"; `gamma`: also weights of 1 - gamma, and v[0] = 0."""
        before = [(region, dict(region.__dict__)) for region in self.regions]
        try:
            for region in self.regions:
                region.__dict__.update({name: value for name, value in attributes.items() if name in region.__dict__})
                if gamma is not None:
                    region.factors = ((gamma, 1 - gamma),) * len(region.factors)
                    region.__dict__["_velocity" if isinstance(region, ChainRegion) else "velocity"] = (None,)
            yield
        finally:
            for region, then in before:
                region.__dict__.update({name: then[name] for name in ("factors", "_velocity", "velocity", *attributes) if name in then})

    def run(self, net: nn.Module | None = None, gradients: bool = True) -> Outcome:
        """Runs the net (or another on the same call), and leaves buffers, random states and `.grad` as they were."""
        net = net or self.net
        with undone(net, self.call), torch.enable_grad(), _default_dtype(self.default):
            args, kwargs = inputs = pytree.tree_map(_leaf, self.call)
            output = net(*args, **kwargs)
            found: dict[str, Tensor | None] = {}
            if gradients:
                wanted: dict[str, Tensor] = {name: p for name, p in net.named_parameters() if p.requires_grad}
                wanted |= {f"input {i}": t for i, t in enumerate(pytree.tree_leaves(inputs)) if isinstance(t, Tensor) and t.requires_grad}
                given = torch.autograd.grad(self.loss(output), list(wanted.values()), allow_unused=True)
                found = dict(zip(wanted, given, strict=True))
            return Outcome(tuple(t.detach() for t in _floats(output)), found)

    def step(self, net: nn.Module) -> None:
        """One forward and backward pass of a net on the call, as `measure` wants it."""
        args, kwargs = self.call
        parameters = [p for p in net.parameters() if p.requires_grad]
        torch.autograd.grad(self.loss(net(*args, **kwargs)), parameters, allow_unused=True)

    def place_of(self, parameter: str) -> tuple[int, int] | None:
        """Numbers of the region and step that a parameter is of; None outside of chains."""
        for i, region in enumerate(self.regions):
            for t, names in enumerate(_names(region)):
                if any(name == parameter or parameter.startswith(f"{name}.") for name in names):
                    return i, t
        return None

    def step_of(self, parameter: str) -> str:
        """Region and step of a parameter, in words; "" outside of chains."""
        place = self.place_of(parameter)
        return "" if place is None else self.where(_title(self.regions[place[0]]), place[1])

    def where(self, region: str, t: int | None) -> str:
        """A region and step, in words, with the module; of a segment, its name."""
        if t is None:
            return region
        found = next((r for r in self.regions if _title(r) == region), None)
        names = [] if found is None else _names(found)
        owner = "" if t >= len(names) else names[t][0] if len(names[t]) == 1 else shared_by(names[t])
        return f"{region}, step {t}" + (f" ({owner})" if owner else "")


def off_by(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry of each; inf where shapes or the places of NaN differ."""
    worst = 0.0
    if len(found) != len(expected):
        return float("inf")
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        if a.numel():
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item())
    return worst


def _in_short(error: BaseException) -> str:
    """What an error is due to, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _names(region: Region) -> list[list[str]]:
    """For each step the paths of its parameters and buffers, or of its layer."""
    if isinstance(region, NamedRegion):
        return [[name] for name in region.names]
    if isinstance(region, CompiledRegion):
        return region.step_names
    assert isinstance(region, MomentumRegion)
    return [[step.path_of(name) for name, _ in step.named_parameters()] for step in region.steps()]


def _title(region: Region) -> str:
    return region.title if isinstance(region, NamedRegion) else region.name


def _weighted(output: Any) -> Tensor:
    """The sum of all floating tensors in an output, with random weights: a plain sum of normalised values has no gradient."""
    if (own := own_loss(output)) is not None:
        return own
    options: Any = {"generator": torch.Generator("cpu").manual_seed(SEED), "dtype": torch.float32, "device": "cpu"}
    parts = [(t * torch.rand(t.shape, **options).to(t)).sum() for t in _floats(output) if t.requires_grad]
    return torch.stack([part.float() if part.dtype.itemsize < 4 else part for part in parts]).sum() if parts else default_loss(output)


def _floats(output: Any) -> Iterator[Tensor]:
    leaves = output.values() if isinstance(output, dict) else [output]
    for leaf in pytree.tree_leaves(list(leaves)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _leaf(t: Any) -> Any:
    return t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """For a time, makes tensors of a dtype where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
