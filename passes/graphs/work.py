"""What an operation takes, as one number to compare: its floating point operations, and the bytes that it moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["FLOPS_PER_BYTE", "hint", "work_of_operation"]

FLOPS_PER_BYTE = 10  # about what a CPU does while it moves a byte; a GPU does more


def work_of_operation(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of one aten operation, as torch.utils.flop_counter counts, and FLOPS_PER_BYTE for each byte of its tensors; 0 for a view."""
    if func.is_view:
        return 0
    tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.layout == torch.strided]
    moved = sum(_number(t.numel()) * t.itemsize for t in tensors)
    packet = func._overloadpacket
    try:
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
    except Exception:  # a formula that does not know these arguments
        flops = 0
    return _number(flops) + FLOPS_PER_BYTE * moved


def _number(size: Any) -> int:
    """A size; what a symbolic one was at the capture, and 0 for one that depends on values."""
    return hint(size) or 0 if isinstance(size, torch.SymInt) else int(size)


def hint(size: torch.SymInt) -> int | None:
    """What a symbolic size was at the capture; None for one that depends on values."""
    return int(size.node.hint) if size.node.has_hint() else None  # type: ignore[arg-type]
