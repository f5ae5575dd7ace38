"""A planned graph as a road from input to output: what autograd saves along it, without and with the regions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch.fx as fx

from passes.graphs.effects import Effect, observed
from passes.graphs.facts import owner_path
from passes.regions import Plan, Stretch

__all__ = ["with_stretches"]

_Key = tuple[str, str, int]  # region, path, step


def with_stretches(gm: fx.GraphModule, plan: Plan, marked: Collection[str] = ()) -> Plan:
    """A plan with the stretches of its graph, in the order in which the model runs: each step of an outermost region, and each run of
    nodes of one module between regions. A storage that autograd saves several times counts where it is saved first.

    Args:
        gm: the planned graph, as it was planned.
        plan: its plan.
        marked: names of further nodes to be found again among the adds, such as those that run a body.

    Returns:
        The plan; its stretches hold every residual-looking add of the graph once.
    """
    effects = observed(gm)
    own = {number for node, effect in effects.items() if node.op in ("placeholder", "get_attr") for number in effect.memory}
    plain, outside = set(own), set(own)
    adds, found = {*plan.residual_adds, *marked}, list[Stretch]()
    where: dict[fx.Node, int] = {}
    idle = {node for node in gm.graph.nodes if node.name not in adds and not (node in effects and effects[node].saved)}
    for (region, path, step), nodes in _runs(gm, plan, idle):
        named = tuple(node.name for node in nodes if node.name in adds)
        saved = _saved(nodes, effects, plain)
        where |= dict.fromkeys(nodes, len(found))
        reads = {number for node in nodes for number in _sources(node, where) if number != len(found)}
        kept = (0 if effects else None) if region else _saved(nodes, effects, outside)
        found.append(Stretch(path, region, step if region else None, len(nodes), named, saved, kept, tuple(sorted(reads))))
    return replace(plan, stretches=tuple(found))


def _runs(gm: fx.GraphModule, plan: Plan, idle: Collection[fx.Node]) -> Iterator[tuple[_Key, list[fx.Node]]]:
    """The nodes that compute something, run by run. A step stands where its first node does; idle nodes between those of a step or of
    two of its region, such as counters of batches, are left out."""
    steps = {
        name: (region.name, step.path, t)
        for region in plan.regions
        if not region.within
        for t, step in enumerate(region.steps)
        for name in step.nodes
    }
    ends = {step.target for region in plan.regions if not region.within for step in region.steps[-1:]}
    open_ = 0  # regions that have begun and not ended
    inside: dict[_Key, list[fx.Node]] = {}
    runs: list[tuple[_Key, list[fx.Node]]] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        key = steps.get(node.name, ("", owner_path(node), 0))
        if node.name in steps:
            open_ += (key[2] == 0 and key not in inside) - (node.name in ends)
            if key not in inside:
                runs.append((key, inside.setdefault(key, [])))
            inside[key].append(node)
        elif open_ > 0 and node in idle:
            continue
        elif runs and runs[-1][0] == key:
            runs[-1][1].append(node)
        else:
            runs.append((key, [node]))
    yield from runs


def _sources(node: fx.Node, where: dict[fx.Node, int]) -> Iterator[int]:
    """The stretches whose values a node reads, directly or through nodes that lie in none."""
    stack, seen = list(node.all_input_nodes), set()
    while stack:
        source = stack.pop()
        if source in where:
            yield where[source]
        elif source.op == "placeholder":
            yield -1
        elif source not in seen and source.op != "get_attr":
            seen.add(source)
            stack += source.all_input_nodes


def _saved(nodes: list[fx.Node], effects: dict[fx.Node, Effect], known: set[int]) -> int | None:
    """Bytes that the nodes are the first to save; None where they are not known."""
    if not effects:
        return None
    saved = {number: size for node in nodes for number, size in effects[node].saved if number not in known}
    known.update(saved)
    return None if None in saved.values() else sum(size or 0 for size in saved.values())
