"""A small GPT over characters, trained from scratch: plain, and as a momentum network at three gammas, from the same initial weights.

    python examples/language_model.py     # some minutes on two cores

The text is the documentation in the modules of Python's own library, which everyone has: the docstrings of every fifth file are held out.
Loss in bits per character; checkpoint around each block has that of plain. Bytes are the peak of a training step beyond parameters and
gradients (`mnet_fx.measure`), with `rest="checkpoint"`, under which the last layer and the loss are computed in parts.
"""

import argparse
import ast
import math
import sysconfig
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mnet_fx

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 6, 64, 24
GAMMAS = {"gamma 0.9": 0.9, "gamma 0.5": 0.5, "gamma 0.1": 0.1}
NETWORKS = ["plain", "checkpoint", *GAMMAS]
RATE, WARM = 6e-3, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, characters: int, checkpointed: bool) -> None:
        super().__init__()
        self.call = partial(checkpoint, use_reentrant=False) if checkpointed else lambda block, x: block(x)
        self.embedding, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = self.call(block, x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def docstrings(path: Path) -> str:
    """Those of a file, one after the other."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def texts() -> tuple[Tensor, Tensor, int]:
    """Characters to train on and characters held out, as numbers, and how many kinds there are; the last is for whatever is no ASCII."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = ["\n\n".join(docstrings(path) for i, path in enumerate(files) if (i % 5 == 0) == held) for held in (False, True)]
    kinds = [c for c in map(chr, range(128)) if c == "\n" or c.isprintable()]
    numbers = {c: i for i, c in enumerate(kinds)}
    train, held = (torch.tensor([numbers.get(c, len(kinds)) for c in part]) for part in parts)
    return train, held, len(kinds) + 1


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and the characters after them, each of shape (BATCH, CONTEXT)."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    found = text[starts + torch.arange(CONTEXT + 1)].to(DEVICE)
    return found[:, :-1], found[:, 1:]


def bits(net: nn.Module, text: Tensor, batches: int) -> float:
    """Per character of a text, the same passages each time."""
    generator = torch.Generator().manual_seed(1)
    net.eval()
    with torch.no_grad():
        found = sum(net(*batch(text, generator)).item() for _ in range(batches)) / batches
    net.train()
    return found / math.log(2)


def trained(name: str, train: Tensor, held: Tensor, kinds: int, steps: int) -> dict:
    """Bits per character on the way; peak, and seconds of a step."""
    torch.manual_seed(0)
    model = Model(kinds, name == "checkpoint").to(DEVICE)
    net = mnet_fx.momentumize(model, gamma=GAMMAS[name], rest="checkpoint") if name in GAMMAS else model
    optimizer = torch.optim.AdamW(net.parameters(), RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator, curve, seconds = torch.Generator().manual_seed(0), [], 0.0
    for step in range(steps):
        if step % max(1, steps // 8) == 0:
            curve.append((step, bits(net, held, 8)))
        began = time.perf_counter()
        optimizer.zero_grad()
        net(*batch(train, generator)).backward()
        optimizer.step()
        schedule.step()
        seconds += (time.perf_counter() - began) * (step > 0)  # the first step of a momentum network captures it
    curve.append((steps, bits(net, held, 32)))
    inputs = batch(train, generator)
    return {"curve": curve, "peak": mnet_fx.measure(lambda: net(*inputs).backward()).peak, "seconds": seconds / max(1, steps - 1)}


def draw(found: dict[str, dict], path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, run in found.items():
        axis.plot(*zip(*run["curve"], strict=True), label=name)
    axis.set(xlabel="steps", ylabel="bits per character, held out")
    axis.legend()
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A character model, plain and as a momentum network.")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; losses mean little then")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--picture", default="language_model.png")
    chosen = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    steps = 8 if chosen.quick else chosen.steps
    train, held, kinds = texts()
    print(f"{len(train):,} characters to train on, {len(held):,} held out")
    print(f"{LAYERS} blocks of width {WIDTH}, {steps} steps of {BATCH} x {CONTEXT} characters")
    print("            bits held out      peak   a step")
    found = {}
    for name in NETWORKS:
        run = trained(name, train, held, kinds, min(steps, 20) if name == "checkpoint" else steps)
        if name != "checkpoint":
            found[name] = run
        loss = "as plain" if name == "checkpoint" else format(run["curve"][-1][1], ".3f")
        print(f"{name:11} {loss:>13} {run['peak'] / 2**20:5.1f} MiB {run['seconds']:6.3f} s", flush=True)
    draw(found, chosen.picture)


if __name__ == "__main__":
    main()
