"""Runs a chain on a tape, each step under `torch.utils.checkpoint`; the rules are in `tape`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointError, checkpoint

from .errors import UNCOMPILED, InversionError, MnetError, StreamError
from .fingerprints import fingerprint
from .replay import Conditions, is_ordinary, transformed, undisturbed
from .tape import FloatTape, PlainTape, Print, Rerun, Tape

__all__ = ["Chain", "run_chain"]


class Step:
    """One step of one forward pass: the function that checkpoint runs, first on the live x[t], then on what the tape hands out."""

    def __init__(self, tape: Tape, t: int, module: nn.Module, sides: tuple[Any, ...], x: Tensor) -> None:
        self.tape, self.t = tape, t
        self.live: Tensor | None = x
        self.prints: Print = ()
        tape.reruns.append(Rerun(Conditions(module, sides, x.device, proof=tape.on_drift != "ignore"), x.requires_grad))

    def __call__(self) -> tuple[Any, ...]:
        if self.live is not None:
            x, self.live = self.live, None
            first_run = self.tape.reruns[self.t].conditions.first_run
            return Close.apply(self, False, *checked(first_run, x, (), self.tape.region, self.t))
        with undisturbed():
            return Close.apply(self, True, *self.tape.rerun(self.t, self.tape.hand_out(self.t)))

    def prove(self, rerun: bool, extras: Sequence[Any]) -> None:
        """Notes the extra outputs that have gradients, or compares: the state does not depend on them."""
        graded = [e for e in extras if isinstance(e, Tensor) and e.requires_grad and is_ordinary(e)]
        prints = self.tape.fingerprint(lambda: fingerprint(*graded))
        if not rerun:
            self.prints = prints
        elif prints != self.prints:
            self.tape.drifted(self.t, f"what step {self.t} gives besides the stream")


def checked(run: Callable[..., tuple[Any, ...]], x: Tensor, sides: tuple[Any, ...], region: str, t: int) -> tuple[Any, ...]:
    """run(x, *sides), and an error if that wrote to x.

    Raises:
        StreamError: the step changed the stream in place.
    """
    version = None if torch.compiler.is_dynamo_compiling() or x.is_inference() else x._version
    outputs = run(x, *sides)
    if version is not None and x._version != version:
        raise StreamError(
            f"{region}, step {t}: the step writes to the stream in place (an in-place activation or x += ... on its input), "
            "so the skip connection is not what it seems; make that operation out of place (inplace=False)"
        )
    return outputs


class Close(Function):
    """End of a step; see Rule 4."""

    @staticmethod
    def forward(ctx: Any, step: Step, rerun: bool, *outputs: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        y, *extras = outputs
        if rerun:
            step.tape.close(step.t, y)
        step.prove(rerun, extras)
        ctx.region, ctx.t = step.tape.region, step.t
        ctx.save_for_backward(y.new_empty(0))
        own = tuple(o.view_as(o) if isinstance(o, Tensor) else o for o in outputs)
        constant = [o for o, needs_grad in zip(own, ctx.needs_input_grad[2:], strict=True) if isinstance(o, Tensor) and not needs_grad]
        ctx.mark_non_differentiable(*constant)
        return own

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        try:
            _ = ctx.saved_tensors  # makes checkpoint rerun the step now
        except CheckpointError as error:
            raise InversionError(ctx.region, ctx.t, "what the step saves for its gradient") from error
        return None, None, *grads


class Chain:
    """A chain on a tape, one step after the other.

    Args:
        tape: a tape at time 0.
        x0, v0: the stream and the initial velocity (or None), with their gradients' history.

    Attributes:
        x: the stream at time t; a caller that keeps it itself may take it away, and gives it back before the next step.
        t: number of steps done.
    """

    def __init__(self, tape: Tape, x0: Tensor, v0: Tensor | None) -> None:
        self.tape, self.t = tape, 0
        self.x: Any
        self.x, self.v = tape.begin(x0, v0)

    def step(self, module: nn.Module, sides: tuple[Any, ...]) -> list[Any]:
        """Runs a step `module(x, *sides) -> (y, *extras)`; returns the extras.

        Raises:
            StreamError: the step changed the stream in place.
            MnetError: a transform of torch.func began or ended within the chain.
        """
        if transformed() and not isinstance(self.tape, FloatTape):
            raise MnetError(
                f"{self.tape.region}, step {self.t}: a transform of torch.func, or forward-mode differentiation, began or ended since "
                "the chain did: apply it to the whole model"
            )
        if isinstance(self.tape, PlainTape):
            y, *extras = checked(module, self.x, sides, self.tape.region, self.t)
        else:
            y, *extras = checkpoint(Step(self.tape, self.t, module, sides, self.x), use_reentrant=False, preserve_rng_state=False)
        self.x, self.v = self.tape.advance(self.t, self.x, self.v, y)
        self.t += 1
        return extras


def run_chain(
    tape: Tape, x0: Tensor, v0: Tensor | None, steps: Sequence[tuple[nn.Module, tuple[Any, ...]]], escapes: Collection[int] = ()
) -> tuple[Tensor, list[Tensor], list[Any]]:
    """Runs a chain on a tape at time 0.

    Args:
        tape: a `PlainTape` lets autograd store the activations (if grad mode is on); the others run each step under checkpoint.
        x0, v0: the stream and the initial velocity (or None), with their gradients' history.
        steps: for each step its module, which returns (y, *extras) with y in the shape of x[t], and its side inputs.
        escapes: times t of the stream values x[t] to return.

    Returns:
        x[T], the escaping x[t], and the extra outputs of all steps, in order.

    Raises:
        StreamError: a step changed the stream in place.
    """
    chain = Chain(tape, x0, v0)
    escaped, extras = [], []
    for t, (module, sides) in enumerate(steps):
        if t in escapes:
            escaped.append(chain.x)
        extras += chain.step(module, sides)
    return chain.x, escaped, extras
