"""Paths on the line that must cross: x -> -x^3 by a ResNet and a momentum network (after Sander et al. 2021, arXiv 2102.07870).

    python examples/dynamics_1d.py      # five seeds, about a minute

One function f, a perceptron with 16 hidden units, is applied 15 times. A flow of the line keeps the order of the points, so the best that
it can do for a map that turns them round is to send all to 0: a mean squared error of 1/7, as x is uniform in [-1, 1). With a speed, paths
may cross.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from mnet_fx import MomentumNet, toy_datasets

DEPTH, HIDDEN, POINTS, GAMMA = 15, 16, 200, 0.9


def states(function: nn.Module, x: Tensor, momentum: bool) -> list[Tensor]:
    """x[0], ..., x[DEPTH], each of shape (points, 1)."""
    if momentum:
        return [x, *(MomentumNet([function] * depth, gamma=GAMMA, use_backprop=True)(x) for depth in range(1, DEPTH + 1))]
    found = [x]
    for _ in range(DEPTH):
        found.append(found[-1] + function(found[-1]))
    return found


def trained(momentum: bool, seed: int, steps: int) -> tuple[float, nn.Module]:
    """Mean squared error on the points, and f."""
    torch.manual_seed(seed)
    x = toy_datasets.make_data_1D(POINTS)
    function = nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    net = MomentumNet([function] * DEPTH, gamma=GAMMA, use_backprop=True) if momentum else lambda x: states(function, x, False)[-1]
    optimizer = torch.optim.Adam(function.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), -(x**3)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return nn.functional.mse_loss(net(x), -(x**3)).item(), function


def draw(functions: dict[str, nn.Module], path: str) -> None:
    """The paths of twenty points through the layers, and where they should end."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    x = torch.linspace(-1, 1, 20)[:, None]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axis, (name, function) in zip(figure.subplots(1, len(functions), sharey=True), functions.items(), strict=True):
        with torch.no_grad():
            paths = torch.cat(states(function, x, name == "momentum"), 1)
        for path_of_one in paths:
            axis.plot(path_of_one, linewidth=1, color=str(0.2 + 0.3 * float(path_of_one[0] > 0)))
        axis.plot([DEPTH] * len(x), -(x**3), "r_", label="wanted")
        axis.set(title=name, xlabel="layer", ylabel="x")
        axis.legend()
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="x -> -x^3 by a ResNet and by a momentum network.")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it runs; errors mean nothing then")
    parser.add_argument("--picture", default="dynamics_1d.png")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    seeds, steps = (1, 30) if chosen.quick else (5, 500)
    print(f"x -> -x^3, {DEPTH} layers that share one f of {HIDDEN} hidden units, {steps} steps of Adam; all to 0 has the error {1 / 7:.3f}")
    functions: dict[str, nn.Module] = {}
    for name, momentum in (("ResNet", False), ("momentum", True)):
        began, errors = time.perf_counter(), []
        for seed in range(seeds):
            error, function = trained(momentum, seed, steps)
            errors.append(error)
            functions.setdefault(name, function)
        each = " ".join(f"{error:.5f}" for error in errors)
        print(
            f"{name:10} error {each}   median {statistics.median(errors):.5f}   {(time.perf_counter() - began) / seeds:.0f} s each",
            flush=True,
        )
    draw(functions, chosen.picture)


if __name__ == "__main__":
    main()
