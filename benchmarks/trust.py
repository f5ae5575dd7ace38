"""Is the gradient the one of the network that ran: with dropout, batch statistics, autocast, NaN, ..., by each way to save memory?

    pip install momentumnet revlib memcnn revtorch
    python benchmarks/trust.py [--quick] [--only WORD] [--readme]

Each peer runs a network of its own kind (`trust_peers.py`), built as its documentation says, of four functions in float64. Its gradients
by `backward()` with respect to the input and every parameter are compared with finite differences of its own forward pass, with the same
random numbers, along a random direction of the input, and of the parameters of each function. Where finite differences cannot be had, the
reference is the same network in plain autograd: under autocast (relative to the norm of all gradients), and for NaN (every entry that is
not finite there must not be finite here).

    right       within 1e-3 (autocast: 2e-2)
    off by E    silently wrong: a gradient was given, with that error
    error       an exception was raised; results/trust.json has its text. In the last line that is right: plain autograd raises one too
    n/a         the situation does not apply, and why

What goes through a compiler runs under torch._functorch.config.activation_memory_budget = 0. --quick compiles with
aot_eager_decomp_partition in place of inductor: the same partitioner, without a C++ compiler.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from tables import save
from torch import Tensor, nn
from tqdm import tqdm
from trust_peers import EXTRAS, PEERS, STATE, Network, Peer, version

__all__ = ["SITUATIONS", "Situation", "judged"]

WIDTH, BATCH = 6, 5
TOLERANCE, AUTOCAST_TOLERANCE = 1e-3, 2e-2  # plain autograd under autocast is 0.5 to 0.9 % off float64


@dataclass(frozen=True)
class Situation:
    """One line of the table.

    Attributes:
        name: the line's heading.
        function: t -> the residual function f[t].
        steps: how many of them.
        keeps_random_state: False: those peers that have the option are told not to.
        frozen: half of the functions, and the first layer of the others, need no gradients.
        autocast: the forward pass runs under bfloat16 autocast.
        changes: parameters change between forward and backward; then an error is the right answer, as in plain autograd.
    """

    name: str
    function: Callable[[int], nn.Module]
    steps: int = 4
    keeps_random_state: bool = True
    frozen: bool = False
    autocast: bool = False
    changes: bool = False


class Shows(nn.Module):
    """(f(x), what is in the middle of it)"""

    gives_more = True

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.inner(x))
        return self.outer(hidden), hidden


class Overflows(nn.Module):
    """A function whose result for the first sample overflows."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("size", torch.ones(BATCH, 1))
        self.size[0] = size

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * self.size


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), *between, nn.Linear(WIDTH, WIDTH))


def far_from_kinks() -> nn.Module:
    """A linear layer whose results are about 1 and -1: finite differences must not cross a kink, where other numbers would be drawn."""
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        layer.weight.mul_(0.2)
        layer.bias.copy_(torch.tensor([1.0, -1.0]).repeat(WIDTH // 2))
    return layer


def dropping(t: int) -> nn.Module:
    return nn.Sequential(mlp(nn.Dropout(0.3)), nn.Dropout(0.3))


SITUATIONS = (
    Situation("nothing special", lambda t: mlp()),
    Situation("dropout", dropping),
    Situation(STATE, dropping, keeps_random_state=False),
    Situation("RReLU as the last operation", lambda t: nn.Sequential(far_from_kinks(), nn.RReLU(0.1, 0.9))),
    Situation("BatchNorm, its statistics", lambda t: mlp(nn.BatchNorm1d(WIDTH))),
    Situation("bfloat16 autocast, 40 steps", lambda t: mlp(), steps=40, autocast=True),
    Situation("frozen halves", lambda t: mlp(), frozen=True),
    Situation(EXTRAS, lambda t: Shows()),
    Situation("a step overflows", lambda t: Overflows(torch.inf if t == 1 else 1.0)),
    Situation("parameters changed before the backward", lambda t: mlp(), changes=True),
)


class Problem:
    """A situation for one peer: functions, input, and a loss of everything the network gives."""

    def __init__(self, situation: Situation, peer: Peer) -> None:
        torch.manual_seed(0)
        self.situation = situation
        self.fs = nn.ModuleList(situation.function(t) for t in range(situation.steps))
        self.x = torch.randn(BATCH, WIDTH * peer.streams)
        self.weights = torch.randn(BATCH, WIDTH * peer.streams)
        if not situation.autocast:
            self.fs, self.x, self.weights = self.fs.double(), self.x.double(), self.weights.double()
        if situation.frozen:
            for t, f in enumerate(self.fs):
                (f if t < situation.steps // 2 else f[0]).requires_grad_(False)
        self.x.requires_grad_()
        self.leaves = [self.x, *(p for p in self.fs.parameters() if p.requires_grad)]

    def loss(self, net: Network) -> Tensor:
        """The same random numbers each time."""
        torch.manual_seed(7)
        random.seed(7)  # RevTorch draws its seeds from here
        with torch.autocast("cpu", torch.bfloat16) if self.situation.autocast else nullcontext():
            out, extras = net(self.x.clone())  # memcnn frees the tensor that it is given
        return (out * self.weights).sum() + sum(extra.square().sum() for extra in extras)

    def gradients(self, net: Network, changes: bool = False) -> list[Tensor]:
        """By backward(), the one way that all peers have."""
        for leaf in self.leaves:
            leaf.grad = None
        loss, before = self.loss(net), [p.detach().clone() for p in self.fs.parameters()]
        try:
            if changes:
                self.overwrite([1.5 * p for p in before])
            loss.backward()
        finally:
            self.overwrite(before)
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves]

    @torch.no_grad()
    def overwrite(self, values: list[Tensor]) -> None:
        for p, value in zip(self.fs.parameters(), values, strict=True):
            p.copy_(value)

    def groups(self) -> list[list[Tensor]]:
        """The input, and the parameters of each function: what a derivative is taken along at once."""
        trained = [[p for p in f.parameters() if p.requires_grad] for f in self.fs]
        return [[self.x], *(group for group in trained if group)]

    def derivative(self, net: Network, group: list[Tensor], directions: list[Tensor]) -> float:
        """Of the loss along a direction, by central differences of two sizes, without the error of second order (Richardson)."""
        start = [leaf.detach().clone() for leaf in group]

        def at(size: float) -> float:
            with torch.no_grad():
                for leaf, value, direction in zip(group, start, directions, strict=True):
                    leaf.copy_(value + size * direction)
            return self.loss(net).item()

        near, far = ((at(size) - at(-size)) / (2 * size) for size in (1e-3, 2e-3))
        at(0.0)
        return (4 * near - far) / 3


def judged(situation: Situation, peer: Peer, compiler: str = "inductor") -> dict[str, Any]:
    """What a peer does in a situation: {"result": "right", "wrong", "error" or "n/a", "error": size, "detail": text}."""
    if situation.name in peer.lacks:
        return {"result": "n/a", "error": None, "detail": peer.lacks[situation.name]}
    torch._dynamo.reset()
    problem = Problem(situation, peer)
    plain = peer.plain(copy.deepcopy(problem.fs))
    budget = functorch_config.patch(activation_memory_budget=0.0) if peer.compiles else nullcontext()
    try:
        with budget:
            net = peer.build(problem.fs, situation.keeps_random_state, compiler)
            return _compared(problem, net, plain)
    except Exception as failure:
        text = " ".join(str(failure).split())[:300]
        return {"result": "error", "error": None, "detail": f"{type(failure).__name__}: {text}"}


def _compared(problem: Problem, net: Network, plain: Network) -> dict[str, Any]:
    found = problem.gradients(net, problem.situation.changes)
    counted = {int(m.num_batches_tracked) for m in problem.fs.modules() if isinstance(m, nn.BatchNorm1d)}
    if any(isinstance(f, Overflows) for f in problem.fs):
        return _finite_alike(found, _plain_gradients(problem, plain))
    if problem.situation.autocast:
        a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, _plain_gradients(problem, plain)))
        return _verdict(((a - b).norm() / b.norm()).item(), AUTOCAST_TOLERANCE)
    verdict = _verdict(_difference(problem, net, found), TOLERANCE)
    if verdict["result"] == "right" and counted - {1}:
        return {"result": "wrong", "error": None, "detail": f"counted {max(counted)} times"}
    return verdict


def _plain_gradients(problem: Problem, plain: Network) -> list[Tensor]:
    """Of the plain network on a copy of the functions, in the order of the leaves."""
    twin = copy.copy(problem)
    functions = next(cell.cell_contents for cell in plain.__closure__ if isinstance(cell.cell_contents, nn.ModuleList))
    twin.fs, twin.leaves = functions, [problem.x, *(p for p in functions.parameters() if p.requires_grad)]
    return twin.gradients(plain)


def _difference(problem: Problem, net: Network, found: list[Tensor]) -> float:
    """Largest difference from finite differences, relative to the derivative, or to a tenth of the largest one."""
    generator = torch.Generator().manual_seed(1)
    gradient = {id(leaf): g for leaf, g in zip(problem.leaves, found, strict=True)}
    exact, given = [], []
    for group in problem.groups():
        directions = [torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator) for leaf in group]
        exact.append(problem.derivative(net, group, directions))
        given.append(sum((gradient[id(leaf)] * d).sum().item() for leaf, d in zip(group, directions, strict=True)))
    largest = max(map(abs, exact))
    return max(abs(a - b) / max(abs(b), largest / 10) for a, b in zip(given, exact, strict=True))


def _finite_alike(found: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    """Whether all that is not finite in plain autograd is not finite here."""
    bad = sum((~b.isfinite()).sum().item() for b in expected)
    hidden = sum((a.isfinite() & ~b.isfinite()).sum().item() for a, b in zip(found, expected, strict=True))
    if not hidden:
        return {"result": "right", "error": 0.0, "detail": ""}
    return {"result": "wrong", "error": None, "detail": f"{hidden} of {bad} NaN hidden"}


def _verdict(error: float, tolerance: float) -> dict[str, Any]:
    return {"result": "right" if error <= tolerance else "wrong", "error": error, "detail": ""}


def shown(verdict: dict[str, Any]) -> str:
    """The cell of the table."""
    result, detail = verdict["result"], verdict["detail"]
    if result == "wrong":
        return detail or f"off by {verdict['error']:.2g}"
    return {"error": f"error ({detail.split(':')[0]})", "n/a": f"n/a ({detail})"}.get(result, result)


def reference(situation: Situation) -> str:
    return "autograd" if situation.autocast or "overflows" in situation.name else "differences"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compile with aot_eager_decomp_partition; a minute in all")
    parser.add_argument("--only", default="", help="only situations that have this word in their names; writes nothing")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the other libraries
    compiler = "aot_eager_decomp_partition" if options.quick else "inductor"
    rows = []
    for situation in tqdm([s for s in SITUATIONS if options.only in s.name]):
        verdicts = {peer.name: judged(situation, peer, compiler) for peer in PEERS}
        cells = {name: shown(verdict) for name, verdict in verdicts.items()}
        rows.append({"situation": situation.name, "reference": reference(situation), **cells, "verdicts": verdicts})
    headings = {peer.name: f"{peer.name} {version(peer)}" if peer.package not in ("torch", "mnet-fx") else peer.name for peer in PEERS}
    columns = {"situation": f"torch {torch.__version__}", "reference": "against"} | headings
    if options.only:
        print(json.dumps(rows, indent=1))
        return
    save("trust", rows, columns, options.readme)


if __name__ == "__main__":
    main()
