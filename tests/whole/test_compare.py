"""`benchmarks/compare.py`: a tiny work runs through, wrong gradients and processes that end are seen, and what has a row is left alone."""

import json
import os
import time
from dataclasses import replace

import compare
import compare_targets
import pytest
from compare_measuring import Options, measured
from compare_picture import draw
from compare_tables import by_work, largest, long
from compare_targets import BLOCKS, COLUMNS, Target, reached
from compare_ways import WAYS, Way
from compare_works import SMALL, mlp
from oracles import Biased
from tables import ROOT
from torch import nn

WORK = replace(mlp(6, 64, 32, 32), name="tiny")
OPTIONS = Options(rounds=2, threads=1)
EAGER = [way for way in WAYS.values() if way.installed and not way.compiles]


def nothing(*said):
    pass


@pytest.fixture(scope="module")
def rows():
    found = {row["way"]: {"work": "tiny", **row} for row in measured(WORK, EAGER, OPTIONS, nothing)}
    assert set(found) == {way.name for way in EAGER}
    assert {name for name, row in found.items() if "unfit" in row} == {"checkpoint per block, chunked head"}
    return {name: row for name, row in found.items() if "unfit" not in row}


def test_every_way_of_a_tiny_work_is_measured_and_right(rows):
    assert {name: row["gradient"]["result"] for name, row in rows.items()} == dict.fromkeys(rows, "right")
    assert rows["mnet_fx"]["kept"] < rows["checkpoint per block"]["kept"] < rows["plain"]["kept"]
    assert rows["plain"]["ratio"] == rows["plain"]["low"] == rows["plain"]["high"] == 1.0
    assert all(len(row["seconds"]) == 2 for row in rows.values())


def test_tables_show_what_was_measured(rows):
    lost = {"work": "tiny", "way": "inductor", "error": "the process ended with code 9"}
    text = long([*rows.values(), lost], ["tiny"], 4.0)
    assert all(f"| {name} " in text for name in rows)
    assert "- inductor: the process ended with code 9 (tiny)" in text
    (line,), columns = by_work([*rows.values(), lost], ["tiny"])
    assert line["plain"].endswith(" / 1.00")
    assert line["inductor"] == "error"
    assert list(columns) == ["work", *(way for way in WAYS if way in {*rows, "inductor"})]


def test_the_largest_batch_lies_on_the_line_through_two(rows):
    row = {"peak": 30.0, "static": 10.0, "batch": 8, "half": {"batch": 4, "total": 24.0}}  # 8 MiB and 4 for each
    assert [largest(row, mib / 1024) for mib in (40, 43, 44, 4)] == [8, 8, 9, 0]
    assert largest(rows["plain"], 1.0) < largest(rows["mnet_fx"], 1.0)
    assert largest(rows["mnet_fx, memory="], 1.0) is None


def test_targets_are_met_or_not():
    target = Target("tiny", "mnet_fx", "peak", 0.75, (BLOCKS,))
    rows = {("tiny", BLOCKS): {"peak": 40.0, "ratio": 1.2}}
    assert target.line(rows)["met"] == "not measured"
    assert [target.line(rows | {("tiny", "mnet_fx"): {"peak": peak}})["met"] for peak in (30.0, 30.1)] == ["yes", "no"]
    below = replace(target, most=1.0, below=True)
    assert [below.line(rows | {("tiny", "mnet_fx"): {"peak": peak}})["met"] for peak in (39.9, 40.0)] == ["yes", "no"]
    alone = replace(target, most=41, others=())
    assert [alone.line({("tiny", "mnet_fx"): {"peak": peak}})["met"] for peak in (41.02, 41.6)] == ["yes", "no"]


def test_targets_are_of_works_and_ways_that_there_are():
    lines, columns = reached({})
    assert columns == COLUMNS
    assert {line["met"] for line in lines[:17]} == {"not measured"}
    for target in compare_targets.TARGETS:
        assert target.work in compare.WORKS
        assert {target.way, *target.others} <= set(WAYS)


def test_the_picture_has_a_field_for_each_work(rows, tmp_path):
    assert draw({(row["work"], row["way"]): row for row in rows.values()}, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert all(f">{word}<" in text for word in ("tiny", "mnet_fx", "checkpoint", "momentumnet"))
    assert not draw({}, tmp_path / "none.svg")


def test_a_fresh_process_tells_its_resident_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    work = "encoder, 3 layers, d 64"
    results = compare.Results(tmp_path / "rows.jsonl")
    results.add({"work": work, "way": "plain", "peak": 1.0})
    compare.add_resident(True, {work: ["plain"]}, 1, results)
    assert 0 < compare.Results(tmp_path / "rows.jsonl").rows[work, "plain"]["rss"] < 300


class BiasedNet(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return Biased.apply(self.net(x))


def test_a_gradient_that_is_off_by_a_hundredth_is_wrong():
    biased = Way("biased", "original", lambda task: BiasedNet(task.model))
    _, row = measured(WORK, [WAYS["plain"], biased], OPTIONS, nothing)
    assert row["gradient"]["result"] == "wrong"
    assert row["gradient"]["error"] == pytest.approx(0.01, rel=0.01)
    (line,), _ = by_work([{"work": "tiny"} | row | {"way": "mnet_fx"}], ["tiny"])
    assert line["mnet_fx"].endswith("**wrong**")


def test_a_way_that_cannot_be_built_has_a_row_that_says_why():
    def fails(task):
        raise TypeError("no such thing")

    rows = list(
        measured(SMALL["diffusion U-Net, 16 px"], [WAYS["plain"], WAYS["revlib"], Way("broken", "original", fails)], OPTIONS, nothing)
    )
    assert rows[:2] == [
        {"way": "revlib", "unfit": "blocks take more than the stream"},
        {"way": "broken", "error": "TypeError: no such thing"},
    ]
    assert rows[2]["way"] == "plain"


def ends(pipe, name, ways, options):
    """Stands in for a process of its own, in which the way "memcnn" crashes, and "revlib" takes long."""
    for way in ways:
        pipe.send(("doing", way))
        if way == "memcnn":
            os._exit(11)
        if way == "revlib":
            time.sleep(100)
        pipe.send(("done", None))
    for way in ways:
        pipe.send(("row", {"way": way, "peak": 1.0}))
    pipe.send(("end", None))


def test_a_process_that_ends_or_takes_long_costs_one_way(tmp_path):
    results = compare.Results(tmp_path / "rows.jsonl")
    compare.sweep(ends, {"tiny": ["memcnn", "mnet_fx", "revlib"]}, replace(OPTIONS, limit=2.0), results)
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["way"], row.get("peak"), row.get("error")) for row in kept] == [
        ("memcnn", None, "the process ended with code 11"),
        ("revlib", None, "not done in 2 s"),
        ("mnet_fx", 1.0, None),
    ]
    again = compare.Results(tmp_path / "rows.jsonl")
    assert again.has("tiny", "mnet_fx")
    assert not again.has("tiny", "plain")
    again.add(kept[2] | {"torch": "1.0"})
    assert not compare.Results(tmp_path / "rows.jsonl").has("tiny", "mnet_fx")


@pytest.mark.skipif(not compare.LINES.exists(), reason="no run is kept")
def test_the_documentation_shows_the_results():
    lines, columns = by_work(list(compare.Results(compare.LINES).rows.values()), compare.WORKS)
    shown = (ROOT.parent / "docs" / "measurements.md").read_text().split("<!-- compare -->")[1].split("<!-- /compare -->")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.strip().splitlines()]
    assert [cells[0], *cells[2:]] == [list(columns.values()), *([line[key] for key in columns] for line in lines)]
