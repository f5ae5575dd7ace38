"""Draws the pictures of the pages, and the table of bytes by gamma: python benchmarks/pictures.py

`memory.svg` from what `memory.py` measured, `dial.svg` from what `exactness.py` measured; `shears.svg`, `bits.svg` and the table by theory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import tables
import torch

import mnet_fx
from mnet_fx.arithmetic.cost import spilled_planes
from mnet_fx.arithmetic.formats import Format

ROOT = Path(__file__).parent
LOOKS = {  # colours of Okabe and Ito, which the colour-blind tell apart; marks for print
    "plain": ("#000000", "o", "plain"),
    "checkpoint per layer": ("#0072B2", "s", "checkpoint per layer"),
    "momentum": ("#D55E00", "^", "mnet_fx"),
}
BLUE, RED, GREY = "#0072B2", "#D55E00", "#BBBBBB"
GAMMAS, STEPS = [0, 0.1, 0.25, 0.5, 0.9, 0.99], [2, 6, 12, 24, 48, 96]


def main() -> None:
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "mnet_fx", "font.size": 11}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    for name, draw in {"memory": memory, "shears": shears, "bits": bits, "dial": dial}.items():
        draw().savefig(ROOT.parent / "docs" / f"{name}.svg", metadata={"Date": None})
        plt.close("all")
    rows = [{"gamma": gamma, **{str(steps): f"{kept(gamma, steps):.0f}" for steps in STEPS}} for gamma in GAMMAS]
    tables.show(
        "gamma_bytes", [{k: str(v) for k, v in row.items()} for row in rows], {"gamma": "gamma"} | {str(n): f"{n} steps" for n in STEPS}
    )


def kept(gamma: float, steps: int) -> float:
    """Bytes for each element of a float32 stream: the state and what it spills, or the inputs of all steps if these are fewer."""
    return min(mnet_fx.state_bytes([gamma] * steps), 4.0 * steps)


def results(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["rows"]


def memory() -> Any:
    """Peak bytes against depth."""
    rows = results("memory")
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
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
    return figure


def shears() -> Any:
    """Integer points (X, U) before a step, after its first shear, and after its second."""
    start = [(x, u) for x in range(-3, 4) for u in range(-3, 4)]
    first = [(x, u + round(2 * math.sin(x))) for x, u in start]
    second = [(x + round(0.6 * u), u) for x, u in first]
    figure, panels = plt.subplots(1, 3, figsize=(5.2, 2.2), sharex=True, sharey=True)
    titles = ["before", "U += round(h(X))", "X += round(r U)"]
    for axes, points, title in zip(panels, [start, first, second], titles, strict=True):
        axes.scatter(*zip(*points, strict=True), c=[x for x, _ in start], cmap="cividis", s=12)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("X")
        axes.set_aspect("equal")
        axes.set_xticks([-6, 0, 6])
        axes.set_yticks([-6, 0, 6])
        axes.grid(color=GREY, linewidth=0.4)
    panels[0].set_ylabel("U")
    return figure


def bits(gamma: float = 0.1, steps: int = 24) -> Any:
    """Bits of u that matter after each step, in its integer and spilled, for a float32 stream of constant size."""
    form = Format.of(torch.float32)
    spilled = [8 * planes for planes in spilled_planes([gamma] * steps, form)]
    shed = [t * mnet_fx.step_bits(gamma) for t in (0, *range(steps))]  # v[0] = 0, so the first step sheds nothing
    held = [form.bits + s - out for s, out in zip(shed, spilled, strict=True)]
    figure, axes = plt.subplots(figsize=(5.2, 2.8))
    axes.bar(range(steps + 1), held, color=BLUE, label="in U, 8 bytes")
    axes.bar(range(steps + 1), spilled, bottom=held, color=RED, label="spilled: packed bytes")
    axes.axhline(math.log2(form.u_limit), color="black", linewidth=0.8, linestyle="--", label="room of U")
    axes.set_xlabel(f"step, gamma {gamma}")
    axes.set_ylabel("bits per element")
    axes.legend(frameon=False)
    return figure


def dial() -> Any:
    """Bits that a step puts aside, measured over 300 steps, on the curve log2(1 / gamma)."""
    rows = [row for row in results("exactness") if row["steps"] == 300 and float(row["gamma"]) > 0]
    figure, axes = plt.subplots(figsize=(5.2, 2.8))
    curve = [k / 200 for k in range(1, 200)]
    axes.plot(curve, [math.log2(1 / g) for g in curve], color=BLUE, label="log2(1 / gamma)")
    axes.plot([float(row["gamma"]) for row in rows], [row["bits"] for row in rows], "^", color=RED, label="measured, 300 steps")
    axes.set_xlabel("gamma: 0 is the original network, near 1 is cheapest")
    axes.set_ylabel("bits per element and step")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
