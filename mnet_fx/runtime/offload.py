"""What a chain keeps, in memory of the host while the chain waits for its backward pass (`momentumize(offload=True)`).

    forward     ... step T - 1 | X, U and what was spilled go to the host, on a stream of its own, beside what comes after the chain
    backward    what came after the chain | they come back | step T - 1 ...

The tensors stay what they are; only their memory is given back meanwhile. What comes back is proved as ever: by the fingerprints of the
state at the first step that is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cuda_streams import Handover, present

__all__ = ["Offload", "offloads"]

_DEVICES = {"cuda"}


def offloads(device: torch.device) -> bool:
    """Whether a device has memory apart from the host's, and may leave something there."""
    return device.type in _DEVICES


@cache
def _beside(device: torch.device) -> Any:
    """The stream on which a device copies to the host."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class Offload(Handover):
    """A handover that leaves the state on the host while the chain waits.

    Attributes:
        copies: the memory of each tensor as bytes on the device, where there are none now, and on the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        if self.copies:
            self._come()
        super().__call__(tensors)

    def wait(self, tensors: Sequence[Tensor], moved: Callable[[], None]) -> None:
        self.moved = moved
        with torch.no_grad(), self._copying() as stream:
            for t in tensors:
                here = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
                there = torch.empty(here.shape, dtype=torch.uint8, device="cpu", pin_memory=stream is not None)
                there.copy_(here, non_blocking=True)
                if stream is not None:
                    here.record_stream(stream)
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
        """Copies all back, on the present stream. Where there is no memory for it, it may be asked again."""
        if (now := present(self.device)) is not None:
            now.wait_stream(_beside(self.device))
        with torch.no_grad():
            while self.copies:
                here, there = self.copies[-1]
                here.untyped_storage().resize_(there.numel())
                here.copy_(there, non_blocking=True)
                self.copies.pop()
        self.moved()
