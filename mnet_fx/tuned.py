"""What `tune` found: as data, and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from .budget.sizes import shown
from .errors import MnetError

__all__ = ["Candidate", "Tuning"]

KINDS = "momentum", "matched", "signed", "calibrated", "rotated"
WORDS = (
    "Total bits decide how close a chain stays, not the bits of a step: at equal bits, fewer, larger\nsteps are closer to the original. "
    "Their price is what the backward pass of one step holds."
)


@dataclass(frozen=True)
class Candidate:
    """One network that was tried.

    Attributes:
        cut: what its steps are: "named layers", "every 3 blocks", "each block" or "each add".
        options: for `momentumize`, with the read maps as `calibration` where it is calibrated.
        steps: how many its chains have.
        bits: per element of the stream that its chains must put aside, all steps together (`state_bits`).
        fidelity: the metric on the held-out calls; default the mean cosine to the original's output.
        error: of the outputs there, relative to the norm of the original's.
        total_bytes: the most that a training step holds, by `estimate`, with everything, and the read maps.
        kept_bytes: of these, what the forward pass leaves for the backward.
    """

    cut: str
    options: dict[str, Any] = field(repr=False, compare=False)
    steps: int
    bits: float
    fidelity: float
    error: float
    total_bytes: int
    kept_bytes: int

    @property
    def kind(self) -> str:
        """One of `KINDS`: the weights; or "calibrated", or that and "rotated"."""
        maps = self.options.get("calibration")
        if maps is None:
            return str(self.options["weights"])
        return "rotated" if any(read is not None and "frame" in read for chain in maps for read in chain["maps"]) else "calibrated"

    @property
    def gamma(self) -> float:
        """Of all its steps."""
        return float(self.options["gamma"])


@dataclass(frozen=True)
class Tuning:
    """What `tune` found; `print` it.

    Attributes:
        model: name of the model's class.
        rows: what was tried.
        best: what was chosen; None where none keeps what was asked for.
        original: the metric of the original network; 1 for the cosine.
        plain_bytes, checkpoint_bytes: the most that a training step of the original holds, and under a checkpoint around each block.
        held_out: how many calls fidelities are of.
        fidelity, memory: what was asked for; `memory` in bytes.
        notes: what could not be tried, and why.
    """

    model: str
    rows: tuple[Candidate, ...]
    best: Candidate | None
    original: float
    plain_bytes: int
    checkpoint_bytes: int | None
    held_out: int
    fidelity: float | None = None
    memory: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Those of the best, for `momentumize(model, **tuning.options)`.

        Raises:
            MnetError: none keeps what was asked for.
        """
        if self.best is None:
            raise MnetError(self._chosen())
        return dict(self.best.options)

    def plot(self, path: str | None = None) -> Any:
        """Fidelity against the bytes of a training step, a line for each kind and cut, a point for each gamma.

        Args:
            path: where to write it; the suffix (.png, .svg, .pdf) decides how. None: nowhere.

        Returns:
            The matplotlib Figure.

        Raises:
            SettingsError: the path cannot be written.
            MnetError: matplotlib is missing (`pip install 'mnet-fx[plot]'`).
        """
        from .reporting.tunings import plot_tuning

        return plot_tuning(self, path)

    def __str__(self) -> str:
        under = "" if self.checkpoint_bytes is None else f", under checkpoint {shown(self.checkpoint_bytes)}"
        title = (
            f"{self.model}: fidelity on {self.held_out} held-out calls (the original {self.original:.4f}), in brackets the relative error"
        )
        return "\n\n".join(
            [
                f"{title}\nA training step holds, plain, {shown(self.plain_bytes)}{under}; calibrated, also the read maps",
                self._table(),
                "\n".join([self._chosen(), WORDS, *self.notes]),
            ]
        )

    def _table(self) -> str:
        kinds = [kind for kind in KINDS if any(row.kind == kind for row in self.rows)]
        grouped: dict[tuple[str, float], dict[str, Candidate]] = {}
        for row in self.rows:
            grouped.setdefault((row.cut, row.gamma), {})[row.kind] = row
        lines = []
        for (cut, gamma), found in grouped.items():
            first = next(iter(found.values()))
            cells = [_cell(found.get(kind), self.best) for kind in kinds]
            lines.append([cut, first.steps, f"{gamma:g}", f"{first.bits:.1f}", shown(first.kept_bytes), shown(first.total_bytes), *cells])
        headers = ["steps are", "steps", "gamma", "bits", "kept", "total", *kinds]
        return tabulate(
            lines, headers=headers, tablefmt="simple", disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))
        )

    def _chosen(self) -> str:
        asked = [f"fidelity {self.fidelity:g}"] if self.fidelity is not None else []
        asked += [f"{shown(self.memory)}"] if self.memory is not None else []
        if self.best is None:
            closest = max(self.rows, key=lambda row: row.fidelity)
            least = min(self.rows, key=lambda row: row.total_bytes)
            wanted = " within ".join(asked) or "a fidelity that is a number"
            return (
                f"None keeps {wanted}: the most faithful has fidelity {closest.fidelity:.4f} at {shown(closest.total_bytes)}, the cheapest "
                f"takes {shown(least.total_bytes)}."
            )
        best = self.best
        how = f"{best.cut}, gamma {best.gamma:g}, {best.kind}: fidelity {best.fidelity:.4f}, {shown(best.total_bytes)}"
        under = self.checkpoint_bytes
        none = "" if under is None or best.total_bytes < 0.99 * under else f" A checkpoint around each block takes no more, {shown(under)}."
        why = "cheapest that keeps" if self.fidelity is not None else "most faithful" + " within" * bool(asked)
        return " ".join(["* The", why, " within ".join(asked), "is", how + "."]).replace("  ", " ") + none


def _cell(row: Candidate | None, best: Candidate | None) -> str:
    return "-" if row is None else f"{'* ' if row is best else ''}{row.fidelity:.4f} ({row.error:.2g})"
