"""Where does the time of a training step go, and what does the proof cost: fingerprints of state, parameters, buffers and side inputs?

    python benchmarks/proof.py [--only encoder ResNet ...] [--rounds 9] [--threads 1] [--readme]

Works of `compare_works`, float32, gamma 0.9, each trained in six ways that take turns in one process:

- *plain*; *checkpoint*: `torch.utils.checkpoint` around each block; *to its end*: the same without its early stop. With it, a rerun ends
  before the last linear layer or convolution, whose result no gradient needs; to take a step back needs that result, so the difference is
  the price of running backwards that no implementation can avoid;
- momentum with activations stored, which has the exact arithmetic of the way forward and its autograd; *unproved*: reversible, with
  on_drift="ignore", which takes no fingerprints; *proved*: as it is. Where the work's target is of rest="checkpoint", with that.

Medians, of ratios taken within a round. Processor time, since a busy machine disturbs it less; with one thread it is the time that an idle
machine would show.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from compare_ways import Task, by_block, ours, plain
from compare_works import WORKS, Work
from tables import save
from torch.utils.checkpoint import set_checkpoint_early_stop
from tqdm import tqdm, trange

DEFAULT = ("encoder, 12 ", "MLP 16 ", "nn.Transformer", "LM, 9 ", "ResNet-101, 160", "diffusion")
WITH_REST = ("LM", "ResNet", "diffusion")
COLUMNS = {
    "work": "work",
    "milliseconds": "plain, ms",
    "checkpoint": "checkpoint",
    "to its end": "to its end",
    "stored": "momentum, stored",
    "unproved": "unproved",
    "proved": "proved",
    "unproved / to its end": "unproved / to its end",
    "proved / checkpoint": "proved / checkpoint",
}


def ways(work: Work) -> dict[str, Callable[[], Any]]:
    task = Task(work, work.make(), work.inputs(work.batch))
    rest = {"rest": "checkpoint"} if work.name.startswith(WITH_REST) else {}
    checkpointed = by_block(task)

    def to_the_end(*inputs: Any) -> Any:
        with set_checkpoint_early_stop(False):
            return checkpointed(*inputs)

    nets = {
        "plain": plain(task),
        "checkpoint": checkpointed,
        "to its end": to_the_end,
        "stored": ours(task, backward="stored"),
        "unproved": ours(task, on_drift="ignore", **rest),
        "proved": ours(task, **rest),
    }
    return {name: partial(step, net, task) for name, net in nets.items()}


def step(net: Callable[..., Any], task: Task) -> None:
    task.work.loss(net(*task.inputs)).backward()


def row(work: Work, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    runs = ways(work)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in trange(rounds + 2, leave=False):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            if round_ > 1:  # the first ones make .grad, capture, and warm up
                times[name].append(time.process_time() - begin)

    def ratio(name: str, base: str) -> float:
        return median(a / b for a, b in zip(times[name], times[base], strict=True))

    pairs = (("unproved", "to its end"), ("proved", "checkpoint"))
    ratios = {name: ratio(name, "plain") for name in runs} | {f"{name} / {base}": ratio(name, base) for name, base in pairs}
    return {"work": work.name, "milliseconds": f"{median(times['plain']) * 1e3:.0f}", **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", default=DEFAULT, help="works with such a word in their names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    works = [work for name, work in WORKS.items() if any(word in name for word in options.only)]
    save("proof", [row(work, options.rounds) for work in tqdm(works)], COLUMNS, options.readme)


if __name__ == "__main__":
    main()
