"""Draws the README's picture from what `memory.py` measured. Run by hand: python benchmarks/pictures.py"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent
LOOKS = {  # colours of Okabe and Ito, which the colour-blind tell apart; marks for print
    "plain": ("#000000", "o", "plain"),
    "checkpoint": ("#0072B2", "s", "torch.utils.checkpoint"),
    "momentum": ("#D55E00", "^", "mnet_fx"),
}


def main() -> None:
    rows = json.loads((ROOT / "results" / "memory.json").read_text())["rows"]
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "mnet_fx", "font.size": 11}
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for model, (colour, mark, label) in LOOKS.items():
        found = [(row["layers"], row["peak"]) for row in rows if row["model"] == model]
        axes.plot(*zip(*found, strict=True), color=colour, marker=mark, label=label)
        axes.annotate(f"{found[-1][1]:.0f} MiB", found[-1], xytext=(6, 0), textcoords="offset points", va="center", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    layers = sorted({row["layers"] for row in rows})
    axes.set_xticks(layers, [str(n) for n in layers])
    axes.set_xlim(right=layers[-1] * 1.5)
    axes.set_xlabel("layers of a transformer encoder")
    axes.set_ylabel("peak MiB of a training step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT.parent / "docs" / "memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
