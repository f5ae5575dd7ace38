"""Comparisons of fingerprints, of which those of a device are read once, at the end of a backward pass.

Reading a number from a device waits until everything asked of it is done, and the device then waits for Python. So numbers stay where they
are: what a rerun finds is put beside what the first run noted, and a callback of autograd's compares all pairs as the pass ends, with one
read for each device. A difference raises out of `backward()` or `torch.autograd.grad`; `.grad` has been written by then, and is not to be
used.

On a CPU, where numbers are at hand, every comparison is made at once.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from ..errors import InversionError, MnetError, MnetWarning, StreamError, is_of_device
from .cuda_streams import present

__all__ = ["Drift", "Print", "Proofs", "differed", "looked", "rerunning", "unseen_write"]

Print = Sequence[Any]
"""Numbers, or int64 tensors of them that are still on a device."""
Conclude = Callable[[list[int]], None]
_AT_HAND = {int, NoneType}


@dataclass(frozen=True)
class Drift:
    """What is done about a recomputation that differs: "raise", "warn" or "ignore"."""

    region: str
    on_drift: str

    def __call__(self, t: int | None, what: str, elements: int | None = None, largest: float | None = None) -> None:
        """Reports that `what` differed in a rerun of step t."""
        error = InversionError(self.region, t, what, elements, largest)
        if self.on_drift == "raise":
            raise error
        if self.on_drift == "warn":
            warnings.warn(str(error), MnetWarning, stacklevel=2)


class Proofs:
    """What one chain compares. Holds no tape, which would be a cycle: what waits concludes without one."""

    def __init__(self) -> None:
        self.waiting: list[_Comparison] = []

    def compare(self, found: Print, noted: Print, conclude: Conclude) -> None:
        """Has `conclude` called with the places in which a rerun found other numbers: now, or as the backward pass around ends."""
        if _are_equal(found, noted):
            conclude([])
            return
        comparison = _Comparison(found, noted, conclude)
        if not comparison.is_on_device:
            comparison.conclude(comparison.on_host())
            return
        around = _around()
        if around is None:
            self.settle([comparison])
            return
        around.comparisons += [*self.waiting, comparison]
        self.waiting.clear()

    def put_off(self, found: Print, noted: Print, conclude: Conclude) -> None:
        """The same in a forward pass: now, or as the first backward pass through the chain ends, or in `settle`."""
        if _are_equal(found, noted):
            conclude([])
            return
        comparison = _Comparison(found, noted, conclude)
        if comparison.is_on_device:
            self.waiting.append(comparison)
        else:
            comparison.conclude(comparison.on_host())

    def settle(self, comparisons: Sequence[_Comparison] = ()) -> None:
        """Compares what waits, and these, now; nothing where a CUDA graph is being captured, in which nobody can read."""
        waiting, self.waiting = self.waiting, []
        if waiting and waiting[0].stream is not None and torch.cuda.is_current_stream_capturing():
            return
        _settle([*waiting, *comparisons])


def _are_equal(found: Print, noted: Print) -> bool:
    """Whether all numbers are at hand, and the same; mostly they are."""
    return {*map(type, found), *map(type, noted)} <= _AT_HAND and [*found] == [*noted]


class _Comparison:
    """
    Attributes:
        stream: of CUDA, on which the numbers that were found are being worked out; None elsewhere.
    """

    def __init__(self, found: Print, noted: Print, conclude: Conclude) -> None:
        self.found, self.noted, self.conclude = found, noted, conclude
        device = next((a.device for a, b in zip(found, noted, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)), None)
        self.is_on_device = device is not None
        self.stream = None if device is None else present(device)

    def on_host(self) -> list[int]:
        """Places that differ without a look at a device; all where there are more of one than of the other."""
        if len(self.found) != len(self.noted):
            return list(range(max(len(self.found), len(self.noted))))
        pairs = enumerate(zip(self.found, self.noted, strict=True))
        return [i for i, (a, b) in pairs if not _on_one_device(a, b) and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)]

    def on_device(self) -> Iterable[tuple[int, Tensor, Tensor]]:
        """Places, and the tensors to be compared there."""
        if len(self.found) == len(self.noted):
            for i, (a, b) in enumerate(zip(self.found, self.noted, strict=True)):
                if _on_one_device(a, b):
                    yield i, a, b


def _on_one_device(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.device == b.device and a.shape == b.shape


class _Pass:
    """The comparisons of one backward pass in one of its threads. Autograd's callback alone keeps it, so it dies with a pass that fails."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.comparisons: list[_Comparison] = []

    def last(self) -> None:
        """Queues `end` behind the callbacks of others, such as DDP and FSDP, which must have run if it raises."""
        Variable._execution_engine.queue_callback(self.end)

    def end(self) -> None:
        comparisons, self.comparisons = self.comparisons, []
        _settle(comparisons)


_LOCAL = threading.local()


def _around() -> _Pass | None:
    """The backward pass in which this thread is, if it will call back: one that runs compiled (compiled autograd) does not."""
    task = torch._C._current_graph_task_id()
    if task == -1 or getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False):
        return None
    known: weakref.ref[_Pass] | None = getattr(_LOCAL, "around", None)
    around = None if known is None else known()
    if around is None or around.task != task:
        around = _Pass(task)
        Variable._execution_engine.queue_callback(around.last)
        _LOCAL.around = weakref.ref(around)
    return around


def _settle(comparisons: Sequence[_Comparison]) -> None:
    """Reads what is on devices, once for each, and concludes in order: all that there is, of which the first error is raised."""
    places = [(k, i, a, b) for k, comparison in enumerate(comparisons) for i, a, b in comparison.on_device()]
    differing: list[set[int]] = [set(comparison.on_host()) for comparison in comparisons]
    for stream in {comparison.stream for comparison in comparisons if comparison.stream is not None}:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for device in {a.device for _, _, a, _ in places}:
            here = [place for place in places if place[2].device == device]
            found, noted = (torch.cat([side.reshape(-1) for side in sides]) for sides in zip(*(place[2:] for place in here), strict=True))
            differs = torch.ne(found, noted).tolist()
            if not any(differs):
                continue
            marks = iter(differs)
            for k, i, a, _ in here:
                if any(list(islice(marks, a.numel()))):  # a list, as `any` alone would leave marks behind
                    differing[k].add(i)
    errors = list[MnetError]()
    for comparison, which in zip(comparisons, differing, strict=True):
        try:
            comparison.conclude(sorted(which))
        except MnetError as error:
            errors.append(error)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # they hold this frame


@contextmanager
def rerunning(region: str, t: int | None) -> Iterator[None]:
    """
    Raises:
        InversionError: what runs here, which ran well before, fails; unless the error is ours, or about memory or a device.
    """
    try:
        yield
    except (MnetError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if is_of_device(error):
            raise
        raise InversionError(region, t, f"the course of the step ({type(error).__name__}: {error})") from error


def differed(drifted: Drift, t: int | None, what: str, differing: list[int]) -> None:
    """Reports that `what` differed in a rerun of step t, if it did."""
    if differing:
        drifted(t, what)


def looked(learn: Callable[[set[str]], None] | None, drifted: Drift | None, t: int, name: str, differing: list[int]) -> None:
    """What `StoringTape.hand_out` concludes; drifted: None where there is a copy."""
    if learn is not None:
        learn({name} if differing else set())
    if differing and drifted is not None:
        drifted(t, f"the stream before step {t}, changed in place,")


def unseen_write(region: str, t: int, differing: list[int]) -> None:
    """
    Raises:
        StreamError: something differs between the stream as it was handed out and as it is.
    """
    if differing:
        raise StreamError(
            f"{region}, step {t}: the stream was changed in place where autograd does not see it (in inference mode, or by .data), "
            "by the step or before it; make that operation out of place (inplace=False)"
        )
