"""What is known about the nodes of one graph, computed once: order, kinds, dependencies, memory, owners, shapes.

A `Facts` has three kinds of edges between nodes, each including the one before:

    values   the inputs whose values a node's result depends on (asking for a shape is not a dependence on values)
    flow     all inputs, and the writes that changed the memory of an input since the input was computed
    order    whatever must have run before: flow; for a node that writes in place, the earlier readers of that memory; for one of which
             nothing is known, and which may write, those of all that it is given or that it may have lent; and the calls before of a
             module with buffers, which may move at each

What nodes write to and share is observed (`effects`) where the capture recorded fake tensors, else read from tables (`writes`).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from passes.graphs.effects import Effect, observed
from passes.graphs.ops import OUT_OF_PLACE, kind
from passes.graphs.writes import is_hook, is_unknown, may_alias, moved, overwritten, running_statistics, statistics, written

__all__ = [
    "Facts",
    "bytes_of",
    "dtype_of",
    "free_shape_of",
    "gradients_reach",
    "joined",
    "owner_keys",
    "owner_path",
    "owner_stack",
    "recorded",
    "shape_of",
]


@dataclass(frozen=True)
class Facts:
    """Everything the matcher and the rules ask about a graph.

    Attributes:
        nodes: all nodes in graph order.
        named: each node by name.
        index: position of each node.
        kinds: kind of each node, see `passes.graphs.ops`.
        values, flow, order: the three kinds of incoming edges.
        shares: the nodes whose memory a node may share: itself for fresh memory; several for a list of tensors.
        base: the first of them.
        alias: the input whose memory a node may share, where there is one.
        writes: for each node that writes in place, the bases of the memory it writes to.
        stale: nodes that write in place although a value recorded before them is read after them from the same memory.
        varies: nodes whose value depends on the values of an input of the graph, not on parameters, constants, shapes and numbers alone.
        unknown: calls that were not observed and that no table knows: they may return, and write to, all that they are given.
    """

    nodes: tuple[fx.Node, ...]
    modules: dict[str, nn.Module]
    named: dict[str, fx.Node] = field(default_factory=dict)
    index: dict[fx.Node, int] = field(default_factory=dict)
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    values: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    flow: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    order: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    shares: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    base: dict[fx.Node, fx.Node] = field(default_factory=dict)
    alias: dict[fx.Node, fx.Node] = field(default_factory=dict)
    writes: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    stale: set[fx.Node] = field(default_factory=set)
    varies: set[fx.Node] = field(default_factory=set)
    unknown: set[fx.Node] = field(default_factory=set)

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Facts:
        """Collect the facts of a graph in time linear in its size."""
        facts = cls(tuple(gm.graph.nodes), dict(gm.named_modules(remove_duplicate=False)))
        for position, node in enumerate(facts.nodes):
            facts.named[node.name], facts.index[node] = node, position
            facts.kinds[node] = "identity" if _repeats(node, found := kind(node, facts.modules)) else found
        _find_memory(facts, observed(gm))
        _find_edges(facts)
        return facts

    def graded(self) -> set[fx.Node]:
        """The nodes that gradients may come to: of what leads to the output or to a write."""
        return gradients_reach(n for n in self.nodes if n.op == "output" or n in self.writes or n in self.unknown or is_hook(n))

    def copied_adds(self, source: fx.Node, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Of the nodes of a step, the sums that write in place to the memory of its source, and in a region to fresh memory."""
        memory = self.base[source]
        return {node for node in nodes if node.target in OUT_OF_PLACE and memory in self.writes.get(node, ())}

    def users_outside(self, node: fx.Node, inside: Container[fx.Node]) -> bool:
        """True if anything that is not `inside` reads the node."""
        return any(user not in inside for user in node.users)


def _repeats(node: fx.Node, kind: str) -> bool:
    """Whether a cast is to what its operand is already."""
    if kind != "cast" or not node.all_input_nodes:
        return False
    before, after = recorded(node.all_input_nodes[0]), recorded(node)
    return isinstance(after, torch.Tensor) and all(getattr(before, of, None) == getattr(after, of) for of in ("dtype", "device", "shape"))


def gradients_reach(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that gradients of some nodes may come to: these, and what they are computed from by values that require gradients.

    Where no result is recorded to require any, as in an exported graph, all that they are computed from.
    """
    stack = list(nodes)
    known = any(
        _requires_grad(node, False) for root in stack[:1] for node in root.graph.nodes if node.op not in ("placeholder", "get_attr")
    )
    found: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in found and (not known or _requires_grad(node, True)):
            found.add(node)
            stack += node.all_input_nodes
    return found


def _requires_grad(node: fx.Node, otherwise: bool) -> bool:
    return getattr(recorded(node), "requires_grad", otherwise)


def _find_memory(facts: Facts, effects: dict[fx.Node, Effect]) -> None:
    """Fill `shares`, `base`, `alias`, `writes`, `stale` and `unknown`: each result is followed to the nodes that may own its memory."""
    last_read: dict[fx.Node, int] = {}
    owners: dict[int, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}
    for node in facts.nodes:
        if effects:
            memory, targets = _observed(node, effects[node], owners, facts)
        else:
            memory, targets = _tabled(node, attributes, facts)
        facts.shares[node] = memory or (node,)
        facts.base[node] = facts.shares[node][0]
        source = next((s for s in node.all_input_nodes if not set(facts.shares[s]).isdisjoint(memory)), None)
        if source is not None:
            facts.alias[node] = source
        if targets:
            facts.writes[node] = targets
            if any(last_read[memory] > facts.index[node] for memory in targets):
                facts.stale.add(node)
        last = max((facts.index[user] for user in node.users), default=-1)
        last_read |= {memory: max(last_read.get(memory, -1), last) for memory in facts.shares[node]}


def _observed(node: fx.Node, effect: Effect, owners: dict[int, fx.Node], facts: Facts) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The nodes whose memory a node shares, and whose memory it overwrites. Of what is a module's, an unknown call writes to nothing."""
    memory = tuple(dict.fromkeys(owners.setdefault(number, node) for number in effect.memory))
    moving = {base for value in statistics(node) if value.op == "get_attr" for base in facts.shares[value]}
    targets = [target for number in effect.written if (target := owners[number]) not in moving]  # moves: only seen where sizes vary
    if not effect.known:
        targets = [target for target in targets if target.op != "get_attr"]
    named = (*running_statistics(node), *overwritten(node, facts.modules))
    return memory, tuple(dict.fromkeys([*targets, *(base for target in named for base in facts.shares[target])]))


def _tabled(node: fx.Node, attributes: dict[str, fx.Node], facts: Facts) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Likewise, as far as the tables tell."""
    if is_unknown(node, facts.modules):
        facts.unknown.add(node)
    if node.op == "get_attr":
        return (attributes.setdefault(str(node.target), node),), ()
    memory = dict.fromkeys(base for source in may_alias(node, facts.modules) for base in facts.shares[source])
    return tuple(memory), tuple(dict.fromkeys(base for target in written(node, facts.modules) for base in facts.shares[target]))


def _find_edges(facts: Facts) -> None:
    """Fill the edges and `varies` in one sweep, with the last write to and the readers since then of each piece of memory."""
    last_write: dict[fx.Node, fx.Node] = {}
    last_maybe: dict[fx.Node, fx.Node] = {}  # the last call that may have written to it
    readers: dict[fx.Node, list[fx.Node]] = {}
    last_call: dict[Any, fx.Node] = {}  # by what it moves, such as statistics
    for node in facts.nodes:
        inputs = tuple(node.all_input_nodes)
        bases = dict.fromkeys(base for source in inputs for base in facts.shares[source])
        lent = dict.fromkeys(base for lender in bases if lender in facts.unknown for base in _lent(lender, facts))
        facts.flow[node] = (*inputs, *_newer_writes(inputs, bases, last_write, facts))
        facts.values[node] = () if facts.kinds[node] in ("shape", "create") else facts.flow[node]
        states = moved(node, facts.modules)
        before = [last_call[state] for state in states if state in last_call]
        before += [last_write[base] for base in lent if base in last_write]
        before += [last_maybe[base] for base in (*bases, *lent) if base in last_maybe]
        facts.order[node] = (*facts.flow[node], *dict.fromkeys(before))
        last_call |= dict.fromkeys(states, node)
        for memory in facts.writes.get(node, ()):
            facts.order[node] = (*facts.order[node], *readers.get(memory, ()))
            last_write[memory], readers[memory] = node, []
        for memory in _maybe_written(node, bases, facts):
            facts.order[node] = (*facts.order[node], *readers.get(memory, ()))
            last_maybe[memory], readers[memory] = node, []
        for base in bases | lent:
            readers.setdefault(base, []).append(node)
        if not _is_number(node) and (node.op == "placeholder" or any(source in facts.varies for source in facts.values[node])):
            facts.varies.add(node)


def _is_number(node: fx.Node) -> bool:
    """Whether a node gives a number, such as a size or the probability of a dropout that varies, and no tensor."""
    return isinstance(recorded(node), (torch.SymFloat, torch.SymInt, float, int))


def _newer_writes(
    inputs: tuple[fx.Node, ...], bases: dict[fx.Node, None], last_write: dict[fx.Node, fx.Node], facts: Facts
) -> list[fx.Node]:
    """The writes to the memory of an input since that input was computed."""
    return [
        write
        for base in bases
        if (write := last_write.get(base)) is not None
        and any(base in facts.shares[source] and facts.index[source] < facts.index[write] for source in inputs)
        and write not in inputs
    ]


def _lent(lender: fx.Node, facts: Facts) -> list[fx.Node]:
    """The memory that an unknown call may have returned."""
    return [base for source in lender.all_input_nodes if source.op != "get_attr" for base in facts.shares[source]]


def _maybe_written(node: fx.Node, bases: dict[fx.Node, None], facts: Facts) -> list[fx.Node]:
    """What a node may write to without that any table says so: what an unknown call is given, or has lent where that is written to."""
    given = list(bases) if node in facts.unknown else []
    given += [base for memory in facts.writes.get(node, ()) if memory in facts.unknown for base in _lent(memory, facts)]
    return [base for base in given if base.op != "get_attr"]


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


def bytes_of(node: fx.Node) -> int | None:
    """Bytes of the tensor that the capture recorded for a node; None if it recorded none, or its size depends on values."""
    shape, value = shape_of(node), recorded(node)
    if shape is None or -1 in shape or not isinstance(value, torch.Tensor):
        return None
    return math.prod(shape) * value.itemsize


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
