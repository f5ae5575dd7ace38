"""Calls that stop on their way, so that all can be brought to one place before any goes on.

Each runs in a thread of its own, and only one of them at a time: the threads are there to be stopped in the middle of a forward.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .runtime.surroundings import surrounded, surroundings

__all__ = ["NAME", "OutOfStep", "Walk", "walking"]

NAME = "mnet_fx: a call that stops on its way"  # of its thread
JOINED = 10.0  # seconds that a call that is left may take to end
Stop = Callable[[Hashable], None]


class OutOfStep(Exception):
    """A call raised, waits for another, or goes another way than it was said to."""


class _Abandoned(BaseException):
    """Ends a call that nobody waits for."""


class Walk:
    """A call that goes on from stop to stop, under the settings of torch's that hold as it is made.

    Args:
        call: what to run; it is given the function that stops it, `stop(where)`.
        patience: seconds that it may take from one stop to the next.

    Attributes:
        at: where it stands; None as long as it goes, and at its end.
        result: what it returned.
    """

    def __init__(self, call: Callable[[Stop], Any], patience: float) -> None:
        self.at: Hashable = None
        self.result: Any = None
        self.patience, self.failed, self.left = patience, False, False
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        run = contextvars.copy_context().run
        self.thread = threading.Thread(target=run, args=(self._run, call, _settings()), name=NAME, daemon=True)
        self.thread.start()

    def to(self, where: Hashable) -> None:
        """Goes on until it stands there; to its end, if that is None.

        Raises:
            OutOfStep: it came to its end before, raised, or did not come to a stop in time.
        """
        while where is None or self.at != where:
            self._go.release()
            if not self._stands.acquire(timeout=self.patience) or self.failed:
                raise OutOfStep
            if self.at is None and where is not None:
                raise OutOfStep
            if self.at is None:
                return

    def leave(self) -> None:
        """Ends it where it stands."""
        self.left = True
        self._go.release()

    def _run(self, call: Callable[[Stop], Any], settings: tuple[Any, ...]) -> None:
        inference, stream, switches = settings
        try:
            self._wait()
            with torch.inference_mode(inference), stream, surrounded(switches):
                self.result = call(self._stop)
        except BaseException:  # whatever it is, the calls will be made again without stops
            self.failed = True
        self.at = None
        self._stands.release()

    def _stop(self, where: Hashable) -> None:
        self.at = where
        self._stands.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self.left:
            raise _Abandoned


def _settings() -> tuple[Any, ...]:
    """What torch keeps for each thread: inference mode, the stream of CUDA, and the switches."""
    stream = torch.cuda.stream(torch.cuda.current_stream()) if torch.cuda.is_initialized() else nullcontext()
    return torch.is_inference_mode_enabled(), stream, surroundings()


@contextmanager
def walking(calls: Sequence[Callable[[Stop], Any]], patience: float) -> Iterator[list[Walk]]:
    """A walk for each call; those that are still under way at the end are left."""
    walks = [Walk(call, patience) for call in calls]
    try:
        yield walks
    finally:
        for walk in walks:
            walk.leave()
        for walk in walks:
            walk.thread.join(JOINED)
