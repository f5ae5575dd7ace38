"""`python -m mnet_fx demo`: one optimiser step of a ResNet-101, plain and rewritten, with proof and figures."""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from ..api import momentumize
from ..budget.measured import Memory, measure
from ..progress import shown_progress
from ..reporting.build import report_of

__all__ = ["demo"]

ROUNDS = 3  # timed passes of each model, interleaved


class _Training:
    """One model, its optimiser and its batch."""

    def __init__(self, net: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.net, self.labels = net.train(), labels
        self.images = images.clone().requires_grad_()
        self.start = copy.deepcopy(net.state_dict())
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def reset(self) -> None:
        """Back to the first weights and statistics; gradients to zero where there are any."""
        self.net.load_state_dict(self.start)
        for tensor in [self.images, *self.net.parameters()]:
            if tensor.grad is not None:
                tensor.grad.zero_()

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.images), self.labels)

    def seconds(self) -> float:
        """Time of one forward and backward pass."""
        begin = time.perf_counter()
        self.loss().backward()
        return time.perf_counter() - begin

    def measured_step(self) -> Memory:
        """One optimiser step from the first weights; returns its bytes."""
        self.reset()
        memory = measure(self.loss, Tensor.backward)
        self.optimizer.step()
        return memory

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by name of the parameter; that of the input has the name "the input"."""
        tensors = dict(self.net.named_parameters()) | {"the input": self.images}
        return {name: t.grad for name, t in tensors.items() if t.grad is not None}


def demo(batch: int = 8, pixels: int = 128, gamma: float = 0.9) -> int:
    """Prints the report, the bytes of both models, and the proof that the gradients are exact; returns 0 if they are, else 1."""
    torch.manual_seed(0)
    model = torchvision.models.resnet101()
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))
    print(f"ResNet-101, batch {batch} at {pixels} px, one SGD step, gamma {gamma:g}, {torch.get_num_threads()} thread(s)\n")
    plain = _Training(copy.deepcopy(model), images, labels)
    ours = _Training(momentumize(copy.deepcopy(model), gamma=gamma), images, labels)
    stored = _Training(momentumize(copy.deepcopy(model), gamma=gamma, backward="stored"), images, labels)
    with tqdm(total=2 * ROUNDS + 5, desc="warming up", leave=False, disable=not shown_progress()) as bar:

        def tick(what: str) -> None:
            bar.set_description(what)
            bar.update()

        times: dict[_Training, list[float]] = {plain: [], ours: []}
        for round_ in range(ROUNDS + 1):
            for training, taken in times.items():
                seconds = training.seconds()
                if round_ > 0:  # the first makes .grad and warms up
                    taken.append(seconds)
                tick("timing")
        memory = {}
        for training in times:
            memory[training] = training.measured_step()
            tick("counting bytes")
        stored.loss().backward()
        tick("proving")
    print(report_of(ours.net), "\n")
    print(_figures(memory[plain], memory[ours], median(times[plain]), median(times[ours])), "\n")
    return _proof(ours, stored)


def _figures(plain: Memory, ours: Memory, plain_seconds: float, our_seconds: float) -> str:
    mib = 2.0**20
    rows = [
        ["kept after forward, MiB", plain.kept / mib, ours.kept / mib, ours.kept / plain.kept],
        ["peak of the step, MiB", plain.peak / mib, ours.peak / mib, ours.peak / plain.peak],
        ["forward and backward, s", plain_seconds, our_seconds, our_seconds / plain_seconds],
    ]
    return tabulate(rows, headers=["", "plain", "momentum", "ratio"], floatfmt=".2f")


def _proof(ours: _Training, stored: _Training) -> int:
    for region in report_of(ours.net).regions:  # had one failed, the backward would have raised InversionError
        how = (
            "came back to its input bit for bit" if region.storage == "reverse" else "kept its inputs, and every step repeated bit for bit"
        )
        print(f"{region.name} ({region.path}, {region.steps} steps): {how}")
    reference, gradients = stored.gradients(), ours.gradients()
    wrong = [name for name in reference if not torch.equal(gradients[name], reference[name])]
    print(f"gradients equal to those of backward='stored', bit for bit: {len(reference) - len(wrong)} of {len(reference)}")
    if wrong:
        print("different:", ", ".join(wrong))
    return 1 if wrong else 0
