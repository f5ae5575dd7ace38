"""How a chain starts: the recurrence that it runs, and the tape that keeps fewest bytes for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..arithmetic.cost import storage
from ..arithmetic.device_state import DeviceState, Reserve, supported
from ..arithmetic.fake_state import SEEN, FakeState, SeenState
from ..arithmetic.fixed_point import State
from ..arithmetic.kernels.choice import kernels
from ..arithmetic.kernels.eager import Kernels
from ..arithmetic.rotated_state import RotatedState
from ..arithmetic.valueless import valueless
from ..errors import MnetError, StreamError
from .float_tape import FloatTape
from .guise import check_carried, plain
from .offload import Offload, would_wait
from .own_copies import Learnt, OwnCopies
from .reads import Reads
from .shear import Factors
from .steps import Chain
from .surroundings import exported, transformed
from .tape import PlainTape, ReversingTape, StoringTape, Tape
from .unreturned import Leaving

__all__ = ["FLOATING", "Recurrence"]

log = logging.getLogger("mnet_fx")
FLOATING: ContextVar[bool] = ContextVar("mnet_fx_floating", default=False)
"""Whether chains run as the recurrence in floating point: for `mnet_fx.verify`, which compares with it."""


@dataclass(frozen=True)
class Recurrence:
    """How a chain runs.

        v[t+1] = g[t] * v[t] + b[t] * f[t](x[t])
        x[t+1] = x[t] + v[t+1]

    Attributes:
        name: of the region, for messages.
        factors: (g[t], b[t]) of every step.
        backward: "reversible" or "stored".
        on_drift: "raise", "warn" or "ignore".
        velocity: the module that gives v[0] from x[0]; None for v[0] = 0.
        widest: dtypes of which the state must hold the widest: those of the steps' parameters, which the stream may be promoted to.
        arithmetic: the loops over elements; None for those that the environment asks for.
        learnt: what the region has learnt about writes that come after its steps; None: it keeps no copies.
        reserve: what the region's chains have spilled on a device so far.
        reads: where the steps read the stream; None: at x[t].
        stored: of how many steps, the last ones, autograd stores the activations though the others are taken back.
        leaving: what is known of what the steps leave beside their outputs; None: they are graphs, which leave nothing.
        offload: whether what a chain keeps on a device waits for its backward pass in memory of the host.
    """

    name: str
    factors: Factors
    backward: str = "reversible"
    on_drift: str = "raise"
    velocity: nn.Module | None = None
    widest: Iterable[torch.dtype] = ()
    arithmetic: Kernels | None = None
    learnt: Learnt | None = None
    reserve: Reserve | None = None
    reads: Reads | None = None
    stored: int = 0
    leaving: Leaving | None = None
    offload: bool = False

    def start(self, x: Tensor, reversing: bool = False) -> Chain:
        """A chain at time 0, on a tape of the kind that keeps fewest bytes.

        Args:
            x: the stream.
            reversing: whether the tape is to go back whatever that takes.

        Raises:
            MnetError: a transform of torch.func, forward-mode differentiation, or what forbids hooks for saved tensors, surrounds a
                reversible chain.
            StreamError: x is a tensor that wraps others, or of another layout; or v[0] does not fit x.
        """
        v0 = None if self.velocity is None else self._checked(self.velocity(x), x)
        tape = self._tape(x, v0, reversing)
        fake = valueless(x)
        tape.own = None if self.learnt is None or fake else OwnCopies(self.learnt)  # on fake tensors: as after a first call
        tape.leaving = None if fake or self.on_drift == "ignore" else self.leaving
        return Chain(tape, x, v0, self.reads)

    def _tape(self, x: Tensor, v0: Tensor | None, reversing: bool) -> Tape:
        reversible = torch.is_grad_enabled() and self.backward == "reversible" and self.stored < len(self.factors)
        floats = transformed() or exported() or FLOATING.get()
        if not floats:
            check_carried(self.name, x)
        if floats or x.numel() == 0:
            return self._in_floats(x, reversible and transformed())
        if reversible and torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
            raise MnetError(
                f"{self.name}: torch.autograd.graph.disable_saved_tensors_hooks surrounds the call, and such hooks recompute a step: "
                "leave it out, or give momentumize backward='stored'"
            )
        gammas = [gamma for gamma, _ in self.factors]
        held = reduce(torch.promote_types, [dtype for dtype in self.widest if dtype.itemsize > 1], x.dtype)  # torch promotes no float8
        kind: type[Tape] = ReversingTape if reversing else PlainTape
        if reversible and not reversing:
            kind = {"reverse": ReversingTape, "inputs": StoringTape}[storage(gammas, x.dtype, v0 is None, held)[0]]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            state = self._state(plain(x.detach()), None if v0 is None else plain(v0.detach()), held, kind is ReversingTape)
        log.debug("%s: %d steps of %s %s, %s on %s", self.name, len(gammas), x.dtype, tuple(x.shape), kind.__name__, type(state).__name__)
        tape = kind(self.name, state, self.factors, self.on_drift)
        tape.end -= self.stored
        if self.offload and isinstance(tape, ReversingTape) and would_wait(x.device) and not valueless(x) and SEEN.get() is None:
            tape.handover = Offload(x.device)
        return tape

    def _state(self, x: Tensor, v0: Tensor | None, held: torch.dtype, goes_back: bool) -> State | DeviceState:
        horizon = min(max(1 / (1 - gamma) for gamma, _ in self.factors), len(self.factors))
        seen = SEEN.get()
        if valueless(x):
            if seen is not None and self.reads is not None:
                seen.rotated |= self.reads.may_rotate
            return FakeState(() if seen is None else seen.again(self.name), x, v0, horizon, self.arithmetic or kernels(), held)
        if self.reads is not None and self.reads.rotates(x):
            return RotatedState(x, v0, horizon, self.arithmetic or kernels(), held)
        if seen is not None:
            return SeenState(seen.new(self.name), x, v0, horizon, self.arithmetic or kernels(), held)
        if supported(x, self.factors, held):
            proof = goes_back and self.on_drift != "ignore"
            return DeviceState(x, v0, self.factors, horizon, held, goes_back, self.reserve, proof)
        return State(x, v0, horizon, self.arithmetic or kernels(), held)

    def _in_floats(self, x: Tensor, reversible: bool) -> Tape:
        if reversible:
            raise MnetError(
                f"{self.name}: transforms of torch.func (grad, vmap, jvp, ...) and forward-mode differentiation cannot follow a reversible "
                "chain: give momentumize backward='stored' (MomentumNet: use_backprop=True), which runs them in floating point; "
                "torch.autograd.grad, double backward and functional_call work as it is"
            )
        if not x.dtype.is_floating_point:
            raise StreamError(f"{self.name}: the stream must be real floating point, got {x.dtype}")
        return FloatTape(self.name, self.factors)

    def _checked(self, v0: Any, x: Tensor) -> Tensor:
        """v[0] as the module gave it for x[0] = x."""
        found = f"shape {tuple(v0.shape)} and dtype {v0.dtype}" if isinstance(v0, Tensor) else f"a {type(v0).__name__}"
        if isinstance(v0, Tensor) and v0.device != x.device:
            raise StreamError(
                f"{self.name}: the initial velocity is on {v0.device} and the stream on {x.device}: one region per device, with its "
                "initial_velocity there"
            )
        if not isinstance(v0, Tensor) or v0.shape != x.shape or not v0.dtype.is_floating_point:
            raise StreamError(
                f"{self.name}: the initial velocity module gave {found} for a stream of shape {tuple(x.shape)} and dtype {x.dtype}; "
                "it must give a real floating tensor of the stream's shape"
            )
        return v0
