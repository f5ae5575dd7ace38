"""What a chain keeps, in memory of the host while the chain waits for its backward pass (`momentumize(offload=True)`).

    forward     ... step T - 1 | X, U and what was spilled go to the host, on a stream of its own, beside what comes after the chain
    backward    what came after the chain | they come back, on the stream in force | step T - 1 ...

The tensors stay what they are; only their memory is given back meanwhile. CUDA's allocator hands it on once the copy is through, and waits
for that where there is no other. What comes back is proved as ever: by the fingerprints of the state at the first step that is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.device_state import DeviceState
from ..arithmetic.fixed_point import State
from ..errors import warn_once
from . import checkpoint
from .cuda_streams import Handover, present

__all__ = ["Offload", "would_wait"]

_DEVICES = {"cuda"}  # with memory apart from the host's
_DROPPING = {checkpoint.__name__, "torch.utils.checkpoint"}


def would_wait(device: torch.device) -> bool:
    """Whether a chain that begins now will wait, on a device with memory of its own: not under a checkpoint, which drops it, nor in a
    backward pass, which needs it at once.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    dropped = hooks is not None and getattr(hooks[0], "__module__", "") in _DROPPING
    return device.type in _DEVICES and not dropped and torch._C._current_graph_task_id() == -1


@cache
def _beside(device: torch.device) -> Any:
    """A stream on which a device copies to the host."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Offload(Handover):
    """A handover that leaves the state on the host while the chain waits.

    Attributes:
        is_away: whether it may not be used.
        copies: of each tensor that is away its memory as bytes on the device, where there are none now, and on the host.
        done: tells of the copies to the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.is_away, self.done = False, None
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        super().__call__(tensors)
        if self.is_away:
            self._come()

    def wait(self, state: State | DeviceState, spilled: Callable[[], Sequence[Tensor]]) -> None:
        self.state, self.spilled, self.is_away = state, spilled(), True  # the function holds the tape, which holds this
        state.trim(wait=False)
        with torch.no_grad(), self._copying() as stream:
            for t in (*state.bulk(), *self.spilled):
                here = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
                if (there := _on_host(here, stream is not None)) is None:
                    break
                there.copy_(here, non_blocking=True)
                if stream is not None:
                    here.record_stream(stream)
                    self.done = stream.record_event()
                self.copies.append((here, there))
                here.untyped_storage().resize_(0)

    @contextmanager
    def _copying(self) -> Iterator[Any]:
        """The stream on which to copy, behind the present one, as the present one; None but on CUDA."""
        stream = _beside(self.device)
        if stream is None:
            yield None
            return
        stream.wait_stream(present(self.device))
        with torch.cuda.stream(stream):
            yield stream

    def _come(self) -> None:
        """Copies all back that is still wanted, on the present stream. Where there is no memory for it, it may be asked again."""
        if self.done is not None:
            present(self.device).wait_event(self.done)
        self.state.trim(wait=True)
        wanted = {t.untyped_storage()._cdata for t in (*self.state.bulk(), *self.spilled)}
        with torch.no_grad():
            while self.copies:
                here, there = self.copies[-1]
                if here.untyped_storage()._cdata in wanted:
                    here.untyped_storage().resize_(there.numel())
                    here.copy_(there, non_blocking=True)
                self.copies.pop()
        self.state.moved()
        self.is_away, self.spilled = False, []


def _on_host(like: Tensor, pinned: bool) -> Tensor | None:
    """Bytes on the host; None, with a warning, where no more can be pinned."""
    try:
        return torch.empty(like.shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    except RuntimeError as error:
        warn_once(f"offload=True: the host has no pinned memory for the state of a chain ({error}), so what is left stays on the device")
        return None
