"""What the project set out to reach, beside what `compare.py` and `planner.py` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tables import ROOT

__all__ = ["TARGETS", "Target", "reached"]

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]
COLUMNS = {"work": "work", "what": "what", "target": "target", "measured": "measured", "met": "met"}
BLOCKS, REST, OVER = "checkpoint per block", "mnet_fx, rest='checkpoint'", "mnet_fx over inductor"
INDUCTOR = ("inductor", "inductor, budget 0.5", "inductor, budget 0.1")
LEAST_OVER = 0.01  # by which a step may be over its budget, or slower than the best fixed setting
CONVOLUTIONS = 0.03


@dataclass(frozen=True)
class Target:
    """A bound on a figure of one row.

    Attributes:
        work: of the row.
        way: of the row.
        figure: "peak" or "ratio", the time.
        most: MiB, or times the least figure of `others`.
        others: ways that it is compared with.
        below: it must be less, not at most.
    """

    work: str
    way: str
    figure: str
    most: float
    others: tuple[str, ...] = ()
    below: bool = False

    def line(self, rows: Rows) -> Row:
        """As the table shows it."""
        what = f"{'peak' if self.figure == 'peak' else 'time'}, {self.way}"
        line = {"work": self.work, "what": what, "target": self._said(), "measured": "", "met": "not measured"}
        figures = [rows.get((self.work, way), {}).get(self.figure) for way in (self.way, *self.others)]
        known = [figure for figure in figures[1:] if figure is not None]
        if figures[0] is None or (self.others and not known):
            return line
        value = figures[0] / min(known) if known else figures[0]
        if not known:
            value = round(value, 0 if self.most >= 10 else 1)  # as the target is told
        met = value < self.most if self.below else value <= self.most
        shown = f"{figures[0]:.4g}" + (f", {value:.2f} x" if known else "") + (" MiB" if not known else "")
        return line | {"measured": shown, "met": "yes" if met else "no"}

    def _said(self) -> str:
        if not self.others:
            return f"at most {self.most:g} MiB"
        others = "every setting of inductor" if self.others == INDUCTOR else self.others[0]
        return f"below {others}" if self.below else f"at most {self.most:g} x {others}"


def _pair(work: str, way: str, peak: float, time: float, *others: str, below: bool = False) -> tuple[Target, Target]:
    return Target(work, way, "peak", peak, others, below), Target(work, way, "ratio", time, others[:1])


STUDY = "LM, 9 layers, d 384"
TARGETS = (
    Target("encoder, 64 layers, d 256", "mnet_fx", "peak", 41),
    *_pair("encoder, 12 layers, d 256", "mnet_fx", 1, 1.15, BLOCKS, below=True),
    *_pair("encoder, 12 layers, d 256", OVER, 1, 1.35, *INDUCTOR, below=True),
    *_pair("ResNet-101, 160 px", REST, 0.75, 1.12, BLOCKS),
    *_pair("MLP 16 x 2048 x 256", "mnet_fx", 0.45, 1.25, BLOCKS),
    Target("MLP 200 x 300 x 500, hidden 8", "mnet_fx", "peak", 5),
    Target("MLP 200 x 300 x 500, hidden 8", "mnet_fx", "ratio", 0.4, ("momentumnet",)),
    *_pair("nn.Transformer, 6 + 6, d 256", "mnet_fx", 1, 1.15, BLOCKS, below=True),
    *_pair("diffusion U-Net, 32 px", REST, 0.8, 1.12, BLOCKS),
    *_pair(STUDY, REST, 0.35, 1.12, BLOCKS),
    Target(STUDY, REST, "peak", 0.75, ("checkpoint per block, chunked head",)),
)


def reached(rows: Rows) -> tuple[list[Row], dict[str, str]]:
    """Lines and columns, as `tables.show` takes them."""
    return [*(target.line(rows) for target in TARGETS), *_planned()], COLUMNS


def _planned() -> Iterator[Row]:
    """The worst of `planner.py`'s budgets."""
    path = ROOT / "results" / "planner.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if row["asked"]] if path.exists() else []
    for model in dict.fromkeys(row["model"] for row in rows) or ("planner, ten budgets",):
        most = CONVOLUTIONS if model.startswith(("ResNet", "U-Net", "WaveNet")) else LEAST_OVER
        over = [row["over"] for row in rows if row["model"] == model and row["over"] != ""]
        slower = [float(row["slower"].strip("%")) / 100 for row in rows if row["model"] == model and row["slower"]]
        for what, found, bound in (("peak over its budget", over, most), ("slower than the best fixed setting", slower, 0.03)):
            line = {"work": model, "what": what, "target": f"at most {bound:.0%}", "measured": "", "met": "not measured"}
            yield line | ({"measured": f"{max(found):+.1%}", "met": "yes" if max(found) <= bound else "no"} if found else {})
