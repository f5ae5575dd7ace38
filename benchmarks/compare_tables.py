"""Tables of what `compare.py` measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compare_ways import WAYS
from tables import table

__all__ = ["by_work", "long", "size"]

Row = dict[str, Any]
COLUMNS = {"work": "work", "way": "way", "kept": "kept, MiB", "peak": "peak, MiB", "rss": "RSS, MiB", "time": "time / plain"}
COLUMNS |= {"gradient": "gradient", "largest": "largest batch in"}


def long(rows: list[Row], works: Iterable[str], memory: float) -> str:
    """Every row that ran, and below, why the others did not.

    Args:
        rows: what was measured.
        works: names, in order.
        memory: GiB for which the largest batch is told.
    """
    ordered = [row for work in works for way in WAYS for row in rows if (row["work"], row["way"]) == (work, way)]
    reasons: dict[str, list[str]] = {}
    for row in ordered:
        if "peak" not in row:
            reasons.setdefault(f"{row['way']}: {row.get('unfit') or row['error']}", []).append(row["work"])
    shown = table([_cells(row, memory) for row in ordered if "peak" in row], COLUMNS | {"largest": f"largest batch in {memory:g} GiB"})
    return "\n".join([shown, "", *(f"- {reason} ({'; '.join(names)})" for reason, names in reasons.items())])


def by_work(rows: list[Row], works: Iterable[str]) -> tuple[list[Row], dict[str, str]]:
    """One line for each work, and a column for each way, as `tables.show` takes them: "peak in MiB / time"."""
    found = {(row["work"], row["way"]): row for row in rows}
    measured = {way for (_, way), row in found.items() if "unfit" not in row}
    columns = {"work": "peak, MiB / time"} | {way: way for way in WAYS if way in measured}
    lines = [{"work": work} | {way: _brief(found.get((work, way))) for way in columns if way != "work"} for work in works]
    return [line for line in lines if any(line[way] for way in measured)], columns


def _brief(row: Row | None) -> str:
    if row is None or "unfit" in row:
        return ""
    if "error" in row:
        return "error"
    result = row["gradient"]["result"]
    return f"{size(row['peak'])} / {row['ratio']:.2f}" + ("" if result == "right" else f", **{result}**")


def size(mib: float) -> str:
    """With three figures, or all before the point."""
    return f"{mib:.0f}" if mib >= 100 else f"{mib:.3g}"


def largest(row: Row, memory: float) -> int | None:
    """The largest batch in so many GiB, on the line through the bytes of the batch and of half of it; None where these are not known."""
    if "half" not in row:
        return None
    total = row["peak"] + row["static"]
    each = (total - row["half"]["total"]) / (row["batch"] - row["half"]["batch"])
    return max(0, int(row["batch"] + (memory * 1024 - total) / each))


def _cells(row: Row, memory: float) -> Row:
    verdict, most = row["gradient"], largest(row, memory)
    return {
        "work": row["work"],
        "way": row["way"],
        "kept": size(row["kept"]),
        "peak": size(row["peak"]),
        "rss": size(row["rss"]) if "rss" in row else "",
        "time": f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
        "gradient": f"{verdict['result']} ({verdict['error']:.1e}, {verdict['against']})",
        "largest": "" if most is None else f"{most:,}",
    }
