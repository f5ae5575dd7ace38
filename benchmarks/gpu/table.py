"""Puts what a run on a GPU gave into docs/measurements.md, and the gist of it into the README.

    python -m benchmarks.gpu.table [--json DIR/gpu.json]      # keeps the JSON as benchmarks/results/gpu/run.json, and replaces the tables
    python -m benchmarks.gpu.table --json ... --name run_2    # keeps it beside the others: the page shows all, the README the first
    python -m benchmarks.gpu.table --check                    # whether the page is what the kept JSON gives

A test runs the check. Without a JSON the page says that nothing was run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

__all__ = ["gist", "kept", "page", "shown"]

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "gpu"
PAGE, README = ROOT / "docs" / "measurements.md", ROOT / "README.md"
GIST = ("encoder of 24 layers, d = 1024", {"plain": "plain", "checkpoint": "checkpoint", "momentum": "momentum"})
MARKS = re.compile(r"(<!-- gpu -->\n).*?(<!-- /gpu -->)", re.DOTALL)
NOTHING = "No run of this script on a GPU is kept."
Row = dict[str, Any]
Run = dict[str, Any]


def kept() -> list[Run]:
    """The JSON of all runs that are kept, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(KEPT.glob("run*.json"))]


def page(runs: list[Run]) -> str:
    """What stands between the marks, for the JSON of some runs."""
    return "\n\n".join(one(run) for run in runs if run["rows"]) or NOTHING


def one(run: Run) -> str:
    """The tables of one run."""
    parts = [(name, [row for row in run["rows"] if row["part"] == name and ("ms" in row or "fits" in row)]) for name in TABLES]
    texts = [TABLES[name](rows) for name, rows in parts if rows]
    return "\n\n".join([about(run), *texts, *left_out(run["rows"])])


def gist(runs: list[Run]) -> str:
    """What stands between the marks of the README: the bfloat16 encoder, and how large it may be, by the first run."""
    if not runs:
        return NOTHING
    run = runs[0]
    model, ways = GIST
    rows = [
        row for row in run["rows"] if row["part"] == "models" and row.get("model", "").startswith(model) and row["model"].endswith(", bf16")
    ]
    steps = {row["way"]: row for row in rows if row["way"] in ways and "ms" in row}
    most = {(row["what"], row["way"]): row["fits"] for row in run["rows"] if row["part"] == "largest" and "fits" in row}
    cells = [
        [title, count(steps[way]["peak_gib"]), count(steps[way]["ms"]), count(most.get(("batch", way))), count(most.get(("layers", way)))]
        for way, title in ways.items()
        if way in steps
    ]
    headers = ["model", "peak, GiB", "ms per step", "largest batch in 24 GiB", "most layers in 24 GiB"]
    return f"{about(run)}\n\n{tabulate(cells, headers=headers, tablefmt='github', disable_numparse=True)}"


def about(run: Run) -> str:
    """What ran, and when."""
    machine = run["machine"]
    day = datetime.date.fromisoformat(machine["date"])
    memory = "" if machine["memory_gib"] is None else f" ({machine['memory_gib']:.0f} GiB)"
    tiny = " Tiny models on purpose: the figures mean nothing." if run["tiny"] else ""
    return f"One {machine['device']}{memory}, torch {machine['torch']}, {day.day} {day:%B %Y}.{tiny}"


def arithmetic(rows: list[Row]) -> str:
    keys = {
        "stream": "stream",
        "loop": "loop",
        "bytes_per_element": "bytes per element",
        "ms": "ms",
        "gb_s": "GB/s",
        "of_copy": "of a copy",
    }
    keys |= {"exact": "exact", "host_reads": "host reads", "launches": "launches"}
    return f"Exact arithmetic, {count(rows[0].get('elements'))} elements:\n\n{table(rows, keys)}"


def models(rows: list[Row], how: str = "") -> str:
    keys = {
        "way": "way",
        "peak_gib": "peak, GiB",
        "ms": "ms",
        "host_ms": "of Python",
        "device_ms": "of kernels",
        "per_second": "per second",
        "host_reads": "host reads",
        "launches": "launches",
    }
    keys |= {"exact": "exact"}
    names = dict.fromkeys(row["model"] for row in rows)
    return "\n\n".join(_model(f"{name}{how}", [row for row in rows if row["model"] == name], keys) for name in names)


def _model(name: str, rows: list[Row], keys: dict[str, str]) -> str:
    units = next((row["unit"] for row in rows if "unit" in row), "steps")
    return f"{name}.{_unrepeated(rows)}\n\n{table(rows, keys | {'per_second': f'{units} per second'})}"


def _unrepeated(rows: list[Row]) -> str:
    """Why the column that says whether gradients are exact is empty, if it is."""
    unrepeated = any(row.get("plain_repeats") is False for row in rows)
    return " The plain model's own gradients do not repeat here, so that none can be compared." if unrepeated else ""


def study(rows: list[Row]) -> str:
    rows = [row | {f"their_{key}": value for key, value in (row.get("theirs") or {}).items()} for row in rows]
    keys = {"way": "way", "peak_gib": "peak, GiB", "per_second": "tokens per second", "their_peak_gib": "theirs on a T4, GiB"}
    keys |= {"their_per_second": "theirs, tokens per second", "exact": "exact"}
    return f"An independent study's model, batch {rows[0].get('batch')}.{_unrepeated(rows)}\n\n{table(rows, keys)}"


def largest(rows: list[Row]) -> str:
    rows = [row | {"of": f"{row['what']} (with {row['fixed']} {'layers' if row['what'] == 'batch' else 'in the batch'})"} for row in rows]
    keys = {"of": "largest", "way": "way", "fits": "fits", "fails": "does not fit"}
    return f"Encoder in bf16, all memory within {rows[0]['cap_gib']:g} GiB:\n\n{table(rows, keys)}"


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "arithmetic": arithmetic,
    "models": models,
    "inductor": partial(models, how=", compiled"),
    "study": study,
    "largest": largest,
}


def left_out(rows: list[Row]) -> list[str]:
    """What failed or was skipped, by name."""
    found = [(row, row.get("error") or row.get("exact_error") or row.get("skipped") or row.get("stopped")) for row in rows]
    lines = [f"- {' / '.join(str(row[key]) for key in NAMES if key in row)}: {why}" for row, why in found if why]
    return ["Not measured, or not in full:\n\n" + "\n".join(lines)] if lines else []


NAMES = ("part", "model", "stream", "what", "way")


def table(rows: list[Row], keys: dict[str, str]) -> str:
    """Rows that have a figure, in the columns that have one."""
    rows = [row for row in rows if not row.get("skipped") and not row.get("error")]
    rows = [row | {"exact": None} if row.get("plain_repeats") is False and not row.get("exact") else row for row in rows]
    keys = {key: title for key, title in keys.items() if any(row.get(key) is not None for row in rows)}
    cells = [[count(row.get(key)) for key in keys] for row in rows]
    return tabulate(cells, headers=list(keys.values()), tablefmt="github", disable_numparse=True)


def count(value: Any) -> str:
    """A figure with three digits or so."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def shown(path: Path = PAGE) -> str:
    """What stands between the marks of a page now."""
    found = MARKS.search(path.read_text())
    assert found is not None, f"{path.name} has no marks <!-- gpu --> and <!-- /gpu -->"
    return found[0].removeprefix(found[1]).removesuffix(found[2]).rstrip("\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a run to keep")
    parser.add_argument("--name", default="run", help="under which; begins with run")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.json is not None:
        shutil.copyfile(options.json, KEPT / f"{options.name}.json")
    texts = {PAGE: page(kept()), README: gist(kept())}
    if options.check:
        same = all(text == shown(path) for path, text in texts.items())
        raise SystemExit(None if same else f"the tables are not what {KEPT} gives: run python -m benchmarks.gpu.table")
    for path, text in texts.items():
        path.write_text(MARKS.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", path.read_text()))


if __name__ == "__main__":
    main()
