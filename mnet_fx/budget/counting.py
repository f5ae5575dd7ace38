"""Counts the memory of tensors while operations run: each storage from the operation that made it until it is freed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .workspace import workspace

__all__ = ["Count", "Counted"]

_BLOCK = 512  # bytes, to which torch's allocator for GPUs rounds


class Count(TorchDispatchMode):
    """A dispatch mode that counts bytes of storages, by tags.

    Args:
        tag: called where an operation makes a storage; gives what it is for.
        after: called with each operation, its arguments and its result, or None.

    Attributes:
        live: bytes now.
        peak: the largest `live` so far, work space that operations take meanwhile included.
        by_tag: bytes now of each tag.
        at_peak: `by_tag` as it was then; work space is "temporaries".
    """

    def __init__(self, tag: Callable[[], str], after: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.tag, self.after = tag, after
        self.live = self.peak = 0
        self.by_tag: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._known: dict[int, Counted] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.hold(tree_leaves(result))
        if (extra := workspace(func, args, kwargs, result)) > 0:
            self._reach(self.live + extra, extra)
        if self.after is not None:
            self.after(func, args, kwargs, result)
        return result

    def hold(self, values: Iterable[Any], tag: str | None = None) -> None:
        """Counts the storages of tensors that are not known yet."""
        for t in values:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = Counted(self, storage, t.device.type, self.tag() if tag is None else tag)

    def retag(self, tensors: Iterable[Any], tag: str) -> None:
        """Gives storages another tag."""
        for t in tensors:
            if isinstance(t, Tensor) and (found := self._known.get(t.untyped_storage()._cdata)) is not None:
                self.by_tag[found.tag] -= found.size
                self.by_tag[tag] += found.size
                found.tag = tag

    def added(self, tag: str, size: int) -> None:
        """A storage came."""
        self.live += size
        self.by_tag[tag] += size
        if self.live > self.peak:
            self._reach(self.live, 0)

    def freed(self, key: int, tag: str, size: int) -> None:
        """A storage went."""
        self._known.pop(key, None)
        self.live -= size
        self.by_tag[tag] -= size

    def _reach(self, height: int, extra: int) -> None:
        if height > self.peak:
            self.peak, self.at_peak = height, self.by_tag.copy()
            self.at_peak["temporaries"] += extra


class Counted:
    """One storage that is counted, and how it will be let go of."""

    def __init__(self, count: Count, storage: torch.UntypedStorage, device: str, tag: str) -> None:
        size = storage.nbytes()
        self.size = -(-size // _BLOCK) * _BLOCK if device == "cuda" else size
        self.tag, self.count, self.key = tag, weakref.ref(count), storage._cdata
        count.added(tag, self.size)
        weakref.finalize(storage, self._gone).atexit = False

    def _gone(self) -> None:
        if (count := self.count()) is not None:
            count.freed(self.key, self.tag, self.size)
