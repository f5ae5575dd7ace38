"""Everything a user could pick to train a model with less memory, on the same work: bytes, time, and whether the gradient is right.

    pip install momentumnet; pip install --no-deps revlib memcnn RevTorch
    python benchmarks/compare.py [--only encoder ResNet ...] [--ways mnet_fx ...] [--quick | --small] [--again] [--rss] [--readme]

Works are those of `compare_works.py`, ways those of `compare_ways.py`; gamma 0.9, float32, `.grad` allocated, no dropout (`trust.py` has
it, and other hard situations). Each work runs in a process of its own, and its ways take turns there. Rows go to results/compare.jsonl as
they come; those that are there, of this state of the packages and this torch, are not measured again, unless --again. Figures of a row:

- kept, peak: bytes of torch's allocator, after the forward pass and at the peak of forward and backward;
- time: median of steps, as a ratio to plain, and the quartiles of the ratios of single rounds;
- gradient: right where it is plain training's to the bit. Else compared with plain autograd of the same network in float64, where that can
  be written down, or else, for momentum networks, with `backward="stored"` (momentumnet: `use_backprop=True`). "right": no parameter's
  gradient is further off than ten times what plain training in float32 is, or 1e-3. "unclear": no further, but
  rounding alone may make more than a hundredth;
- RSS, with --rss: how far the resident size of a fresh process rises in a step above what it was before the first, with
  MALLOC_MMAP_THRESHOLD_=65536, as glibc else keeps what is freed;
- largest batch: that fits in --memory, parameters and gradients included, on the line through the bytes of the batch and of half of it. Not
  of what is compiled, which would be compiled twice, nor of plans, which are made for one batch.

--targets shows what the project set out to reach beside what was measured. --quick: three small works, nothing compiled, nothing written;
under three minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from compare_measuring import BLOCKS, MIB, Options, Row, failure, measured, resident
from compare_picture import draw
from compare_tables import by_work, long
from compare_targets import reached
from compare_ways import WAYS
from compare_works import SMALL, WORKS, Work
from tables import ROOT, show, table
from tqdm import tqdm

LINES = ROOT / "results" / "compare.jsonl"
QUICK = 3  # works
STARTING = 600.0  # seconds that a process may take to import what it needs, and for the gradients in float64
Target = Callable[[Connection, str, list[str], Options], None]


@cache
def state() -> dict[str, str]:
    """Of what is measured: the last commit that changed the packages, and torch."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "../mnet_fx", "../passes"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit or "unknown", "torch": torch.__version__}


@dataclass
class Results:
    """Rows in a file of lines, the newest of each work and way last.

    Attributes:
        path: the file; None keeps them in memory.
    """

    path: Path | None

    def __post_init__(self) -> None:
        text = self.path.read_text() if self.path is not None and self.path.exists() else ""
        self.rows = {(row["work"], row["way"]): row for row in map(json.loads, text.splitlines())}

    def has(self, work: str, way: str) -> bool:
        """Whether there is a row of the present state."""
        row = self.rows.get((work, way), {})
        return all(row.get(key) == value for key, value in state().items())

    def add(self, row: Row) -> None:
        self.rows[row["work"], row["way"]] = row
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def child(is_small: bool, pipe: Connection, name: str, ways: list[str], options: Options) -> None:
    """Measures in a process of its own, and sends what it has to say, and rows."""
    warnings.simplefilter("ignore")  # of the other libraries
    try:
        work = (SMALL if is_small else WORKS)[name]
        for row in measured(work, [WAYS[way] for way in ways], options, lambda *said: pipe.send(said)):
            pipe.send(("row", row))
    except Exception as error:
        traceback.print_exc()
        for way in ways:
            pipe.send(("row", {"way": way, "error": failure(error)}))
    pipe.send(("end", None))


def rows_of(target: Target, name: str, ways: list[str], options: Options, tick: Callable[[str], None]) -> Iterator[Row]:
    """The rows of one work, from a process of its own; a way that ends it or takes too long has a row that says so; the others go on."""
    processes = multiprocessing.get_context("spawn")
    while True:
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=target, args=(theirs, name, ways, options), daemon=True)
        process.start()
        theirs.close()
        doing, limit = None, STARTING
        try:
            while (said := _heard(ours, limit))[0] != "end":
                limit = options.limit
                if said[0] == "row":
                    yield said[1]
                else:
                    doing = said[1] if said[0] == "doing" else doing
                    tick(said[0])
            return
        except (EOFError, TimeoutError) as error:
            process.join(1.0)  # after which it has an exit code, if it ended
            text = str(error) or f"the process ended with code {process.exitcode}"
        finally:
            process.kill()
            process.join()
        if doing in (None, "plain"):
            yield from ({"way": way, "error": text} for way in ways)
            return
        yield {"way": doing, "error": text}
        ways = [way for way in ways if way != doing]


def _heard(pipe: Connection, limit: float) -> Any:
    """What comes next. Raises EOFError or TimeoutError."""
    if not pipe.poll(limit):
        raise TimeoutError(f"not done in {limit:g} s")
    return pipe.recv()


def sweep(target: Target, asked: dict[str, list[str]], options: Options, results: Results) -> None:
    """Measures ways of works, with plain training beside them."""
    with tqdm(total=sum(len({"plain", *ways}) * (1 + options.rounds) for ways in asked.values())) as bar:
        for name, ways in asked.items():
            bar.set_description(name)
            for row in rows_of(target, name, list(dict.fromkeys(["plain", *ways])), options, lambda said: bar.update(said == "done")):
                if row["way"] in ways:
                    results.add({"work": name, **row, **state(), "date": date.today().isoformat()})


def _resident(is_small: bool, pipe: Connection, name: str, way: str, room: int | None, threads: int) -> None:
    warnings.simplefilter("ignore")
    pipe.send(resident((SMALL if is_small else WORKS)[name], WAYS[way], room, threads))


def add_resident(is_small: bool, asked: dict[str, list[str]], threads: int, results: Results) -> None:
    """Adds the peak resident size, of a fresh process each, to rows that lack it."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # else glibc keeps what is freed
    rows = [row for row in results.rows.values() if row["way"] in asked.get(row["work"], ()) and "peak" in row and "rss" not in row]
    for row in tqdm(rows, "resident size"):
        blocks = results.rows.get((row["work"], BLOCKS), {})
        room = round((blocks["peak"] + blocks["static"]) * MIB) if "peak" in blocks else None
        processes = multiprocessing.get_context("spawn")
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=_resident, args=(is_small, theirs, row["work"], row["way"], room, threads), daemon=True)
        process.start()
        theirs.close()
        try:
            results.add(row | {"rss": ours.recv()})
        except EOFError:
            print(f"{row['work']}, {row['way']}: no resident size, as its process ended")
        process.join()


def chosen(works: dict[str, Work], options: argparse.Namespace) -> dict[str, list[str]]:
    """Works and their ways, of those that were asked for."""
    ways = [way for way in WAYS if not options.ways or way in options.ways]
    ways = [way for way in ways if WAYS[way].installed and not (options.quick and WAYS[way].compiles)]
    return {name: ways for name in works if not options.only or any(word in name for word in options.only)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only works with such a word in their names")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), metavar="WAY", help=f"of {', '.join(map(repr, WAYS))}")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for a way to be ready, compiled and measured once")
    parser.add_argument("--quick", action="store_true", help="three small works, nothing compiled, one thread, two rounds; writes nothing")
    parser.add_argument("--small", action="store_true", help="small works of each kind; writes results/compare_small.jsonl")
    parser.add_argument("--again", action="store_true", help="also what has a row")
    parser.add_argument("--rss", action="store_true", help="then the peak resident size, in a fresh process for each row that lacks it")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for which the largest batch is told")
    parser.add_argument("--readme", action="store_true", help="put the tables, and the picture if there is matplotlib, into docs/")
    parser.add_argument("--targets", action="store_true", help="only show the targets, and what was measured")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.quick:
        options.threads, options.rounds = 1, 2  # small operations gain nothing from a second
    torch.set_num_threads(options.threads)
    works = SMALL if options.small else dict(list(SMALL.items())[:QUICK]) if options.quick else WORKS
    results = Results(None if options.quick else LINES.with_name("compare_small.jsonl") if options.small else LINES)
    if not options.targets:
        asked = chosen(works, options)
        lacking = {name: [way for way in ways if options.again or not results.has(name, way)] for name, ways in asked.items()}
        measuring = Options(options.rounds, options.threads, not options.quick, options.limit)
        sweep(partial(child, works is not WORKS), {name: ways for name, ways in lacking.items() if ways}, measuring, results)
        if options.rss:
            add_resident(works is not WORKS, asked, options.threads, results)
        print(long(list(results.rows.values()), works, options.memory))
        for way in WAYS.values():
            if not way.installed:
                print(f"- {way.name}: the module {way.package} is not installed")
    if options.targets or options.readme:
        print(table(*reached(results.rows)))
    if options.readme:
        show("compare", *by_work(list(results.rows.values()), works))
        show("targets", *reached(results.rows))
        draw(results.rows, ROOT.parent / "docs" / "compare.svg")


if __name__ == "__main__":
    main()
