"""What a capture costs: the first call of a kind, and what each later one spends beside the model's own operations.

    python benchmarks/capture.py [--rounds 5] [--calls 300] [--readme]

Without gradients, on one thread. The same backend, which runs graphs as they are and notes when it is called, stands behind `torch.compile`
and behind `momentumize(inner=...)`. *first call*: with the capture, of a fresh model after `torch._dynamo.reset()`; ways take turns,
medians. *later call*: from the call to the first graph, and from the end of the last one to the result: guards, mostly. Writes
benchmarks/results/capture.json.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from tables import save
from torch import Tensor, nn
from torchvision.models import resnet101
from transformers import BertConfig, BertModel

import mnet_fx

COLUMNS = {"model": "model", "way": "way", "first": "first call, s", "ratio": "of torch.compile", "later": "later call, ms"}
WAYS = ("torch.compile, eager", "momentumize")
NOTED: list[float] = []


def noting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that runs a graph as it is and notes when it begins and ends."""

    def run(*args: Any) -> Any:
        NOTED.append(time.perf_counter())
        try:
            return graph.forward(*args)
        finally:
            NOTED.append(time.perf_counter())

    return run


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """Twelve small layers: 200 parameters to be guarded, and next to nothing to compute."""
    config = BertConfig(num_hidden_layers=12, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=100)
    return BertModel(config), {"input_ids": torch.randint(0, 100, (1, 4)), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    return resnet101(), {"x": torch.randn(1, 3, 32, 32)}


MODELS = {"BERT, 12 layers, d 64": bert, "ResNet-101, 32 px": resnet}


def once(way: str, model: nn.Module, call: dict[str, Tensor], calls: int) -> tuple[float, float]:
    """Seconds of the first call, and milliseconds of later ones outside of graphs."""
    torch._dynamo.reset()
    gc.collect()  # the garbage of the one before
    net = torch.compile(model, backend=noting) if way == WAYS[0] else mnet_fx.momentumize(model, inner=noting)
    begin = time.perf_counter()
    net(**call)
    first = time.perf_counter() - begin
    outside = []
    for _ in range(calls):
        NOTED.clear()
        begin = time.perf_counter()
        net(**call)
        end = time.perf_counter()
        outside.append(NOTED[0] - begin + end - NOTED[-1])
    return first, median(outside) * 1e3


def measured(name: str, rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row for each way, of one model."""
    model, call = MODELS[name]()
    model.eval()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for i in range(rounds + 1):
        for way in WAYS:
            taken = once(way, model, call, calls)
            found[way] += [taken] if i else []
    firsts, laters = ({way: median(values[k] for values in found[way]) for way in WAYS} for k in (0, 1))
    return [{"model": name, "way": way, "first": firsts[way], "ratio": firsts[way] / firsts[WAYS[0]], "later": laters[way]} for way in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [row for rows in map(partial(measured, rounds=chosen.rounds, calls=chosen.calls), MODELS) for row in rows]
    save("capture", rows, COLUMNS, chosen.readme)


if __name__ == "__main__":
    main()
