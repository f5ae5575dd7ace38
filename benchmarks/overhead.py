"""Microseconds of Python that a step costs, on tensors so small that nothing else takes time; on a GPU, what the host is busy with.

    python benchmarks/overhead.py [--device cuda] [--steps 48] [--rounds 60] [--readme] [--profile WAY]

A chain of steps x + tanh(linear(norm(x))), width 8, four rows: as it is, each step under `torch.utils.checkpoint`, captured by momentumize,
and as named layers. Ways take turns; medians, forward and backward apart. `beyond` is what a way takes beyond the checkpoint. Writes
benchmarks/results/overhead.json. With --profile, prints where Python's time goes instead.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from tables import save
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnet_fx

WIDTH, ROWS = 8, 4
COLUMNS = {
    "way": "microseconds per step",
    "forward": "forward",
    "backward": "backward",
    "forward beyond": "forward, beyond checkpoint",
    "backward beyond": "backward, beyond checkpoint",
}


class Block(nn.Module):
    """Three operations, with four parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class Chain(nn.Module):
    """Residual steps; `call` runs one."""

    def __init__(self, steps: int, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(steps))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.call is None else self.call(layer, x))
        return x


class Layer(Block):
    """With its own skip connection, for named regions."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def ways(steps: int, device: str) -> dict[str, nn.Module]:
    """All ways to run a chain of this length."""
    nets = {
        "plain": Chain(steps),
        "checkpoint": Chain(steps, partial(checkpoint, use_reentrant=False)),
        "momentum, captured": mnet_fx.momentumize(Chain(steps)),
        "momentum, unproved": mnet_fx.momentumize(Chain(steps), on_drift="ignore"),
        "momentum, named": mnet_fx.momentumize(nn.Sequential(*(Layer() for _ in range(steps))), regions=[""]),
    }
    return {name: net.to(device) for name, net in nets.items()}


def timed(net: nn.Module, x: Tensor, steps: int) -> tuple[float, float]:
    """Microseconds per step of a forward and of a backward pass, without waiting for a device in between."""
    begin = time.perf_counter()
    loss = net(x).sum()
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    if x.is_cuda:
        torch.cuda.synchronize()
    return (middle - begin) / steps * 1e6, (end - middle) / steps * 1e6


def measured(steps: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each way."""
    nets, x = ways(steps, device), torch.randn(ROWS, WIDTH, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    for net in nets.values():
        for _ in range(3):
            timed(net, x, steps)
    for _ in range(rounds):
        for name, net in nets.items():
            times[name].append(timed(net, x, steps))
    rows = [{"way": name, "forward": median(f for f, _ in found), "backward": median(b for _, b in found)} for name, found in times.items()]
    base = next(row for row in rows if row["way"] == "checkpoint")
    for row in rows:
        row["forward beyond"], row["backward beyond"] = row["forward"] - base["forward"], row["backward"] - base["backward"]
    return rows


def profiled(way: str, steps: int, rounds: int, device: str) -> None:
    """Prints where Python's time goes, in microseconds per step."""
    net, x = ways(steps, device)[way], torch.randn(ROWS, WIDTH, device=device)
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(3):
            timed(net, x, steps)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(rounds):
            timed(net, x, steps)
        profile.disable()
    calls = steps * rounds
    rows = [
        [
            f"{own / calls * 1e6:.1f}",
            f"{cumulated / calls * 1e6:.1f}",
            f"{count / calls:.1f}",
            f"{'/'.join(file.split('/')[-2:])}:{line} {name}",
        ]
        for (file, line, name), (_, count, own, cumulated, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    ]
    rows.sort(key=lambda row: -float(row[0]))
    print(tabulate(rows[:70], headers=["own", "with callees", "calls", "function"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    parser.add_argument("--profile", metavar="WAY", help="such as 'momentum, captured'")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if chosen.profile:
        profiled(chosen.profile, chosen.steps, chosen.rounds, chosen.device)
        return
    rows = measured(chosen.steps, chosen.rounds, chosen.device)
    rounded = [{key: f"{value:.0f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    save("overhead", [{"device": chosen.device, "steps": chosen.steps, **row} for row in rounded], COLUMNS, chosen.readme)


if __name__ == "__main__":
    main()
