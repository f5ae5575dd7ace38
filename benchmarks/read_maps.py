"""What does it cost a training step that a network is calibrated: read maps of each kind, signs, and rotated velocities?

    python benchmarks/read_maps.py [--rounds 15] [--readme]

Six pre-norm transformer layers (d = 384, 6 heads, feed-forward 1536, dropout 0), 8 x 256 tokens, named as regions, gamma 0.25, on two
threads. All networks share their parameters and take turns in every round; the figure is the median over rounds of the time of a training
step relative to that of the uncalibrated network with matched weights in the same round, with the quartiles.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median, quantiles

import torch
from tables import save
from torch import nn

import mnet_fx

D, LAYERS, SHAPE = 384, 6, (8, 256)
COLUMNS = {"network": "network", "ratio": "step, relative", "quartiles": "quartiles"}


class Encoder(nn.Module):
    """Transformer layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(D, 6, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(LAYERS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def networks(model: nn.Module) -> dict[str, nn.Module]:
    """Those that are compared, the one that they are compared with first."""
    batches = [torch.randn(*SHAPE, D) for _ in range(4)]

    def made(weights: str = "matched", **calibration: object) -> nn.Module:
        net = mnet_fx.momentumize(model, gamma=0.25, weights=weights, regions=["layers"])
        if calibration:
            mnet_fx.calibrate(net, batches, **calibration)
        return net.train()

    return {
        'weights="matched"': made(),
        "the same once more": made(),
        "diagonal maps": made(kind="diagonal"),
        "maps of rank 24": made(kind="low-rank", rank=24),
        "maps of rank 48": made(kind="low-rank", rank=48),
        "maps of rank 96": made(kind="low-rank", rank=96),
        "full maps": made(kind="full"),
        'weights="signed"': made("signed"),
        "full maps, rotated": made(kind="full", rotate=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = Encoder()
    nets, x = networks(model), torch.randn(*SHAPE, D)
    ratios: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(options.rounds + 2):
        taken = {}
        for name in random.Random(turn).sample(list(nets), len(nets)):
            begin = time.perf_counter()
            nets[name](x).square().mean().backward()
            taken[name] = time.perf_counter() - begin
            model.zero_grad()
        for name, seconds in taken.items() if turn > 1 else ():
            ratios[name].append(seconds / taken['weights="matched"'])
    rows = []
    for name, found in ratios.items():
        low, _, high = quantiles(found, n=4)
        rows.append({"network": name, "ratio": f"{median(found):.3f}", "quartiles": f"{low:.3f} to {high:.3f}"})
    save("read_maps", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
