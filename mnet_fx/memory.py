"""Bytes that a forward and backward pass take, read off torch's own allocator."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Memory", "measure"]


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before.

    Attributes:
        kept: bytes still allocated after the forward pass, output included.
        peak: highest number of bytes allocated at any time in forward and backward.
    """

    kept: int
    peak: int


def measure(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Memory:
    """Runs `backward(forward())` once and counts bytes.

    Run both once before, so that parameters have their `.grad` and lazily made buffers exist; what they allocate is counted otherwise.
    On the CPU the figures are the allocator's events as `torch.profiler` records them, not the process's resident size, which depends on
    malloc; on CUDA the caching allocator's counters.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return _measure_cuda(forward, backward)
    result, kept, peak = _profiled(forward)
    _, _, later = _profiled(lambda: backward(result))
    return Memory(kept, max(peak, kept + later))


def _profiled(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """Result of run(), bytes left allocated by it, and the highest number on the way."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's library else writes to stderr at every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = run()
    live = peak = 0
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, live, peak


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
