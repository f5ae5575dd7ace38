"""The seekable tape: keeps no activations of a chain of steps, and takes the chain back step by step in the backward pass.

Each step runs under a checkpoint (see `checkpoint`), so that autograd, its hooks and its gradients are those of the plain chain (see
`steps`). What a tape adds is where a recomputation gets x[t] from:

    forward    x[t] --f[t]--> y --+                 tape.push: (X, U) goes from t to t + 1
                 |                Shear --> x[t+1], v[t+1]
    backward   checkpoint reruns f[t] on x[t], which the tape works out from (X, U) at t + 1: first x back, then f, then u back

Rule 1. The stream tensor x[t] is no argument of the checkpointed function: the first run takes the live tensor, every later run what
        the tape hands out. Nothing else keeps x[t] alive.
Rule 2. The tape is at a time t, with (X[t], U[t]); or half-way, with (X[t], U[t+1]), while f[t] is rerun. It seeks to any time in either
        direction by rerunning steps, so a partial `autograd.grad`, `retain_graph` and double backward get the right x[t].
Rule 3. Every rerun, for whatever reason, goes through `Conditions.run` and sees what the first run saw.
Rule 4. y leaves a step by `steps.Close`, whose forward completes the tape's move and which saves an (empty) tensor. Where the gradient
        comes in by y, as it mostly does, its backward is the first of the step, so errors of the recomputation come up there and are given
        our words. Extra outputs leave as they are: the graph is the model's, where y may depend on them.
        A step that differentiates within itself is rerun before its first run ends: on x[t] as it is, and the tape does not move.

        Close.backward          asks for its saved tensor                     autograd comes to step t from the side of t + 1
          checkpoint            runs step t again
            Step.__call__
              tape.hand_out     x back, half a step: gives x[t]               the tape holds (X[t], U[t+1])
              Conditions.run    restores what the first run saw; y = f(x[t])  autograd saves what the gradient of f[t] needs
              Close.forward     tape.close: u back, and the proof             the tape holds (X[t], U[t])
        gradients of f[t], with what was saved; then Shear, then Close.backward of step t - 1

Rule 5. Each arrival at a time is proved: the fingerprint of the state must be the one noted on the way forward; so must that of y where
        momentum is so small that the state says nothing of y, and those of the extra outputs that a rerun gives gradients to. Those of
        a device are compared when the pass ends (see `proofs`).
Rule 6. The tape belongs to the autograd graph alone (what stands for saved tensors -> Step -> tape -> Rerun, no way back), dies with it.
        Nothing is freed by hand.
Rule 7. Gradients flow through `shear.Shear`, the linear map of the recurrence; rounding to the grid is straight-through. It saves
        nothing and is differentiable, so double backward works.
Rule 8. Never worse than a checkpoint: where T stored inputs take fewer bytes than (X, U), `StoringTape` keeps those instead. The
        forward and the gradients have the same bits either way.
Rule 9. From time `end` on autograd stores what steps need. A reversing tape stays at that time, and a copy of its state goes on to T.
Rule 10. A pass announces each use of the state to `handover`: other streams may have used it, and it may have waited on the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.device_state import DeviceState, LostBits
from ..arithmetic.fingerprints import prints
from ..arithmetic.fixed_point import Record, State
from ..arithmetic.rotated_state import RotatedState
from ..arithmetic.rotations import Rotation
from ..errors import InversionError
from .cuda_streams import Handover
from .guise import Guise, dressed, plain
from .own_copies import OwnCopies
from .proofs import Drift, Print, Proofs, differed, looked, rerunning, unseen_write
from .replay import Conditions
from .shear import Enter, Factors, Shear, handed_on
from .unreturned import Leaving

__all__ = ["PlainTape", "Rerun", "ReversingTape", "StoringTape", "Tape"]

SMALL = 1 / 32  # below this momentum u spills so many bits that the state may not show a y that differs, so y has a fingerprint too


class Rerun:
    """What it takes to run one step again; the tape holds it, so it does not know the tape, which would be a cycle."""

    def __init__(self, conditions: Conditions, x: Tensor) -> None:
        self.conditions, self.requires_grad, self.guise = conditions, x.requires_grad, Guise.of(x)

    def __call__(self, x: Tensor) -> tuple[Any, ...]:
        return self.conditions.run(dressed(x.detach(), self.guise).requires_grad_(self.requires_grad))


class Tape:
    """One forward pass of one chain. Abstract: `ReversingTape` works x[t] out again, `StoringTape` keeps it, `PlainTape` never needs it.

    Args:
        region: name for messages.
        state: (X, U) at time 0.
        factors: (g[t], b[t]) of every step.
        on_drift: "raise", "warn" or "ignore" a recomputation that differs.
    """

    def __init__(self, region: str, state: State | DeviceState, factors: Factors, on_drift: str = "raise") -> None:
        self.state, self.handed_on = state, handed_on(factors)
        self._begin(region, factors, on_drift)

    def _begin(self, region: str, factors: Factors, on_drift: str) -> None:
        self.region, self.factors, self.on_drift, self.end = region, factors, on_drift, len(factors)
        self.drifted, self.proofs = Drift(region, on_drift), Proofs()
        self.reruns: list[Rerun] = []
        self.rotations: dict[int, Rotation] = {}  # of the velocity, after step t
        self.fresh: Print = ()  # of x[t + 1], where `push` has taken it together with that of the state
        self.own: OwnCopies | None = None  # of what is overwritten after its steps, in named regions
        self.leaving: Leaving | None = None  # what is known of what steps leave beside their outputs, where they may

    def begin(self, x0: Tensor, v0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x[0] and v[0] with their gradients' history."""
        return Enter.apply(x0, v0, self)

    def advance(self, t: int, x: Tensor, v: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
        """x[t + 1] and v[t + 1] with their gradients' history."""
        return Shear.apply(x, v, y, self, t)

    def enter(self) -> Tensor:
        """x[0], on the grid."""
        return self.state.read()

    def watches(self, x: Tensor) -> bool:
        """Whether writes to x that autograd does not see are looked for: not where nobody wants proof, and its version tells most."""
        return self.on_drift != "ignore" or x.is_inference()

    def note(self, x: Tensor) -> Print:
        """What tells later whether somebody wrote to x[t], which was just given: its fingerprint, unless `push` sees that."""
        fresh, self.fresh = self.fresh, ()
        return () if isinstance(self.state, DeviceState) else fresh or prints([plain(x.detach())])

    def push(self, t: int, y: Tensor, x: Tensor) -> Tensor:
        """Takes the state from t to t + 1 with y = f[t](x[t]); returns x[t + 1]. x is the tensor in which x[t] was handed out."""
        raise NotImplementedError

    def _step(self, t: int, y: Tensor, x: Tensor | None = None, state: State | DeviceState | None = None) -> tuple[Any, Tensor]:
        """A step of the state: its record and x[t + 1]. A device looks meanwhile whether x still is what was handed out."""
        state = state or self.state
        if t in self.rotations:
            assert isinstance(state, RotatedState)
            return state.step(y, *self.factors[t], self.rotations[t])
        if not isinstance(state, DeviceState):
            return state.step(y, *self.factors[t])
        given = x if x is not None and self.watches(x) else None
        result = state.step(y, *self.factors[t], given=given)
        if given is not None:
            self.proofs.put_off(*state.written, partial(unseen_write, self.region, t))
        return result

    def present(self, t: int) -> Tensor:
        """x[t], while the first run of step t goes on."""
        raise NotImplementedError

    def hand_out(self, t: int) -> Tensor:
        """x[t] for a rerun of step t, which `close` will end."""
        raise NotImplementedError

    def close(self, t: int, y: Tensor) -> None:
        """Ends a rerun of step t, which gave y."""
        raise NotImplementedError

    def rerun(self, t: int, x: Tensor) -> tuple[Any, ...]:
        """(y, *extras) of step t on x = x[t], once more."""
        self.reruns[t].conditions.look(self.proofs, partial(self.drifted, t))
        with rerunning(self.region, t):
            return self.reruns[t](x)

    def fingerprint(self, of: Callable[[], Print]) -> Print:
        """of(), or nothing where nobody wants proof."""
        return () if self.on_drift == "ignore" else of()

    def prove(self, found: Print, noted: Print, t: int, what: str) -> None:
        """Reports that `what` differs in a rerun of step t, if it does."""
        self.proofs.compare(found, noted, partial(differed, self.drifted, t, what))

    def prove_residual(self, t: int, y: Tensor, noted: Print) -> None:
        """The same for what step t gave, y."""
        self.prove(self.fingerprint(lambda: prints([y])), noted, t, f"the residual of step {t}")


class ReversingTape(Tape):
    """Holds (X, U) of one time, and moves it to and fro."""

    def __init__(self, region: str, state: State | DeviceState, factors: Factors, on_drift: str = "raise") -> None:
        super().__init__(region, state, factors, on_drift)
        self.time = 0
        self.half = False
        self.from_rest = state.from_rest
        self.records: list[Any] = []
        self.prints = [self.fingerprint(state.fingerprint)]
        self.residuals: dict[int, Print] = {}  # of y, where g[t] is small
        self.handover = Handover(state.X.device)

    def push(self, t: int, y: Tensor, x: Tensor) -> Tensor:
        after = self._pushed(t, y, x) if t < self.end else self._onwards(t, y, x)
        if t + 1 == len(self.factors):
            self.handover.wait(self.state, self._spilled)
        return after

    def _pushed(self, t: int, y: Tensor, x: Tensor) -> Tensor:
        self._seek(t)  # where a backward pass through earlier steps has come in between
        after = self._forward(y, x)
        found = self.fingerprint(partial(self.state.fingerprint, after))
        self.prints.append(found[:2])
        self.fresh = found[2:]
        if self.factors[t][0] < SMALL:
            self.residuals[t] = self.fingerprint(lambda: prints([y]))
        return after

    def _onwards(self, t: int, y: Tensor, x: Tensor) -> Tensor:
        """A step of the end, on a state of its own (Rule 9)."""
        if t == self.end:
            self._seek(t)
            self.ahead = self.state.ahead()
        self.handover(partial(self._tensors, x, self.ahead))
        _, after = self._step(t, y, x, self.ahead)
        if t + 1 == len(self.factors):
            del self.ahead
        return after

    def present(self, t: int) -> Tensor:
        return self.state_at(t)

    def hand_out(self, t: int) -> Tensor:
        if self.half and self.time == t:
            self.handover(self._tensors)
            return self.state.read()
        self._seek(t + 1)
        return self._halve()

    def close(self, t: int, y: Tensor) -> None:
        self.handover(self._tensors)
        try:
            self.state.unstep_u(self.records[t], y)
        except LostBits as lost:
            raise self._lost(lost) from lost
        self.half = False
        if t in self.residuals:
            self.prove_residual(t, y, self.residuals[t])
        self.proofs.compare(
            self.fingerprint(self.state.fingerprint), self.prints[t], partial(_returned, weakref.ref(self), self.drifted, t)
        )

    def state_at(self, t: int) -> Tensor:
        """x[t], with the tape at that time."""
        self.handover(self._tensors)
        self._seek(t)
        return self.state.read()

    def _forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        self.handover(partial(self._tensors, x))
        del self.records[self.time :]
        record, after = self._step(self.time, y, x)
        self.records.append(record)
        self.time += 1
        return after

    def _spilled(self) -> list[Tensor]:
        """What is in records; a device has it in its state."""
        return [s.bytes for r in self.records if isinstance(r, Record) for s in (r.x_spill, r.u_spill) if s]

    def _tensors(self, x: Tensor | None = None, ahead: State | DeviceState | None = None) -> list[Tensor]:
        """What the states are made of; and x[t], which nobody keeps, as autograd would."""
        noted = [number for print_ in (*self.prints, *self.residuals.values()) for number in print_ if isinstance(number, Tensor)]
        more = [*([] if x is None else [x]), *([] if ahead is None else ahead.tensors())]
        return [*self.state.tensors(), *self._spilled(), *noted, *more]

    def _halve(self) -> Tensor:
        self.handover(self._tensors)
        try:
            x = self.state.unstep_x(self.records[self.time - 1])
        except LostBits as lost:
            raise self._lost(lost) from lost
        self.half, self.time = True, self.time - 1
        return x

    def _lost(self, lost: LostBits) -> InversionError:
        return InversionError(self.region, lost.step, "the room that was ready for what the step outgrew (there will be more from now on)")

    def _seek(self, t: int) -> None:
        """Goes to time t, rerunning the steps in between."""
        if self.half or self.time != t:
            self.handover(self._tensors)
        if self.half:  # a rerun that did not reach its end
            self.state.restep_x(self.records[self.time])
            self.half, self.time = False, self.time + 1
        x = self.state.read() if self.time < t else None
        while x is not None and self.time < t:
            x = self._forward(self._value(x))
            after = self.time - 1
            self.prove(self.fingerprint(self.state.fingerprint), self.prints[self.time], after, f"the state after step {after}")
        while self.time > t:
            x = self._halve()
            self.close(self.time, self._value(x))

    def _value(self, x: Tensor) -> Tensor:
        """y of a rerun at the present time that keeps no graph."""
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t):  # hides the packing from the checkpoint that asked
            return plain(self.rerun(self.time, x)[0].detach())


class StoringTape(Tape):
    """Keeps the inputs x[t], as a checkpoint does; (X, U) is only needed on the way forward."""

    def __init__(self, region: str, state: State | DeviceState, factors: Factors, on_drift: str = "raise") -> None:
        super().__init__(region, state, factors, on_drift)
        self.prints: list[Print] = []
        self.inputs: list[tuple[Tensor, Print]] = []
        self.copies: dict[str, Tensor] = {}  # of those that the caller may overwrite, in named regions

    def enter(self) -> Tensor:
        return self._kept(super().enter())

    def push(self, t: int, y: Tensor, x: Tensor) -> Tensor:
        _, after = self._step(t, y, x)
        if t < self.end:
            self.prints.append(self.fingerprint(lambda: prints([y])))
        if t + 1 == len(self.factors):
            del self.state
        return self._kept(after) if t + 1 < self.end else after

    def present(self, t: int) -> Tensor:
        return self.inputs[t][0]

    def hand_out(self, t: int) -> Tensor:
        (x, print_), name = self.inputs[t], f"x[{t}]"
        found = self.fingerprint(lambda: prints([x]))
        changed = bool(found) and (isinstance(found[0], Tensor) or found != print_)  # on a device nobody knows yet: rather the copy
        own = {name: self.copies[name]} if name in self.copies else {}
        learn, drifted = None if self.own is None else self.own.lesson("", own), None if own else self.drifted
        self.proofs.compare(found, print_, partial(looked, learn, drifted, t, name))
        return own.get(name, x) if changed else x

    def close(self, t: int, y: Tensor) -> None:
        self.prove_residual(t, y, self.prints[t])

    def _kept(self, x: Tensor) -> Tensor:
        name = f"x[{len(self.inputs)}]"
        self.inputs.append((x.detach(), self.fingerprint(lambda: prints([x]))))
        if self.own is not None and self.on_drift != "ignore" and self.own.wanted("", name):
            x_, print_ = self.inputs[-1]
            self.copies[name] = self.own.shared(x_, print_[0])
        return x


def _returned(tape: weakref.ref[ReversingTape], drifted: Drift, t: int, differing: list[int]) -> None:
    """What `ReversingTape.close` concludes: with how far v is from 0, while the tape is there and at rest."""
    if differing:
        there = tape()
        at_rest = there is not None and t == there.time == 0 and there.from_rest and not there.half
        drifted(t, f"the state before step {t}", *(there.state.off_zero() if there is not None and at_rest else ()))


class PlainTape(Tape):
    """Keeps nothing and goes forward only: for inference, and for steps whose activations autograd stores."""

    def push(self, t: int, y: Tensor, x: Tensor) -> Tensor:
        return self._step(t, y, x)[1]
