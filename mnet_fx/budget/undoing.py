"""A pass that leaves no trace: of what verify and estimate run on a user's own model and data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["SEED", "same", "undone"]

SEED = 20211


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and values, NaN being NaN."""
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


@contextmanager
def undone(net: nn.Module, call: Any) -> Iterator[None]:
    """Seeds torch, Python and numpy, and afterwards puts buffers, random states and the call's tensors back."""
    tensors = [t for t in (*net.buffers(), *pytree.tree_leaves(call)) if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in tensors]
    devices = {t.device for t in (*net.parameters(), *tensors) if t.device.type != "cpu"}
    with ExitStack() as stack:
        for kind in {device.type for device in devices} or {"cuda"}:
            stack.enter_context(torch.random.fork_rng([d for d in devices if d.type == kind], device_type=kind))
        torch.manual_seed(SEED)
        stack.enter_context(_seeded())
        try:
            yield
        finally:
            with torch.no_grad():
                for t, then in zip(tensors, before, strict=True):
                    if not same(t, then):
                        t.copy_(then)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seeds Python's and numpy's global generators for a time."""
    states = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
