"""Splits a graph at its regions: each run of nodes between two of them becomes a GraphModule `piece_i`.

before    a -> b -> region_0 -> getitem -> c -> d -> region_1 -> e
after     piece_0(..) -> region_0 -> getitem -> piece_1(..) -> region_1 -> piece_2(..)

Of a list of tensors, as `chunk` makes, a piece returns the tensors. A tensor that is given a hook is returned by the piece that makes
it, and the hook is put on it outside of all pieces: a compiler only sees the part of its gradient that comes from the same piece. What
later pieces read for nothing that has gradients is returned detached: else parameters behind it would get gradients of
zeros, not None, and an optimizer with weight decay would move them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Set
from typing import Any

import torch.fx as fx
from torch import Tensor, nn

from passes.graphs.effects import noted
from passes.graphs.facts import gradients_reach, recorded
from passes.graphs.writes import is_hook, is_unknown, written
from passes.rewriting.segments import Segment

__all__ = ["COST", "OVERWRITTEN", "PROOF", "pieces"]

Groups = list[list[fx.Node]]
Segments = list[list[Segment]]


PROOF = "mnet_fx_proof"
"""In the meta data of a piece that can be run again: which of its outputs shows that a rerun gave what the first run did."""

COST = "mnet_fx_cost"
"""In the meta data of such a piece: its `Cost`, or None."""

OVERWRITTEN = "mnet_fx_overwritten"
"""In the meta data of a piece: whether a later one overwrites what it reads or makes. Of the whole graph a compiler could tell, and keep
something else for the gradient; of a piece alone it cannot."""


def pieces(
    gm: fx.GraphModule, between: Collection[str], everywhere: Collection[str] = (), cut: Callable[[Groups], Segments] | None = None
) -> fx.GraphModule:
    """Gather what lies between the calls of some modules.

    Args:
        gm: a graph with flat inputs, not changed.
        between: targets of the calls that stay as they are.
        everywhere: names of placeholders that every piece gets, whether it reads them or not.
        cut: cuts each run of nodes into segments, see `segmented`, which become pieces of their own; None: a run is a piece.

    Returns:
        A graph of the calls `piece_0`, `piece_1`, ... (GraphModules that return tuples) and those of `between`.
    """
    kept = {node for node in gm.graph.nodes if node.op == "call_module" and node.target in between}
    several = {node for node in kept if recorded(node) is None}  # calls that return a tuple: not x[t] itself, which may be indexed
    own = kept | {node for node in gm.graph.nodes if is_hook(node) or (node.target is operator.getitem and node.args[0] in several)}
    hooked = {node.args[0] for node in own if is_hook(node)}
    groups: Groups = [[]]
    units: list[fx.Node | list[fx.Node]] = []
    listed: dict[Any, list[fx.Node]] = {}  # values that are lists of tensors, and the group that makes each
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node in own:
            units += [groups[-1], node]
            groups.append([])
        elif node.target is operator.getitem and node.args[0] in listed:
            listed[node.args[0]].append(node)  # with what made the list, as a compiled part returns tensors
        else:
            groups[-1].append(node)
            if isinstance(node.meta.get("example_value"), (list, tuple)):
                listed[node] = groups[-1]
        if node in hooked:
            units.append(groups[-1])
            groups.append([])
    units.append(groups[-1])
    runs = [unit for unit in units if isinstance(unit, list)]
    segments = iter([[Segment(run)] for run in runs] if cut is None else cut(runs))
    parts = [part for unit in units for part in (next(segments) if isinstance(unit, list) else [unit])]
    return _Joiner(gm, everywhere, _graded(gm, own)).joined(parts)


def _graded(gm: fx.GraphModule, own: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that gradients may come to: from the output, a region or hook, or a write."""
    modules = dict(gm.named_modules())
    return gradients_reach(node for node in gm.graph.nodes if node.op == "output" or node in own or _has_effect(node, modules))


def _has_effect(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return False
    if (effect := noted(node)) is not None:
        return bool(effect.written) or not effect.known
    return is_unknown(node, modules) or bool(written(node, modules))


class _Joiner:
    """Writes the outer graph and the pieces."""

    def __init__(self, gm: fx.GraphModule, everywhere: Collection[str], graded: Collection[fx.Node]) -> None:
        self.gm, self.graded, self.graph = gm, graded, fx.Graph()
        self.everywhere = [node for node in gm.graph.nodes if node.op == "placeholder" and node.name in everywhere]
        self.values: dict[fx.Node, fx.Node] = {}
        self.modules: dict[str, Any] = {}

    def joined(self, units: list[fx.Node | Segment]) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.node_copy(node)
        for unit, later in zip(units, _written_after(units), strict=True):
            if isinstance(unit, Segment):
                self._piece(unit, later)
            else:
                self._copied(unit)
        self._copied(self.gm.graph.output_node())
        return fx.GraphModule(self.modules, self.graph)

    def _copied(self, node: fx.Node) -> None:
        """The node as it is, with the attributes that it refers to."""
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                self.values[source] = self.graph.node_copy(source)
        self.values[node] = self.graph.node_copy(node, self.values.__getitem__)
        for used in (node, *node.all_input_nodes):
            if used.op in ("call_module", "get_attr"):
                self.modules[str(used.target)] = getattr(self.gm, str(used.target))

    def _piece(self, segment: Segment, later: Set[int]) -> None:
        """One piece and its call; nothing for no nodes. `later`: the storages that later ones overwrite."""
        nodes = segment.nodes
        if not nodes:
            return
        inside, graph = set(nodes), fx.Graph()
        read = dict.fromkeys(self.everywhere)
        read |= dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        inner: dict[fx.Node, fx.Node] = {}
        for source in read:
            inner[source] = graph.node_copy(source) if source.op == "get_attr" else graph.placeholder(source.name)
            inner[source].meta = dict(source.meta)
        for node in nodes:
            inner[node] = graph.node_copy(node, inner.__getitem__)
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        graph.output(tuple(self._given(node, inside, inner[node]) for node in outputs))
        name = f"piece_{len([n for n in self.modules if n.startswith('piece_')])}"
        targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        self.modules[name] = fx.GraphModule({target: getattr(self.gm, target) for target in targets}, graph)
        if segment.proof is not None:
            self.modules[name].meta |= {PROOF: outputs.index(segment.proof), COST: segment.cost}
        self.modules[name].meta[OVERWRITTEN] = any(not later.isdisjoint(_held(node)) for node in nodes)
        call = self.graph.call_module(name, tuple(self.values[source] for source in read if source.op != "get_attr"))
        for i, node in enumerate(outputs):
            self.values[node] = self.graph.call_function(operator.getitem, (call, i))
            self.values[node].meta = dict(node.meta)

    def _given(self, node: fx.Node, inside: Set[fx.Node], value: fx.Node) -> fx.Node:
        """What a piece returns of a node."""
        if not isinstance(recorded(node), Tensor) or any(user in self.graded for user in node.users if user not in inside):
            return value
        return value.graph.call_method("detach", (value,))


def _written_after(units: list[fx.Node | Segment]) -> list[Set[int]]:
    """For each unit, the storages that those after it overwrite."""
    found: list[Set[int]] = []
    later: frozenset[int] = frozenset()
    for unit in reversed(units):
        found.append(later)
        nodes = unit.nodes if isinstance(unit, Segment) else [unit]
        written_here = {storage for node in nodes if (effect := noted(node)) is not None for storage in effect.written}
        later |= written_here
    return found[::-1]


def _held(node: fx.Node) -> Set[int]:
    """The storages that a node reads or makes, but for those that it overwrites itself, as a batch norm its statistics."""
    effects = [effect for one in (node, *node.all_input_nodes) if (effect := noted(one)) is not None]
    own = noted(node)
    return {storage for effect in effects for storage in effect.memory} - set(() if own is None else own.written)
