"""`mnet_fx.tune`: which options keep a momentum network close to the original one, and what they cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.fx as fx
from torch import Tensor, nn

from .api import momentumize
from .arguments import call_from
from .arithmetic.cost import state_bits
from .budget.estimates import Estimate
from .budget.estimating import estimate
from .budget.sizes import parsed
from .calibration import Calibration, calibrate
from .closeness import evaluated, mean_cosine, outputs, relative_error
from .errors import MnetError, SettingsError
from .named.marks import marked_containers
from .progress import working
from .reporting.ask import report
from .reporting.build import REPORT, TRANSFORMED
from .settings import Settings
from .tuned import Candidate, Tuning

__all__ = ["tune"]

_ALIKE = 1.01  # totals that are as good as the least: an estimate is no nearer
GAMMAS = (0.05, 0.1, 0.25, 0.5, 0.9)


def tune(
    model: nn.Module,
    inputs: Any,
    *,
    fidelity: float | None = None,
    memory: str | int | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    gammas: Sequence[float] = GAMMAS,
    optimizer: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    rotate: bool = False,
    blocks: Sequence[int] = (),
    **options: Any,
) -> Tuning:
    """Tries momentum networks of a model, and picks the cheapest that is faithful enough, or the most faithful that fits.

    Tried are all gammas, weights "momentum" and "matched", and "matched" with the read maps of `calibrate` where there are calls to fit
    them on; each with the layers that the model's library marks as steps, where there are any (`regions="auto"`), each repeated block
    (or several, see `blocks`), and each residual add. What `options` names is the same for all of them. Nothing is trained; the model is
    left as it was.

    Args:
        model: the original, pretrained.
        inputs: a list of calls, each a tuple of positional arguments, a mapping of keyword arguments, or one tensor: the last quarter is
            held out, the others are for `calibrate`. Or one such call, by itself: it is what is compared on, and nothing is calibrated.
        fidelity: the least that is asked for. With it, the fewest bytes are chosen; of those within 1 % of them, the most faithful.
        memory: bytes that a training step may hold, as for `estimate`. Without `fidelity`, the most faithful within is chosen.
        metric: a function of a network in eval mode -> number, larger is better; without gradients. Default: the mean cosine between the
            rows of the first output and the original's, on the held-out calls.
        gammas: those to try, numbers in [0, 1).
        optimizer: as for `estimate`, which counts the bytes.
        loss: likewise.
        rotate: try calibrated networks with rotated velocities too, as `calibrate(rotate=True)` fits them.
        blocks: numbers of blocks, such as (2, 3), each of which to try as one step too (`granularity`).
        options: others of `momentumize`, such as regions, granularity, weights, precision; not gamma and calibration.

    Returns:
        A `Tuning`; print it. `momentumize(model, **tuning.options)` makes the network that was chosen.

    Time: for each gamma and cut two networks, of which each is captured where it is not of named layers, and one calibration.

    Raises:
        SettingsError: an argument cannot be used, or the model has no chain.
        MnetError: no cut could be tried; the message is that of the last.
    """
    _check(model, metric, fidelity, gammas, blocks, options)
    batches = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise SettingsError("inputs must be a call of the model, or a list of calls, got an empty list")
    rotations = (False, True) if rotate else (False,)
    search = _Search(model, batches, metric, gammas, {"optimizer": optimizer, "loss": loss}, options, rotations, blocks)
    size = None if memory is None else parsed(memory)
    with working(f"tuning {type(model).__name__}") as say:
        rows = tuple(search.rows(say))
    first = search.first
    return Tuning(
        model=type(model).__name__,
        rows=rows,
        best=_best(rows, fidelity, size),
        original=search.original,
        plain_bytes=first.plain.total_bytes,
        checkpoint_bytes=None if first.checkpoint is None else first.checkpoint.total_bytes,
        held_out=len(search.held),
        fidelity=fidelity,
        memory=size,
        notes=tuple(search.notes),
    )


def _check(model: nn.Module, metric: Any, fidelity: Any, gammas: Any, blocks: Sequence[int], options: Mapping[str, Any]) -> None:
    if not isinstance(model, nn.Module) or {REPORT, TRANSFORMED} & model.__dict__.keys():
        raise SettingsError(f"tune takes the original model, got {type(model).__name__}" + " rewritten" * isinstance(model, nn.Module))
    if metric is not None and not callable(metric):
        raise SettingsError(f"metric must be a function (network) -> number, got {metric!r}")
    if fidelity is not None and (isinstance(fidelity, bool) or not isinstance(fidelity, (int, float))):
        raise SettingsError(f"fidelity must be a number, got {fidelity!r}")
    if metric is None and fidelity is not None and not -1 <= fidelity <= 1:
        raise SettingsError(f"fidelity is a mean cosine, at most 1, where no metric is given, got {fidelity!r}")
    if isinstance(gammas, (str, float)) or not isinstance(gammas, Sequence) or not gammas:
        raise SettingsError(f"gammas must be a list of numbers in [0, 1), got {gammas!r}")
    for gamma in gammas:
        Settings(gamma, **{name: options[name] for name in ("weights", "granularity") if name in options})  # raises where one cannot be
        state_bits(gamma, 1)  # and here, where it is a schedule
    for k in blocks:
        Settings(granularity=k)
    if taken := {"gamma", "calibration", "inplace", "example_inputs"} & options.keys():
        raise SettingsError(f"tune chooses {', '.join(sorted(taken))} itself: leave it out; gammas=[...] says which are tried")


def _best(rows: Sequence[Candidate], fidelity: float | None, memory: int | None) -> Candidate | None:
    fit = [row for row in rows if not math.isnan(row.fidelity) and (memory is None or row.total_bytes <= memory)]
    if fidelity is None:
        return max(fit, key=lambda row: (row.fidelity, -row.total_bytes), default=None)
    kept = [row for row in fit if row.fidelity >= fidelity]
    least = min((row.total_bytes for row in kept), default=0)
    alike = [row for row in kept if row.total_bytes <= _ALIKE * least]
    return max(alike, key=lambda row: (row.fidelity, -row.total_bytes, -row.kept_bytes), default=None)


class _Search:
    """The candidates of a model, one after the other.

    Args:
        model, metric, gammas, options: as for `tune`.
        batches: calls of the model, as `calibrate` takes them.
        counted: optimizer and loss, for `estimate`.
        rotations: the ways to calibrate: without rotated velocities, and with.
        blocks: how many blocks may be a step, beside one.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        metric: Any,
        gammas: Sequence[float],
        counted: dict[str, Any],
        options: dict[str, Any],
        rotations: tuple[bool, ...],
        blocks: Sequence[int],
    ) -> None:
        self.rotations, self.blocks = rotations, blocks
        self.model, self.batches, self.gammas, self.counted, self.options = model, batches, gammas, counted, options
        self.held = [call_from(batch) for batch in batches[-max(1, len(batches) // 4) :]]
        self.notes: dict[str, None] = {}
        self.known: dict[Any, Estimate] = {}
        self.seen: set[tuple[int, ...]] = set()
        with evaluated(model):
            self.expected = [outputs(model, call) for call in self.held]
        self.metric = metric
        if metric is None and any(not found or found[0].shape[-1:] in ((), (1,)) for found in self.expected):
            raise SettingsError("the first output has no rows to take cosines of: give metric, a function (network) -> number")
        self.original = 1.0 if metric is None else self._metric(model)

    @property
    def first(self) -> Estimate:
        """The first estimate, whose plain and checkpoint ways are those of all."""
        return next(iter(self.known.values()))

    def rows(self, say: Callable[[str], None]) -> Iterator[Candidate]:
        """All candidates.

        Args:
            say: told what is tried.

        Raises:
            SettingsError: the model has no chain.
            MnetError: no cut could be tried.
        """
        failed: MnetError = SettingsError(f"{type(self.model).__name__} has no residual chain: print(mnet_fx.report(model)) says why")
        for cut, options in self._cuts():
            try:
                yield from self._of_cut(cut, options, say)
            except MnetError as error:
                failed = error
                self.notes[f"Not tried, {cut}: {error}"] = None
        if not self.known:
            raise failed

    def _cuts(self) -> list[tuple[str, dict[str, Any]]]:
        """What steps can be, by name, with the options that make them so, fewest steps first."""
        fixed = self.options
        if fixed.get("regions") is not None:
            return [("named layers", {})]
        found: list[tuple[str, dict[str, Any]]] = []
        free = not {"regions", "granularity", "rest"} & fixed.keys() and not isinstance(self.model, fx.GraphModule)
        if free and (paths := marked_containers(self.model, fixed.get("min_steps", 2))):
            found.append(("named layers", {"regions": paths}))
        names: dict[Any, str] = {k: f"every {k} blocks" for k in sorted(self.blocks, reverse=True)}
        names |= {"module": "each block", "add": "each add"}
        return found + [(name, {"granularity": g}) for g, name in names.items() if fixed.get("granularity", g) == g]

    def _of_cut(self, cut: str, options: dict[str, Any], say: Callable[[str], None]) -> Iterator[Candidate]:
        """Candidates of one cut; none where its chains are as long as those of one before it."""
        kinds = [self.options["weights"]] if "weights" in self.options else ["momentum", "matched"]
        for i, (gamma, weights) in enumerate(itertools.product(self.gammas, kinds)):
            chosen = {**self.options, **options, "gamma": gamma, "weights": weights}
            say(f"tuning {type(self.model).__name__}: {cut}, gamma {gamma}, weights {weights}")
            net = momentumize(self.model, **chosen)
            fidelity = self._fidelity(net)
            steps = tuple(region.steps for region in report(net).regions if region.storage != "nested")
            if not steps or (i == 0 and steps in self.seen):
                self.notes[f"Not tried, {cut}: " + ("the same steps as above." if steps else "there are none.")] = None
                return
            self.seen.add(steps)
            yield self._candidate(cut, net, chosen, fidelity)
            if weights == "momentum" or len(self.batches) == 1 or gamma == 0:
                continue
            for rotate in self.rotations:
                if found := self._calibrated(net, rotate):
                    yield self._candidate(cut, net, {**chosen, "calibration": found.maps}, self._fidelity(net))

    def _calibrated(self, net: nn.Module, rotate: bool) -> Calibration | None:
        try:
            return calibrate(net, self.batches, rotate=rotate)
        except SettingsError as error:
            self.notes[f"Not calibrated: {error}"] = None
            return None

    def _candidate(self, cut: str, net: nn.Module, options: dict[str, Any], fidelity: tuple[float, float]) -> Candidate:
        chains = [region for region in report(net).regions if region.storage != "nested"]
        maps = options.get("calibration") or []
        key = cut, tuple((chain.storage, chain.state_bytes_per_element) for chain in chains), bool(maps)
        if key not in self.known:
            self.known[key] = estimate(net, self.batches[-1], **self.counted)
        taken = self.known[key].momentum
        tensors = [t for chain in maps for read in chain["maps"] if read is not None for t in read.values()]
        return Candidate(
            cut=cut,
            options=options,
            steps=sum(chain.steps for chain in chains),
            bits=sum(state_bits(options["gamma"], chain.steps) for chain in chains),
            fidelity=fidelity[0],
            error=fidelity[1],
            total_bytes=taken.total_bytes + sum(t.nbytes for t in tensors),
            kept_bytes=taken.kept_bytes,
        )

    def _fidelity(self, net: nn.Module) -> tuple[float, float]:
        """The metric, and the relative error of the outputs."""
        with evaluated(net):
            found = [outputs(net, call) for call in self.held]
        return self._metric(net) if self.metric else mean_cosine(found, self.expected), relative_error(found, self.expected)

    def _metric(self, net: nn.Module) -> float:
        with evaluated(net):
            return float(self.metric(net))
