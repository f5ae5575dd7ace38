"""Bytes that a forward and backward pass take, read off torch's own allocator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils import _pytree as pytree

from ..errors import MnetWarning

__all__ = ["Memory", "measure"]

_MARK = "mnet_fx: the backward pass begins"


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before.

    Attributes:
        kept: bytes still allocated after the forward pass, output or loss included.
        peak: highest number of bytes allocated at any time in forward and backward.
    """

    kept: int
    peak: int


def measure(step: Callable[[], Any], backward: Callable[[Any], Any] | None = None) -> Memory:
    """Bytes that a training step takes: `measure(lambda: loss_of(net(x)).backward())`, or `measure(forward, backward)`.

    Args:
        step: runs forward and backward, once, and whatever else belongs to the step, such as `optimizer.step()`. What is kept is then what
            is allocated when the first backward pass begins (`torch.autograd.backward` or `grad`); without one, when the step ends, with a
            warning where it returned what has a gradient.
        backward: with it, `step` is the forward pass alone, and `backward(step())` is called after it.

    Run the step once before, so that parameters have their `.grad` and lazily made buffers exist; what they allocate is counted otherwise.
    On the CPU the figures are the allocator's events as `torch.profiler` records them, not the process's resident size, which depends on
    malloc; on CUDA the caching allocator's counters.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if backward is None:
        return (_measure_step_cuda if cuda else _measure_step)(step)
    if cuda:
        return _measure_cuda(step, backward)
    result, kept, peak, _ = _profiled(step)
    _, _, later, _ = _profiled(lambda: backward(result))
    return Memory(kept, max(peak, kept + later))


def _measure_step(step: Callable[[], Any]) -> Memory:
    with _at_backward(lambda: record_function(_MARK)):
        result, left, peak, marked = _profiled(step)
    if marked is None:
        _warn_of_a_forward(result)
    return Memory(left if marked is None else marked, peak)


def _warn_of_a_forward(result: Any) -> None:
    if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(result)):
        warnings.warn(
            "measure(step): the step ran no backward pass, so the bytes are a forward pass's alone; end it with .backward(), or give "
            "measure(forward, backward)",
            MnetWarning,
            stacklevel=4,
        )


def _measure_step_cuda(step: Callable[[], Any]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept: list[int] = []

    @contextmanager
    def noted() -> Iterator[None]:
        kept.append(torch.cuda.memory_allocated() - before)  # the allocator's own count, which runs with the host
        yield

    with _at_backward(noted):
        result = step()
    torch.cuda.synchronize()
    if not kept:
        _warn_of_a_forward(result)
    return Memory(kept[0] if kept else torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before)


@contextmanager
def _at_backward(around: Callable[[], Any]) -> Iterator[None]:
    """For a time, runs the first backward pass of the outermost kind within `around()`."""
    originals = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}
    begun: list[bool] = []

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if begun:
                return original(*args, **kwargs)
            begun.append(True)
            with around():
                return original(*args, **kwargs)

        return run

    try:
        for name, original in originals.items():
            setattr(torch.autograd, name, watched(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.autograd, name, original)


def _profiled(run: Callable[[], Any]) -> tuple[Any, int, int, int | None]:
    """Result of run(), bytes left allocated by it, the highest number on the way, and the number at the mark, if there was one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's library else writes to stderr at every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = run()
    live = peak = 0
    marked: int | None = None
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() in ("[memory]", _MARK)]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == _MARK:
            marked = live if marked is None else marked
            continue
        live += event.nbytes()
        peak = max(peak, live)
    return result, live, peak, marked


def _measure_cuda(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Memory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = forward()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    backward(result)
    torch.cuda.synchronize()
    return Memory(kept, torch.cuda.max_memory_allocated() - before)
