"""What does `torch.compile(model, backend="mnet_fx")` keep, and what does a step and the compilation cost, beside inductor alone?

    python benchmarks/compiled.py [--what memory time compilation] [--rounds 5] [--readme]

- memory: bytes of torch's allocator, kept after the forward pass and at the peak of forward and backward, for GPT-2 (d = 256) of 4, 8 and
  16 layers, in train mode with dropout;
- time: medians of interleaved training steps in one process as ratios to inductor alone, on the pre-norm encoder of memory.py with 12
  layers and on GPT-2 small's width with 6 layers. "inductor, steps apart" is the bound of what any such backend can do: each residual
  function is compiled by itself and run again in the backward pass to its end (torch.utils.checkpoint without its early stop), and there
  is no momentum, no state, no proof;
- compilation: seconds that the backend takes (all of it but Dynamo's tracing), no caches, for encoders of 2 (which warms up), 12 and 48
  layers.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from models import Encoder
from tables import save
from torch import Tensor, nn
from torch._dynamo.utils import compilation_time_metrics
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from tqdm import tqdm

import mnet_fx
from mnet_fx.budget.measured import measure

MIB = 2.0**20
COLUMNS = {"model": "model", "layers": "layers", "compiler": "compiler"}
COLUMNS |= {"kept": "kept, MiB", "peak": "peak, MiB", "time": "time / inductor", "compilation": "compilation, s"}
EMPTY: dict[str, Any] = dict.fromkeys(COLUMNS, "")


def gpt2(layers: int, width: int, tokens: int, batch: int) -> tuple[nn.Module, Callable[[Callable], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=5000, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(0, 5000, (batch, tokens))
    return model, lambda f: f(input_ids=ids, labels=ids, use_cache=False).loss


def encoder(layers: int) -> tuple[nn.Module, Callable[[Callable], Tensor]]:
    x = torch.randn(8, 256, 256)
    return Encoder(layers), lambda f: f(x).square().mean()


def thrifty(budget: float) -> Callable[[torch.fx.GraphModule, list[Any]], Callable]:
    """Inductor, told to keep such a part of what it would."""

    def compile_(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return torch._dynamo.lookup_backend("inductor")(gm, inputs)

    return compile_


APART = "inductor, steps apart"
COMPILERS: dict[str, Any] = {"inductor": "inductor", "inductor, budget 0.1": thrifty(0.1), "mnet_fx": mnet_fx.backend(gamma=0.9)}


def apart(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """An encoder whose residual functions are compiled one by one, and each run again in the backward pass, to its end."""
    assert isinstance(model, Encoder)
    steps = [torch.compile(branch) for layer in model.layers for branch in (layer.attention, layer.mlp)]

    def run(x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            for step in steps:
                x = x + checkpoint(step, x, use_reentrant=False)
        return x

    return run


def compiled(model: nn.Module, compiler: str) -> Callable:
    return apart(model) if compiler == APART else torch.compile(model, backend=COMPILERS[compiler])


def compared(name: str, layers: int, made: tuple[nn.Module, Callable], compilers: list[str], rounds: int, memory: bool) -> list[dict]:
    """One row for each compiler, on copies of one model."""
    model, call = made
    torch._dynamo.reset()  # else the limit on recompilations is soon reached, and models run uncompiled
    rows, times = [], {compiler: [] for compiler in compilers}
    functions = {compiler: compiled(copy.deepcopy(model), compiler) for compiler in compilers}
    for function in functions.values():
        for _ in range(2):  # the second time, .grad is there
            call(function).backward()
    for _ in range(rounds):
        for compiler, function in functions.items():
            begin = time.perf_counter()
            call(function).backward()
            times[compiler].append(time.perf_counter() - begin)
    for compiler, function in functions.items():
        row: dict[str, Any] = EMPTY | {"model": name, "layers": layers, "compiler": compiler}
        if rounds:
            row["time"] = median(times[compiler]) / median(times["inductor"])
        if memory:
            bytes_ = measure(lambda f=function: call(f), Tensor.backward)
            row |= {"kept": bytes_.kept / MIB, "peak": bytes_.peak / MIB}
        rows.append(row)
    return rows


def memory(rounds: int) -> list[dict]:
    compilers = ["inductor", "inductor, budget 0.1", "mnet_fx"]
    made = {layers: gpt2(layers, 256, 128, 4) for layers in (4, 8, 16)}
    return [row for layers in tqdm(made) for row in compared("GPT-2, d = 256", layers, made[layers], compilers, 0, memory=True)]


def times(rounds: int) -> list[dict]:
    compilers = ["inductor", "mnet_fx"]
    rows = compared("encoder", 12, encoder(12), [*compilers, APART], rounds, memory=True)
    return rows + compared("GPT-2 small", 6, gpt2(6, 768, 128, 4), compilers, rounds, memory=True)


def compilation(rounds: int) -> list[dict]:
    rows = []
    for layers in tqdm((2, 12, 48)):
        torch._dynamo.reset()
        compilation_time_metrics.clear()
        model, call = encoder(layers)
        with torch._inductor.config.patch(force_disable_caches=True):
            call(torch.compile(model, backend=COMPILERS["mnet_fx"])).backward()
        seconds = sum(compilation_time_metrics["OutputGraph.call_user_compiler"])
        rows.append(
            {"model": "encoder", "layers": layers, "compiler": "mnet_fx", "kept": "", "peak": "", "time": "", "compilation": seconds}
        )
    return rows


def main() -> None:
    questions = {"memory": memory, "time": times, "compilation": compilation}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(questions), choices=list(questions))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    mnet_fx.reset_reports()
    rows = [row for name in options.what for row in questions[name](options.rounds)]
    assert all(report.regions for report in mnet_fx.reports() if report.residual_adds)
    save("compiled", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
