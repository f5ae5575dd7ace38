"""One training step on fake tensors, with everything that it allocates noted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from ..arguments import Call
from ..arithmetic.cost import state_bytes, step_bits
from ..arithmetic.formats import Format
from ..errors import MnetError, SettingsError
from ..runtime.sides import tensors_of
from ..runtime.steps import watched
from ..runtime.tape import ReversingTape, StoringTape, Tape
from .counting import Count, Tag
from .estimates import PARTS, Way
from .places import ACTIVATIONS, OUTSIDE, STATE, STEPS, Places
from .work import Work

__all__ = ["Taken", "default_loss", "own_loss", "taken"]


@dataclass(frozen=True)
class Taken:
    """What one step took.

    Attributes:
        way: the figures.
        flops: floating point operations of forward and backward.
        kept: bytes after the forward by tag, what is there between steps included.
        chains: those that ran on a tape which goes back.
    """

    way: Way
    flops: int
    kept: Counter[Tag]
    chains: tuple[ChainTaken, ...]

    def deeper(self, factor: float, owners: Iterable[str]) -> float:
        """Bytes of a step if the chains, whose steps these modules own, were so many times as long."""
        inside = tuple(f"{path}." if path else "" for path in owners)
        growing = sum(size for (part, path), size in self.kept.items() if part in _OF_STEPS)
        growing += sum(size for (part, path), size in self.kept.items() if part in _OF_MODULES and f"{path}.".startswith(inside))
        more = (factor - 1) * growing + sum(chain.kept(factor) - chain.kept(1.0) for chain in self.chains)
        ends = (chain.live + (factor - 1) * chain.handed for chain in self.chains)
        return max([self.way.total_bytes, *ends]) + more


_STORED = "stored inputs"  # of checkpoints, until the parts are named
_OF_STEPS = frozenset([STEPS, _STORED])
_OF_MODULES = frozenset(["parameters", "buffers", "gradients", "optimizer state", OUTSIDE])


@dataclass(frozen=True)
class ChainTaken:
    """A chain that ran on a tape: its momenta, elements and dtype of its stream, and bytes of an element's state.

    Attributes:
        handed: bytes of what its steps gave to the outside and that is still there as it ends, as skip outputs that are summed later.
        live: all bytes as it ends.
    """

    gammas: tuple[float, ...]
    elements: int
    dtype: torch.dtype
    state: float
    handed: float
    live: int

    @classmethod
    def of(cls, tape: ReversingTape | StoringTape, x: Tensor, handed: int, live: int) -> ChainTaken:
        gammas = tuple(gamma for gamma, _ in tape.factors)
        steps = len(gammas)
        return cls(gammas, x.numel(), x.dtype, state_bytes(gammas, x.dtype), handed * steps / max(1, steps - 1), live)

    def kept(self, factor: float) -> float:
        """Bytes kept if it were so many times as long: the fewer of states and stored inputs."""
        steps, bits = len(self.gammas), [step_bits(gamma) for gamma in self.gammas[1:] or self.gammas]
        reverse = self.state + (factor - 1) * steps * sum(bits) / len(bits) / 8
        return self.elements * min(max(reverse, 0.0), factor * steps * self.dtype.itemsize)

    @property
    def moved(self) -> int:
        """Bytes that the arithmetic of one step reads and writes, forward and back, and proved, each loop as one pass."""
        form, item = Format.of(self.dtype), self.dtype.itemsize
        passes = (2 * form.state_bytes + 2 * item) + (form.state_bytes + form.dtype.itemsize + item) + (2 * form.u_dtype.itemsize + item)
        return self.elements * (passes + 2 * form.state_bytes)


def taken(
    name: str,
    net: nn.Module,
    call: Call,
    mode: FakeTensorMode,
    loss: Callable[[Any], Tensor],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer | None],
    gpu: str | None,
) -> Taken:
    """Runs a training step of a fake model in one way.

    Args:
        name: of the way.
        net: the model, with fake tensors.
        call: of it, with fake tensors.
        mode: their mode.
        loss: output -> scalar.
        optimizer: makes one of the fake model's parameters.
        gpu: as in `Work`.

    Raises:
        MnetError: the model or the loss needs the values of tensors.
        SettingsError: the loss is no scalar that depends on the parameters.
    """
    places, work = Places(net), Work(gpu)
    count = Count(places, work)
    chains = _Chains(count)
    with mode, torch.enable_grad(), torch._dynamo.config.patch(_config()), _explained(net):
        _hold_what_stays(count, net, call, stepper := _stepped(net, optimizer))
        base = count.peak = count.live
        with count, watched(chains.note):
            value = _checked(loss(net(*call[0], **call[1])), loss)
            count.retag(_after_forward(name))
            kept, tags = count.live - base, count.by_tag.copy()
            places.backward = True
            value.backward()
            del value
            if all(p.device.type == "cpu" for p in net.parameters()):  # elsewhere, that are operations as others
                work.move(sum(chain.moved * len(chain.gammas) for chain in chains.found))
            peak, flops, seconds = count.peak - base, work.flops, work.seconds
            if stepper is not None:
                stepper.step()
    way = Way(name, kept, peak, count.peak, _parts(count.at_peak), _outside(tags), 1.0, None if gpu is None else seconds)
    return Taken(way, flops, tags, tuple(chains.found))


class _Chains:
    """Notes the chains that run on tapes, and what their steps hand to the outside."""

    def __init__(self, count: Count) -> None:
        self.count, self.found = count, list[ChainTaken]()
        self.first: dict[int, int] = {}  # bytes of activations after the first step, by tape

    def note(self, tape: Tape, t: int, x: Tensor) -> None:
        """To be called after each step of each tape."""
        if not isinstance(tape, (ReversingTape, StoringTape)):
            return
        now = sum(size for (part, _), size in self.count.by_tag.items() if part == ACTIVATIONS)
        first = self.first.setdefault(id(tape), now)
        if t == len(tape.factors):
            self.found.append(ChainTaken.of(tape, x, now - first, self.count.live))
            del self.first[id(tape)]


def _config() -> dict[str, Any]:
    """Of Dynamo: sizes stay numbers at a second batch, and no log entry breaks a graph."""
    found: dict[str, Any] = {"automatic_dynamic_shapes": False}
    if hasattr(torch._dynamo.config, "ignore_logging_functions"):
        entries = {f for name, f in vars(logging.Logger).items() if callable(f) and name.split("_")[0] in _LEVELS}
        found["ignore_logging_functions"] = torch._dynamo.config.ignore_logging_functions | entries
    return found


_LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")  # also of Hugging Face, as warning_once


def _stepped(net: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer | None]) -> torch.optim.Optimizer | None:
    """The optimizer, with its state made by a first step; and gradients for all parameters."""
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p, requires_grad=False)
    made = optimizer(net)
    if made is not None:
        made.step()
    return made


def _hold_what_stays(count: Count, net: nn.Module, call: Call, optimizer: torch.optim.Optimizer | None) -> None:
    for part, named in (("parameters", net.named_parameters()), ("buffers", net.named_buffers())):
        for path, t in named:
            count.hold([t], (part, path))
    for path, p in net.named_parameters():
        count.hold([p.grad], ("gradients", path))
        if optimizer is not None and p in optimizer.state:
            count.hold(pytree.tree_leaves(dict(optimizer.state[p])), ("optimizer state", path))
    count.hold(pytree.tree_leaves(call), ("inputs", ""))


def _after_forward(name: str) -> Callable[[Tag], Tag]:
    """What is left of a step after the forward is stored input under a checkpoint; else something outside saves it, or gets it."""
    part = _STORED if name == "checkpoint" else OUTSIDE
    return lambda tag: (part, tag[1]) if tag[0] == ACTIVATIONS else tag


def _parts(tags: Counter[Tag]) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for (part, _), size in tags.items():
        parts[STATE if part == _STORED else part] += size
    return parts


def _outside(tags: Counter[Tag]) -> dict[str, int]:
    found = {path: size for (part, path), size in tags.items() if part == OUTSIDE and size}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def own_loss(output: Any) -> Tensor | None:
    """The `loss` of an output, as Hugging Face's models have it."""
    own = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return own if isinstance(own, Tensor) else None


def default_loss(output: Any) -> Tensor:
    """The output's own `loss` where it has one, else the sum of all floating tensors in it."""
    if (own := own_loss(output)) is not None:
        return own
    parts = [t.sum() for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
    if not parts:
        raise SettingsError(
            "no floating tensor of the model's output has a gradient: give loss, a function (output) -> scalar tensor; where no "
            "parameter and no input requires gradients, there is no training step to estimate"
        )
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _checked(value: Any, loss: Callable[[Any], Tensor]) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise SettingsError(f"loss must be a function (output) -> scalar tensor with a gradient; {loss!r} gave {found}")
    return value


@contextmanager
def _explained(net: nn.Module) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise MnetError(
            f"{type(net).__name__} asks for the values of tensors ({error}), as in an if on a tensor, .item() or x[mask], and an estimate "
            "has none: take that out of the model (for a transformer of Hugging Face, leave out the attention mask), or measure a step "
            "with mnet_fx.measure"
        ) from error
