"""What `momentumize` finds, rewrites and leaves alone over the model zoos, and whether it is right about each model.

    python benchmarks/coverage.py --zoo torchvision timm --workers 2

Each model runs in a process of its own, with a time limit. Results are kept line by line in results/coverage.jsonl, so that an
interrupted sweep goes on where it stopped. Three checks per model:

- oracle: with gamma=0, outputs, gradients and buffers are those of the original, in train mode (same random numbers) and eval mode;
  errors are relative to the largest element of each tensor, in float64 where the model can. Where BatchNorm over few values or recursion
  amplifies rounding, the yardstick is how far the original moves when its weights are off by a rounding;
- exactness: with gamma=0.9, gradients of backward="reversible" are those of "stored", bit for bit, in float32;
- coverage: residual adds rewritten, of those that lie in chains of two or more: by our own report (all found but projection shortcuts,
  single adds, also inside the branch of another, and chains around longer ones), and by the independent count of `reference.py`.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from itertools import zip_longest
from multiprocessing.connection import Connection
from typing import Any

import reference
import torch
from tables import ROOT, save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm
from zoos import ZOOS

LINES = ROOT / "results" / "coverage.jsonl"
_BYTES = 5 << 30  # 5 GB of memory for one model
_NOT_IN_CHAINS = ("projection_shortcut", "too_short", "interrupted", "nested")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", nargs="+", default=list(ZOOS), choices=list(ZOOS))
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=240, help="processor time for one model")
    parser.add_argument("--again", action="store_true", help="forget earlier results of these models")
    parser.add_argument("--missing", action="store_true", help="only models that have no row of any version")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--references", action="store_true", help="only count independently where rows lack it")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("ZOO", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_guarded(*options.one)))
        return
    if options.references:
        _count_again(options)
    elif not options.table:
        _sweep(options)
    _tables(options.readme)


def _sweep(options: argparse.Namespace) -> None:
    """Measures what has no row of this version of the code; rows of models not asked for stay, and say of which commit they are."""
    zoos = [[(zoo, name) for name in ZOOS[zoo]() if not options.only or name in options.only] for zoo in options.zoo]
    names = [name for nth in zip_longest(*zoos) for name in nth if name]  # in turns, so that an interrupted sweep has seen all zoos
    rows = {(row["zoo"], row["model"]): row for row in _known()}
    left = [name for name in names if options.again or name not in rows or not (options.missing or rows[name]["version"] == _version())]
    LINES.parent.mkdir(exist_ok=True)
    LINES.write_text("".join(json.dumps(row) + "\n" for name, row in rows.items() if name not in left))
    with ThreadPoolExecutor(options.workers) as pool, LINES.open("a") as lines:
        jobs = [pool.submit(run_one, zoo, name, options.seconds) for zoo, name in left]
        for job in tqdm(as_completed(jobs), total=len(jobs)):
            lines.write(json.dumps(job.result() | {"version": _version(), "commit": _commit()}) + "\n")
            lines.flush()


def _count_again(options: argparse.Namespace) -> None:
    """Adds the independent count to rows without it; it does not depend on the version of the code."""
    rows = _known()
    lacking = [row for row in rows if "reference" not in row and "unbuilt" not in row and row["zoo"] in options.zoo]
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = {pool.submit(run_one, row["zoo"], row["model"], options.seconds, _counted): row for row in lacking}
        for job in tqdm(as_completed(jobs), total=len(jobs)):
            jobs[job]["reference"] = job.result().get("reference")
            LINES.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _known() -> list[dict[str, Any]]:
    rows = []
    for line in LINES.read_text().splitlines() if LINES.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line at which an earlier sweep was killed
            continue
    return rows


@cache
def _version() -> str:
    """A hash of the code that decides the results: those of another version are measured again."""
    files = sorted(path for folder in ("mnet_fx", "passes", "benchmarks") for path in (ROOT.parent / folder).glob("*.py"))
    return hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


@cache
def _commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def run_one(zoo: str, name: str, seconds: int, work: Callable[[str, str], dict[str, Any]] | None = None) -> dict[str, Any]:
    """One model in a process of its own, forked from one that has imported what they all need; what goes wrong there is a result too."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "torchvision", "mnet_fx", "sympy", "torch.export"])
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_child, args=(work or _guarded, zoo, name, seconds, theirs))
    process.start()
    theirs.close()
    row = {"zoo": zoo, "model": name}
    try:
        return ours.recv() if ours.poll(5 * seconds) else row | {"error": f"no result within {5 * seconds} s"}
    except EOFError:
        process.join(10)
        ended = f"no result within {seconds} s of processor time" if process.exitcode == -signal.SIGXCPU else None
        return row | {"error": ended or f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        process.close()


def _child(work: Callable[[str, str], dict[str, Any]], zoo: str, name: str, seconds: int, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    warnings.simplefilter("ignore")
    results.send(work(zoo, name))


def _counted(zoo: str, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    _seed(0)
    model, call = ZOOS[zoo]()[name]()
    return {"reference": reference.count(model, call)}


def _guarded(zoo: str, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    _seed(0)
    row: dict[str, Any] = {"zoo": zoo, "model": name}
    try:
        model, call = ZOOS[zoo]()[name]()
    except Exception as error:
        return row | {"unbuilt": f"{type(error).__name__}: {error}"[:300]}
    mode = model.training
    try:
        with torch.no_grad():
            model(**call)
        row["reference"] = reference.count(model, call)
        model.train(mode)
    except Exception as error:
        return row | {"unbuilt": f"the model itself fails: {type(error).__name__}: {error}"[:300]}
    try:
        _measure(row, model, call)
    except Exception as error:
        row |= {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-1500:]}
    return row


def _measure(row: dict[str, Any], model: nn.Module, call: dict[str, Any]) -> None:
    """Fills `row`, stage by stage, so that an exception leaves what was found before it."""
    import mnet_fx

    warnings.simplefilter("ignore")
    row["stage"] = "momentumize"
    start = time.perf_counter()
    net = mnet_fx.momentumize(model, call, gamma=0.9)
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["stage"] = "exactness"
    row["exact"] = _exact(net, call)
    report = mnet_fx.report(net)  # after calls: with example inputs, a model with graph breaks is only seen up to the first
    refused = Counter(refusal.code for refusal in report.refusals if refusal.node)
    refused += Counter(add.code for add in report.adds if "." in add.node and add.code in _NOT_IN_CHAINS)  # in bodies
    row |= {
        "found": report.residual_adds,
        "in_chains": report.residual_adds - sum(refused[code] for code in _NOT_IN_CHAINS),
        "rewritten": report.rewritten_adds,
        "steps": [region.steps for region in report.regions],
        "refused": dict(refused),
        "modules": sorted(
            {f"{refusal.code} {refusal.path}: {refusal.explanation}"[:200] for refusal in report.refusals if not refusal.node}
        )[:8],
        "front_end": "+".join(sorted({part.front_end for part in report.captured if part.rewritten_adds})) or "-",
    }
    del net
    row["stage"] = "oracle"
    model, call, row["oracle_dtype"] = _doubled(model, call)
    net = mnet_fx.momentumize(model, gamma=0.0)
    for mode in ("train", "eval"):
        row[f"oracle_{mode}"], row[f"tolerance_{mode}"] = _against_original(row, model, net, call, training=mode == "train")
    row["oracle"] = all(row[f"oracle_{mode}"] <= row[f"tolerance_{mode}"] for mode in ("train", "eval"))
    row["stage"] = "done"


def _doubled(model: nn.Module, call: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], str]:
    """The model in float64, in which rounding cannot be taken for a mistake; in float32 if its own code does not allow it."""
    doubled = copy.deepcopy(model).double()
    inputs = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, call)
    try:
        with torch.no_grad():
            doubled(**inputs)
    except Exception:
        return model, call, "float32"
    return doubled, inputs, "float64"


def _against_original(row: dict[str, Any], model: nn.Module, net: nn.Module, call: dict[str, Any], training: bool) -> tuple[float, float]:
    """The error of a rewritten net, and what is allowed. Where the error is large, two more questions: whether dropout drew other masks,
    since a mask depends on the layout in memory; and how far the original itself moves when its weights are off by a rounding."""
    expected, found = _from_same_state([model, net], call, training)
    error, allowed = _error(found, expected), 1e-6 if row["oracle_dtype"] == "float64" else 1e-3
    dropouts = [m for each in (model, net) for m in each.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
    if training and error > allowed and dropouts:
        row["oracle_dropout"] = "off"
        for module in dropouts:
            module.p = 0.0
        expected, found = _from_same_state([model, net], call, training)
        error = _error(found, expected)
    if error > allowed:
        allowed = max(allowed, 10 * _sensitivity(model, call, expected, 2.0**-39 if row["oracle_dtype"] == "float64" else 2.0**-24))
    return error, allowed


def _sensitivity(model: nn.Module, call: dict[str, Any], expected: dict[str, Tensor], size: float) -> float:
    """How far the original moves when its weights are off by relative errors of that size: of the grid of the exact arithmetic."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.mul_(1 + size * torch.randn_like(p))
    (found,) = _from_same_state([model], call, model.training)
    with torch.no_grad():
        for p, before in zip(parameters, kept, strict=True):
            p.copy_(before)
    return _error(found, expected)


def _exact(net: nn.Module, call: dict[str, Any]) -> bool:
    """Whether the gradients of a net are those of the same net with stored activations (switched over, since captures take long)."""
    regions = net.__dict__["forward"].regions
    results = []
    for backward in ("reversible", "stored"):
        for region in regions:
            region.backward = backward
        results += _from_same_state([net], call, training=True)
    a, b = results
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(1e30), b[name].nan_to_num(1e30)) for name in a)


def _from_same_state(nets: list[nn.Module], call: dict[str, Any], training: bool) -> list[dict[str, Tensor]]:
    """Results of several models that share their buffers, each starting from the same ones."""
    state = {name: buffer.clone() for name, buffer in nets[0].named_buffers()}
    results = []
    for net in nets:
        net.train(training)
        if not training:  # some fill caches at their first call in eval mode, which a step and its second run would see differently
            with torch.no_grad():
                net(**call)
        results.append(_run(net, call))
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(state[name])
    return results


def _seed(n: int) -> None:
    torch.manual_seed(n)
    random.seed(n)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(n)


def _run(net: nn.Module, call: dict[str, Any]) -> dict[str, Tensor]:
    """Floating outputs, the gradients of a random projection of them, and the buffers afterwards."""
    _seed(1)
    net.zero_grad(set_to_none=True)
    outputs = [leaf for leaf in tree_leaves(net(**call)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    weights = torch.Generator().manual_seed(2)
    terms = [(o * torch.randn(o.shape, generator=weights, dtype=o.dtype)).sum() for o in outputs if o.requires_grad]
    if terms:
        torch.stack(terms).sum().backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": b.clone() for name, b in net.named_buffers() if b.is_floating_point()}
    net.zero_grad(set_to_none=True)
    return found


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any output, gradient or buffer, relative to the largest element of it; infinite where one has no such tensor.

    A gradient that is zero but for rounding (that of a bias before a norm) is measured by a fraction of the largest gradient of the model,
    a running mean that is (of what comes from a norm) by a fraction of the standard deviation.
    """
    if found.keys() != expected.keys():
        return float("inf")
    gradients = [t.abs().max().item() for name, t in expected.items() if name.startswith("gradient") and t.numel()]
    floor = 1e-3 * max(gradients, default=0.0)
    worst = 0.0
    for name, tensor in expected.items():
        if tensor.numel():
            difference = (found[name] - tensor).abs().nan_to_num(float("inf")).max().item()
            least = floor if name.startswith("gradient") else 1e-8
            if name.endswith("running_mean"):
                least = 1e-3 * expected[name.replace("running_mean", "running_var")].max().item() ** 0.5
            worst = max(worst, difference / max(tensor.abs().max().item(), least))
    return worst


def _tables(readme: bool) -> None:
    rows = _known()
    summary = [_summary(zoo, [row for row in rows if row["zoo"] == zoo]) for zoo in ZOOS]
    columns = {
        "zoo": "zoo",
        "models": "models",
        "unbuilt": "not built",
        "errors": "errors",
        "rewritten_models": "models rewritten",
        "in_chains": "adds in chains",
        "rewritten": "rewritten",
        "share": "%",
        "reference": "independent count",
        "reference_share": "% of it",
        "oracle": "gamma=0 is the original",
        "exact": "gradients exact",
    }

    save("coverage_summary", summary, columns, readme)
    for row in rows:
        wrong = [key for key in ("oracle", "exact") if row.get(key) is False]
        if wrong or "error" in row:
            print(row["zoo"], row["model"], *wrong, row.get("error", ""), row.get("oracle_train", ""), row.get("oracle_eval", ""))
        elif max(row.get("in_chains", 0), _referred(row)) > row.get("rewritten", 0):
            of = f"{row['rewritten']} of {row['in_chains']}, independent count {_referred(row)}"
            print(row["zoo"], row["model"], of, row["refused"], *row["modules"][:2])


def _summary(zoo: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    built = [row for row in rows if "unbuilt" not in row]
    rewritten = [row for row in built if row.get("rewritten")]
    in_chains = sum(row.get("in_chains", 0) for row in built)
    return {
        "zoo": zoo,
        "models": len(built),
        "unbuilt": len(rows) - len(built),
        "errors": sum("error" in row for row in built),
        "rewritten_models": len(rewritten),
        "in_chains": in_chains,
        "rewritten": (done := sum(row["rewritten"] for row in rewritten)),
        "share": round(100 * done / max(in_chains, 1), 2),
        "reference": (counted := sum(_referred(row) for row in built)),
        "reference_share": round(100 * sum(min(row.get("rewritten", 0), _referred(row)) for row in built) / max(counted, 1), 2),
        "oracle": f"{sum(row.get('oracle', False) for row in built)} of {len(built)}",
        "exact": f"{sum(row.get('exact', False) for row in built)} of {len(built)}",
    }


def _referred(row: dict[str, Any]) -> int:
    return (row.get("reference") or {}).get("in_chains", 0)


if __name__ == "__main__":
    main()
