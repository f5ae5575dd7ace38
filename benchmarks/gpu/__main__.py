"""One command for one run on one NVIDIA GPU: what do a training step's bytes and milliseconds become, beside the usual ways?

    python -m benchmarks.gpu --out DIR [--only arithmetic models study largest inductor] [--models encoder_bf16 gpt2] [--minutes 8]
    python -m benchmarks.gpu --out DIR --device cpu --tiny      # whether everything runs; under a minute

Writes DIR/gpu.json, anew after each row. Needs no network: all weights are random. What fails, for want of memory or of a package, is a row
with the error. `python -m benchmarks.gpu.table` makes the tables of docs/measurements.md. In order of priority:

- arithmetic: bandwidth of the exact arithmetic, beside a copy on the device;
- models: an encoder of 24 layers, GPT-2, a Llama of 1.1 B parameters, a ResNet-152: plain, with checkpoints (also on the host), here;
- study: the table of an independent study of reversible transformers;
- largest: the largest batch and depth in 24 GiB;
- inductor: the encoder and GPT-2 under torch.compile.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Hopper's default, and what makes its products repeat

import torch

from . import arithmetic, largest, models, study
from .session import Session, failure
from .subjects import SUBJECTS

PARTS = ["arithmetic", "models", "study", "largest", "inductor"]
KEPT = {"study": 40.0, "largest": 90.0}  # seconds that earlier parts leave them


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "."), help="folder of gpu.json (default $OUT)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), help="models of the parts models and inductor")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new begins")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, and aot_eager in inductor's place")
    parser.add_argument("--compiler", help="in inductor's place")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --device cpu --tiny shows whether everything runs")
    torch.manual_seed(0)
    torch._dynamo.config.automatic_dynamic_shapes = False  # each model has one shape
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    compiler = chosen.compiler or ("aot_eager" if chosen.tiny else "inductor")
    session = Session(chosen.device, chosen.tiny, Path(chosen.out) / "gpu.json", 60 * chosen.minutes, compiler)
    parts = {
        "arithmetic": arithmetic.run,
        "models": partial(models.eager, only=chosen.models),
        "study": study.run,
        "largest": largest.run,
        "inductor": partial(models.compiled, only=chosen.models),
    }
    names = [part for part in PARTS if part in chosen.only]
    for i, name in enumerate(names):
        begin = time.monotonic()
        session.reserve = min(0.4 * session.seconds, sum(KEPT.get(later, 0.0) for later in names[i + 1 :]))
        session.parts[name] = None
        try:
            parts[name](session)
        except Exception as error:
            session.add(name, error=failure(error))
        session.parts[name] = time.monotonic() - begin
        session.save()
    print({name: f"{seconds:.0f} s" for name, seconds in session.parts.items() if seconds is not None})


if __name__ == "__main__":
    main()
