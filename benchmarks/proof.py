"""What does the proof cost: fingerprints of state, parameters, buffers and side inputs, taken in each step and checked in each rerun?

    python benchmarks/proof.py [--layers 12] [--rounds 9] [--threads 1] [--readme]

One training step of the pre-norm encoder, d = 256, 256 tokens, batch 8, float32, gamma 0.9, with on_drift="raise" against "ignore", which
takes no fingerprints, and against `torch.utils.checkpoint` around each residual function: as it is, and without its early stop. With it, a
rerun ends before the last linear layer, whose result no gradient needs; to take a step back needs that result, so this is the price of
running backwards that no implementation can avoid. Interleaved in one process; medians, of ratios taken within a round. Processor time,
since a busy machine disturbs it less; with one thread it is the time that an idle machine would show.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from models import Encoder, checkpointed
from tables import save
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from tqdm import trange

from mnet_fx import momentumize

COLUMNS = {"name": "training step", "milliseconds": "processor ms", "ratio": "ratio to unproved", "checkpoint": "ratio to checkpoint"}


def models(layers: int) -> dict[str, Callable[[Tensor], Tensor]]:
    encoder = Encoder(layers)
    proved, unproved = (momentumize(encoder, gamma=0.9, on_drift=choice) for choice in ("raise", "ignore"))

    def to_the_end(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return checkpointed(encoder, x)

    return {
        "checkpoint": lambda x: checkpointed(encoder, x),
        "checkpoint, no early stop": to_the_end,
        "momentum, unproved": unproved,
        "momentum": proved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs, x = models(options.layers), torch.randn(8, 256, 256)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in trange(options.rounds + 1):
        for name, run in runs.items():
            begin = time.process_time()
            run(x).sum().backward()
            if round_:  # the first makes .grad and warms up
                times[name].append(time.process_time() - begin)

    def ratio(name: str, base: str) -> float:
        return median(a / b for a, b in zip(times[name], times[base], strict=True))

    rows = [
        {
            "name": name,
            "milliseconds": median(taken) * 1e3,
            "ratio": ratio(name, "momentum, unproved"),
            "checkpoint": ratio(name, "checkpoint"),
        }
        for name, taken in times.items()
    ]
    save("proof", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
