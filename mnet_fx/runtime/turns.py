"""One step at a time: reruns swap buffers and flags of live modules, steps share generators, and threads that go back through one graph
share its tape.

A thread that runs a step and starts a backward pass in it waits for that pass, which runs in threads of autograd's, one for each device,
and may rerun steps: so it takes turns within the turn of the thread that waits. Whom a thread works for, torch's own thread-local objects
tell, which autograd hands on.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import torch

__all__ = ["Turns"]

_KEY = "mnet_fx.runtime.turns"


class Turns:
    """A lock that is held by a turn, and may be taken again, within that turn, by the thread that has it and those that work for it.

    Attributes:
        turns: those that go on, each within the one before.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turns: list[_Turn] = []

    def __enter__(self) -> None:
        mine = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
        with self.changed:
            if mine is not (self.turns[-1] if self.turns else None):
                self.changed.wait_for(lambda: self.turns[-1] is mine if mine in self.turns else not self.turns)
            turn = _Turn(mine)
            self.turns.append(turn)
        _stash(_KEY, turn)

    def __exit__(self, *exception: object) -> None:
        with self.changed:
            turn = self.turns.pop()
            self.changed.notify_all()
        _stash(_KEY, turn.within)


class _Turn:
    """One turn, and the one that its thread had before."""

    def __init__(self, within: object) -> None:
        self.within = within


def _stash(key: str, value: object) -> None:
    """Makes an object one of this thread's, and of those that work for it."""
    if _UNCOUNTED:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


def _is_uncounted() -> bool:
    """Whether torch lets go of more references than it takes, as 2.11 does: an object that it keeps would be freed under it."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(f"{_KEY}.probe", probe)
    uncounted = sys.getrefcount(probe) == before
    if uncounted:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return uncounted


_UNCOUNTED = _is_uncounted()
