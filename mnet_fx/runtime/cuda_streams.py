"""A chain whose passes run on several CUDA streams.

Autograd runs the backward of an operation on the stream of its forward, and orders streams by the gradients that pass between them. The
state of a tape passes beside these: what one stream asked for must be done before another goes on with it, and its memory must not go to
others before that one is through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.device_state import DeviceState
from ..arithmetic.fixed_point import State
from ..arithmetic.kernels.launching import raw_stream

__all__ = ["Handover", "present"]

_KNOWN: dict[tuple[torch.device, int], Any] = {}


def present(device: torch.device) -> Any:
    """The current stream of a device, always the same object; None but on CUDA."""
    if device.type != "cuda":
        return None
    key = (device, raw_stream(device))
    if key not in _KNOWN:
        _KNOWN[key] = torch.cuda.current_stream(device)
    return _KNOWN[key]


class Handover:
    """Remembers the stream on which a chain's state was used last.

    Called before each use of the state, with the tensors it is made of (X, U, what was spilled, noted fingerprints):

        self.handover = Handover(x0.device)             as the tape begins
        self.handover(lambda: [state.X, state.U, ...])  before each move to and fro
        self.handover.wait(...)                         as the chain has come to its end

    On other devices than CUDA, and while the stream stays the same, it does nothing, and asks for no tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, present(device)

    def __call__(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        """Has the present stream wait for the last one, if it is another.

        Args:
            tensors: a function that returns those of the state.
        """
        if (now := present(self.device)) is self.last:
            return
        now.wait_stream(self.last)
        for t in tensors():
            t.record_stream(now)
        self.last = now

    def wait(self, state: State | DeviceState, spilled: Callable[[], Sequence[Tensor]]) -> None:
        """The chain waits for its backward pass from now on; so these may lie elsewhere meanwhile.

        Args:
            state: of the chain.
            spilled: gives what is in records.
        """
