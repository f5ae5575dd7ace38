"""Memory for what a chain on a device spills: how much there is at hand is up to the host, which looks at the device's count a step late.

What happens on the device never depends on it (see `kernels.device_decide`): where a plane was missing, the forward pass is right, and the
way back raises `LostBits`. Before a step is launched there are planes for what theory says that the steps not yet seen will take, and some
more (`Reserve`). The first chain of a region waits for each step's count instead, with room for the most that one step can take, so it
loses nothing, whatever comes; the chains after it have room for what it took beyond theory, and one plane more.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import StreamError
from .cost import spilled_planes
from .formats import Format

__all__ = ["LostBits", "Planes", "Reserve"]

PATIENCE = 5.0  # seconds without news from the device before it is asked whether it still runs
_MOST = 13  # planes that one step can take: X emptied, and U, of a float64 stream, which any may become
_UNSEEN = -1  # as a count in a mailbox


class LostBits(Exception):
    """There was no memory for what a step had to put aside, so the chain cannot go back over it. Its forward pass was right.

    Attributes:
        step: the first such step.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step} had to put more aside than there was room for")
        self.step = step


@dataclass
class Reserve:
    """What the chains of one region have needed so far; keep one for each region.

    Attributes:
        most: planes that two steps together took beyond theory, at most; None before a chain was seen, and after bits were lost.
    """

    most: int | None = None

    def beyond(self) -> int | None:
        """Planes to have ready beyond theory; None: those of the worst step, and look at each step before the next."""
        return None if self.most is None else max(2, self.most + 1)

    def learn(self, excess: int) -> None:
        self.most = max(self.most or 0, excess)

    def forget(self) -> None:
        self.most = None


class Mailbox:
    """Memory of the host that a device can reach: how many planes were used at each time, -1 until it is known; then addresses of planes.

    Attributes:
        words: the words, to be read and written by the host at any time.
        address: of the first one.
        last: the last time of which the device was told to write.
    """

    def __init__(self, steps: int, pinned: bool) -> None:
        size = steps + 1 + 14 * (steps + 4)
        with torch.inference_mode(False):
            self.memory = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self.words: Any = (ctypes.c_int64 * size).from_address(self.memory.data_ptr())
        self.address, self.steps, self.last = self.memory.data_ptr(), steps, 0

    def is_quiet(self) -> bool:
        """Whether the device has written all that it was told to; of a step taken again, this is not the last word."""
        return _UNSEEN not in self.words[0 : self.last + 1]

    def clear(self) -> None:
        self.words[0 : self.steps + 1] = [0] + [_UNSEEN] * self.steps
        self.last = 0


class _Pool:
    """Mailboxes that no chain holds any more; one is used again once the device has written all that it was told to."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, torch.device], list[Mailbox]] = {}
        self.lock = threading.RLock()  # a chain that the garbage collector finds meanwhile gives its mailbox in the same thread

    def take(self, steps: int, device: torch.device) -> Mailbox:
        with self.lock:
            boxes = self.free.get((steps, device), [])
            place = next((i for i, box in enumerate(boxes) if box.is_quiet()), None)
            box = Mailbox(steps, device.type == "cuda") if place is None else boxes.pop(place)
        box.clear()
        return box

    def give(self, box: Mailbox, device: torch.device) -> None:
        with self.lock:
            self.free.setdefault((box.steps, device), []).append(box)


_POOL = _Pool()


class Planes:
    """The planes of one chain: uint8 tensors with a byte for each element.

    Args:
        gammas: g[t] of the steps.
        form: how the state is held.
        at_rest: whether v[0] = 0.
        like: X, for its size and device.
        reserve: of the region.
    """

    def __init__(self, gammas: Sequence[float], form: Format, at_rest: bool, like: Tensor, reserve: Reserve) -> None:
        self.form, self.at_rest = form, at_rest
        self.expect(gammas)
        self.size, self.device, self.reserve = like.numel(), like.device, reserve
        self.planes: list[Tensor] = []
        self.told = 0  # the time until which the reserve knows
        self.mail = _POOL.take(len(gammas), like.device)
        self.words, self.given = self.mail.words, self.mail.steps + 1  # where addresses begin

    def __del__(self) -> None:
        if "words" in self.__dict__:
            last = next((t for t in range(self.mail.last, 0, -1) if self.words[t] != _UNSEEN), 0)
            if last > self.told:
                self._learn(last)
            _POOL.give(self.mail, self.device)

    def expect(self, gammas: Sequence[float]) -> None:
        """Notes what theory says that the steps will take."""
        self.theory = spilled_planes(gammas, self.form, self.at_rest)

    def make_room(self, t: int) -> int:
        """Has planes ready for step t, which is about to be launched; returns how many there are in all."""
        beyond = self.reserve.beyond()
        if t < self.mail.last and self.words[t + 1] != _UNSEEN:  # once more
            need = self.words[t + 1]
        else:
            seen = max(t if beyond is None else t - 1, 0)
            need = self._used(seen) + self.theory[t + 1] - self.theory[seen] + (_MOST if beyond is None else beyond)
        while len(self.planes) < need:
            plane = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            self.words[self.given + len(self.planes)] = plane.data_ptr()
            self.planes.append(plane)
        return len(self.planes)

    def launching(self, t: int) -> None:
        """Step t goes on its way; also one that was taken before, of which the device will write once more."""
        self.mail.last, self.words[t + 1] = max(self.mail.last, t + 1), _UNSEEN

    def look(self, wait: bool = False) -> None:
        """Looks whether the device has told what all steps took; frees the planes that nobody took then.

        Raises:
            LostBits: a plane was missing.
        """
        last = self.mail.last
        if wait:
            self._wait(last)
        used = self.words[last]
        if used == _UNSEEN:
            return
        if used < _UNSEEN:
            self.reserve.forget()
            raise LostBits(-2 - used)
        del self.planes[used:]
        if last > self.told:
            self._learn(last)

    def trim(self, wait: bool) -> None:
        """Frees the planes that nobody took, if it is known how many. A region's first chain waits for that, as it does at each step."""
        if wait or self.reserve.beyond() is None:
            self._wait(self.mail.last)
        if (used := self.words[self.mail.last]) > _UNSEEN:
            del self.planes[used:]

    def moved(self) -> Tensor:
        """The planes lie elsewhere now. Waits for the device, which may read the old addresses until it has told what all steps took.

        Returns:
            The new addresses, int64, on the device.
        """
        self._wait(self.mail.last)
        addresses = [plane.data_ptr() for plane in self.planes]
        self.words[self.given : self.given + len(addresses)] = addresses
        with torch.inference_mode(False):  # memory of its own: another chain may write to the mailbox before the copy is through
            there = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda")
        return there.to(self.device, non_blocking=True)

    def _learn(self, last: int) -> None:
        """Tells the reserve what the steps until a time took beyond theory, any two that follow each other."""
        words, theory, self.told = self.words, self.theory, last
        if last > 0 and words[last] >= 0:
            self.reserve.learn(max(words[t] - theory[t] - words[max(t - 2, 0)] + theory[max(t - 2, 0)] for t in range(1, last + 1)))

    def _used(self, t: int) -> int:
        """Planes used at time t; none to care for where bits are lost already."""
        self._wait(t)
        return max(self.words[t], 0)

    def _wait(self, t: int) -> None:
        if self.words[t] != _UNSEEN:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise StreamError("a reversible chain cannot be captured in a CUDA graph, since its host looks after its memory: leave it out")
        begin = time.monotonic()
        while self.words[t] == _UNSEEN:
            time.sleep(0)  # other threads may go on
            if time.monotonic() - begin > PATIENCE:
                torch.cuda.synchronize(self.device)  # raises where the device has failed
                if self.words[t] == _UNSEEN:
                    raise RuntimeError("the device has finished, and did not tell what a step of a reversible chain put aside")
                return
