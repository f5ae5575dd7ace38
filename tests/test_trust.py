"""The judge of `benchmarks/trust.py`: what it says of this package, of plain autograd, and of what is known to be wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import trust
import trust_peers
from oracles import Biased
from trust import SITUATIONS, judged
from trust_peers import PEERS, Peer, residual

OURS = [peer for peer in PEERS if peer.package == "mnet-fx"]
QUICK = "aot_eager_decomp_partition"
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("peer", OURS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_ours_is_right_in_every_situation(situation, peer):
    verdict = judged(replace(situation, steps=min(situation.steps, 8)), peer, QUICK)
    assert verdict["result"] == ("n/a" if situation.name in peer.lacks else "error" if situation.changes else "right"), verdict
    assert not situation.changes or verdict["detail"].startswith("InversionError")


def plain(fs, keeps_random_state, compiler):
    return residual(fs)


def biased(fs, keeps_random_state, compiler):
    return residual(fs, lambda f, x: f(Biased.apply(x)))


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_plain_autograd_is_right(situation):
    verdict = judged(situation, Peer("plain", "torch", plain, residual))
    assert verdict["result"] == ("error" if situation.changes else "right"), verdict


SMOOTH = [s for s in SITUATIONS if not (s.changes or s.autocast or "overflows" in s.name)]


@pytest.mark.parametrize("situation", SMOOTH, ids=lambda situation: situation.name)
def test_an_error_of_a_hundredth_is_seen(situation):
    verdict = judged(situation, Peer("biased", "torch", biased, residual))
    assert verdict["result"] == "wrong", verdict


def test_what_is_known_to_be_wrong_is_seen():
    by_name = {peer.name: peer for peer in PEERS}
    situations = {situation.name: situation for situation in SITUATIONS}
    assert judged(situations[trust_peers.STATE], by_name["checkpoint"])["error"] > 0.1
    assert judged(situations["dropout"], by_name["inductor"], QUICK)["error"] > 0.1
    assert trust.shown(judged(situations["BatchNorm, its statistics"], by_name["checkpoint"])) == "counted 2 times"


def test_the_documentation_shows_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "trust.json").read_text())["rows"]
    table = (ROOT / "docs" / "measurements.md").read_text().split("<!-- trust -->")[1].split("<!-- /trust -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()][2:]
    assert [row["situation"] for row in rows] == [situation.name for situation in SITUATIONS]
    assert lines == [[row["situation"], row["reference"], *(row[peer.name] for peer in PEERS)] for row in rows]
    assert all(row[peer.name] == trust.shown(row["verdicts"][peer.name]) for row in rows for peer in PEERS)
