"""Is the inverse exact, at any gamma and depth, and what does it keep? Against momentumnet and revlib.

    pip install momentumnet revlib
    python benchmarks/exactness.py [--gammas ...] [--steps 2 12 50 300 1000] [--readme]

A chain of residual functions Linear(16, 16), tanh on a batch of 64, float32. For ours: whether the state came back bit for bit,
whether the gradients equal those of stored activations bit for bit, and the bits per element and step put aside, beside the floor
log2(1/gamma). For the others: the largest error of a gradient of their reversible mode against autograd through the same recurrence,
relative to the gradient's largest entry ("nan" where it is not finite). revlib's default mode hands the gradient of the velocity on
without the factor gamma, so it is off at any depth.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from tables import save
from torch import Tensor, nn
from tqdm import tqdm

from mnet_fx import state_bits
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime.steps import Chain, run_chain
from mnet_fx.runtime.tape import PlainTape, ReversingTape

GAMMAS = [0.0, 1 / 256, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999]
COLUMNS = {
    "gamma": "gamma",
    "steps": "steps",
    "restored": "state restored",
    "equal": "gradients equal",
    "bits": "bits / step",
    "floor": "floor",
    "momentumnet": "momentumnet error",
    "revlib": "revlib error",
}


class Step(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.f(x),)


def functions(steps: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(steps))


def gradients(out: Tensor, x: Tensor, fs: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().mean(), [x, *fs.parameters()]))


def ours(kind: type, fs: nn.ModuleList, x: Tensor, gamma: float) -> tuple[list[Tensor], ReversingTape]:
    factors = tuple((gamma, 1 - gamma) for _ in fs)
    tape = kind("chain", State(x.detach(), horizon=min(len(fs), 1 / (1 - gamma))), factors)
    out, _, _ = run_chain(Chain(tape, x, None), [(Step(f), ()) for f in fs])
    return gradients(out, x, fs), tape


def error(found: list[Tensor], reference: list[Tensor]) -> str:
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, reference, strict=True))
    return f"{worst:.0e}" if worst == worst and worst != float("inf") else "nan"


def momentumnet_error(fs: nn.ModuleList, x: Tensor, gamma: float) -> str:
    from momentumnet import MomentumNet

    runs = [gradients(MomentumNet(list(fs), gamma=gamma, use_backprop=stored)(x), x, fs) for stored in (False, True)]
    return error(*runs)


def revlib_error(fs: nn.ModuleList, x: Tensor, gamma: float) -> str:
    import revlib

    def forward(other: Tensor, f: Tensor) -> Tensor:
        return other * gamma + f * (1 - gamma)

    def inverse(output: Tensor, f: Tensor) -> Tensor:
        return (output - f * (1 - gamma)) / gamma if gamma else output / 0.0

    pairs = [module for f in fs for module in (f, nn.Identity())]
    net = revlib.ReversibleSequential(
        *pairs,
        coupling_forward=[forward, revlib.additive_coupling_forward],
        coupling_inverse=[inverse, revlib.additive_coupling_inverse],
    )
    for p in fs.parameters():
        p.grad = None
    leaf = x.detach().clone().requires_grad_()
    out = net(torch.cat([torch.zeros_like(leaf), leaf], 1))[:, 16:]
    out.square().mean().backward()
    found = [leaf.grad, *(p.grad for p in fs.parameters())]
    v, h = torch.zeros_like(x), x
    for f in fs:
        v = gamma * v + (1 - gamma) * f(h)
        h = h + v
    return error(found, gradients(h, x, fs))


def other(measure, *arguments) -> str:
    try:
        return measure(*arguments)
    except ImportError:
        return "not installed"
    except Exception as failure:
        return type(failure).__name__


def row(gamma: float, steps: int) -> dict:
    fs, x = functions(steps), torch.randn(64, 16, requires_grad=True)
    found, tape = ours(ReversingTape, fs, x, gamma)  # raises InversionError if a state does not come back
    stored, _ = ours(PlainTape, fs, x, gamma)
    spilled = [r.u_spill for r in tape.records if r.u_spill is not None] + [r.x_spill for r in tape.records if r.x_spill is not None]
    return {
        "gamma": f"{gamma:.4g}",
        "steps": steps,
        "restored": "yes" if tape.time == 0 and not tape.state.U.any() else "NO",
        "equal": "yes" if all(map(torch.equal, found, stored)) else "NO",
        "bits": sum(s.bytes.numel() for s in spilled) * 8 / x.numel() / steps,
        "floor": state_bits(gamma, steps) / steps,
        "momentumnet": other(momentumnet_error, fs, x, gamma),
        "revlib": other(revlib_error, fs, x, gamma),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gammas", type=float, nargs="+", default=GAMMAS)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 12, 50, 300, 1000])
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the other libraries
    cases = [(gamma, steps) for gamma in options.gammas for steps in options.steps]
    rows = [row(*case) for case in tqdm(cases)]
    save("exactness", rows, COLUMNS, options.readme, [r for r in rows if r["steps"] in (12, 300)])


if __name__ == "__main__":
    main()
