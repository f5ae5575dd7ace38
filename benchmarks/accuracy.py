"""How accurate is the forward pass, beside the recurrence in float32?

    python benchmarks/accuracy.py [--seeds 3] [--precision standard] [--readme]

Largest error of x[0], ..., x[T] against float64 over the largest |x|: ours as a ratio to that of the plain float32 recurrence, for gamma
from 0 to 0.999, 2 to 300 steps and scales of 1e-6 to 1e6. In chains that mix, every element of f(x) depends on several of x, as in a
network. In the others each element is a chain of its own. "wide": x[0] spans seven orders of magnitude. Counted are runs in which the
recurrence itself is worth something: its error is below 1 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from tables import save
from torch import Tensor
from tqdm import tqdm

from mnet_fx.arithmetic.fixed_point import State

D = 24
COLUMNS = {"chain": "chain", "runs": "runs", "median": "median ratio", "worst": "worst ratio", "beyond": "runs beyond 2"}
Form = Callable[[Tensor, Tensor, float], Tensor]
MIXING: dict[str, Form] = {
    "mixing, saturating": lambda x, w, scale: scale * torch.tanh(x @ w / scale),
    "mixing, linear": lambda x, w, scale: 0.5 * (x @ w),
    "mixing, normalised": lambda x, w, scale: scale * torch.nn.functional.layer_norm(x, (D,), eps=1e-5 * scale**2) @ w,
}
APART: dict[str, Form] = {
    "elementwise, linear": lambda x, w, scale: 1.5 * w[0] * x,
    "elementwise, saturating": lambda x, w, scale: scale * torch.tanh(3 * x / scale),
    "elementwise, saturating, wide": lambda x, w, scale: scale * torch.tanh(3 * x / scale),
}
CASES = [(g, steps, 1.0) for g in (0.0, 1 / 256, 0.05, 0.3, 0.5, 0.9, 0.99, 0.999) for steps in (2, 12, 40, 100, 300)]
CASES += [(g, 12, scale) for g in (0.0, 1 / 256, 0.05, 0.3, 0.5, 0.9, 0.99, 0.999) for scale in (1e-6, 1e6)]


def recurrence(x: Tensor, form: Form, weights: Tensor, gamma: float, scale: float) -> list[Tensor]:
    v, stream = torch.zeros_like(x), [x]
    for w in weights:
        v = gamma * v + (1 - gamma) * form(x, w.to(x.dtype), scale)
        x = x + v
        stream.append(x)
    return stream


def ours(x0: Tensor, form: Form, weights: Tensor, gamma: float, scale: float, held: torch.dtype) -> list[Tensor]:
    state = State(x0, horizon=min(len(weights), 1 / (1 - gamma)), held=held)
    stream = [state.read()]
    for w in weights:
        stream.append(state.step(form(stream[-1], w.to(x0.dtype), scale), gamma, 1 - gamma)[1])
    return stream


def errors(form: Form, gamma: float, steps: int, scale: float, wide: bool, held: torch.dtype) -> tuple[float, float]:
    """Of ours, and of the float32 recurrence."""
    weights = torch.randn(steps, D, D, dtype=torch.float64) / D**0.5
    x0 = scale * torch.randn(40, D) * (10.0 ** torch.linspace(-7, 0, D) if wide else 1.0)
    exact = recurrence(x0.double(), form, weights, gamma, scale)
    largest = max(x.abs().max() for x in exact)
    streams = (ours(x0, form, weights, gamma, scale, held), recurrence(x0, form, weights, gamma, scale))
    first, second = (max((a.double() - b).abs().max() for a, b in zip(s, exact, strict=True)) / largest for s in streams)
    return first.item(), second.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=["standard", "high"], default="standard", help="the option of momentumize")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    held, rows = torch.float64 if options.precision == "high" else torch.float32, []
    for name, form in tqdm((MIXING | APART).items()):
        ratios = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            found = [errors(form, *case, wide="wide" in name, held=held) for case in CASES]
            ratios += [a / b for a, b in found if b < 0.01]
        beyond = sum(ratio > 2 for ratio in ratios)
        rows.append({"chain": name, "runs": len(ratios), "median": median(ratios), "worst": f"{max(ratios):.3g}", "beyond": beyond})
    save("accuracy" if options.precision == "standard" else "accuracy_high", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
