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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .arguments import call_from
from .captured.forward import CapturedForward
from .checkpoints import note_config
from .closeness import evaluated, mean_cosine, outputs, relative_error
from .errors import MnetWarning, SettingsError
from .lockstep import OutOfStep, walking
from .named.layers import NamedLayer
from .read_maps import Maps, Place, ReadMap, data_of
from .regions.region import MomentumRegion
from .reporting.build import REPORT
from .runtime.reads import channel_axis, observed
from .settings import Settings
from .verifying.subject import Subject

__all__ = ["Calibration", "RegionCalibration", "calibrate"]

Kind = Literal["auto", "diagonal", "low-rank", "full"]
RIDGE = 3e-3  # of the mean variance of a channel
FULL_FROM, FULL_AT_LEAST = 6, 4  # tokens per channel: from where "auto" fits full maps, and below which they are worse than none
PER_RANK, WIDEST = 16, 4  # tokens that a rank takes where "auto" has too few for full maps; what part of the width a rank is at most
PATIENCE = 60.0, 20.0  # seconds at least, and times a whole call's, that a call may take from one step to the next
Step = tuple[Place, int]
Streams = dict[Step, tuple[Tensor, Tensor]]
_Tokens = list[tuple[Tensor, Tensor]]  # of each call, (tokens, n): x[t], and what it is short of z[t]
_Asked = tuple[Kind, int | None]  # kind and rank
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
    """

    path: str
    steps: int
    mapped: int
    kind: str
    tokens: int
    width: int
    rank: int | None = None

    def __str__(self) -> str:
        kind = self.kind if self.rank is None else f"of rank {self.rank}"
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


def calibrate(net: nn.Module, batches: Sequence[Any], *, kind: Kind = "auto", rank: int | None = None) -> Calibration:
    """Brings a momentum network closer to the original one at the same bits: each step reads at x[t] + m[t] + x[t] W[t].

    The maps are fitted by ridge regression in eval mode, without gradients, and stay frozen: no keys of the state_dict, no parameters.
    They follow the stream's dtype and device. Copies and pickles of the net have them. Checkpoints carry them among the options:
    `mnet_fx.load` rebuilds the net with them, and a net without them warns. Gradients stay exact. Maps act on channels, the
    last dimension of the stream, or dimension 1 where it has 4 or 5 (images, volumes); all other positions are tokens. Where a batch is a
    mapping with an "attention_mask" of the shape of the tokens, those masked out do not count.

    Args:
        net: from `momentumize(..., weights="matched")`; already calibrated: its maps are replaced.
        batches: calls of the net, each a tuple of positional arguments, a mapping of keyword arguments, or one tensor; at least two. The
            last quarter is held out. The others run three times, once side by side, each in a thread of its own: two streams of each, and
            what else their calls hold at a step, are kept. Of a model whose calls disturb each other, or that runs chains in an order of
            its own for each batch, they run T times, for T steps, one by one.
        kind: "full": W is n x n; "low-rank": the product of n x rank and rank x n, which costs a step 2 rank / n of what a full one does;
            "diagonal": n numbers; "auto": full from 6 n tokens on, else of rank tokens / 16, at most n / 4, with a warning.
        rank: of W, at most n; for kind="low-rank" alone. Default n / 4.

    Raises:
        SettingsError: the net has other weights, is no network of `momentumize`, or runs a chain more than once in a call, or none.

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
    old = dict(maps)
    try:
        with evaluated(net):
            found = _calibrated(net, maps, calls[:-held], calls[-held:], (kind, rank))
        note_config(net)
        return found
    except BaseException:
        maps.clear()
        maps.update(old)
        raise


def _calibrated(net: nn.Module, maps: Maps, fitted: list[Any], held: list[Any], asked: _Asked) -> Calibration:
    maps.clear()
    began = time.monotonic()
    ways = [list(_streams(net, call)) for call in fitted]
    patience = max(PATIENCE[0], PATIENCE[1] * (time.monotonic() - began))
    steps = list(dict.fromkeys(step for way in ways for step in way))
    if not steps:
        raise SettingsError(f"{type(net).__name__}: no chain ran with a velocity, so there is nothing to calibrate")
    before = [outputs(net, call) for call in held]
    with Subject(net, (), {}, None).set(gamma=0.0):
        expected = [outputs(net, call) for call in held]
    try:
        fits = _fitted(maps, steps, _side_by_side(net, fitted, ways, steps, patience), asked)
    except OutOfStep:
        _LOG.info("calls of %s disturb each other: all are made anew for each of %d steps", type(net).__name__, len(steps))
        fits = _fitted(maps, steps, _one_by_one(net, fitted, ways, steps), asked)
    regions = tuple(RegionCalibration(place[0], len(place), len(found), *min(found)) for place, found in fits.items())
    _warn(regions, asked[0])
    after = [outputs(net, call) for call in held]
    errors = relative_error(before, expected), relative_error(after, expected)
    cosines = mean_cosine(before, expected), mean_cosine(after, expected)
    return Calibration(regions, len(held), *errors, *cosines, data_of(maps))


def _fitted(maps: Maps, steps: Sequence[Step], streams: Iterator[_Tokens], asked: _Asked) -> dict[Place, list[_Fit]]:
    """Fits the map of each step to what `streams` gives for it, before that goes on to the next; how each was fitted."""
    maps.update({place: (None,) * len(place) for place, _ in steps})
    fits: dict[Place, list[_Fit]] = {}
    for (place, t), pairs in zip(steps, streams, strict=True):
        read, fit = _fitted_step(pairs, asked)
        maps[place] = tuple(read if i == t else known for i, known in enumerate(maps[place]))
        fits.setdefault(place, []).append(fit)
    return fits


def _side_by_side(net: nn.Module, calls: list[Any], ways: list[list[Step]], steps: list[Step], patience: float) -> Iterator[_Tokens]:
    """For each step its tokens in all calls, which go on together; in the end, that each came out as it does alone.

    Raises:
        OutOfStep: they cannot, or do not.
    """
    found: list[Streams] = [{} for _ in calls]

    def call_of(i: int, stop: Callable[[Step], None]) -> list[Tensor]:
        with _seen(found[i], stop):
            return outputs(net, calls[i])

    with walking([partial(call_of, i) for i in range(len(calls))], patience) as walks:
        for step in steps:
            there = [i for i, way in enumerate(ways) if step in way]
            for i in there:
                walks[i].to(step)
            yield [_tokens(found[i][step], calls[i]) for i in there]
        for walk in walks:
            walk.to(None)
    for walk, call in zip(walks, calls, strict=True):
        if not all(map(torch.allclose, walk.result, outputs(net, call))):
            raise OutOfStep


def _one_by_one(net: nn.Module, calls: list[Any], ways: list[list[Step]], steps: list[Step]) -> Iterator[_Tokens]:
    """For each step its tokens in all calls, each made anew."""
    for step in steps:
        streams = [(_streams(net, call).get(step), call) for call, way in zip(calls, ways, strict=True) if step in way]
        yield [_tokens(found, call) for found, call in streams if found is not None]


def _fitted_step(pairs: list[tuple[Tensor, Tensor]], asked: _Asked) -> tuple[ReadMap, _Fit]:
    """The map of one step, and how it was fitted."""
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    x, ahead = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    kind, rank = _chosen(*asked, *x.shape)
    return ReadMap(**{name: t.to(dtype) for name, t in _fit(x, ahead, kind, rank).items()}), (kind, *x.shape, rank)


def _chosen(kind: Kind, rank: int | None, tokens: int, width: int) -> tuple[Kind, int | None]:
    """Kind and rank of a map fitted to so many tokens."""
    if kind == "auto" and tokens >= FULL_FROM * width:
        kind = "full"
    elif kind == "auto":
        kind, rank = "low-rank", min(tokens // PER_RANK, width // WIDEST)
    elif kind == "low-rank" and rank is None:
        rank = width // WIDEST
    return kind, None if rank is None else min(max(rank, 1), width)


def _fit(x: Tensor, e: Tensor, kind: str, rank: int | None) -> dict[str, Tensor]:
    """m and W of e ~ m + x W, for (tokens, n) float64 each.

    Source of the low-rank fit: reduced-rank regression, Izenman 1975, doi 10.1016/0047-259X(75)90042-1: the fit of full rank, projected
    onto the directions in which what it predicts varies most.
    """
    mean_x, mean_e = x.mean(0), e.mean(0)
    x, e = x - mean_x, e - mean_e
    if kind == "diagonal":
        weight = (x * e).mean(0) / ((x * x).mean(0) * (1 + RIDGE) + 1e-12)
        return {"shift": mean_e - mean_x * weight, "weight": weight}
    covariance = x.T @ x / len(x)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(covariance, x.T @ e / len(x))
    if rank is None:
        return {"shift": mean_e - mean_x @ weight, "weight": weight}
    up = torch.linalg.eigh(weight.T @ covariance @ weight).eigenvectors[:, -rank:].T  # orthonormal rows
    down = weight @ up.T
    return {"shift": mean_e - mean_x @ down @ up, "down": down, "up": up}


def _streams(net: nn.Module, call: Any) -> Streams:
    """x[t] and c[t] v[t] = z[t] - x[t] of every step that has a velocity, in one call of the net."""
    found: Streams = {}
    with _seen(found):
        net(*call[0], **call[1])
    return found


def _seen(found: Streams, stop: Callable[[Step], None] | None = None) -> AbstractContextManager[None]:
    """Has the streams of the calls that this thread makes noted; those of the last step alone where `stop` stops before each."""
    before: dict[Place, tuple[int, Tensor]] = {}

    def see(place: Place, t: int, reach: float, x: Tensor) -> None:
        last, earlier = before.get(place, (-1, x))
        if t <= last:
            where = place[0] or "the root"
            raise SettingsError(f"the chain from {where} runs more than once in a call, and maps are fitted for one run of it")
        before[place] = t, x.detach().clone()
        if not reach:
            return
        if stop is not None:
            found.clear()
        found[place, t] = before[place][1], reach * (x.detach() - earlier)
        if stop is not None:
            stop((place, t))

    return observed(see)


def _tokens(streams: tuple[Tensor, Tensor], call: Any) -> tuple[Tensor, Tensor]:
    """Streams as (tokens, n) each, without those masked out."""
    mask, found = call[1].get("attention_mask"), []
    for x in streams:
        rows = x.movedim(channel_axis(x), -1)
        masked = isinstance(mask, Tensor) and mask.shape == rows.shape[:-1]
        found.append(rows[mask.bool()] if masked else rows.reshape(-1, rows.shape[-1]))
    return found[0], found[1]


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
    if holders[0].weights != "matched":
        raise SettingsError("calibrate needs weights='matched', under which the original stream can be told from x: momentumize with that")
    first = holders[0]
    return first.calibration if isinstance(first, Settings) else first.read_maps.maps
