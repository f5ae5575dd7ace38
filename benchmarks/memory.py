"""How do bytes and time of a training step grow with depth? Plain, checkpoint per layer and per residual function, momentum.

    python benchmarks/memory.py [--layers 8 16 32 64] [--rounds 3] [--readme]

Pre-norm encoder, d = 256, 256 tokens, batch 8, float32, gamma 0.9, `.grad` allocated. Bytes are those of torch's allocator. Times are
medians of interleaved passes in one process, as ratios to plain.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from models import Encoder, checkpointed, checkpointed_layers
from tables import save, show
from torch import Tensor
from tqdm import tqdm

from mnet_fx import momentumize
from mnet_fx.budget.measured import measure

MIB = 2.0**20
COLUMNS = {"layers": "layers", "model": "model", "kept": "kept, MiB", "peak": "peak, MiB", "time": "time / plain"}


def measured(layers: int, rounds: int, bar: tqdm) -> list[dict]:
    encoder, x = Encoder(layers), torch.randn(8, 256, 256)
    net = momentumize(encoder, gamma=0.9)
    runs = {
        "plain": lambda: encoder(x),
        "checkpoint per layer": lambda: checkpointed_layers(encoder, x),
        "checkpoint per function": lambda: checkpointed(encoder, x),
        "momentum": lambda: net(x),
    }
    rows, times = [], {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run().sum().backward()
            if round_:  # the first makes .grad and warms up
                times[name].append(time.perf_counter() - begin)
            bar.update()
    for name, run in runs.items():
        memory = measure(lambda run=run: run().sum(), Tensor.backward)
        ratio = median(times[name]) / median(times["plain"])
        rows.append({"layers": layers, "model": name, "kept": memory.kept / MIB, "peak": memory.peak / MIB, "time": ratio})
        bar.update()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3, help="timed passes")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with tqdm(total=len(options.layers) * 4 * (options.rounds + 2)) as bar:
        rows = [row for layers in options.layers for row in measured(layers, options.rounds, bar)]
    save("memory", rows, COLUMNS, options.readme)
    if options.readme:
        show("memory_deepest", [row for row in rows if row["layers"] == max(options.layers)], COLUMNS)


if __name__ == "__main__":
    main()
