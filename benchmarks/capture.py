"""What a capture costs: the first call of a kind, and what each later one spends beside the model's own operations.

    python benchmarks/capture.py [--rounds 5] [--calls 300] [--readme]

Without gradients, on one thread. The same backend, which runs graphs as they are and notes when it is called, stands behind `torch.compile`
and behind `momentumize(inner=...)`. *first call*: with the capture, after `torch._dynamo.reset()`. *later call*: from the call to the first
graph, and from the end of the last one to the result. Ways take turns; medians. Hooks that come later have their effect in what
`momentumize` returns, which takes guards that `torch.compile` leaves out by itself. Writes benchmarks/results/capture.json.
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
HOOKED = "torch.compile, with guards of hooks"
WAYS = ("torch.compile", HOOKED, "momentumize")
NOTED: list[float] = []
Call = dict[str, Tensor]


def noting() -> Callable[..., Any]:
    """A backend that runs a graph as it is and notes when it begins and ends."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            NOTED.append(time.perf_counter())
            try:
                return graph.forward(*args)
            finally:
                NOTED.append(time.perf_counter())

        return run

    return backend


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    """Twelve small layers: 200 parameters to be guarded, and next to nothing to compute."""
    config = BertConfig(num_hidden_layers=12, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=100)
    return BertModel(config), {"input_ids": torch.randint(0, 100, (1, 4)), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    return resnet101(), {"x": torch.randn(1, 3, 32, 32)}


MODELS = {"BERT, 12 layers, d 64": bert, "ResNet-101, 32 px": resnet}


def built(way: str, model: nn.Module, call: Call) -> tuple[Callable[..., Any], float]:
    """A net whose first call is done, and the seconds that it took."""
    net = mnet_fx.momentumize(model, inner=noting()) if way == WAYS[-1] else torch.compile(model, backend=noting())
    gc.collect()  # the garbage of others
    begin = time.perf_counter()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=way != HOOKED):
        net(**call)
    return net, time.perf_counter() - begin


def outside(net: Callable[..., Any], call: Call) -> float:
    """Milliseconds of a call before the first graph and after the last."""
    NOTED.clear()
    begin = time.perf_counter()
    net(**call)
    return (NOTED[0] - begin + time.perf_counter() - NOTED[-1]) * 1e3


def measured(name: str, rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row for each way, of one model."""
    model, call = MODELS[name]()
    model.eval()
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    later: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds + 1):
        torch._dynamo.reset()
        nets = {way: built(way, model, call) for way in WAYS}
        for _ in range(calls if i else 0):  # the first round warms up
            for way, (net, _) in nets.items():
                later[way].append(outside(net, call))
        for way, (_, seconds) in nets.items():
            first[way] += [seconds] if i else []
    base = median(first[WAYS[0]])
    return [{"model": name, "way": w, "first": median(first[w]), "ratio": median(first[w]) / base, "later": median(later[w])} for w in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [row for rows in map(partial(measured, rounds=chosen.rounds, calls=chosen.calls), MODELS) for row in rows]
    save("capture", rows, COLUMNS, chosen.readme)


if __name__ == "__main__":
    main()
