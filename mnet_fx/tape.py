"""The seekable tape: runs a chain of steps, keeps no activations, and takes the chain back step by step in the backward pass.

Each step runs under `torch.utils.checkpoint` (non-reentrant, public API only), so that autograd, its hooks and its gradients are those of
the plain chain. What is ours is where a recomputation gets x[t] from:

    forward    x[t] --f[t]--> y --+                 tape.push: (X, U) goes from t to t + 1
                 |                Shear --> x[t+1], v[t+1]
    backward   checkpoint reruns f[t] on x[t], which the tape works out from (X, U) at t + 1: first x back, then f, then u back

Rule 1. The stream tensor x[t] is no argument of the checkpointed function: the first run takes the live tensor, every later run what
        the tape hands out. Nothing else keeps x[t] alive.
Rule 2. The tape is at a time t, with (X[t], U[t]); or half-way, with (X[t], U[t+1]), while f[t] is rerun. It seeks to any time in either
        direction by rerunning steps, so a partial `autograd.grad`, `retain_graph` and double backward get the right x[t].
Rule 3. Every rerun, for whatever reason, goes through `Conditions.run` and sees what the first run saw.
Rule 4. A step ends in `_Close`, whose forward completes the tape's move and which saves an (empty) tensor: checkpoint stops a rerun once
        the last saved tensor is back, hence never before the move is complete. Its backward is the first of the step, so errors of the
        recomputation come up there and are given our words.
Rule 5. Each arrival at a time is proved: the fingerprint of the state must be the one noted on the way forward.
Rule 6. The tape belongs to the autograd graph alone (checkpoint's frames -> _Step -> tape -> _Rerun, no way back) and dies with it.
        Nothing is freed by hand.
Rule 7. Gradients flow through `_Shear`, the linear map of the recurrence; rounding to the grid is straight-through. It saves nothing and
        is differentiable, so double backward works.
Rule 8. Never worse than a checkpoint: where T stored inputs take fewer bytes than (X, U), `StoringTape` keeps those instead. The
        forward and the gradients have the same bits either way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointError, checkpoint

from .errors import UNCOMPILED, InversionError, MnetError, MnetWarning, StreamError
from .fingerprints import fingerprint
from .fixed_point import Record, State
from .replay import Conditions, transformed, undisturbed

__all__ = ["Chain", "Factors", "FloatTape", "PlainTape", "ReversingTape", "StoringTape", "Tape", "run_chain"]

Factors = tuple[tuple[float, float], ...]
Print = tuple[int, ...]


class Tape:
    """One forward pass of one chain. Abstract: `ReversingTape` works x[t] out again, `StoringTape` keeps it, `PlainTape` never needs it.

    Args:
        region: name for messages.
        state: (X, U) at time 0.
        factors: (g[t], b[t]) of every step.
        on_drift: "raise", "warn" or "ignore" a recomputation that differs.
    """

    def __init__(self, region: str, state: State, factors: Factors, on_drift: str = "raise") -> None:
        self.region, self.state, self.factors, self.on_drift = region, state, factors, on_drift
        self.reruns: list[_Rerun] = []

    def begin(self, x0: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x[0] and v[0] with their gradients' history."""
        return _Enter.apply(x0, v0, self)

    def advance(self, t: int, x: Tensor, v: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        """x[t + 1] and v[t + 1] with their gradients' history."""
        return _Shear.apply(x, v, y, self, t)

    def enter(self) -> Tensor:
        """x[0], on the grid."""
        return self.state.read()

    def push(self, t: int, y: Tensor) -> Tensor:
        """Takes the state from t to t + 1 with y = f[t](x[t]); returns x[t + 1]."""
        raise NotImplementedError

    def hand_out(self, t: int) -> Tensor:
        """x[t] for a rerun of step t."""
        raise NotImplementedError

    def close(self, t: int, y: Tensor) -> None:
        """Ends a rerun of step t, which gave y."""
        raise NotImplementedError

    def rerun(self, t: int, x: Tensor) -> tuple[Any, ...]:
        """(y, *extras) of step t on x = x[t], once more."""
        if (what := self.reruns[t].conditions.changed()) is not None:
            self.drifted(t, what)
        try:
            return self.reruns[t](x)
        except (MnetError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise InversionError(self.region, t, f"the course of the step ({type(error).__name__}: {error})") from error

    def fingerprint(self, of: Callable[[], Print]) -> Print:
        """of(), or nothing where nobody wants proof."""
        return () if self.on_drift == "ignore" else of()

    def drifted(self, t: int, what: str, elements: int | None = None, largest: float | None = None) -> None:
        """Reports that `what` differed in a rerun of step t."""
        error = InversionError(self.region, t, what, elements, largest)
        if self.on_drift == "raise":
            raise error
        if self.on_drift == "warn":
            warnings.warn(str(error), MnetWarning, stacklevel=2)


class ReversingTape(Tape):
    """Holds (X, U) of one time, and moves it to and fro."""

    def __init__(self, region: str, state: State, factors: Factors, on_drift: str = "raise") -> None:
        super().__init__(region, state, factors, on_drift)
        self.time = 0
        self.half = False
        self.from_rest = state.v_bound == 0.0
        self.records: list[Record] = []
        self.prints = [self.fingerprint(state.fingerprint)]

    def push(self, t: int, y: Tensor) -> Tensor:
        x = self._forward(y)
        self.prints.append(self.fingerprint(self.state.fingerprint))
        return x

    def hand_out(self, t: int) -> Tensor:
        if self.half and self.time == t:
            return self.state.read()
        self._seek(t + 1)
        return self._halve()

    def close(self, t: int, y: Tensor) -> None:
        self.state.unstep_u(self.records[t], y)
        self.half = False
        if self.fingerprint(self.state.fingerprint) != self.prints[t]:
            self.drifted(t, f"the state before step {t}", *(self.state.off_zero() if t == 0 and self.from_rest else ()))

    def state_at(self, t: int) -> Tensor:
        """x[t], with the tape at that time."""
        self._seek(t)
        return self.state.read()

    def _forward(self, y: Tensor) -> Tensor:
        del self.records[self.time :]
        record, x = self.state.step(y, *self.factors[self.time])
        self.records.append(record)
        self.time += 1
        return x

    def _halve(self) -> Tensor:
        self.time -= 1
        x = self.state.unstep_x(self.records[self.time])
        self.half = True
        return x

    def _seek(self, t: int) -> None:
        """Goes to time t, rerunning the steps in between."""
        if self.half:  # a rerun that did not reach its end
            self.state.restep_x(self.records[self.time])
            self.half, self.time = False, self.time + 1
        x = self.state.read() if self.time < t else None
        while x is not None and self.time < t:
            x = self._forward(self._value(x))
            if self.fingerprint(self.state.fingerprint) != self.prints[self.time]:
                self.drifted(self.time - 1, f"the state after step {self.time - 1}")
        while self.time > t:
            x = self._halve()
            self.close(self.time, self._value(x))

    def _value(self, x: Tensor) -> Tensor:
        """y of a rerun at the present time that keeps no graph."""
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t):  # hides the packing from the checkpoint that asked
            return self.rerun(self.time, x)[0].detach()


class StoringTape(Tape):
    """Keeps the inputs x[t], as a checkpoint does; (X, U) is only needed on the way forward."""

    def __init__(self, region: str, state: State, factors: Factors, on_drift: str = "raise") -> None:
        super().__init__(region, state, factors, on_drift)
        self.prints: list[Print] = []
        self.inputs: list[tuple[Tensor, Print]] = []

    def enter(self) -> Tensor:
        return self._kept(super().enter())

    def push(self, t: int, y: Tensor) -> Tensor:
        self.prints.append(self.fingerprint(lambda: fingerprint(y)))
        _, x = self.state.step(y, *self.factors[t])
        if t + 1 < len(self.factors):
            return self._kept(x)
        del self.state
        return x

    def hand_out(self, t: int) -> Tensor:
        x, print_ = self.inputs[t]
        if self.fingerprint(lambda: fingerprint(x)) != print_:
            self.drifted(t, f"the stream before step {t}, changed in place,")
        return x

    def close(self, t: int, y: Tensor) -> None:
        if self.fingerprint(lambda: fingerprint(y)) != self.prints[t]:
            self.drifted(t, f"the residual of step {t}")

    def _kept(self, x: Tensor) -> Tensor:
        self.inputs.append((x.detach(), self.fingerprint(lambda: fingerprint(x))))
        return x


class PlainTape(Tape):
    """Keeps nothing and goes forward only: for inference, and for steps whose activations autograd stores."""

    def push(self, t: int, y: Tensor) -> Tensor:
        return self.state.step(y, *self.factors[t])[1]


class FloatTape(PlainTape):
    """No tape: the recurrence in floating point, for what cannot follow integers (torch.func's transforms, forward-mode differentiation,
    torch.export), and for streams without elements.

    Equal to the others up to rounding in the stream's dtype; v is held in float32 at least.
    """

    def __init__(self, region: str, factors: Factors) -> None:
        self.region, self.factors, self.on_drift = region, factors, "ignore"

    def begin(self, x0: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return x0, v0

    def advance(self, t: int, x: Tensor, v: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        gamma, weight = self.factors[t]
        dtype = torch.promote_types(x.dtype, y.dtype)
        y = weight * y.to(torch.promote_types(dtype, torch.float32))
        v = y if v is None else gamma * v + y
        return (x + v).to(dtype), v


class _Rerun:
    """What it takes to run one step again; the tape holds it, so it does not know the tape, which would be a cycle."""

    def __init__(self, conditions: Conditions, requires_grad: bool) -> None:
        self.conditions, self.requires_grad = conditions, requires_grad

    def __call__(self, x: Tensor) -> tuple[Any, ...]:
        return self.conditions.run(x.detach().requires_grad_(self.requires_grad))


class _Step:
    """One step of one forward pass: the function that checkpoint runs, first on the live x[t], then on what the tape hands out."""

    def __init__(self, tape: Tape, t: int, module: nn.Module, sides: tuple[Any, ...], x: Tensor) -> None:
        self.tape, self.t = tape, t
        self.live: Tensor | None = x
        tape.reruns.append(_Rerun(Conditions(module, sides, x.device, proof=tape.on_drift != "ignore"), x.requires_grad))

    def __call__(self) -> tuple[Any, ...]:
        if self.live is not None:
            x, self.live = self.live, None
            first_run = self.tape.reruns[self.t].conditions.first_run
            return _Close.apply(self, False, *checked(first_run, x, (), self.tape.region, self.t))
        with undisturbed():
            return _Close.apply(self, True, *self.tape.rerun(self.t, self.tape.hand_out(self.t)))


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


class _Close(Function):
    """End of a step; see Rule 4."""

    @staticmethod
    def forward(ctx: Any, step: _Step, rerun: bool, *outputs: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        y = outputs[0]
        if rerun:
            step.tape.close(step.t, y)
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


class _Enter(Function):
    """x0 and v0, put on the grid; straight-through backward."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, v0: Tensor | None, tape: Tape) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.gamma = tape.factors[0][0]
        return tape.enter(), None if v0 is None else _token(x0)

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if gv is not None:
            gv = gv * ctx.gamma  # see _Shear
        elif gx is not None and ctx.needs_input_grad[1]:
            gv = torch.zeros_like(gx)  # g[0] = 0 forgets v0
        return gx, gv, None


class _Shear(Function):
    """(x[t], v[t], y) -> (x[t+1], v[t+1]): values from the tape, gradient of v' = g v + b y, x' = x + v'.

    v is a token of the stream's shape without memory: only its gradient is real. What is handed on as the gradient of v[t] is that of
    v[t+1], which is to be multiplied by g[t] by whoever takes it: one pass over the elements less.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, tape: Tape, t: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.dtypes = tape.factors[t : t + 2], (x.dtype, y.dtype)
        after = tape.push(t, y)
        return after, _token(after)

    @staticmethod
    @torch.compiler.disable(reason=UNCOMPILED)
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        (gamma, weight), (x_dtype, y_dtype) = ctx.factors[0], ctx.dtypes
        if gv is not None:
            next_gamma = ctx.factors[1][0]
            gv = gv * next_gamma if gx is None else torch.add(gx, gv, alpha=next_gamma)
        total = gx if gv is None else gv
        if total is None:
            return None, None, None, None, None
        gy = (total * weight).to(y_dtype) if ctx.needs_input_grad[2] else None
        return None if gx is None else gx.to(x_dtype), total if gamma and ctx.needs_input_grad[1] else None, gy, None, None


def _token(x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(x.shape)


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
            y, *extras = checkpoint(_Step(self.tape, self.t, module, sides, self.x), use_reentrant=False, preserve_rng_state=False)
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
