"""The benchmark for GPUs runs, here on tiny models; and the page shows what its kept JSON gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """Its modules: `benchmarks` is a folder of the repository's root."""
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.gpu.largest
    import benchmarks.gpu.table

    return benchmarks.gpu


def test_all_but_the_compilers_run_on_tiny_models(tmp_path, gpu):
    command = ["-m", "benchmarks.gpu", "--out", tmp_path, "--device", "cpu", "--tiny", "--models", "encoder_bf16"]
    subprocess.run([sys.executable, *command, "--only", "arithmetic", "models", "study", "largest"], cwd=ROOT, check=True)
    run = json.loads((tmp_path / "gpu.json").read_text())
    rows = run["rows"]
    assert not [row for row in rows if row.get("error") or row.get("skipped") or row.get("stopped") or row.get("exact_error")]
    assert all(run["parts"].values())
    compared = [row for row in rows if row.get("way") == "momentum" and row["part"] in ("models", "study")]
    assert [row["exact"] and row["finite"] and row["plain_repeats"] for row in compared] == [True, True]
    assert all(row["exact"] for row in rows if row["part"] == "arithmetic" and row["loop"].startswith(("state.step", "state.unstep", "24")))
    assert len([row for row in rows if row["part"] == "largest" and 0 < row["fits"] < row["fails"]]) == 6
    text = gpu.table.page([run])
    assert all(f"| {row['way']} " in text for row in rows if "way" in row)
    assert "Not measured" not in text


def test_the_page_shows_what_the_kept_run_gives(gpu):
    kept = gpu.table.kept()
    assert kept
    assert gpu.table.shown() == gpu.table.page(kept)
    assert gpu.table.shown(gpu.table.README) == gpu.table.gist(kept)


def test_a_page_tells_what_was_not_measured(gpu):
    machine = {"device": "card", "memory_gib": 80.0, "torch": "2.11.0", "date": "2026-11-27"}
    rows = [
        {"part": "models", "model": "a model", "way": "plain", "error": "OutOfMemoryError: too much"},
        {
            "part": "models",
            "model": "a model",
            "way": "momentum",
            "unit": "tokens",
            "peak_gib": 0.5,
            "ms": 2.0,
            "per_second": 1234.0,
            "exact": False,
        },
    ]
    text = gpu.table.page([{"machine": machine, "tiny": False, "rows": rows}])
    assert text.startswith("One card (80 GiB), torch 2.11.0, 27 November 2026.\n")
    assert "- models / a model / plain: OutOfMemoryError: too much" in text
    assert "| momentum | 0.5         | 2    | 1,234               | no      |" in text
    assert gpu.table.page([]) == gpu.table.NOTHING


@pytest.mark.parametrize("room", [0, 3, 8, 100, 1000])
def test_the_largest_that_fits_is_found(gpu, room):
    found = gpu.largest.largest(lambda n: n <= room, 8, 16)
    assert found["fits"] <= room < found["fails"]
    assert found["fails"] - found["fits"] <= max(1, room // 16)


def test_a_search_that_runs_out_of_time_keeps_what_it_found(gpu):
    def fits(n):
        if n > 32:
            raise gpu.largest.TimeIsUp
        return True

    assert gpu.largest.largest(fits, 8, 16) == {"fits": 32, "fails": None, "probes": 3, "stopped": "time was up"}
