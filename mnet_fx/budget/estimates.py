"""What an estimate says: as data, and as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from ..errors import MnetError
from .sizes import parsed, shown

__all__ = ["PARTS", "Estimate", "Limits", "Way"]

PARTS = (
    "parameters",
    "buffers",
    "gradients",
    "optimizer state",
    "inputs",
    "stream state",
    "spilled bits",
    "kept for steps",
    "outside of chains",
    "one step's activations",
    "temporaries",
)
"""The keys of `Way.parts`, in the order in which tables show them."""

SCHEMA = 1


@dataclass(frozen=True)
class Limits:
    """What fits in a given number of bytes.

    Attributes:
        largest_batch: the largest first dimension of the inputs with which a training step fits; 0 where not even one row does.
        largest_depth_factor: how many times as long the residual chains could be, at the batch that was given, if what their steps need
            (parameters, gradients, optimizer state, activations, stored inputs or spilled bits) grows in proportion; below 1 where the
            model does not fit; `inf` where nothing grows; None where the model has no chain.
    """

    largest_batch: int
    largest_depth_factor: float | None


@dataclass(frozen=True)
class Way:
    """A training step done in one way: "plain", "checkpoint" (`torch.utils.checkpoint` around each block), or "momentum".

    A step is: forward, loss, backward, with `.grad` of all parameters allocated before (as where gradients are accumulated, or set to zero
    in place), then the optimizer's step if one was given. All numbers are bytes, as they are requested from torch's allocator.

    Attributes:
        name: "plain", "checkpoint" or "momentum".
        kept_bytes: what the forward pass leaves allocated until the backward, output and loss included: `mnet_fx.measure(...).kept`.
        peak_bytes: the most that forward and backward allocate at any time, beyond what is there before: `mnet_fx.measure(...).peak`.
        total_bytes: the most that is allocated at any time of the whole step, optimizer included, with everything: parameters, buffers,
            gradients, optimizer state and inputs. What `fits` compares. The sum of `parts`.
        parts: what that most consists of, name -> bytes, for every name of `PARTS`:
            "parameters", "buffers", "gradients", "optimizer state", "inputs" (of the model): there between steps too;
            "stream state": X and U of chains, or the inputs x[t] that short chains and checkpoints keep;
            "spilled bits": the low bits of U that momentum forgets and the tape keeps;
            "kept for steps": what else is kept to run steps again: random states, copies of buffers;
            "outside of chains": saved by ordinary autograd; for "plain" all activations;
            "one step's activations": those of the block that is run again (0 for "plain");
            "temporaries": all else at that time: gradients of activations, work space of operations.
        outside: module path -> bytes of "outside of chains" as they are at the end of the forward pass, largest first; "" is the root.
            Their sum may exceed that part at the peak.
        flops_ratio: floating point operations of forward and backward, relative to plain.
        seconds: of forward and backward by the roofline of the GPU that was named; None where none was.
        limits: what fits in the `memory` that was given, or None where none was.
    """

    name: str
    kept_bytes: int
    peak_bytes: int
    total_bytes: int
    parts: dict[str, int]
    outside: dict[str, int]
    flops_ratio: float
    seconds: float | None = None
    limits: Limits | None = None

    def fits(self, memory: str | int) -> bool:
        """Whether the whole step fits in that many bytes, given as a number or as a text such as "16GiB", "80 GB" or "512MiB"."""
        return self.total_bytes <= parsed(memory)

    @property
    def total_mb(self) -> float:
        """`total_bytes` in MB (10**6 bytes), the unit of pytorch/rfcs #108."""
        return self.total_bytes / 1e6

    @property
    def largest_batch(self) -> int | None:
        """See `Limits`; None without `memory`."""
        return None if self.limits is None else self.limits.largest_batch

    @property
    def largest_depth_factor(self) -> float | None:
        """See `Limits`; None without `memory`."""
        return None if self.limits is None else self.limits.largest_depth_factor


@dataclass(frozen=True)
class Estimate:
    """What `mnet_fx.estimate` found; `str(estimate)` is a table under 100 columns, with words on what dominates and what to do.

    Attributes:
        model: name of the model's class.
        plain, checkpoint, momentum: a training step in each way. `checkpoint` is None where the model has no blocks to put one around
            (then no chain was found either).
        batch: the first dimension of the first tensor of the inputs.
        steps: number of residual steps in the chains of the momentum network.
        gamma: what was given, as a text.
        memory: bytes that were given as `memory`, or None.
        gpu: the name that was given, or None.
        optimizer: name of the optimizer's class, or None.
        seconds_taken: how long the estimate took.
        advice: sentences: what dominates, and what to do about it.
        notes: sentences: what the figures do not cover or had to assume.
    """

    model: str
    plain: Way
    checkpoint: Way | None
    momentum: Way
    batch: int | None
    steps: int
    gamma: str
    memory: int | None = None
    gpu: str | None = None
    optimizer: str | None = None
    seconds_taken: float = 0.0
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _at_batch: Callable[[int], Estimate] | None = field(default=None, repr=False, compare=False)
    _at_gamma: Callable[[float], Estimate] | None = field(default=None, repr=False, compare=False)
    _at_depth: Callable[[float], dict[str, int]] | None = field(default=None, repr=False, compare=False)

    @property
    def ways(self) -> tuple[Way, ...]:
        """Those there are, in the order plain, checkpoint, momentum."""
        return tuple(way for way in (self.plain, self.checkpoint, self.momentum) if way is not None)

    def fits(self, memory: str | int) -> bool:
        """Whether a training step of the momentum network fits; see `Way.fits`."""
        return self.momentum.fits(memory)

    def at_batch(self, batch: int) -> Estimate:
        """The same for another batch, which takes the place of the first dimension of all inputs that have there what the first one has.

        Raises:
            MnetError: there is no batch dimension, or the estimate was read from a file.
        """
        if self._at_batch is None:
            raise MnetError("the inputs have no dimension that could be the batch, or this estimate does not know its model any more")
        return self._at_batch(batch)

    def at_gamma(self, gamma: float) -> Estimate:
        """The same for another momentum.

        Raises:
            MnetError: the estimate is of a rewritten model, which has its own, or was read from a file.
        """
        if self._at_gamma is None:
            raise MnetError("this estimate is of a model with a gamma of its own, or does not know its model any more")
        return self._at_gamma(gamma)

    def total_at_depth(self, factor: float) -> dict[str, int]:
        """`total_bytes` of each way if the residual chains were so many times as long.

        Raises:
            MnetError: the model has no chain.
        """
        if self._at_depth is None:
            raise MnetError("the model has no residual chain whose depth could vary")
        return self._at_depth(factor)

    def plot(self, path: str | None = None, against: str | None = None, values: Sequence[float] | None = None) -> Any:
        """The ways as a picture: each as a bar of its parts, or its total as one quantity varies.

        Args:
            path: where to write it; the suffix (.png, .svg, .pdf) decides how. None: nowhere.
            against: None for bars; or "batch", "depth" (how many times as long the chains are), "gamma".
            values: of that quantity; by default a few around those of the estimate.

        Returns:
            The matplotlib Figure.

        Raises:
            SettingsError: `against` is none of these, or the path cannot be written.
            MnetError: the model has no batch dimension, chain, or free gamma; or matplotlib is missing (`pip install 'mnet-fx[plot]'`).
        """
        from ..reporting.estimates import plot_estimate

        return plot_estimate(self, path, against, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json.dumps takes. "schema" is raised by one when a key changes its meaning or goes; new keys may come."""
        ways = {way.name: _way_dict(way) for way in self.ways}
        named = ("model", "batch", "steps", "gamma", "memory", "gpu", "optimizer", "seconds_taken", "advice", "notes")
        rest = {key: getattr(self, key) for key in named}
        return {"schema": SCHEMA, **rest, "advice": list(self.advice), "notes": list(self.notes), "ways": ways}

    def __str__(self) -> str:
        words = ["\n".join(textwrap.fill(sentence, 99) for sentence in part) for part in (self.advice, self.notes)]
        return "\n\n".join(part for part in (textwrap.fill(self._title(), 99), self._table(), *words) if part)

    def _title(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        with_ = "" if self.optimizer is None else f", {self.optimizer}"
        return f"{self.model}{batch}{with_}: a training step before it runs ({self.steps} residual steps, gamma {self.gamma})"

    def _table(self) -> str:
        ways = self.ways
        rows: list[list[str]] = [["kept after the forward", *(shown(way.kept_bytes) for way in ways)]]
        rows += [["peak of forward and backward", *(shown(way.peak_bytes) for way in ways)]]
        rows += [["total at the peak", *(shown(way.total_bytes) for way in ways)]]
        used = [name for name in PARTS if any(way.parts[name] for way in ways)]
        rows += [[f"- {name}", *(shown(way.parts[name]) for way in ways)] for name in used]
        rows += [["operations / plain", *(f"{way.flops_ratio:.2f}" for way in ways)]]
        if self.gpu is not None:
            rows += [[f"seconds, {self.gpu}", *(_seconds(way.seconds) for way in ways)]]
        if self.memory is not None:
            rows += [[f"fits in {shown(self.memory)}", *("yes" if way.fits(self.memory) else "no" for way in ways)]]
            rows += [["largest batch", *("-" if way.limits is None else str(way.largest_batch) for way in ways)]]
            rows += [["largest depth", *(_factor(way.largest_depth_factor) for way in ways)]]
        headers = ["", *(way.name for way in ways)]
        return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=("left", *["right"] * len(ways)))


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


def _factor(factor: float | None) -> str:
    return "-" if factor is None else "any" if factor == float("inf") else f"x {factor:.2f}"


def _way_dict(way: Way) -> dict[str, Any]:
    found = asdict(way)
    limits = found.pop("limits")
    if limits is not None and limits["largest_depth_factor"] == float("inf"):
        limits["largest_depth_factor"] = "any"  # JSON has no infinity
    return {**found, "total_mb": way.total_mb, "limits": limits}
