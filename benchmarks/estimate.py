"""Is the estimate right? Bytes estimated before a training step runs, against those of torch's allocator while it runs.

    python benchmarks/estimate.py [--only encoder GPT-2] [--readme]
    python benchmarks/estimate.py --held-out [--only BERT] [--readme]      # models that no constant of the estimate was settled with

Each model plain, with a checkpoint around each block, and as a momentum network at gamma 0.9 and 0.1: bytes kept after the forward, and the
peak of forward and backward, with `.grad` allocated. Inputs are real numbers for the measurement, and meta tensors for the estimate.
"values": how far that with values=True is off, which sees them in a forward pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from budget_models import MODELS
from held_out_models import HELD_OUT, total
from tables import ROOT, save
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

import mnet_fx
from mnet_fx.budget.blocks import block_paths, checkpointed

MIB = 2.0**20
GAMMAS = (0.9, 0.1)
COLUMNS = {
    "model": "model",
    "way": "way",
    "kept": "kept, MiB",
    "kept_estimated": "estimated",
    "kept_error": "off by",
    "kept_values": "values",
    "peak": "peak, MiB",
    "peak_estimated": "estimated ",
    "peak_error": "off by ",
    "peak_values": "values ",
}


Call = tuple[Any, ...] | dict[str, Any]
Model = tuple[str, Callable[[], tuple[nn.Module, Call]], Callable[[Any], Tensor]]
_OTHERS: dict[str, Model] = {name: ("held out", make, total) for name, make in HELD_OUT.items()}


def called(net: nn.Module, call: Call) -> Any:
    return net(**call) if isinstance(call, dict) else net(*call)


def measured(net: nn.Module, call: Call, loss: Callable[[Any], Tensor]) -> mnet_fx.Memory:
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    loss(called(net, call)).backward()
    gc.collect()
    return mnet_fx.measure(lambda: loss(called(net, call)).backward())


@dataclass(frozen=True)
class Estimated:
    """Of one way: from sizes alone, and with values."""

    sizes: mnet_fx.Way
    values: mnet_fx.Way
    seconds: float


def estimates(model: nn.Module, inputs: Call, loss: Callable[[Any], Tensor], gamma: float) -> dict[str, Estimated]:
    """Of plain training, checkpoints and the momentum network at a gamma; the first two do not depend on it, nor on values."""
    meta = tree_map(lambda t: torch.empty_like(t, device="meta"), inputs)
    begin = time.perf_counter()
    found = mnet_fx.estimate(model, meta, loss=loss, gamma=gamma)
    seconds = time.perf_counter() - begin
    values = mnet_fx.estimate(model, inputs, loss=loss, gamma=gamma, values=True)
    ways = {f"momentum, {gamma}": Estimated(found.momentum, values.momentum, seconds)}
    if gamma != GAMMAS[0]:
        return ways
    return {name: Estimated(getattr(found, name), getattr(values, name), seconds) for name in ("plain", "checkpoint")} | ways


def rows_of(name: str, bar: tqdm, models: Mapping[str, Model] = MODELS) -> list[dict]:
    kind, make, loss = models[name]
    torch.manual_seed(0)
    model, inputs = make()
    rows = []
    for gamma in GAMMAS:
        expected = estimates(model, inputs, loss, gamma)
        net = mnet_fx.momentumize(model, gamma=gamma)
        nets = {f"momentum, {gamma}": net}
        if "checkpoint" in expected:
            called(net, inputs)
            owners = [path for chain in net.__dict__["forward"].network.chains for path in chain]
            nets |= {"plain": model, "checkpoint": checkpointed(model, block_paths(model, owners))}
        for way, estimated in expected.items():
            rows.append(_row(name, kind, way, estimated, measured(nets[way], inputs, loss)))
            bar.update()
    return rows


def _row(name: str, kind: str, way: str, estimated: Estimated, memory: mnet_fx.Memory) -> dict:
    row = {"model": name, "kind": kind, "way": way, "seconds": estimated.seconds}
    for what in ("kept", "peak"):
        measured, sizes, values = (
            getattr(memory, what),
            getattr(estimated.sizes, f"{what}_bytes"),
            getattr(estimated.values, f"{what}_bytes"),
        )
        row |= {what: measured / MIB, f"{what}_estimated": sizes / MIB}
        row |= {f"{what}_error": f"{sizes / measured - 1:+.2%}", f"{what}_values": f"{values / measured - 1:+.2%}"}
    return row


def reestimated(name: str, known: list[dict], bar: tqdm, models: Mapping[str, Model] = MODELS) -> list[dict]:
    """The rows of a model with the measurements of before and estimates of now."""
    kind, make, loss = models[name]
    torch.manual_seed(0)
    model, inputs = make()
    rows = []
    for gamma in GAMMAS:
        for way, estimated in estimates(model, inputs, loss, gamma).items():
            row = next(row for row in known if (row["model"], row["way"]) == (name, way))
            rows.append(_row(name, kind, way, estimated, mnet_fx.Memory(round(row["kept"] * MIB), round(row["peak"] * MIB))))
            bar.update()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true", help="the models of held_out_models.py")
    parser.add_argument("--only", nargs="+", choices=[*MODELS, *_OTHERS], help="models; rows of the others stay as they are")
    parser.add_argument("--measured", action="store_true", help="estimate anew, and keep the measurements of results/")
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    models, result = (_OTHERS, "estimate_held_out") if options.held_out else (MODELS, "estimate")
    torch.set_num_threads(2)
    warnings.simplefilter("ignore", mnet_fx.MnetWarning)
    path = ROOT / "results" / f"{result}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    chosen = options.only or list(models)
    with tqdm(total=4 * len(chosen)) as bar:
        for name in chosen:
            found = reestimated(name, known, bar, models) if options.measured else rows_of(name, bar, models)
            rows = {model: [row for row in known if row["model"] == model] for model in models} | {name: found}
            known = [row for group in rows.values() for row in group]
            save(result, [row for row in known if COLUMNS.keys() <= row.keys()], COLUMNS, options.readme)  # some may be of before a column


if __name__ == "__main__":
    main()
