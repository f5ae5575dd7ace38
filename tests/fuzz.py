"""Random programs against oracles that share no code with the package, for each way in. Run by hand:

    python tests/fuzz.py --way captured --programs 2000 --seed 0
    python tests/fuzz.py --way captured --programs 1 --seed 17 --show        # one program: its source and what came out

Ways: captured (`momentumize`), rest (likewise, with rest="checkpoint" and some of it kept, but for what is stored), eager and aot_eager
(`torch.compile` with the backend over that compiler), named (`regions=[...]`), graph (a `torch.fx.GraphModule` of symbolic_trace or
torch.export).

Each program is a small model in Python source (`fuzz_programs.py`). What a training step, or two, gives and leaves (values, other outputs,
gradients of inputs and parameters, buffers, attributes, the side input) is compared:

1. gamma=0 with the plain model, in float64. The bound follows from the program's condition: how far its own results move when its input
   moves by 1e-10.
   A program that fails so and draws random numbers is tried once more without: what stands between the steps of a chain may draw before
   or after it, in another order than the original (docs/what-to-know.md). One of which nothing is rewritten,
   and that aot_eager alone gets wrong likewise, is left out.
2. reversible with stored, at gamma 0.9 or 0.5, bit for bit.
3. where the chain is known by construction, with a float64 recurrence written here.

Explained outcomes: an error of the package that says what to do (they are counted by their text), and errors of torch that plain torch
raises too; such programs are left out. Anything else is a failure: it is printed with its seed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import fuzz_programs
import torch
from fuzz_programs import Source
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError
from tqdm import tqdm

import mnet_fx

__all__ = ["WAYS", "Outcome", "tried"]

Results = dict[str, Any]
MOVED, FLOOR, FACTOR = 1e-10, 1e-9, 30.0  # of the input; least bound; bound beyond what a moved input does


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Attributes:
        kind: "right", "left out" (plain torch fails), "refused" (nothing was rewritten, and nothing changed), "explained" (an error of
            the package), or "FAILED".
        detail: which error, or what differs.
    """

    kind: str
    detail: str = ""


# ---- one training step, or two


def inputs(dtype: torch.dtype, graded: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, s = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), s.clone().requires_grad_(graded)


def loss_of(out: Any) -> Tensor:
    """A sum in which every element of every output that has a gradient has a weight of its own."""
    tensors = [(i, leaf) for i, leaf in enumerate(tree_leaves(out), 1) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return sum((t * torch.linspace(-1, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() * i for i, t in tensors)


def run(net: Callable[..., Any], owner: nn.Module, dtype: torch.dtype, trial: Trial, moved: float = 0.0) -> Results:
    """All that training steps give and leave; `owner` has the parameters and the state."""
    torch.manual_seed(7)
    results: Results = {}
    for call in range(trial.calls):
        x, s = inputs(dtype, trial.graded)
        with torch.no_grad():
            x += moved * (1 + call)
        side = s.clone() if trial.graded else s  # one that may be written to
        out = net(x, side)
        loss_of(out).backward()
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(out)]
        results |= {f"output {i} of call {call}": leaf for i, leaf in enumerate(leaves)}
        results |= {f"side of call {call}": side.detach(), f"grad of side of call {call}": s.grad, f"grad of x of call {call}": x.grad}
    results |= {f"grad of {name}": p.grad for name, p in owner.named_parameters()}
    results |= {f"buffer {name}": b.detach() for name, b in owner.named_buffers()}
    for name, module in owner.named_modules():
        results |= {f"{name}.{key}": getattr(module, key) for key in ("calls", "log") if hasattr(module, key)}
    return results


def differences(found: Results, expected: Results, allowed: Callable[[str], float] | None, zeros: bool = False) -> list[str]:
    """What differs by more than the bound, or, without one, in any bit; `zeros`: a gradient of zeros may stand for none."""
    if list(found) != list(expected):
        return [f"other results: {sorted(set(found) ^ set(expected))}"]
    wrong = []
    for name, b in expected.items():
        for a, b_ in zip(tree_leaves(found[name]), tree_leaves(b), strict=False):
            if zeros and b_ is None and name.startswith("grad") and isinstance(a, Tensor) and not a.any():
                continue
            if not isinstance(b_, Tensor) or not isinstance(a, Tensor):
                if a is not b_ and a != b_:
                    wrong.append(f"{name}: {a} for {b_}")
            elif a.shape != b_.shape or a.dtype is not b_.dtype:
                wrong.append(f"{name}: {a.shape} {a.dtype} for {b_.shape} {b_.dtype}")
            elif allowed is None:
                if not torch.equal(a.nan_to_num(7.5), b_.nan_to_num(7.5)):
                    wrong.append(f"{name}: bits differ by up to {(a - b_).abs().max():.2g}")
            elif b_.is_floating_point() and not (distance(a, b_) <= allowed(name)):
                wrong.append(f"{name}: off by {distance(a, b_):.2g} of its size, allowed {allowed(name):.1g}")
        if len(tree_leaves(found[name])) != len(tree_leaves(b)):
            wrong.append(f"{name}: {found[name]} for {b}")
    return wrong


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry, or to 1e-3 where all are small."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() if b.numel() else 0.0


# ---- the ways in


@dataclass(frozen=True)
class Trial:
    """One program, how it is called, and with what options."""

    source: Source
    seed: int
    calls: int
    graded: bool
    training: bool
    gamma: float

    def model(self, dtype: torch.dtype) -> nn.Module:
        return self.source.model().to(dtype).train(self.training)


def captured(model: nn.Module, trial: Trial, **options: Any) -> tuple[Callable[..., Any], nn.Module]:
    net = mnet_fx.momentumize(model, **options)
    return net, net


def named(model: nn.Module, trial: Trial, **options: Any) -> tuple[Callable[..., Any], nn.Module]:
    net = mnet_fx.momentumize(model, regions=["layers"], **options)
    return net, net


def compiled(inner: str) -> Callable[..., tuple[Callable[..., Any], nn.Module]]:
    def way(model: nn.Module, trial: Trial, **options: Any) -> tuple[Callable[..., Any], nn.Module]:
        return torch.compile(model, backend=mnet_fx.backend(inner=inner, **options)), model

    return way


def resting(model: nn.Module, trial: Trial, **options: Any) -> tuple[Callable[..., Any], nn.Module]:
    if options.get("backward") != "stored":
        options |= {"rest": "checkpoint", "keep": (0, 500, 2000, 2**30)[trial.seed % 4]}
    return captured(model, trial, **options)


def graph(model: nn.Module, trial: Trial, **options: Any) -> tuple[Callable[..., Any], nn.Module]:
    net = mnet_fx.momentumize(model, **options)
    return net, net


def as_graph(model: nn.Module, trial: Trial, dtype: torch.dtype) -> nn.Module:
    """The program of the way "graph": what a tracer makes of it."""
    if trial.seed % 3:
        return torch.fx.symbolic_trace(model)
    return torch.export.export(model, tuple(t.detach() for t in inputs(dtype, False)), strict=False).module()


WAYS = {
    "captured": captured,
    "rest": resting,
    "eager": compiled("eager"),
    "aot_eager": compiled("aot_eager"),
    "named": named,
    "graph": graph,
}


# ---- the oracles


def tried(way: str, seed: int) -> tuple[Outcome, Source]:
    """What comes of the program of a seed."""
    source = fuzz_programs.written(seed, "layered" if way == "named" else None)
    rng = random.Random(seed + 10**9)
    calls = 1 if rng.random() < 0.6 else 2
    trial = Trial(source, seed, calls, rng.random() < 0.5, rng.random() < 0.7, rng.choice([0.9, 0.5]))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _outcome(way, trial), source


def _outcome(way: str, trial: Trial) -> Outcome:
    outcome = _attempted(way, trial)
    calm = replace(trial, source=trial.source.without_random_numbers())
    if outcome.kind == "FAILED" and outcome.detail.startswith("gamma=0") and calm != trial and _attempted(way, calm).kind != "FAILED":
        return Outcome("explained", "random numbers in another order")
    return outcome


def _attempted(way: str, trial: Trial) -> Outcome:
    make = _made(way, trial)
    try:
        expected, other = (run(net, net, torch.float64, trial, moved) for net, moved in ((make(torch.float64), m) for m in (0.0, MOVED)))
    except Exception as error:
        return Outcome("left out", type(error).__name__)
    moves = {name: distance(other[name], b) for name, b in expected.items() if isinstance(b, Tensor) and b.is_floating_point()}
    typical = max([m for m in moves.values() if m == m] or [0.0])
    try:
        return _compared(way, trial, make, expected, lambda name: FLOOR + FACTOR * typical)
    except (mnet_fx.MnetError, CheckpointError) as error:
        return Outcome("explained", f"{type(error).__name__}: {shortened(str(error))}")
    except Exception as error:
        if way in ("eager", "aot_eager", "captured", "rest") and type(error) is (plainly := _plain_failure(trial, way)):
            return Outcome("left out", f"torch.compile raises {plainly.__name__} too")
        return Outcome("FAILED", f"{type(error).__name__}: {shortened(str(error))}\n{traceback.format_exc(limit=-4)}")


def _made(way: str, trial: Trial) -> Callable[[torch.dtype], nn.Module]:
    if way != "graph":
        return trial.model
    return lambda dtype: as_graph(trial.model(dtype), trial, dtype)


def _compared(
    way: str, trial: Trial, make: Callable[[torch.dtype], nn.Module], expected: Results, allowed: Callable[[str], float]
) -> Outcome:
    mnet_fx.reset_reports()
    net, owner = WAYS[way](make(torch.float64), trial, gamma=0)
    # What is computed for nobody, in another piece than what it reads, gives zeros; so does layer(x) - x of a layer that detaches x.
    dead = way in ("aot_eager", "named")
    if wrong := differences(ours := run(net, owner, torch.float64, trial), expected, allowed, zeros=dead):
        rewritten = any(report.regions for report in _reports(way, owner))
        if way == "aot_eager" and not rewritten and not differences(_plainly(trial, torch.float64), ours, allowed, zeros=dead):
            return Outcome("left out", "torch.compile is as wrong")
        return Outcome("FAILED", "gamma=0 is not the original\n" + "\n".join(wrong))
    dtype = torch.float64 if trial.source.steps else torch.float32
    found = {}
    for backward in ("reversible", "stored"):
        mnet_fx.reset_reports()
        torch._dynamo.reset()
        net, owner = WAYS[way](make(dtype), trial, gamma=trial.gamma, backward=backward)
        found[backward] = run(net, owner, dtype, trial)
    if wrong := differences(found["reversible"], found["stored"], None):
        return Outcome("FAILED", "reversible is not stored\n" + "\n".join(wrong))
    regions = [region for report in _reports(way, owner) for region in report.regions]
    if way == "graph" and re.search(r"quiet\(|no_grad", trial.source.text.split("class Program")[-1]):
        return Outcome("right" if regions else "refused")  # torch.fx records no grad mode: the graph is another network than the program
    if trial.source.steps and [region.steps for region in regions] == [trial.source.steps]:
        if wrong := differences(*_alike(_recurrence(trial), found["stored"]), allowed, zeros=dead):
            return Outcome("FAILED", "not the recurrence\n" + "\n".join(wrong))
        return Outcome("right", "recurrence")
    return Outcome("right" if regions else "refused")


def _reports(way: str, owner: nn.Module) -> list[Any]:
    return mnet_fx.reports() if way in ("eager", "aot_eager") else [mnet_fx.report(owner)]


def _alike(first: Results, second: Results) -> tuple[Results, Results]:
    """Both without what only one has: the constants and the unused members of a traced graph."""
    names = [name for name in second if name in first]
    return {name: second[name] for name in names}, {name: first[name] for name in names}


def _recurrence(trial: Trial) -> Results:
    """The chain of a program as v' = g v + (1 - g) b(x, s), x' = x + v', by plain autograd."""
    model = trial.model(torch.float64)
    shown = [line.strip() for line in trial.source.text.split("def forward(self, x, s):")[-1].splitlines()]

    def forward(x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        x, outs = model.stem(x), []
        v = torch.zeros_like(x)
        for line in shown:
            if (step := re.search(r"self\.b(\d+)\(", line)) is not None:
                v = trial.gamma * v + (1 - trial.gamma) * getattr(model, f"b{step[1]}")(x, s)
                x = x + v
            elif line == "outs.append(x)":
                outs.append(x)
        return x, *outs

    return run(forward, model, torch.float64, trial)


def _plainly(trial: Trial, dtype: torch.dtype, backend: str = "aot_eager") -> Results:
    """What torch.compile without this package gives."""
    torch._dynamo.reset()
    model = trial.model(dtype)
    return run(torch.compile(model, backend=backend), model, dtype, trial)


def _plain_failure(trial: Trial, way: str) -> type[Exception] | None:
    """What torch.compile without this package raises, if anything."""
    try:
        for dtype in (torch.float64, torch.float32):
            _plainly(trial, dtype, "aot_eager" if way == "aot_eager" else "eager")
    except Exception as error:
        return type(error)
    return None


def shortened(text: str) -> str:
    """A message without names and numbers, so that alike ones count as one."""
    return re.sub(r"'[^']*'|\d+", "_", " ".join(text.split()))[:160]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import logging

    logging.disable(logging.CRITICAL)
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS), default="captured")
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others have the next ones")
    parser.add_argument("--show", action="store_true", help="print the source of each program")
    parser.add_argument("--kind", help="only programs of this kind, see `fuzz_programs`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, failed = collections.defaultdict[str, list[int]](list), []
    with _quiet():
        wanted = [
            seed
            for seed in range(options.seed, options.seed + options.programs)
            if options.kind in (None, fuzz_programs.written(seed).kind)
        ]
        for seed in tqdm(wanted, mininterval=10):
            outcome, source = tried(options.way, seed)
            seeds[f"{outcome.kind} {outcome.detail}".strip() if outcome.kind != "FAILED" else "FAILED"].append(seed)
            if options.show:
                print(source.text)
            if options.show or outcome.kind == "FAILED":
                print(f"seed {seed} ({source.kind}): {outcome.kind} {outcome.detail}\n", flush=True)
            failed += [seed] * (outcome.kind == "FAILED")
    for name, alike in sorted(seeds.items(), key=lambda item: -len(item[1])):
        print(f"{len(alike):6d}  {name} {alike[:5] if name.startswith('explained') else ''}")
    print(f"{options.way}: {options.programs} programs from seed {options.seed}; failed: {failed or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
