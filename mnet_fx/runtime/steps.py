"""Runs a chain on a tape, each step under a checkpoint; the rules are in `tape`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..arithmetic.fingerprints import prints
from ..errors import UNCOMPILED, InversionError, MnetError, StreamError
from .checkpoint import CheckpointError, checkpoint
from .float_tape import FloatTape
from .guise import is_ordinary, plain
from .noted import Known, noted
from .proofs import Print, unseen_write
from .reads import Reads, is_observed
from .replay import Conditions, undisturbed
from .surroundings import around, transformed
from .tape import PlainTape, Rerun, Tape
from .unreturned import LEFT, Unreturned

__all__ = ["Chain", "closed", "graded", "run_chain", "unwritten_saves", "watched"]

_NOTHING = nullcontext()
_WATCHERS: list[Callable[[Tape, int, Tensor], None]] = []
"""Called with the tape, t and x[t] after each step: for `mnet_fx.verify`, which says where a chain leaves the original, and `estimate`."""


@contextmanager
def watched(watch: Callable[[Tape, int, Tensor], None]) -> Iterator[None]:
    """Has `watch` called after each step, for a time."""
    _WATCHERS.append(watch)
    try:
        yield
    finally:
        _WATCHERS.remove(watch)


class Step:
    """One step of one forward pass: the function that checkpoint runs, first on the live x[t], then on what the tape hands out."""

    def __init__(self, chain: Chain, module: nn.Module, sides: tuple[Any, ...]) -> None:
        tape, t, x, print_ = chain.tape, chain.t, chain.x, chain.print
        self.tape, self.t = tape, t
        self.live: tuple[Tensor, Print] | None = (x, print_)
        self.running = True
        self.prints: Print = ()
        conditions = Conditions(module, sides, x.device, tape.on_drift != "ignore", tape.own, chain.known, chain.then)
        tape.reruns.append(Rerun(conditions, x))
        self.unreturned = None if tape.leaving is None else tape.leaving.watched(conditions)

    def __call__(self) -> tuple[Any, ...]:
        if self.live is not None:
            (x, print_), self.live = self.live, None
            with _NOTHING if self.unreturned is None else self.unreturned.first_run():
                outputs = checked(self.tape.reruns[self.t].conditions.first_run, x, (), print_, self.tape, self.t)
            self.running = False
            return self.closed(False, *outputs)
        with undisturbed():
            if self.running:
                return self.rerun(self._from_tape(self.tape.present))
            x = self._from_tape(self.tape.hand_out)
            return self.closed(True, *(self.rerun(x) if self.unreturned is None else self._looked_at(self.unreturned, x)))

    def _looked_at(self, unreturned: Unreturned, x: Tensor) -> tuple[Any, ...]:
        """The step on x[t] once more, and a look at what it leaves beside its outputs."""
        with unreturned.rerun():
            outputs = self.rerun(x)
        self.tape.prove(*unreturned.prints(), self.t, LEFT)
        return outputs

    def rerun(self, x: Tensor) -> tuple[Any, ...]:
        """The step on x[t] once more."""
        if self.tape.reruns[self.t].conditions.is_pure:
            return self.tape.rerun(self.t, x)
        with unwritten_saves(f"{self.tape.region}, step {self.t}"):
            return self.tape.rerun(self.t, x)

    def _from_tape(self, get: Callable[[int], Tensor]) -> Tensor:
        with torch._C.DisableTorchFunction():
            return get(self.t)

    def closed(self, rerun: bool, y: Tensor, *extras: Any) -> tuple[Any, ...]:
        """What leaves the step."""
        return closed(self, rerun, y, extras), *extras

    @property
    def place(self) -> tuple[str, int | None]:
        """The region, and the step's number."""
        return self.tape.region, self.t

    def finish(self, rerun: bool, y: Tensor, extras: Sequence[Any]) -> None:
        """Ends a run that gave y. Notes the extra outputs that have gradients, or compares: the state does not depend on them."""
        if rerun:
            self.tape.close(self.t, y)
        found = self.tape.fingerprint(lambda: prints(graded(extras)))
        if not rerun:
            self.prints = found
        else:
            self.tape.prove(found, self.prints, self.t, f"what step {self.t} gives besides the stream")


class Closing(Protocol):
    """What is run under a checkpoint and ends with `Close`."""

    @property
    def place(self) -> tuple[str, int | None]:
        """What an `InversionError` says."""

    def finish(self, rerun: bool, y: Tensor, extras: Sequence[Any]) -> None:
        """Called at the end of each run."""


def closed(run: Closing, rerun: bool, y: Tensor, others: Sequence[Any]) -> Tensor:
    """y with `Close` behind it; where y needs no gradient, another output that does is passed too, so that `Close` is in the graph."""
    needing = [] if y.requires_grad else [e for e in others if isinstance(e, Tensor) and e.requires_grad]
    return Close.apply(run, rerun, others, y, *needing[:1])


def graded(outputs: Sequence[Any]) -> list[Tensor]:
    """The outputs that have gradients and whose values can be fingerprinted."""
    return [t for t in (plain(e) for e in outputs if isinstance(e, Tensor) and e.requires_grad) if is_ordinary(t)]


@contextmanager
def unwritten_saves(where: str) -> Iterator[None]:
    """
    Raises:
        MnetError: what runs here overwrites in place what its gradient needs. The checkpoint around hands that out without looking, where
            autograd by itself would raise.
    """
    with noted_saves() as saved:
        yield
        if any(t._version != version for t, version in saved):
            raise MnetError(
                f"{where}: the step overwrites in place a value that its gradient needs (as y.mul_(2) does after y = x.exp()); torch's "
                "own autograd refuses that too, where it asks for that gradient: use an out-of-place operation, or overwrite a clone"
            )


class _Noted(list[tuple[Tensor, int]]):
    """Tensors, each with its version then."""

    pack: Callable[[Tensor], Any]

    def note(self, t: Tensor) -> Any:
        self.append((t.detach() if t.grad_fn is not None else t, t._version))  # it would hold what it is an output of
        return self.pack(t)


torch._dynamo.eval_frame.skip_code(_Noted.note.__code__)  # autograd may call it where Dynamo looks at every frame


@contextmanager
def noted_saves() -> Iterator[list[tuple[Tensor, int]]]:
    """The tensors that autograd saves meanwhile, each with its version then; they are packed as the hooks around say."""
    hooks, noted = torch._C._autograd._top_saved_tensors_default_hooks(False), _Noted()
    if hooks is None:
        yield noted
        return
    noted.pack, unpack = hooks
    try:
        with torch.autograd.graph.saved_tensors_hooks(noted.note, unpack):
            yield noted
    finally:
        noted.clear()  # what autograd saved holds its method, and so would be held by itself


def checked(run: Callable[..., tuple[Any, ...]], x: Tensor, sides: tuple[Any, ...], print_: Print, tape: Tape, t: int) -> tuple[Any, ...]:
    """run(x, *sides), and an error if that wrote to x, which the version tells, or if it changed unseen since its fingerprint was taken.

    Raises:
        StreamError: the step changed the stream in place.
    """
    version = None if torch.compiler.is_dynamo_compiling() or x.is_inference() else x._version
    outputs = run(x, *sides)
    if version is not None and x._version != version:
        raise StreamError(
            f"{tape.region}, step {t}: the step writes to the stream in place (an in-place activation or x += ... on its input), "
            "so the skip connection is not what it seems; make that operation out of place (inplace=False)"
        )
    if print_:
        tape.proofs.put_off(stream_print(tape, x), print_, partial(unseen_write, tape.region, t))
    return outputs


def stream_print(tape: Tape, x: Tensor) -> Print:
    """What tells whether the stream was written to; nothing where nobody looks."""
    return tape.note(x) if tape.watches(x) else ()


class Close(Function):
    """End of a step; see Rule 4."""

    @staticmethod
    def forward(ctx: Any, run: Closing, rerun: bool, extras: tuple[Any, ...], y: Tensor, *needing: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        with torch._C.DisableTorchFunction():
            run.finish(rerun, plain(y), extras)
            ctx.save_for_backward(plain(y).new_empty(0))
        ctx.place = run.place
        own = y.detach()
        if not ctx.needs_input_grad[3]:
            ctx.mark_non_differentiable(own)
        return own

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        try:
            _ = ctx.saved_tensors  # makes checkpoint rerun the step now
        except CheckpointError as error:
            raise InversionError(ctx.place[0], ctx.place[1], "what the step saves for its gradient") from error
        return None, None, None, grad


class Chain:
    """A chain on a tape, one step after the other.

    Args:
        tape: a tape at time 0.
        x0, v0: the stream and the initial velocity (or None), with their gradients' history.

    Attributes:
        x: the stream at time t; a caller that keeps it itself may take it away, and gives it back before the next step.
        t: number of steps done.
        print: the fingerprint of x, which nobody may write to.
        known: fingerprints of what the steps read, where they are known already.
        then: torch's switches, where no step moves one; None: that is not known.
        reads: where the steps read the stream; None: at x[t].
        frame: that of the velocity, see `arithmetic.rotations`; None: the one in which it began.
    """

    frame: Tensor | None

    def __init__(self, tape: Tape, x0: Tensor, v0: Tensor | None, reads: Reads | None = None) -> None:
        self.tape, self.t, self.reads = tape, 0, reads
        self.known: Known = {}
        self.then: tuple[Any, ...] | None = None
        self.x: Any
        self.x, self.v = tape.begin(x0, v0)
        self.print = stream_print(tape, self.x)
        self.rotates, self.frame = reads is not None and reads.rotates(x0), None

    def step(self, module: nn.Module, sides: tuple[Any, ...], index: int | None = None) -> list[Any]:
        """Runs a step `module(x, *sides) -> (y, *extras)`; returns the extras. `index`: its number among all steps, if that is not t.

        Raises:
            StreamError: the step changed the stream in place.
            MnetError: a transform of torch.func began or ended within the chain.
        """
        if transformed() and not isinstance(self.tape, FloatTape):
            raise MnetError(
                f"{self.tape.region}, step {self.t}: a transform of torch.func, or forward-mode differentiation, began or ended since "
                "the chain did: apply it to the whole model"
            )
        if self.reads is not None:
            gamma, weight = self.tape.factors[self.t]
            reach = gamma / weight if self.t else 0.0
            module = self.reads.of(module, self.t if index is None else index, reach, self.x)
        if isinstance(self.tape, PlainTape) or self.t >= self.tape.end:
            y, *extras = checked(module.forward, self.x, sides, self.print, self.tape, self.t)
        else:
            y, *extras = checkpoint(Step(self, module, sides))
        if self.reads is not None and (self.rotates or is_observed()):
            self._rotate(self.reads, index, y)
        self.x, self.v = self.tape.advance(self.t, self.x, self.v, y)
        self.t += 1
        for watch in _WATCHERS:
            watch(self.tape, self.t, self.x)
        self.print = stream_print(self.tape, self.x) if self.t < len(self.tape.factors) else ()
        if self.t == len(self.tape.factors) and isinstance(self.tape, PlainTape):
            self.tape.proofs.settle()  # no backward pass of ours would
        return extras

    def _rotate(self, reads: Reads, index: int | None, y: Tensor) -> None:
        """Has the velocity rotated after this step, which gave y."""
        gamma, weight = self.tape.factors[self.t + 1] if self.t + 1 < len(self.tape.factors) else (0.0, 1.0)
        rotation = reads.rotation(self.t if index is None else index, gamma / weight, self.frame, y)
        self.frame = None
        if rotation is not None:
            self.tape.rotations[self.t], self.frame = rotation, rotation.after


def run_chain(
    chain: Chain,
    steps: Sequence[tuple[nn.Module, tuple[Any, ...]]],
    escapes: Collection[int] = (),
    kept: Callable[[int, list[Any]], list[Any]] = lambda t, extras: extras,
) -> tuple[Tensor, list[Tensor], list[Any]]:
    """Runs a chain from time 0 to its end.

    Args:
        chain: on a `PlainTape`, autograd stores the activations (if grad mode is on); on others each step runs under checkpoint.
        steps: for each step its module, which returns (y, *extras) with y in the shape of x[t], and its side inputs.
        escapes: times t of the stream values x[t] to return.
        kept: given t and the extra outputs of step t, which of them to keep.

    Returns:
        x[T], the escaping x[t], and the extra outputs that were kept, in order.

    Raises:
        StreamError: a step changed the stream in place.
    """
    escaped, extras = [], []
    if not isinstance(chain.tape, PlainTape):
        chain.known = {} if chain.tape.on_drift == "ignore" else noted(steps[: chain.tape.end])
        still = all(getattr(step, "stateless", False) and getattr(step, "is_pure", False) for step, _ in steps)
        chain.then = around(chain.x.device) if still else None
    for t, (module, sides) in enumerate(steps):
        if t in escapes:
            escaped.append(chain.x)
        extras += kept(t, chain.step(module, sides))
    return chain.x, escaped, extras
