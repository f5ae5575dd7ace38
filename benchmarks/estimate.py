"""Is the estimate right? Bytes estimated before a training step runs, against those of torch's allocator while it runs.

    python benchmarks/estimate.py [--only encoder GPT-2] [--readme]

Each model plain, with a checkpoint around each block, and as a momentum network at gamma 0.9 and 0.1: bytes kept after the forward, and the
peak of forward and backward, with `.grad` allocated. Inputs are real numbers for the measurement and meta tensors for the estimate.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings

import torch
from budget_models import MODELS
from tables import ROOT, save
from torch import Tensor
from tqdm import tqdm

import mnet_fx
from mnet_fx.budget.blocks import block_paths, checkpointed

MIB = 2.0**20
COLUMNS = {
    "model": "model",
    "way": "way",
    "kept": "kept, MiB",
    "kept_estimated": "estimated",
    "kept_error": "off by",
    "peak": "peak, MiB",
    "peak_estimated": "estimated ",
    "peak_error": "off by ",
}


def measured(net: torch.nn.Module, inputs: tuple[Tensor, ...], loss) -> mnet_fx.Memory:
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    loss(net(*inputs)).backward()
    gc.collect()
    return mnet_fx.measure(lambda: loss(net(*inputs)).backward())


def rows_of(name: str, bar: tqdm) -> list[dict]:
    kind, make, loss = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make()
    meta = tuple(torch.empty_like(t, device="meta") for t in inputs)
    rows = []
    for gamma in (0.9, 0.1):
        begin = time.perf_counter()
        estimate = mnet_fx.estimate(model, meta, loss=loss, gamma=gamma)
        seconds = time.perf_counter() - begin
        net = mnet_fx.momentumize(model, gamma=gamma)
        runs = {f"momentum, {gamma}": (estimate.momentum, net)}
        if gamma == 0.9:
            net(*inputs)
            owners = [path for chain in net.__dict__["forward"].network.chains for path in chain]
            runs = {
                "plain": (estimate.plain, model),
                "checkpoint": (estimate.checkpoint, checkpointed(model, block_paths(model, owners))),
            } | runs
        for way, (expected, net) in runs.items():
            memory = measured(net, inputs, loss)
            rows.append(_row(name, kind, way, expected, memory, seconds))
            bar.update()
    return rows


def _row(name: str, kind: str, way: str, expected: mnet_fx.Way, memory: mnet_fx.Memory, seconds: float) -> dict:
    off = {"kept": expected.kept_bytes / memory.kept - 1, "peak": expected.peak_bytes / memory.peak - 1}
    return {
        "model": name,
        "kind": kind,
        "way": way,
        "kept": memory.kept / MIB,
        "kept_estimated": expected.kept_bytes / MIB,
        "kept_error": f"{off['kept']:+.2%}",
        "peak": memory.peak / MIB,
        "peak_estimated": expected.peak_bytes / MIB,
        "peak_error": f"{off['peak']:+.2%}",
        "seconds": seconds,
    }


def reestimated(name: str, known: list[dict], bar: tqdm) -> list[dict]:
    """The rows of a model with the measurements of before and estimates of now."""
    kind, make, loss = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make()
    rows = []
    for gamma in (0.9, 0.1):
        begin = time.perf_counter()
        estimate = mnet_fx.estimate(model, tuple(torch.empty_like(t, device="meta") for t in inputs), loss=loss, gamma=gamma)
        seconds = time.perf_counter() - begin
        ways = {f"momentum, {gamma}": estimate.momentum}
        if gamma == 0.9:
            ways = {"plain": estimate.plain, "checkpoint": estimate.checkpoint} | ways
        for way, expected in ways.items():
            row = next(row for row in known if (row["model"], row["way"]) == (name, way))
            memory = mnet_fx.Memory(round(row["kept"] * MIB), round(row["peak"] * MIB))
            rows.append(_row(name, kind, way, expected, memory, seconds))
            bar.update()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=list(MODELS), help="models; rows of the others stay as they are")
    parser.add_argument("--measured", action="store_true", help="estimate anew, and keep the measurements of results/estimate.json")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore", mnet_fx.MnetWarning)
    path = ROOT / "results" / "estimate.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    with tqdm(total=4 * len(options.only)) as bar:
        for name in options.only:
            found = reestimated(name, known, bar) if options.measured else rows_of(name, bar)
            rows = {model: [row for row in known if row["model"] == model] for model in MODELS} | {name: found}
            known = [row for group in rows.values() for row in group]
            save("estimate", known, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
