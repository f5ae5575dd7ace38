"""`mnet_fx.calibrate`: has each step read the stream where the original network would, as far as an affine map of x[t] can tell.

    weights="matched":  z[t] = x[t] + c[t] v[t]  obeys  z[t+1] = z[t] + f[t](x[t])      the original would read f[t] at z[t]
    calibrated:         f[t] read at  x[t] + m[t] + x[t] W[t]                           m, W: ridge regression of c[t] v[t] on x[t]

The step must not read v[t] itself, or it could not be undone. Steps are fitted in the order in which they run, each in a network in which
those before it are calibrated: all batches are brought to a step, its map is fitted, and they go on (`lockstep`). Where a model does not
bear that several of its calls are under way at once, all batches run anew for each step.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .arguments import Call, call_from
from .captured.forward import CapturedForward
from .checkpoints import note_config
from .closeness import evaluated, mean_cosine, outputs, relative_error
from .errors import MnetWarning, SettingsError
from .lockstep import OutOfStep, walking
from .map_fits import FULL_AT_LEAST, FULL_FROM, Kind, affine, chosen, frame
from .named.layers import NamedLayer
from .read_maps import Maps, Place, ReadMap, data_of
from .regions.region import MomentumRegion
from .reporting.build import REPORT
from .runtime.reads import observed
from .settings import Settings
from .step_streams import Seen, Step, Streams, sensitivities, streams, tokens
from .verifying.subject import Subject

__all__ = ["Calibration", "RegionCalibration", "calibrate"]

PATIENCE = 60.0, 20.0  # seconds at least, and times a whole call's, that a call may take from one step to the next
_Tokens = list[tuple[Tensor, Tensor]]  # of each call, (tokens, n): what `step_streams` has of a step


class _Asked(NamedTuple):
    """What was asked for."""

    kind: Kind
    rank: int | None
    rotate: bool


_Fit = tuple[str, int, int, int | None]  # kind, tokens, width, rank
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegionCalibration:
    """One chain.

    Attributes:
        path: of its first step's module.
        steps: how many it has.
        mapped: how many of these have a map.
        kind: "diagonal", "low-rank" or "full".
        tokens: positions of the stream that the maps were fitted on.
        width: channels.
        rank: of W, where it is of low rank.
        rotated: after how many steps the velocity is rotated.
    """

    path: str
    steps: int
    mapped: int
    kind: str
    tokens: int
    width: int
    rank: int | None = None
    rotated: int = 0

    def __str__(self) -> str:
        kind = self.kind if self.rank is None else f"of rank {self.rank}"
        kind += f", {self.rotated} rotated" if self.rotated else ""
        return f"{self.path or '(root)'}: {self.mapped} of {self.steps} steps, {kind}, {self.tokens} tokens of width {self.width}"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did, and how close the network is to the original one on batches that no map was fitted on.

    Attributes:
        regions: the chains.
        held_out: how many batches these figures are of.
        error_before, error_after: norm of the difference of the outputs, relative to the norm of the original's.
        cosine_before, cosine_after: mean cosine between the rows (last dimension) of the first output and the original's.
        maps: the read maps, as lists, dictionaries and tensors, which `torch.save` writes and `momentumize(calibration=...)` takes.
    """

    regions: tuple[RegionCalibration, ...]
    held_out: int
    error_before: float
    error_after: float
    cosine_before: float
    cosine_after: float
    maps: list[dict[str, Any]] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return "\n".join(
            [
                "calibrated",
                *map(str, self.regions),
                f"on {self.held_out} held-out batches     before      after",
                f"relative error of output  {self.error_before:9.5f}  {self.error_after:9.5f}",
                f"mean cosine to original   {self.cosine_before:9.5f}  {self.cosine_after:9.5f}",
            ]
        )


def calibrate(net: nn.Module, batches: Sequence[Any], *, kind: Kind = "auto", rank: int | None = None, rotate: bool = False) -> Calibration:
    """Brings a momentum network closer to the original one at the same bits: each step reads at x[t] + m[t] + x[t] W[t].

    The maps are fitted by ridge regression in eval mode, without gradients, and stay frozen: no keys of the state_dict, no parameters.
    They follow the stream's dtype and device. Copies and pickles of the net have them. Checkpoints carry them among the options:
    `mnet_fx.load` rebuilds the net with them, and a net without them warns. Gradients stay exact. Maps act on channels, the
    last dimension of the stream, or dimension 1 where it has 4 or 5 (images, volumes); all other positions are tokens. Where a batch is a
    mapping with an "attention_mask" of the shape of the tokens, those masked out do not count.

    Args:
        net: from `momentumize(..., weights="matched")`, or "signed"; already calibrated: its maps are replaced.
        batches: calls of the net, each a tuple of positional arguments, a mapping of keyword arguments, or one tensor; at least two. The
            last quarter is held out. The others run three times, once side by side, each in a thread of its own: two streams of each, and
            what else their calls hold at a step, are kept. Of a model whose calls disturb each other, or that runs chains in an order of
            its own for each batch, they run T times, for T steps, one by one.
        kind: "full": W is n x n; "low-rank": the product of n x rank and rank x n, which costs a step 2 rank / n of what a full one does;
            "diagonal": n numbers; "auto": full from 6 n tokens on, else of rank tokens / 16, at most n / 4, with a warning.
        rank: of W, at most n; for kind="low-rank" alone. Default n / 4.
        rotate: also fit, for each step, an orthogonal matrix Q that turns its velocity into the directions to which the step after it is
            least sensitive. At the same bits again closer to the original, mostly at large gammas; a step makes two more products with
            n x n matrices forward and three back, in float64 on the integers, and runs without the kernels for CPUs and GPUs. Of each
            batch but the held-out ones it also takes a forward and backward pass of the original for each of 4 random projections of the
            outputs.

    Raises:
        SettingsError: the net has other weights, is no network of `momentumize`, or runs a chain more than once in a call, or none; or
            rotate is set, and no gradient reaches the steps.

    Source: z[t] is that of `settings.matched_weights`.
    """
    maps = _maps(net)
    if kind not in get_args(Kind):
        raise SettingsError(f"kind must be one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
    if rank is not None and (kind != "low-rank" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise SettingsError(f'rank must be a positive int, with kind="low-rank" alone, got {rank!r} with kind={kind!r}')
    if not isinstance(batches, Sequence) or len(batches) < 2:
        raise SettingsError("batches must be a list of at least two: the last quarter is held out")
    calls, held = [call_from(batch) for batch in batches], max(1, len(batches) // 4)
    old = Maps(maps, maps.streams)
    try:
        with torch.inference_mode(False), evaluated(net):  # maps made in inference mode could not be trained with
            found = _calibrated(net, maps, calls[:-held], calls[-held:], _Asked(kind, rank, rotate))
        note_config(net)
        return found
    except BaseException:
        maps.clear()
        maps.update(old)
        maps.streams = old.streams
        raise


def _calibrated(net: nn.Module, maps: Maps, fitted: list[Call], held: list[Call], asked: _Asked) -> Calibration:
    maps.clear()
    maps.streams.clear()
    began = time.monotonic()
    ways = [list(streams(net, call, asked.rotate)) for call in fitted]
    patience = max(PATIENCE[0], PATIENCE[1] * (time.monotonic() - began))
    steps = list(dict.fromkeys(step for way in ways for step in way))
    if not steps:
        raise SettingsError(f"{type(net).__name__}: no chain ran with a velocity, so there is nothing to calibrate")
    before = [outputs(net, call) for call in held]
    with Subject(net, (), {}, None).set(gamma=0.0):
        expected = [outputs(net, call) for call in held]
    fitting = _Fitting(maps, steps, asked, sensitivities(net, fitted) if asked.rotate else {})
    try:
        fitting.run(_side_by_side(net, fitted, ways, steps, asked.rotate, patience))
    except OutOfStep:
        _LOG.info("calls of %s disturb each other: all are made anew for each of %d steps", type(net).__name__, len(steps))
        fitting.run(_one_by_one(net, fitted, ways, steps, asked.rotate))
    regions = fitting.regions()
    _warn(regions, asked.kind)
    after = [outputs(net, call) for call in held]
    errors = relative_error(before, expected), relative_error(after, expected)
    cosines = mean_cosine(before, expected), mean_cosine(after, expected)
    return Calibration(regions, len(held), *errors, *cosines, data_of(maps))


class _Fitting:
    """Fits what is asked for to the streams of each step, before the calls go on to the next."""

    def __init__(self, maps: Maps, steps: Sequence[Step], asked: _Asked, felt: dict[tuple[Place, int], Tensor]) -> None:
        self.maps, self.steps, self.asked, self.felt = maps, steps, asked, felt
        self.fits: dict[Place, list[_Fit]] = {}
        self.rotated: Counter[Place] = Counter()

    def run(self, found: Iterator[_Tokens]) -> None:
        """Goes through all steps; `found` gives the tokens of each."""
        self.maps.update({place: (None,) * len(place) for place, _, _ in self.steps})
        self.fits, self.rotated = {}, Counter()
        for (place, t, after), pairs in zip(self.steps, found, strict=True):
            dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
            tensors = self._fitted(place, t, after, *_joined(place, t, pairs))
            known = self.maps[place][t]
            read = ReadMap(**({} if known is None else known.data()), **{name: tensor.to(dtype) for name, tensor in tensors.items()})
            self.maps[place] = tuple(read if i == t else other for i, other in enumerate(self.maps[place]))

    def _fitted(self, place: Place, t: int, after: bool, stream: Tensor, ahead: Tensor) -> dict[str, Tensor]:
        """The tensors of one step's map that tell of it, or of what comes after it."""
        kind, rank = chosen(self.asked.kind, self.asked.rank, *stream.shape)
        if not after:
            self.fits.setdefault(place, []).append((kind, *stream.shape, rank))
            return affine(stream, ahead, kind, rank)
        self.rotated[place] += 1
        later = [found for (where, i), found in self.felt.items() if where == place and i > t]
        return {"frame": frame(stream, ahead, kind, rank, later[0] if later else torch.zeros(stream.shape[-1], dtype=torch.float64))}

    def regions(self) -> tuple[RegionCalibration, ...]:
        """What was fitted."""
        fits = [(place, len(found), min(found)) for place, found in self.fits.items()]
        return tuple(
            RegionCalibration(place[0], len(place), mapped, kind, tokens, width, rank, self.rotated[place])
            for place, mapped, (kind, tokens, width, rank) in fits
        )


def _joined(place: Place, t: int, pairs: _Tokens) -> tuple[Tensor, Tensor]:
    """The tokens of all calls, (tokens, n) each, in float64.

    Raises:
        SettingsError: they have another number of channels in each call, or are not finite.
    """
    where = f"at step {t} of the chain from {place[0] or 'the root'}"
    if len(widths := {pair[0].shape[-1] for pair in pairs}) > 1:
        raise SettingsError(f"{where} the batches' streams have {sorted(widths)} channels: give batches of one kind")
    first, second = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    if not bool(first.isfinite().all() and second.isfinite().all()):
        raise SettingsError(f"{where} the batches' streams hold inf or NaN, which no map can be fitted to")
    return first, second


def _side_by_side(
    net: nn.Module, calls: list[Call], ways: list[list[Step]], steps: list[Step], rotate: bool, patience: float
) -> Iterator[_Tokens]:
    """For each step its tokens in all calls, which go on together; in the end, that each came out as it does alone.

    Raises:
        OutOfStep: they cannot, or do not.
    """
    found: list[Streams] = [{} for _ in calls]

    def call_of(i: int, stop: Callable[[Step], None]) -> list[Tensor]:
        seen = Seen(rotate, stop)
        found[i] = seen.found
        with observed(seen):
            return outputs(net, calls[i])

    with walking([partial(call_of, i) for i in range(len(calls))], patience) as walks:
        for step in steps:
            there = [i for i, way in enumerate(ways) if step in way]
            for i in there:
                walks[i].to(step)
            yield [tokens(found[i][step], calls[i]) for i in there]
        for walk in walks:
            walk.to(None)
    for walk, call in zip(walks, calls, strict=True):
        if not all(map(torch.allclose, walk.result, outputs(net, call))):
            raise OutOfStep


def _one_by_one(net: nn.Module, calls: list[Call], ways: list[list[Step]], steps: list[Step], rotate: bool) -> Iterator[_Tokens]:
    """For each step its tokens in all calls, each made anew."""
    for step in steps:
        found = [(streams(net, call, rotate).get(step), call) for call, way in zip(calls, ways, strict=True) if step in way]
        yield [tokens(pair, call) for pair, call in found if pair is not None]


def _warn(regions: Sequence[RegionCalibration], kind: Kind) -> None:
    for region in regions:
        least = {"auto": FULL_FROM, "full": FULL_AT_LEAST}.get(kind, 0)
        if region.mapped and region.tokens < least * region.width:
            warnings.warn(
                f"the chain from {region.path or 'the root'} was calibrated on {region.tokens} tokens of width {region.width}: full maps "
                f"need at least {FULL_AT_LEAST} to {FULL_FROM} times the width; {region.kind} ones were fitted",
                MnetWarning,
                stacklevel=4,
            )


def _maps(net: nn.Module) -> Maps:
    """The read maps of a network, which `calibrate` fills.

    Raises:
        SettingsError: it has none to fill.
    """
    if not isinstance(net, nn.Module) or REPORT not in net.__dict__:
        raise SettingsError(f"calibrate takes a network that mnet_fx.momentumize returned, got {type(net).__name__}")
    forwards = [module.__dict__.get("forward") for module in net.modules()]
    holders: list[Any] = [f.settings for f in forwards if isinstance(f, CapturedForward)]
    holders += [f.region for f in forwards if isinstance(f, NamedLayer)] + [m for m in net.modules() if isinstance(m, MomentumRegion)]
    if not holders:
        raise SettingsError(f"{type(net).__name__} has no chain to calibrate; print(net.report) says why")
    if holders[0].weights == "momentum":
        raise SettingsError(
            "calibrate needs weights='matched' or 'signed', under which the original stream can be told from x: momentumize with that"
        )
    first = holders[0]
    return first.calibration if isinstance(first, Settings) else first.read_maps.maps
