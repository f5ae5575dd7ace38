"""Does a planned step stay within the memory that was stated, and is it as fast as what else fits? Ten budgets, and the fixed settings.

    python benchmarks/planner.py [--only encoder GPT-2 ...] [--rounds 5] [--quick] [--readme]

Of each model of `budget_models`: plain; a checkpoint around each block; `momentumize` with everything stored, with rest="store" and with
rest="checkpoint"; and memory= at ten budgets from 90 % of plain to the least. gamma 0.9, float32, `.grad` allocated; two threads. *asked*,
*predicted* and *measured* are what forward and backward take at their peak with parameters, gradients and inputs: predicted on fake
tensors, measured by torch's allocator. *slower* is against the fastest fixed setting of momentumize that fits in what was asked; times
are medians of interleaved steps in one process. The rows hold every figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from budget_models import MODELS
from tables import save
from torch import Tensor, nn
from tqdm import tqdm

import mnet_fx
from mnet_fx.budget.blocks import block_paths, checkpointed
from mnet_fx.budget.estimating import Request
from mnet_fx.budget.measured import measure

MIB = 2.0**20
BUDGETS = 10
FIXED = {"all stored": {"backward": "stored"}, "rest stored": {}, "rest under checkpoint": {"rest": "checkpoint"}}
COLUMNS = {
    "model": "model",
    "setting": "setting",
    "asked": "asked, MiB",
    "predicted": "predicted",
    "measured": "measured",
    "time": "time / plain",
    "slower": "slower than the fastest fixed",
}


def nets_of(model: nn.Module, inputs: tuple[Tensor, ...], loss: Callable[[Any], Tensor], budgets: int) -> tuple[dict, dict]:
    """The ways to run a model, and what each was asked to take and is predicted to."""
    first = mnet_fx.plan(model, inputs, memory=0.999, loss=loss)
    least, plain = first.least.total_bytes, first.plain.total_bytes
    request = Request.of(model, inputs, None, loss, {})
    blocks = request.at(None).checkpoint
    static = plain - first.plain.peak_bytes
    nets = {"plain": model, "checkpoint per block": checkpointed(model, block_paths(model, request.owners))}
    said = {"plain": (None, plain), "checkpoint per block": (None, None if blocks is None else blocks.total_bytes)}
    for name, options in FIXED.items():
        nets[name], said[name] = mnet_fx.momentumize(model, **options), (None, None)
    for i in range(budgets):
        asked = round(0.9 * plain + (least - 0.9 * plain) * i / max(budgets - 1, 1))
        plan = first.at(max(asked, least))
        name = f"memory={asked / plain:.2f}"
        nets[name], said[name] = mnet_fx.momentumize(model, **plan.options), (plan.memory, plan.predicted.total_bytes)
    return nets, {name: (*of, static) for name, of in said.items()}


def measured(title: str, rounds: int, budgets: int, bar: tqdm) -> list[dict]:
    _, make, loss = MODELS[title]
    torch.manual_seed(0)
    model, inputs = make()
    nets, said = nets_of(model, inputs, loss, budgets)
    times: dict[str, list[float]] = {name: [] for name in nets}
    for round_ in range(rounds + 1):
        for name, net in nets.items():
            begin = time.perf_counter()
            loss(net(*inputs)).backward()
            if round_:  # the first makes .grad and captures
                times[name].append(time.perf_counter() - begin)
            bar.update()
    rows = []
    for name, net in nets.items():
        asked, predicted, static = said[name]
        peak = measure(lambda net=net: loss(net(*inputs)), Tensor.backward).peak + static
        ratio = median(times[name]) / median(times["plain"])
        spread = (max(times[name]) - min(times[name])) / median(times[name])
        rows.append({"model": title, "setting": name, "asked": _mib(asked), "predicted": _mib(predicted), "measured": peak / MIB})
        rows[-1] |= {"time": ratio, "spread": spread, "slower": "", "over": "" if asked is None else peak / asked - 1}
    for row in rows:
        fitting = [other["time"] for other in rows if other["setting"] in FIXED and other["measured"] <= (row["asked"] or 0)]
        if row["asked"] and fitting:
            row["slower"] = f"{row['time'] / min(fitting) - 1:+.0%}"
    return rows


def _mib(size: int | None) -> float | str:
    return "" if size is None else size / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["encoder", "GPT-2", "ResNet-50", "U-Net"], choices=[*MODELS])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--quick", action="store_true", help="the U-Net with three budgets and two steps; writes nothing")
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    titles, rounds, budgets = (["U-Net"], 2, 3) if options.quick else (options.only, options.rounds, BUDGETS)
    with tqdm(total=len(titles) * (2 + len(FIXED) + budgets) * (rounds + 1)) as bar:
        rows = [row for title in titles for row in measured(title, rounds, budgets, bar)]
    if options.quick:
        for row in rows:
            print(row)
    else:
        save("planner", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
