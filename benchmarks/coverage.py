"""What `momentumize` finds, rewrites and leaves alone over the model zoos, and whether it is right about each model.

    python benchmarks/coverage.py --zoo torchvision timm --workers 2

Each model runs in a process of its own, with a time limit. Results are kept line by line in results/coverage.jsonl, so that an
interrupted sweep goes on where it stopped. Three checks per model:

- oracle: with gamma=0, outputs and gradients are those of the original, in train mode (same random numbers) and eval mode. Errors are
  relative to the largest output and the largest gradient; BatchNorm over few values amplifies rounding, so both models run in float64;
- exactness: with gamma=0.9, gradients of backward="reversible" are those of "stored", bit for bit, in float32;
- coverage: residual adds rewritten, of those that lie in chains of two or more (all found but projection shortcuts, single adds, and
  adds inside the branch of another).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tables import ROOT, save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm
from zoos import ZOOS

LINES = ROOT / "results" / "coverage.jsonl"
TOLERANCE = 1e-5
_NOT_IN_CHAINS = ("projection_shortcut", "too_short", "nested")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", nargs="+", default=list(ZOOS), choices=list(ZOOS))
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=240, help="time limit of one model")
    parser.add_argument("--again", action="store_true", help="forget earlier results of these models")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("ZOO", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_guarded(*options.one)))
        return
    if not options.table:
        _sweep(options)
    _tables(options.readme)


def _sweep(options: argparse.Namespace) -> None:
    names = [(zoo, name) for zoo in options.zoo for name in ZOOS[zoo]() if not options.only or name in options.only]
    known = [] if not LINES.exists() else [json.loads(line) for line in LINES.read_text().splitlines()]
    if options.again:
        known = [row for row in known if (row["zoo"], row["model"]) not in names]
        LINES.write_text("".join(json.dumps(row) + "\n" for row in known))
    done = {(row["zoo"], row["model"]) for row in known}
    left = [name for name in names if name not in done]
    with ThreadPoolExecutor(options.workers) as pool, LINES.open("a") as lines:
        jobs = [pool.submit(run_one, zoo, name, options.seconds) for zoo, name in left]
        for job in tqdm(as_completed(jobs), total=len(jobs)):
            lines.write(json.dumps(job.result()) + "\n")
            lines.flush()


def run_one(zoo: str, name: str, seconds: int) -> dict[str, Any]:
    """One model in a process of its own; what goes wrong with the process is a result too."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--one", zoo, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"zoo": zoo, "model": name, "error": f"no result within {seconds} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {"zoo": zoo, "model": name, "error": f"the process ended with {done.returncode}: {done.stderr[-300:]}"}


def _guarded(zoo: str, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    _seed(0)
    row: dict[str, Any] = {"zoo": zoo, "model": name}
    try:
        model, call = ZOOS[zoo]()[name]()
    except Exception as error:
        return row | {"unbuilt": f"{type(error).__name__}: {error}"[:300]}
    try:
        with torch.no_grad():
            model(**call)
    except Exception as error:
        return row | {"unbuilt": f"the model itself fails: {type(error).__name__}: {error}"[:300]}
    try:
        return row | _measured(model, call)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-1500:]}


def _measured(model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    import mnet_fx

    warnings.simplefilter("ignore")
    start = time.perf_counter()
    nets = {backward: mnet_fx.momentumize(model, call, gamma=0.9, backward=backward) for backward in ("reversible", "stored")}
    seconds = (time.perf_counter() - start) / 2
    report = mnet_fx.report(nets["reversible"])
    refused = Counter(refusal.code for refusal in report.refusals if refusal.node)
    row: dict[str, Any] = {
        "found": report.residual_adds,
        "in_chains": report.residual_adds - sum(refused[code] for code in _NOT_IN_CHAINS),
        "rewritten": report.rewritten_adds,
        "steps": [region.steps for region in report.regions],
        "refused": dict(refused),
        "modules": sorted(
            {f"{refusal.code} {refusal.path}: {refusal.explanation}"[:200] for refusal in report.refusals if not refusal.node}
        )[:8],
        "front_end": "+".join(sorted({part.front_end for part in report.captured if part.rewritten_adds})) or "-",
        "seconds": round(seconds, 2),
    }
    if not report.rewritten_adds:
        return row
    results = [_run(net.train(), call) for net in nets.values()]
    differing = [i for i, (a, b) in enumerate(zip(*results, strict=True)) if not _same_bits(a, b)]
    row["exact"] = not differing
    del nets, results
    model, call = model.double(), tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, call)
    net = mnet_fx.momentumize(model, call, gamma=0.0)
    for mode in ("train", "eval"):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = _run(model.train(mode == "train"), call)
        model.load_state_dict(state)
        row[f"oracle_{mode}"] = _error(_run(net.train(mode == "train"), call), expected)
        model.load_state_dict(state)
    row["oracle"] = max(row["oracle_train"], row["oracle_eval"]) <= TOLERANCE
    return row


def _seed(n: int) -> None:
    torch.manual_seed(n)
    random.seed(n)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(n)


def _run(net: nn.Module, call: dict[str, Any]) -> list[Tensor | None]:
    """Floating outputs, and the gradients of a random projection of them."""
    _seed(1)
    net.zero_grad(set_to_none=True)
    outputs = [leaf for leaf in tree_leaves(net(**call)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    weights = torch.Generator().manual_seed(2)
    total = sum(((o * torch.randn(o.shape, generator=weights, dtype=o.dtype)).sum() for o in outputs if o.requires_grad), torch.zeros(()))
    total.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    return [torch.cat([o.detach().flatten() for o in outputs]), *grads]


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _error(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Largest difference of outputs and of gradients, each relative to the largest of all; infinite where one has no gradient."""
    errors = []
    for part in (slice(0, 1), slice(1, None)):
        pairs = list(zip(found[part], expected[part], strict=True))
        if any((a is None) != (b is None) for a, b in pairs):
            return float("inf")
        both = [(a, b) for a, b in pairs if a is not None and b is not None and b.numel()]
        largest = max((b.abs().max().item() for _, b in both), default=0.0)
        difference = max(((a - b).abs().nan_to_num(float("inf")).max().item() for a, b in both), default=0.0)
        errors.append(difference / largest if largest else difference)
    return max(errors)


def _tables(readme: bool) -> None:
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    summary = [_summary(zoo, [row for row in rows if row["zoo"] == zoo]) for zoo in ZOOS]
    columns = {
        "zoo": "zoo", "models": "models", "errors": "errors", "rewritten_models": "models rewritten", "in_chains": "adds in chains",
        "rewritten": "rewritten", "share": "%", "oracle": "gamma=0 is the original", "exact": "gradients exact",
    }  # fmt: skip
    save("coverage", [*summary, *sorted(rows, key=lambda row: (row["zoo"], row["model"]))], {"zoo": "zoo"}, False)
    save("coverage_summary", summary, columns, readme)
    for row in rows:
        wrong = [key for key in ("oracle", "exact") if row.get(key) is False]
        if wrong or "error" in row:
            print(row["zoo"], row["model"], *wrong, row.get("error", ""), row.get("oracle_train", ""), row.get("oracle_eval", ""))
        elif row.get("in_chains", 0) > row.get("rewritten", 0) or row.get("modules"):
            print(row["zoo"], row["model"], f"{row['rewritten']} of {row['in_chains']}", row["refused"], *row["modules"][:2])


def _summary(zoo: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    built = [row for row in rows if "unbuilt" not in row]
    rewritten = [row for row in built if row.get("rewritten")]
    in_chains = sum(row.get("in_chains", 0) for row in built)
    return {
        "zoo": zoo,
        "models": len(built),
        "errors": sum("error" in row for row in built),
        "rewritten_models": len(rewritten),
        "in_chains": in_chains,
        "rewritten": (done := sum(row["rewritten"] for row in rewritten)),
        "share": round(100 * done / max(in_chains, 1), 2),
        "oracle": f"{sum(row['oracle'] for row in rewritten)} of {len(rewritten)}",
        "exact": f"{sum(row['exact'] for row in rewritten)} of {len(rewritten)}",
    }


if __name__ == "__main__":
    main()
