"""Residual adds where nothing is rewritten: in blocks under a context, and in bodies of higher-order operations. They are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch.fx as fx

from passes import Plan, Refusal, Stretch

from ..reporting.findings import AddReport

__all__ = ["Bodies", "bodies", "holders", "refusals", "with_bodies"]

_FOUND = "inside of a block under torch.autocast, inference_mode or vmap, or of the body of a torch.utils.checkpoint or the like"

Bodies = Mapping[str, Plan]
"""What would be rewritten of each body of a graph, were it not one, by its path in the graph."""


def bodies(gm: fx.GraphModule, planned: Callable[[fx.GraphModule], Plan]) -> Bodies:
    """The bodies of a graph, those within bodies included."""
    return {name: planned(body) for name, body in gm.named_modules() if name and isinstance(body, fx.GraphModule)}


def refusals(plans: Bodies) -> tuple[Refusal, ...]:
    """One for each body in which adds could be rewritten."""
    return tuple(
        Refusal.of("lost_context", name, plan.regions[0].path, f"{len(plan.rewritten_adds)} residual adds are {_FOUND}")
        for name, plan in plans.items()
        if plan.regions
    )


def holders(gm: fx.GraphModule, plans: Bodies) -> dict[str, str]:
    """The nodes of a graph that run a body, each with the path of that."""
    return {node.name: str(user.target) for node, user in _runs(gm, plans, "")}


def with_bodies(gm: fx.GraphModule, own: Sequence[AddReport], plans: Bodies, stretches: Sequence[Stretch]) -> tuple[AddReport, ...]:
    """The residual adds of a graph and of its bodies, in the order in which they run.

    Args:
        gm: the graph.
        own: its own residual adds.
        plans: of its bodies.
        stretches: of the graph.
    """
    at = {name: i for i, stretch in enumerate(stretches) for name in stretch.adds}
    found = _in_order(gm, [(add.node, add) for add in own], plans, "")
    return tuple(add if add.stretch is not None else replace(add, stretch=at.get(holder)) for holder, add in found)


def _in_order(gm: fx.GraphModule, own: list[tuple[str, AddReport]], plans: Bodies, inside: str) -> list[tuple[str, AddReport]]:
    """The adds of a graph and of its bodies, each with the name of the graph's node that it lies in or is."""
    at = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    found = list(own)
    for node, user in _runs(gm, plans, inside):
        path = f"{inside}{user.target}"
        body = gm.get_submodule(str(user.target))
        assert isinstance(body, fx.GraphModule)
        found += [(node.name, add) for _, add in _in_order(body, _left(path, plans[path]), plans, f"{path}.")]
    return sorted(found, key=lambda pair: at[pair[0]])


def _runs(gm: fx.GraphModule, plans: Bodies, inside: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """For each body, once, the node that runs it, and the node that names it."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op in ("call_module", "get_attr") and f"{inside}{node.target}" in plans and node.target not in seen:
            seen.add(node.target)
            yield (node if node.op == "call_module" else next(iter(node.users), node)), node


def _left(path: str, plan: Plan) -> list[tuple[str, AddReport]]:
    """The residual adds of a body: none is rewritten."""
    owners = {add: step.path for region in plan.regions for step in region.steps for add in step.adds}
    owners |= {refusal.node: refusal.path for refusal in plan.refusals if refusal.code == "too_short"}  # but for the body, it may not be
    left = {refusal.node: refusal for refusal in plan.refusals}
    left |= {add: Refusal.of("lost_context", add, owner, f"it is {_FOUND}") for add, owner in owners.items()}
    every = [(add, replace(left[add], node=f"{path}.{add}")) for add in plan.residual_adds]
    return [(add, AddReport.left(r)) for add, r in every]
