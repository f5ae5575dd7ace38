"""What was rewritten, what was not, and why: as data, as text, and for a browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes import Stretch

from . import data, html, text
from .findings import AddReport, CapturedPart, Findings, RegionReport

__all__ = ["AddReport", "CapturedPart", "Pending", "RegionReport", "Report", "Stretch"]


@dataclass(frozen=True)
class Report(Findings):
    """What `momentumize` did, or would do; `str(report)` prints it. See `Findings` for the fields."""

    def __str__(self) -> str:
        return text.text(self)

    def table(self, fmt: str = "simple") -> str:
        """The model from input to output, one row for each region and for what lies between: adds, what becomes of them, bytes.

        Args:
            fmt: any format of the package tabulate, such as "simple", "github", "html", "latex", "tsv".

        Raises:
            SettingsError: there is no such format.
        """
        return text.table(self, fmt)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries, as `mnet_fx/reporting/report.schema.json` describes them."""
        return data.to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """JSON of `to_dict`. Its "version" rises when a field goes or means something else, and not when one is added."""
        return data.to_json(self, indent)

    def to_csv(self) -> str:
        """One line for each residual-looking add, in the order in which the model runs, under a header."""
        return data.to_csv(self)

    def to_html(self, title: str = "mnet_fx report") -> str:
        """A page that needs no other file: the model as a picture, the table, and every add."""
        return html.page(self, title)

    def _repr_html_(self) -> str:
        return html.fragment(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """The model from input to output as a picture: bytes kept along the way, before and after, regions and refusals.

        Args:
            path: where to write it; the suffix (.png, .svg, .pdf) decides how. None: nowhere.

        Returns:
            The matplotlib Figure.

        Raises:
            MnetError: matplotlib is not installed (`pip install 'mnet-fx[plot]'`).
        """
        from .plots import plot_report

        return plot_report(self, path)


class Pending(Report):
    """A report that is worked out at the first look at one of its fields.

    Args:
        work: gives the report.
    """

    def __init__(self, work: Callable[[], Report]) -> None:
        self.__dict__["_work"] = work

    def __getattr__(self, name: str) -> Any:
        """A field that is not there yet."""
        if name not in Report.__dataclass_fields__ or "_work" not in self.__dict__:
            raise AttributeError(name)
        self.__dict__.update(vars(self.__dict__["_work"]()))  # where that fails, nothing is kept, and the next look tries again
        self.__dict__.pop("_work", None)
        return self.__dict__[name]
