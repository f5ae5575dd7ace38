"""How the memory of a training step grows with depth: transformers and perceptrons, plain, under checkpoint, and as momentum networks.

    python examples/transformer_memory.py     # about two minutes

The tutorial of the package momentumnet shows two of these lines. Bytes are those that forward and backward allocate at most, beyond
parameters and gradients (`mnet_fx.measure`); on a GPU, of the caching allocator.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnet_fx

TOKENS, BATCH, WIDTH = 128, 8, 128  # of the transformer
ROWS, FEATURES = 2048, 128  # of the perceptrons
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def transformer(depth: int) -> nn.Transformer:
    """Half encoder, half decoder."""
    return nn.Transformer(WIDTH, 4, depth // 2, depth // 2, 4 * WIDTH, dropout=0.0, batch_first=True)


def perceptrons(depth: int) -> nn.Sequential:
    return nn.Sequential(*(Perceptron() for _ in range(depth)))


def checkpointed(model: nn.Module) -> nn.Module:
    """The activations of each layer are computed again in the backward pass."""
    for layer in (*model.encoder.layers, *model.decoder.layers) if isinstance(model, nn.Transformer) else model:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "checkpoint": checkpointed,
    "momentum": lambda model: mnet_fx.momentumize(model, gamma=0.9),
}


def mebibytes(build: Callable[[int], nn.Module], inputs: tuple[Tensor, ...], way: str, depth: int) -> float:
    """Peak of a training step, in MiB."""
    torch.manual_seed(0)
    net = WAYS[way](build(depth).to(DEVICE))

    def step() -> None:
        net(*inputs).square().mean().backward()

    step()  # so that gradients are there
    return mnet_fx.measure(step).peak / 2**20


def draw(found: dict[str, dict[str, list[float]]], depths: list[int], path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axis, (name, lines) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for way, values in lines.items():
            axis.plot(depths, values, "o-", label=way)
        axis.set(title=name, xlabel="layers", ylabel="peak beyond parameters, MiB", ylim=0, xscale="log", xticks=depths, xticklabels=depths)
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The memory of a training step against depth.")
    parser.add_argument("--quick", action="store_true", help="two small depths, to see that it runs")
    parser.add_argument("--picture", default="transformer_memory.png")
    chosen = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    depths = [2, 8] if chosen.quick else [2, 4, 8, 16, 32, 64]
    works = {
        f"nn.Transformer, {BATCH} x {TOKENS} x {WIDTH}": (transformer, tuple(torch.randn(2, BATCH, TOKENS, WIDTH, device=DEVICE))),
        f"perceptrons, {ROWS} x {FEATURES}": (perceptrons, (torch.randn(ROWS, FEATURES, device=DEVICE),)),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, (build, inputs) in works.items():
        print(f"\n{name}: peak of a training step beyond parameters, MiB, on {DEVICE}\nlayers     {''.join(f'{d:9}' for d in depths)}")
        found[name] = {}
        for way in WAYS:
            found[name][way] = [mebibytes(build, inputs, way, depth) for depth in depths]
            print(f"{way:11}{''.join(f'{value:9.1f}' for value in found[name][way])}", flush=True)
    draw(found, depths, chosen.picture)


if __name__ == "__main__":
    main()
