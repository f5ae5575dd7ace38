"""A momentum network under DistributedDataParallel, on handwritten digits; needs scikit-learn, which ships the images.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py     # a minute; gloo on CPUs, NCCL on GPUs
    python examples/ddp.py                                       # starts these two processes itself

Momentumize first, wrap after. Each process takes its half of every batch. Before training, the gradients are compared with those of one
process on the joined batch.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mnet_fx

WIDTH, BLOCKS, BATCH, TRAIN = 64, 8, 64, 1344


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def momentum_network() -> nn.Module:
    torch.manual_seed(0)  # the same weights in each process
    model = nn.Sequential(nn.Linear(64, WIDTH), *(Block() for _ in range(BLOCKS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
    return mnet_fx.momentumize(model, gamma=0.9)


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def gradients(net: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    net.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
    return [p.grad.clone() for p in net.parameters()]


def largest_difference(net: nn.Module, device: torch.device, images: Tensor, labels: Tensor) -> float:
    """Between the gradients of all processes together and those of one on the joined batch, relative to the largest gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    together = gradients(net, images[rank::ranks], labels[rank::ranks])
    alone = gradients(momentum_network().to(device), images, labels)
    pairs = list(zip(together, alone, strict=True))
    return max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)


def train(net: nn.Module, device: torch.device, epochs: int) -> list[float]:
    """Accuracy on the test images after each epoch, in percent."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = (t.to(device) for t in digits())
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(TRAIN, generator=generator).to(device).split(BATCH):
            own = batch[rank::ranks]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[own]), labels[own]).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            found.append(100 * (net(images[TRAIN:]).argmax(1) == labels[TRAIN:]).float().mean().item())
    return found


def draw(accuracies: list[float], path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(1, len(accuracies) + 1), accuracies, "o-")
    axis.set(xlabel="epochs", ylabel="accuracy on test images, %")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A momentum network under DistributedDataParallel.")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--picture", default="ddp.png")
    chosen = parser.parse_args()
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun sets it, and says so
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *sys.argv])
    torch.set_num_threads(1)
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    net = DistributedDataParallel(momentum_network().to(device))
    images, labels = (t[:BATCH].to(device) for t in digits())
    difference = largest_difference(net, device, images, labels)
    accuracies = train(net, device, 1 if chosen.quick else 12)
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} processes; gradients differ from those of one on the joined batch by {difference:.1e} of the largest"
        )
        print(f"accuracy after each epoch, %: {' '.join(f'{value:.1f}' for value in accuracies)}")
        draw(accuracies, chosen.picture)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
