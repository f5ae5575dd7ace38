"""In which order the dimensions of a value lie in memory.

A sum lies as its first operand does: x + f(x) as x, f(x) + x as f(x). A chain has all its values in one order, that of most of them, and
brings into their own those that the model has in another (its input, often): random masks are drawn in the order of memory, and a `view`
works in one order and not in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from passes.graphs.facts import recorded
from passes.graphs.work import hint
from passes.regions import PlannedRegion

__all__ = ["Order", "laid", "order_of", "orders_of"]

Order = tuple[int, ...]
UNKNOWN = -1


def order_of(node: fx.Node) -> Order | None:
    """The dimensions of a value, that of the largest stride first, those of size 1 before all; None where it is unknown or ambiguous."""
    value = recorded(node)
    stride: Any = getattr(value, "stride", None)
    if stride is None or getattr(value, "layout", torch.strided) is not torch.strided or getattr(value, "is_nested", False):
        return None
    sizes, strides = (list(map(_number, numbers)) for numbers in (value.shape, stride() if callable(stride) else stride))
    long = {i: strides[i] for i, size in enumerate(sizes) if size != 1}
    if UNKNOWN in sizes or UNKNOWN in strides or len({*long.values(), 0}) <= len(long):
        return None
    return (*(i for i in range(len(sizes)) if i not in long), *sorted(long, key=lambda i: -long[i]))


def orders_of(region: PlannedRegion, named: Mapping[str, fx.Node]) -> tuple[Order | None, tuple[Order | None, ...]]:
    """The order of a chain; and for each of x[0] to x[T] the one that the model has it in, or None if that is the chain's, or unknown."""
    found = [order_of(named[name]) for name in (*(step.source for step in region.steps), region.steps[-1].target)]
    known = Counter(order for order in found[1:] if order is not None)
    if not known:
        return None, (None,) * len(found)
    common = known.most_common(1)[0][0]
    return common, tuple(None if order == common else order for order in found)


def laid(graph: fx.Graph, value: fx.Node, order: Order) -> fx.Node:
    """Writes what brings a value into an order: a copy, if it is not."""
    back = [order.index(i) for i in range(len(order))]
    calls: Sequence[tuple[str, tuple[Any, ...]]] = (("permute", order), ("contiguous", ()), ("permute", tuple(back)))
    for method, args in calls:
        seen, value = recorded(value), graph.call_method(method, (value, *args))
        if isinstance(seen, torch.Tensor):
            value.meta["example_value"] = getattr(seen, method)(*args)
    return value


def _number(size: Any) -> int:
    found = hint(size) if isinstance(size, torch.SymInt) else int(size)
    return UNKNOWN if found is None else found
