"""Tables of what `compare.py` measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compare_ways import WAYS
from tabulate import tabulate

__all__ = ["by_work", "long"]

Row = dict[str, Any]
HEADINGS = {
    "work": "work",
    "way": "way",
    "kept": "kept, MiB",
    "peak": "peak, MiB",
    "time": "time / plain",
    "gradient": "gradient",
}


def long(rows: list[Row], works: Iterable[str]) -> str:
    """Every row that ran, and below, why the others did not."""
    ordered = [row for work in works for way in WAYS for row in rows if (row["work"], row["way"]) == (work, way)]
    cells = [[_cell(row, key) for key in HEADINGS] for row in ordered if "peak" in row]
    table = tabulate(cells, headers=list(HEADINGS.values()), tablefmt="github", disable_numparse=True)
    reasons: dict[str, list[str]] = {}
    for row in ordered:
        if "peak" not in row:
            reasons.setdefault(f"{row['way']}: {row.get('unfit') or row['error']}", []).append(row["work"])
    return "\n".join([table, "", *(f"- {reason} ({'; '.join(names)})" for reason, names in reasons.items())])


def by_work(rows: list[Row], works: Iterable[str]) -> tuple[list[Row], dict[str, str]]:
    """One line for each work, and a column for each way, as `tables.show` takes them: "peak in MiB / time"."""
    found = {(row["work"], row["way"]): row for row in rows}
    measured = {way for _, way in found}
    columns = {"work": "peak, MiB / time"} | {way: way for way in WAYS if way in measured}
    lines = [{"work": work} | {way: _brief(found.get((work, way))) for way in columns if way != "work"} for work in works]
    return [line for line in lines if any(line[way] for way in measured)], columns


def _brief(row: Row | None) -> str:
    if row is None or "unfit" in row:
        return ""
    if "error" in row:
        return "error"
    wrong = "" if row["gradient"]["result"] == "right" else ", **wrong**"
    return f"{size(row['peak'])} / {row['ratio']:.2f}{wrong}"


def size(mib: float) -> str:
    """With three figures, or all before the point."""
    return f"{mib:.0f}" if mib >= 100 else f"{mib:.3g}"


def _cell(row: Row, key: str) -> str:
    if key == "time":
        return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    if key == "gradient":
        verdict = row["gradient"]
        return f"{verdict['result']} ({verdict['error']:.1e}, {verdict['against']})"
    return size(row[key]) if key in ("kept", "peak") else str(row[key])
