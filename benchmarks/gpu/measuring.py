"""Peak bytes, milliseconds, host reads and launches of a training step; and whether gradients are equal bit for bit."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mnet_fx

from .session import Session

__all__ = ["allocate_gradients", "clocked", "deterministic", "equal_bits", "gradients", "host_reads", "hosted", "kernels", "peak"]

Step = Callable[[], Any]
SYNCHRONIZES = "called a synchronizing CUDA operation"


def allocate_gradients(model: nn.Module) -> None:
    """Gives every parameter a `.grad` of zeros: steps then add to it, and what it takes is allocated before."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def peak(session: Session, step: Step) -> tuple[int, int | None]:
    """Most bytes allocated during a step: beyond those allocated before it, and all of them (None on a CPU). What was freed counts
    until the streams that use it are through, as with copies to the host.
    """
    gc.collect()
    if not session.cuda:
        return mnet_fx.measure(step).peak, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    step()
    torch.cuda.synchronize()
    top = torch.cuda.memory_stats()["active_bytes.all.peak"]
    return top - before, top


def clocked(session: Session, step: Step) -> float:
    """Milliseconds of one step, until the device has done it."""
    if not session.cuda:
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_reads(session: Session, step: Step) -> int | None:
    """How often the host waits for the device in a step, by torch's own debug mode; None on a CPU."""
    if not session.cuda:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNCHRONIZES in str(warning.message) for warning in caught)


def hosted(session: Session, step: Step) -> float | None:
    """Milliseconds until Python is through with a step, and waits for the device if that is slower; None on a CPU."""
    if not session.cuda:
        return None
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken * 1e3


def kernels(session: Session, step: Step) -> tuple[int | None, float | None]:
    """How many kernels run on the device in a step, copies and fills by the driver left out, and the milliseconds in which the device does
    anything, if nothing runs beside another; None on a CPU."""
    if not session.cuda:
        return None, None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in events), sum(e.time_range.elapsed_us() for e in events) / 1e3


@contextmanager
def _repeating() -> Iterator[None]:
    """Convolutions and attention whose gradients repeat: cuDNN's fastest do not."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
        torch.backends.cuda.enable_cudnn_sdp(attention)


@contextmanager
def deterministic() -> Iterator[None]:
    """Every operation that can repeat does; those of flash attention's gradient add in an order of their own otherwise."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """The loss and all gradients of one step from a fixed seed. The backward pass alone is made deterministic: under that switch, Dynamo
    would capture a forward pass anew."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    torch.manual_seed(1)
    with _repeating():
        loss = forward()
        with deterministic():
            loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal_bits(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether tensors are equal in every bit, so that NaN equals itself and -0.0 is not 0.0."""

    def bits(t: Tensor) -> Tensor:
        return t.reshape(-1).view(torch.uint8)

    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(some, others, strict=True))
