"""Writes a benchmark's JSON, and puts the table made from it between two marks in the README or a page of docs/."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

__all__ = ["save", "show", "table"]

ROOT = Path(__file__).parent


def save(name: str, rows: list[dict[str, Any]], columns: dict[str, str], readme: bool, shown: list[dict[str, Any]] | None = None) -> None:
    """Writes `results/<name>.json` (rows and the machine they were measured on) and prints the table.

    Args:
        name: name of the benchmark.
        rows: one dictionary per line of the table.
        columns: key of a row -> heading.
        readme: also replace what stands between `<!-- name -->` and `<!-- /name -->` in README.md or docs/.
        shown: the rows that are shown there (default all).
    """
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print(table(rows, columns))
    if readme:
        show(name, rows if shown is None else shown, columns)


def show(name: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Puts a table between the marks `<!-- name -->` and `<!-- /name -->`, in the one page that has them."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    for path in (ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").glob("*.md"))):
        text, found = marks.subn(lambda m: f"{m[1]}{table(rows, columns)}\n{m[2]}", path.read_text())
        if found:
            path.write_text(text)
            return
    raise SystemExit(f"neither README.md nor docs/ has marks <!-- {name} --> and <!-- /{name} -->")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """In Markdown."""
    cells = [[f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows]
    return tabulate(cells, headers=list(columns.values()), tablefmt="github", disable_numparse=True)
