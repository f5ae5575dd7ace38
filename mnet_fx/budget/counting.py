"""Counts the memory of tensors while operations run: each storage from the operation that made it until it is freed."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .workspace import workspace

__all__ = ["Count", "Tag"]

Tag = tuple[str, str]
"""What a storage is for, one of `estimates.PARTS`, and the path of the module that made it."""

_BLOCK = 512  # bytes, to which torch's allocator for GPUs rounds
_WORKSPACE: Tag = ("temporaries", "")


class Count(TorchDispatchMode):
    """A dispatch mode that counts bytes of storages, by tags.

    Args:
        tag: called where an operation makes a storage; gives what it is for.
        after: called with each operation, its arguments and its result.

    Attributes:
        live: bytes now.
        peak: the largest `live` so far, work space that operations take meanwhile included.
        by_tag: bytes now of each tag.
    """

    def __init__(self, tag: Callable[[], Tag], after: Callable[..., None]) -> None:
        super().__init__()
        self.tag, self.after = tag, after
        self.live = self.peak = 0
        self.by_tag: Counter[Tag] = Counter()
        self._then: Counter[Tag] | None = None  # by_tag at the peak; None while that is now
        self._known: dict[int, _Counted] = {}
        self._sum: _Sum | None = None  # where the last operation was one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._sum = self._sum_of_gradients(args, result) if func is torch.ops.aten.add.Tensor and _accumulates() else None
        self.hold(tree_leaves(result))
        extra = workspace(func, args, kwargs)
        if extra and self.live + extra > self.peak:
            self.peak, self._then = self.live + extra, self.by_tag.copy()
            self._then[_WORKSPACE] += extra
        self.after(func, args, kwargs, result)
        return result

    @property
    def at_peak(self) -> Counter[Tag]:
        """`by_tag` as it was at the peak, with work space among the temporaries."""
        return self.by_tag if self._then is None else self._then

    def hold(self, values: Iterable[Any], tag: Tag | None = None) -> None:
        """Counts the storages of tensors that are not known yet."""
        for t in values:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self._known:
                    counted = _Counted(self, storage, t.device.type, tag or self.tag())
                    self._known[storage._cdata] = counted
                    self._add(counted)

    def retag(self, new: Callable[[Tag], Tag]) -> None:
        """Gives all storages of now other tags."""
        if self._then is None:
            self._then = self.by_tag.copy()
        for counted in self._known.values():
            self.by_tag[counted.tag] -= counted.size
            counted.tag = new(counted.tag)
            self.by_tag[counted.tag] += counted.size

    def _sum_of_gradients(self, args: Any, result: Tensor) -> _Sum | None:
        """What to go back to if a part of a sum that raises the peak is freed with the operation."""
        size = result.untyped_storage().nbytes()
        if self.live + size <= self.peak:
            return None
        parts = [t.untyped_storage() for t in args if isinstance(t, Tensor)]  # an expanded one is smaller
        return _Sum(frozenset(part._cdata for part in parts if part.nbytes() == size), self.peak, self.at_peak.copy())

    def _add(self, counted: _Counted) -> None:
        self.live += counted.size
        self.by_tag[counted.tag] += counted.size
        if self.live > self.peak:
            self.peak, self._then = self.live, None

    def _free(self, key: int) -> None:
        counted = self._known.pop(key)
        if self._sum is not None and key in self._sum.parts:
            self.peak, self._then, self._sum = self._sum.peak, self._sum.at_peak, None
        if self._then is None and counted.size:
            self._then = self.by_tag.copy()
        self.live -= counted.size
        self.by_tag[counted.tag] -= counted.size


@dataclass(frozen=True)
class _Sum:
    """A sum of two gradients, and the peak before it. Autograd adds in place to one that nobody else holds, but not to subclasses of
    tensors, as fake ones are: there the one that it would add to is freed next.
    """

    parts: frozenset[int]
    peak: int
    at_peak: Counter[Tag]


def _accumulates() -> bool:
    """Whether autograd itself makes this operation, and no hook or function of Python: in the middle of a backward pass, or in a thread of
    autograd's own.
    """
    frame = sys._getframe(1).f_back  # of who called the mode, but for what torch puts around that
    while frame is not None and frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py")):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


class _Counted:
    """One storage that is counted until it is freed."""

    def __init__(self, count: Count, storage: torch.UntypedStorage, device: str, tag: Tag) -> None:
        size = storage.nbytes()
        self.size, self.tag = -(-size // _BLOCK) * _BLOCK if device == "cuda" else size, tag
        weakref.finalize(storage, _freed, weakref.ref(count), storage._cdata).atexit = False


def _freed(count: weakref.ref[Count], key: int) -> None:
    if (found := count()) is not None:
        found._free(key)
