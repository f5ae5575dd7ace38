"""Four nested rings, separated by a momentum network and not by the ResNet of equal size (after Sander et al. 2021, arXiv 2102.07870).

    python examples/nested_rings.py                      # one seed
    python examples/nested_rings.py --seeds 3 --untied   # each layer its own function: then the ResNet separates them too, at some seeds

One function f, a perceptron with 16 hidden units, is applied 15 times to points of the plane; then a line divides what has become of them.

    ResNet      x[t+1] = x[t] + f(x[t])                                      follows a flow of the plane, as far as its steps are small
    momentum    v[t+1] = 0.9 v[t] + 0.1 f(x[t]);  x[t+1] = x[t] + v[t+1]     a flow of position and speed: paths of x may cross

A flow of the plane cannot take a ring out of another. Large steps can, so the ResNet errs for want of training rather than by a theorem
once each layer has a function of its own.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from mnet_fx import MomentumNet, toy_datasets

RINGS, POINTS, DEPTH, HIDDEN, GAMMA = 4, 250, 15, 16, 0.9


class Separator(nn.Module):
    """`DEPTH` residual layers in the plane and a line; `states(x)` has the points after each layer."""

    def __init__(self, momentum: bool, untied: bool) -> None:
        super().__init__()
        made = [nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2)) for _ in range(DEPTH if untied else 1)]
        self.functions = nn.ModuleList(made * (1 if untied else DEPTH))
        self.head, self.momentum = nn.Linear(2, 2), momentum

    def features(self, x: Tensor, depth: int = DEPTH) -> Tensor:
        if self.momentum:
            return MomentumNet(self.functions[:depth], gamma=GAMMA, use_backprop=True)(x)
        for function in self.functions[:depth]:
            x = x + function(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def trained(momentum: bool, seed: int, steps: int, untied: bool) -> tuple[float, Separator]:
    """Accuracy on the points, in [0, 1], and the network."""
    torch.manual_seed(seed)
    points, labels = toy_datasets.make_data(POINTS, RINGS)
    torch.manual_seed(seed)
    net = Separator(momentum, untied)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(points), labels).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (net(points).argmax(1) == labels).float().mean().item(), net


def draw(nets: dict[str, Separator], path: str) -> None:
    """The points after every third layer."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    torch.manual_seed(0)
    points, labels = toy_datasets.make_data(POINTS, RINGS)
    depths = range(0, DEPTH + 1, 3)
    figure = Figure(figsize=(2.2 * len(depths), 4.6), layout="constrained")
    axes = figure.subplots(len(nets), len(depths))
    for row, (name, net) in zip(axes, nets.items(), strict=True):
        for axis, depth in zip(row, depths, strict=True):
            with torch.no_grad():
                x, y = net.features(points, depth).T if depth else points.T
            axis.scatter(x, y, c=labels, s=2, cmap="coolwarm")
            axis.set(xticks=[], yticks=[], title=f"{name}, layer {depth}")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Nested rings: a momentum network against the ResNet of equal size.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that it runs; accuracies mean nothing then")
    parser.add_argument("--untied", action="store_true", help="each layer has a function of its own")
    parser.add_argument("--picture", default="nested_rings.png")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    seeds, steps, nets = (1, 30, {}) if chosen.quick else (chosen.seeds, 2000, {})
    print(f"{RINGS} rings of {POINTS} points, {DEPTH} layers, {HIDDEN} hidden units, {steps} steps of Adam")
    for name, momentum in (("ResNet", False), ("momentum", True)):
        began, accuracies = time.perf_counter(), []
        for seed in range(seeds):
            accuracy, net = trained(momentum, seed, steps, chosen.untied)
            accuracies.append(accuracy)
            nets.setdefault(name, net)
        seconds = (time.perf_counter() - began) / seeds
        each = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        print(f"{name:10} accuracy {each}   mean {statistics.mean(accuracies):.3f}   {seconds:.0f} s each", flush=True)
    draw(nets, chosen.picture)


if __name__ == "__main__":
    main()
