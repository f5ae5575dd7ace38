"""What is known about the nodes of one graph, computed once: order, kinds, dependencies, memory, owners, shapes.

A `Facts` has three kinds of edges between nodes, each including the one before:

    values   the inputs whose values a node's result depends on (asking for a shape is not a dependence on values)
    flow     all inputs, and the writes that changed the memory of an input since the input was computed
    order    whatever must have run before: flow; for a node that writes in place, the earlier readers of that memory, also those that an
             unknown module may have lent it to; and the calls before of a module with buffers, which may move at each
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from passes.memory import is_unknown, may_alias, moved, written
from passes.ops import kind

__all__ = ["Facts", "dtype_of", "free_shape_of", "joined", "owner_keys", "owner_path", "owner_stack", "recorded", "shape_of"]


@dataclass(frozen=True)
class Facts:
    """Everything the matcher and the rules ask about a graph.

    Attributes:
        nodes: all nodes in graph order.
        named: each node by name.
        index: position of each node.
        kinds: kind of each node, see `passes.ops`.
        values, flow, order: the three kinds of incoming edges.
        base: the node whose memory a node may share (itself for fresh memory).
        alias: the input whose memory a node may share, where there is one.
        writes: for each node that writes in place, the bases of the memory it writes to.
        stale: nodes that write in place although a value recorded before them is read after them from the same memory.
        varies: nodes whose value depends on the values of an input of the graph, not on parameters, constants, shapes and
            numbers alone.
    """

    nodes: tuple[fx.Node, ...]
    modules: dict[str, nn.Module]
    named: dict[str, fx.Node] = field(default_factory=dict)
    index: dict[fx.Node, int] = field(default_factory=dict)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    values: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    flow: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    order: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    alias: dict[fx.Node, fx.Node] = field(default_factory=dict)
    writes: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    stale: set[fx.Node] = field(default_factory=set)
    varies: set[fx.Node] = field(default_factory=set)

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Facts:
        """Collect the facts of a graph in time linear in its size."""
        facts = cls(tuple(gm.graph.nodes), dict(gm.named_modules(remove_duplicate=False)))
        for position, node in enumerate(facts.nodes):
            facts.named[node.name], facts.index[node] = node, position
            facts.kinds[node] = kind(node, facts.modules)
        _find_memory(facts)
        _find_edges(facts)
        return facts

    def users_outside(self, node: fx.Node, inside: Container[fx.Node]) -> bool:
        """True if anything that is not `inside` reads the node."""
        return any(user not in inside for user in node.users)


def _find_memory(facts: Facts) -> None:
    """Fill `base`, `alias`, `writes` and `stale`: each result is followed to the first node that may own its memory."""
    last_read: dict[fx.Node, int] = {}
    for node in facts.nodes:
        source, targets = may_alias(node, facts.modules), written(node, facts.modules)
        base = facts.base[node] = node if source is None else facts.base[source]
        if source is not None:
            facts.alias[node] = source
        if targets:
            facts.writes[node] = tuple(dict.fromkeys(facts.base[target] for target in targets))
            if any(last_read[memory] > facts.index[node] for memory in facts.writes[node]):
                facts.stale.add(node)
        last_read[base] = max(last_read.get(base, -1), *(facts.index[user] for user in node.users), -1)


def _find_edges(facts: Facts) -> None:
    """Fill the edges and `varies` in one sweep, with the last write to and the readers since then of each piece of memory."""
    last_write: dict[fx.Node, fx.Node] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    last_call: dict[Any, fx.Node] = {}  # by what it moves, such as statistics
    for node in facts.nodes:
        inputs = tuple(node.all_input_nodes)
        bases = dict.fromkeys(facts.base[source] for source in inputs)
        lent = {facts.base[source]: base for base in bases if is_unknown(base, facts.modules) for source in base.all_input_nodes}
        newer = [
            write
            for base in bases
            if (write := last_write.get(base)) is not None
            and any(facts.base[source] is base and facts.index[source] < facts.index[write] for source in inputs)
            and write not in inputs
        ]
        facts.flow[node] = (*inputs, *newer)
        facts.values[node] = () if facts.kinds[node] in ("shape", "create") else facts.flow[node]
        states = moved(node, facts.modules)
        before = [last_call[state] for state in states if state in last_call]
        before += [
            last_write[base] for base, lender in lent.items() if base in last_write and facts.index[last_write[base]] > facts.index[lender]
        ]
        facts.order[node] = (*facts.flow[node], *before)
        last_call |= dict.fromkeys(states, node)
        for memory in facts.writes.get(node, ()):
            facts.order[node] = (*facts.order[node], *readers.get(memory, ()))
            last_write[memory], readers[memory] = node, []
        for base in bases | lent:
            readers.setdefault(base, []).append(node)
        if node.op == "placeholder" or (not _is_number(node) and any(source in facts.varies for source in facts.values[node])):
            facts.varies.add(node)


def _is_number(node: fx.Node) -> bool:
    """Whether a node gives a number, such as the probability of a dropout that varies, and no tensor."""
    return isinstance(recorded(node), (torch.SymFloat, torch.SymInt, float, int))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape that a node had for the inputs of the capture; None if it recorded none, -1 for a size that depends on values.

    Sizes are compared by these: a symbol of a capture may stand for a size that is known elsewhere, as in `s2 == 32`.
    """
    shape = _shape(node)
    return None if shape is None else tuple(size if isinstance(size, int) else _hint(size) for size in shape)


def free_shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """As `shape_of`, with -1 for every size that may vary."""
    shape = _shape(node)
    return None if shape is None else tuple(size if isinstance(size, int) else -1 for size in shape)


def _shape(node: fx.Node) -> Any:
    return getattr(recorded(node), "shape", None)


def _hint(size: torch.SymInt) -> int:
    return int(size.node.hint) if size.node.has_hint() else -1  # type: ignore[arg-type]


def dtype_of(node: fx.Node) -> str | None:
    """Name of the dtype that the capture recorded for a node, such as "float32", or None."""
    dtype = getattr(recorded(node), "dtype", None)
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def recorded(node: fx.Node) -> Any:
    """The value that a node had in the capture, without its elements; None if the capture recorded none."""
    return next((node.meta[key] for key in ("val", "example_value", "tensor_meta") if key in node.meta), None)


def owner_keys(node: fx.Node) -> tuple[str, ...]:
    """Keys of the module calls that were running when the node was recorded, outermost first; a second call of `a.b` is `a.b@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(stack)[: -1 if node.op == "call_module" else None]


def owner_path(node: fx.Node) -> str:
    """Path of the module whose forward contains the node; for the call of a leaf module, of its caller."""
    keys = owner_keys(node)
    return str(node.meta["nn_module_stack"][keys[-1]][0]) if keys else ""


def owner_stack(node: fx.Node) -> list[str]:
    """Paths of the modules whose calls were running when the node was recorded, outermost first."""
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def joined(*parts: str) -> str:
    """The path of a module from the paths along the way, of which any may be empty."""
    return ".".join(part for part in parts if part)
