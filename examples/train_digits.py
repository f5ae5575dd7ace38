"""Handwritten digits by a pre-activation ResNet: plain, and as a momentum network at three gammas, from the same initial weights.

    python examples/train_digits.py     # five seeds; needs scikit-learn, which ships the images

Each seed draws its own split into training and test images, initial weights and order of the batches, the same for all four networks.
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mnet_fx

WIDTH, BLOCKS, BATCH, TRAIN = 16, 6, 64, 1344
NETWORKS = {"plain": None, "gamma 0.9": 0.9, "gamma 0.5": 0.5, "gamma 0.1": 0.1}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [[nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)] for _ in range(2)]
        self.branch = nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTH, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def accuracy(gamma: float | None, seed: int, epochs: int) -> float:
    """Of the test images, in percent, after training from scratch."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    model = Net()
    net = model if gamma is None else mnet_fx.momentumize(model, gamma=gamma)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * (TRAIN // BATCH))
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        return 100 * (net(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean().item()


def draw(found: dict[str, list[float]], path: str) -> None:
    """Accuracies as points, one column for each network."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for i, accuracies in enumerate(found.values()):
        axis.plot([i] * len(accuracies), accuracies, "o", alpha=0.6)
        axis.plot([i - 0.2, i + 0.2], [statistics.mean(accuracies)] * 2, "k-")
    axis.set(xticks=range(len(found)), xticklabels=found, ylabel="test accuracy, %", title="digits, each point a seed")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits by a pre-activation ResNet, plain and as momentum networks.")
    parser.add_argument("--quick", action="store_true", help="one seed and one epoch, to see that it runs; accuracies mean nothing then")
    parser.add_argument("--picture", default="train_digits.png")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    seeds, epochs = (1, 1) if chosen.quick else (5, 10)
    print(f"{BLOCKS} blocks of width {WIDTH}, {TRAIN} training images, {epochs} epochs, {seeds} seeds")
    found: dict[str, list[float]] = {}
    for name, gamma in NETWORKS.items():
        began = time.perf_counter()
        found[name] = [accuracy(gamma, seed, epochs) for seed in range(seeds)]
        mean, spread = statistics.mean(found[name]), statistics.stdev(found[name]) if seeds > 1 else float("nan")
        seconds = (time.perf_counter() - began) / seeds
        each = " ".join(f"{value:.2f}" for value in found[name])
        print(f"{name:10} {mean:6.2f} % +- {spread:.2f}   ({each})   {seconds:.0f} s each", flush=True)
    draw(found, chosen.picture)


if __name__ == "__main__":
    main()
