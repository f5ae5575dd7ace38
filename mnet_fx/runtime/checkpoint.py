"""A function whose first run keeps nothing of what autograd saves, and which is run again when a gradient asks for that.

    first run      each tensor that autograd saves goes, and a `Saved` takes its place
    backward pass  the first `Saved` that is asked for has the function run again: its n-th saved tensor belongs to the n-th `Saved`

So does `torch.utils.checkpoint` (non-reentrant), and autograd, its hooks and its gradients are those of the plain function either way. That
also sets random numbers, autocast, devices and tracing around each rerun, which `replay` does for steps, and took 230 microseconds more for
a step of nine tensors (the chain of benchmarks/overhead.py). And trainers put functions of their own in its place, which know no tape.

- A pass is given each tensor once, and nothing is held of it afterwards, so memory falls as the pass goes on, also with retain_graph.
  Who asks once more (a backward that reads ctx.saved_tensors twice), or outside of a pass (`grad_fn._saved_result`), has a rerun for it.
- A function that differentiates within itself is run again before its first run has ended: a rerun has more to save then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from ..errors import UNCOMPILED

__all__ = ["CheckpointError", "checkpoint"]

Result = TypeVar("Result")
_C: Any = torch._C  # of which the type stubs know a part


def checkpoint(run: Callable[[], Result]) -> Result:
    """run(), of which autograd keeps nothing.

    Args:
        run: called once now, and once for each backward pass that needs what it saves, in grad mode; whatever else a rerun has to find as
            it was, it sees to itself.

    Raises:
        CheckpointError: out of the backward pass, if a rerun saves other tensors, by number, shape, dtype or device.
    """
    frame = _Frame(run)
    with saved_tensors_hooks(frame.pack, _unpack):
        result = run()
    frame.is_complete = True
    return result


class Saved(dict[Hashable, Tensor]):
    """Stands for a tensor that autograd saved: by pass, what a rerun saved, until it is asked for."""

    __slots__ = ("__weakref__", "frame", "index")
    frame: _Frame
    index: int


class _Frame:
    """One call of `checkpoint`. Those that stand for its tensors hold it; it holds none of them."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run, self.is_complete = run, False
        self.saved: list[weakref.ref[Saved]] = []
        self.kinds: list[tuple[Any, ...]] = []
        self.passes: set[Hashable] = set()

    def pack(self, t: Tensor) -> Saved:
        saved = Saved()
        saved.frame, saved.index = self, len(self.saved)
        self.saved.append(weakref.ref(saved))
        self.kinds.append((t.shape, t.dtype, t.device))
        return saved

    @torch.compiler.disable(reason=UNCOMPILED)
    def hand_out(self, asked: Saved, key: Hashable | None) -> Tensor:
        """What a rerun saved in the place of `asked`; the others get theirs too, where a pass asks for the first time."""
        found = self._again()
        if key is not None and key not in self.passes:
            self.passes.add(key)
            for i, ref in enumerate(self.saved):
                if i != asked.index and (saved := ref()) is not None:
                    saved[key] = found[i]
        return found[asked.index]

    def _again(self) -> list[Tensor]:
        """All that a rerun saves."""
        found = _Found()
        with saved_tensors_hooks(found.pack, _as_it_is), torch.enable_grad():
            self.run()
        kinds = [(t.shape, t.dtype, t.device) for t in found]
        if kinds != self.kinds and (self.is_complete or kinds[: len(self.kinds)] != self.kinds):
            raise CheckpointError(f"a rerun saves other tensors: {kinds}, where the first run saved {self.kinds}")
        return found


class _Found(list[Tensor]):
    """The tensors that a rerun saves, which its own graph can use as well."""

    def pack(self, t: Tensor) -> Tensor:
        t = t.detach() if t.requires_grad else t
        self.append(t)
        return t


def _unpack(saved: Saved) -> Tensor:
    key = _C._get_graph_exec_group()  # of several passes that share a rerun
    if key is None and (key := _C._current_graph_task_id()) == -1:
        key = None
    return saved.pop(key) if key in saved else saved.frame.hand_out(saved, key)


def _as_it_is(t: Tensor) -> Tensor:
    return t


for _function in (_Frame.pack, _Found.pack, _unpack, _as_it_is):
    torch._dynamo.eval_frame.skip_code(_function.__code__)  # autograd may call them where Dynamo looks at every frame
