"""A part of a model outside of chains under `torch.utils.checkpoint`: its inputs are kept, and it is run again in the backward pass.

As a step's, a rerun sees what the first run saw (`replay`), leaves no trace, and is proved: parameters, buffers and inputs must be what
they were, and its outputs must have the fingerprints of the first run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..arithmetic.fingerprints import prints
from .guise import is_ordinary
from .proofs import Drift, Print, Proofs, differed, rerunning
from .replay import Conditions, undisturbed
from .steps import closed, graded, unwritten_saves

__all__ = ["run_segment"]


def run_segment(name: str, on_drift: str, module: nn.Module, x: Tensor, inputs: Sequence[Any], proof: int | None) -> tuple[Any, ...]:
    """Runs a part under a checkpoint.

    Args:
        name: for messages.
        on_drift: "raise", "warn" or "ignore".
        module: called as `module(x, *inputs)`; returns a tuple.
        x: any tensor on the device on which the part runs; of no other meaning.
        inputs: what the part reads, but for parameters and buffers.
        proof: index of an output that lies in memory of its own; None: outputs are not compared.

    Raises:
        InversionError: out of the backward pass, if a rerun differs.
    """
    segment = _Segment(name, on_drift, module, x, inputs, proof)
    return tuple(checkpoint(segment, use_reentrant=False, preserve_rng_state=False))


class _Segment:
    """The function that checkpoint runs, first and again."""

    def __init__(self, name: str, on_drift: str, module: nn.Module, x: Tensor, inputs: Sequence[Any], proof: int | None) -> None:
        self.place: tuple[str, int | None] = (name, None)
        self.x, self.wanted, self.proof = x, on_drift != "ignore", proof
        self.conditions = Conditions(module, inputs, x.device, self.wanted)
        self.drifted, self.proofs = Drift(name, on_drift), Proofs()
        self.prints: Print = ()
        self.ran = False

    def __call__(self) -> tuple[Any, ...]:
        if not self.ran:
            self.ran = True
            return self._closed(False, self.conditions.first_run(self.x))
        with undisturbed():
            self.conditions.look(self.proofs, partial(self.drifted, None))
            with rerunning(*self.place), unwritten_saves(self.place[0]):  # ends before `Close`, where the checkpoint stops the rerun
                outputs = self.conditions.run(self.x)
            return self._closed(True, outputs)

    def _closed(self, rerun: bool, outputs: Sequence[Any]) -> tuple[Any, ...]:
        if self.proof is None:
            return tuple(outputs)
        before, y, after = outputs[: self.proof], outputs[self.proof], outputs[self.proof + 1 :]
        return *before, closed(self, rerun, y, (*before, *after)), *after

    def finish(self, rerun: bool, y: Tensor, extras: Sequence[Any]) -> None:
        """Notes the outputs that have gradients, or compares."""
        own = [y] if is_ordinary(y) else []
        found = prints([*own, *graded(extras)]) if self.wanted else ()
        if rerun:
            self.proofs.compare(found, self.prints, partial(differed, self.drifted, None, "what it gives"))
        else:
            self.prints = found
