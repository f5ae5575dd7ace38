"""A part of a model outside of chains, under a checkpoint: its inputs are kept, and it is run again in the backward pass.

As a step's, a rerun sees what the first run saw (`replay`), leaves no trace, and is proved: parameters, buffers and inputs must be what
they were, and its outputs must have the fingerprints of the first run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..arithmetic.fingerprints import prints
from ..arithmetic.valueless import valueless
from ..errors import StreamError
from .checkpoint import checkpoint
from .guise import is_ordinary
from .own_copies import Learnt, OwnCopies
from .proofs import Drift, Print, Proofs, differed, rerunning
from .replay import Conditions, undisturbed
from .sides import tensors_of
from .steps import closed, graded, unwritten_saves
from .unreturned import LEFT, Leaving, Unreturned

__all__ = ["run_segment", "run_whole"]


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
    return tuple(checkpoint(segment))


def run_whole(
    name: str, on_drift: str, module: nn.Module, x: Tensor, inputs: Sequence[Any], learnt: Learnt, leaving: Leaving | None = None
) -> Any:
    """Runs a part of which no graph is known under a checkpoint.

    A rerun goes to its end, where what it gives is compared; so results are handed on as they are: of any structure, inputs or views of
    them, or held by others too.

    Args:
        name: for messages.
        on_drift: "raise", "warn" or "ignore".
        module: called as `module(x, *inputs)`.
        x: as in `run_segment`.
        inputs: what the part reads, but for parameters and buffers.
        learnt: what earlier calls of the part found overwritten, in it or after it; it learns from this one.
        leaving: likewise, what they left beside their results.

    Raises:
        InversionError: out of the backward pass, if a rerun differs.
        StreamError: the part writes to an input of which there is no copy.
    """
    segment = _Whole(name, on_drift, module, x, inputs, None, None if valueless(x) else OwnCopies(learnt))
    if leaving is not None and on_drift != "ignore" and not valueless(x):
        segment.unreturned = leaving.watched(segment.conditions)
    return checkpoint(segment)


class _Segment:
    """The function that checkpoint runs, first and again."""

    def __init__(
        self,
        name: str,
        on_drift: str,
        module: nn.Module,
        x: Tensor,
        inputs: Sequence[Any],
        proof: int | None,
        own: OwnCopies | None = None,
    ) -> None:
        self.place: tuple[str, int | None] = (name, None)
        self.x, self.wanted, self.proof, self.own = x, on_drift != "ignore", proof, own
        self.conditions = Conditions(module, inputs, x.device, self.wanted, own)
        self.drifted, self.proofs = Drift(name, on_drift), Proofs()
        self.prints: Print = ()
        self.ran = False
        self.unreturned: Unreturned | None = None

    def __call__(self) -> Any:
        if not self.ran:
            self.ran = True
            return self._closed(False, self._first())
        with undisturbed():
            self.conditions.look(self.proofs, partial(self.drifted, None))
            look = nullcontext() if self.unreturned is None else self.unreturned.rerun()
            with look, rerunning(*self.place), unwritten_saves(self.place[0]):
                outputs = self.conditions.run(self.x)
            if self.unreturned is not None:
                self.proofs.compare(*self.unreturned.prints(), partial(differed, self.drifted, None, LEFT))
            return self._closed(True, outputs)

    def _first(self) -> Any:
        with nullcontext() if self.unreturned is None else self.unreturned.first_run():
            return self.conditions.first_run(self.x)

    def _closed(self, rerun: bool, outputs: Any) -> Any:
        if self.proof is None:
            return tuple(outputs)
        before, y, after = outputs[: self.proof], outputs[self.proof], outputs[self.proof + 1 :]
        return *before, closed(self, rerun, y, (*before, *after)), *after

    def finish(self, rerun: bool, y: Tensor, extras: Sequence[Any]) -> None:
        """Notes the outputs that have gradients, or compares."""
        own = [y] if is_ordinary(y) else []
        self._prove(rerun, [*own, *graded(extras)])

    def _prove(self, rerun: bool, outputs: Sequence[Tensor]) -> None:
        found = prints(outputs) if self.wanted else ()
        if rerun:
            self.proofs.compare(found, self.prints, partial(differed, self.drifted, None, "what it gives"))
        else:
            self.prints = found


class _Whole(_Segment):
    """The same for a part whose results are not known before they are there."""

    def _first(self) -> Any:
        conditions, before = self.conditions, self.conditions.versions()
        outputs = super()._first()
        conditions.written = {name for name, version in conditions.versions().items() if version != before[name]}
        conditions.forget_histories()
        if self.own is not None:
            self.own.learnt.overwritten |= {(conditions.layer, name): True for name in conditions.written}
        elif self.wanted:
            conditions.suppose()
        if missing := sorted(conditions.written - conditions.copies.keys()):
            raise StreamError(
                f"{self.place[0]} writes in place to {missing[0]} of its call, of which there is no copy to run it again with (none "
                "is made with on_drift='ignore', or of what earlier calls left as it was): give it a clone, or use rest='store'"
            )
        return outputs

    def _closed(self, rerun: bool, outputs: Any) -> Any:
        self._prove(rerun, graded(list(tensors_of(outputs))))
        return outputs
