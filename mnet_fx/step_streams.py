"""What calls of a momentum network show of its steps: the streams that read maps are fitted to, and what outputs are sensitive to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Call
from .arithmetic.rotations import Rotation
from .closeness import graded_outputs
from .errors import SettingsError
from .read_maps import Place
from .runtime.reads import Observer, channel_axis, observed
from .verifying.subject import Subject

__all__ = ["Seen", "Step", "Streams", "sensitivities", "streams", "tokens"]

PROBES = 4  # random projections of the outputs of each call, and forward passes that are made for them
Step = tuple[Place, int, bool]  # a step of a chain; whether after it has run
Streams = dict[Step, tuple[Tensor, Tensor]]


class Seen(Observer):
    """Notes the streams of the calls that this thread makes; those of the last step alone where `stop` stops at each.

    Attributes:
        found: of every step that has a velocity, before it runs: x[t] and c[t] v[t] = z[t] - x[t]; and, if velocities are to be rotated
            after it: z[t+1] and, in the frame in which the chain began, z[t+1] - x[t].
    """

    def __init__(self, rotates: bool, stop: Callable[[Step], None] | None = None) -> None:
        self.rotates, self.stop = rotates, stop
        self.found: Streams = {}
        self._last: dict[Place, tuple[int, Tensor, Tensor, float]] = {}  # t, x[t], z[t], and the reach that v had as z[t] came to be

    def before(self, place: Place, t: int, reach: float, x: Tensor) -> None:
        last, _, z, known = self._last.get(place, (-1, x, x, 0.0))
        if t <= last:
            where = place[0] or "the root"
            raise SettingsError(f"the chain from {where} runs more than once in a call, and maps are fitted for one run of it")
        x = x.detach().clone()
        ahead = (z - x) * (reach / known) if reach and known else torch.zeros_like(x)  # another reach where steps were left out
        self._last[place] = t, x, x + ahead, reach
        if reach:
            self._note((place, t, False), x, ahead)

    def after(self, place: Place, t: int, reach: float, y: Tensor, frame: Tensor | None) -> None:
        _, x, z, _ = self._last[place]
        z = z + y.detach()
        self._last[place] = t, x, z, reach
        if reach and self.rotates:
            self._note((place, t, True), z, Rotation(channel_axis(x), frame, frame, 0.0).residual(z - x))

    def _note(self, step: Step, *streams: Tensor) -> None:
        if self.stop is not None:
            self.found.clear()
        self.found[step] = streams[0], streams[1]
        if self.stop is not None:
            self.stop(step)


def streams(net: nn.Module, call: Call, rotates: bool) -> Streams:
    """Those of every step in one call of the net."""
    seen = Seen(rotates)
    with observed(seen):
        net(*call[0], **call[1])
    return seen.found


class _Probes(Observer):
    """Adds a zero to what each step reads, which outputs can be differentiated by."""

    def __init__(self) -> None:
        self.zeros: dict[tuple[Place, int], Tensor] = {}

    def reading(self, place: Place, t: int, step: nn.Module, x: Tensor) -> nn.Module:
        if not x.requires_grad:  # as at the start of a chain, where no velocity is either
            return step
        zero = self.zeros[place, t] = torch.zeros_like(x, requires_grad=True)
        return _Probed(step, zero)


class _Probed(nn.Module):
    def __init__(self, step: nn.Module, zero: Tensor) -> None:
        super().__init__()
        self.stateless, self.is_pure = getattr(step, "stateless", False), getattr(step, "is_pure", False)
        self._modules["step"] = step
        self._zero = zero

    def forward(self, x: Tensor, *sides: Any) -> Any:
        return self._modules["step"].forward(x + self._zero, *sides)  # type: ignore[union-attr]


@contextmanager
def _all_graded(net: nn.Module) -> Iterator[None]:
    """Has all parameters need gradients, for a time: else the streams of frozen networks need none."""
    frozen = [p for p in net.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def sensitivities(net: nn.Module, calls: list[Call]) -> dict[tuple[Place, int], Tensor]:
    """For each step the mean of g g' over tokens, (n, n), with g the gradient by what the step reads in the original network of a random
    projection of the outputs, each of them relative to its norm.

    Raises:
        SettingsError: no gradient reaches the steps.
    """
    found: dict[tuple[Place, int], Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _all_graded(net):
        for call in calls:
            net(*call[0], **call[1])  # captures each kind of call, as none can be at gamma 0
        for call in calls * PROBES:  # not one forward pass with several backward passes, which compilers of steps may not bear
            probes = _Probes()
            with Subject(net, (), {}, None).set(gamma=0.0, backward="stored"), observed(probes):
                results = [t / t.detach().norm().clamp_min(1e-300) for t in graded_outputs(net, call) if t.requires_grad]
            if results and probes.zeros:
                _add(found, probes, results, call, generator)
    if not any(bool(torch.any(s)) for s in found.values()):
        raise SettingsError(
            "rotate=True needs gradients by what the steps read, and the outputs of the calls have none; nor have streams before which "
            "nothing needs any, as where layers have no parameters"
        )
    return found


def _add(found: dict[tuple[Place, int], Tensor], probes: _Probes, results: list[Tensor], call: Call, generator: torch.Generator) -> None:
    """Adds what a random projection of the outputs of one call is sensitive to."""
    zeros = list(probes.zeros.values())
    drawn = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in results]
    given = torch.autograd.grad(results, zeros, drawn, allow_unused=True)
    for step, zero, g in zip(probes.zeros, zeros, given, strict=True):
        rows = tokens((zero if g is None else g, zero), call)[0].detach().double()
        found[step] = rows.T @ rows + found.get(step, 0.0)


def tokens(pair: tuple[Tensor, Tensor], call: Call) -> tuple[Tensor, Tensor]:
    """Two streams as (tokens, n) each, without those masked out."""
    mask: Any = call[1].get("attention_mask")
    found = []
    for x in pair:
        rows = x.movedim(channel_axis(x), -1)
        masked = isinstance(mask, Tensor) and mask.shape == rows.shape[:-1]
        found.append(rows[mask.bool()] if masked else rows.reshape(-1, rows.shape[-1]))
    return found[0], found[1]
