"""What must hold between the stages; a violation is a bug of this package, never of the model."""

from __future__ import annotations

import torch.fx as fx

from passes.regions import Plan, PlannedRegion, Step

__all__ = ["InvariantError", "verify_plan", "verify_rewrite"]


class InvariantError(AssertionError):
    """A stage handed on something that it promised not to."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"{message}; please report this with the model's graph")


def verify_plan(gm: fx.GraphModule, plan: Plan) -> None:
    """Check that a plan fits a graph.

    Args:
        gm: the graph.
        plan: a plan that should have been made from it.

    Raises:
        InvariantError: if the plan names unknown nodes, does not account for each residual add once, or has overlapping or broken regions.
    """
    position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    accounted = [*plan.rewritten_adds, *(refusal.node for refusal in plan.refusals)]
    _require(sorted(accounted) == sorted(plan.residual_adds), "regions and refusals do not account for each residual add exactly once")
    claimed: dict[str, set[str]] = {}  # by the region that they lie within
    for region in plan.regions:
        _verify_region(region, position)
        for step in region.steps:
            taken = claimed.setdefault(region.within, set())
            overlap = taken & set(step.nodes)
            _require(not overlap, f"nodes {sorted(overlap)} belong to two steps")
            taken |= set(step.nodes)
    _verify_nesting(plan)


def _verify_nesting(plan: Plan) -> None:
    holding = {region.within for region in plan.regions}
    step_of = {
        region.name: {name: t for t, step in enumerate(region.steps) for name in step.nodes if name != step.target}
        for region in plan.regions
        if region.name in holding
    }
    for region in plan.regions:
        steps = {step_of.get(region.within, {}).get(name) for step in region.steps for name in step.nodes}
        _require(
            not region.within or len(steps - {None}) == len(steps) == 1, f"{region.name} does not lie within one step of {region.within}"
        )


def _verify_region(region: PlannedRegion, position: dict[str, int]) -> None:
    _require(len(region.steps) > 0, f"{region.name} has no steps")
    for before, after in zip(region.steps, region.steps[1:], strict=False):
        _require(before.target == after.source, f"{region.name} is not contiguous: {before.target} is followed by {after.source}")
    _require(all(1 <= t < len(region.steps) for t in region.escapes), f"{region.name} has escapes out of range: {region.escapes}")
    inside = set(region.nodes)
    summed = [name for total in region.totals for name in (*total.nodes, *(name for _, name, _ in total.terms))]
    _require(len(set(summed)) == len(summed), f"{region.name} sums something twice")
    for step in region.steps:
        _verify_step(step, region, position)
        _require(not inside & set(step.sides), f"{region.name} has a side input from inside: {sorted(inside & set(step.sides))}")


def _verify_step(step: Step, region: PlannedRegion, position: dict[str, int]) -> None:
    named = (step.source, step.target, *step.nodes, *step.adds, *step.sides, *step.extras)
    unknown = [name for name in named if name not in position]
    _require(not unknown, f"{region.name} names nodes that the graph does not have: {unknown}")
    inside = set(step.nodes)
    _require(step.target in inside and step.source not in inside, f"{region.name} has a step without its target or with its source")
    _require({*step.adds, *step.extras} <= inside, f"{region.name} has adds or extras outside of their step")
    _require(
        [position[name] for name in step.nodes] == sorted(position[name] for name in step.nodes), f"{region.name} has a step out of order"
    )
    _require(
        (step.branch is not None) == (step.form == "branch"), f"{region.name} has a step of form {step.form} with branch {step.branch}"
    )


def verify_rewrite(before: fx.GraphModule, after: fx.GraphModule, plan: Plan) -> None:
    """Check a rewritten graph against the one it came from.

    Args:
        before: the planned graph.
        after: the rewritten graph.
        plan: what was rewritten.

    Raises:
        InvariantError: if the graph is malformed, or a node outside the regions is missing.
    """
    try:
        after.graph.lint()
    except RuntimeError as error:
        raise InvariantError(f"the rewritten graph is malformed: {error}") from error
    allowed = {node.name for node in after.graph.nodes} | {name for region in plan.regions for name in region.nodes}
    missing = [node.name for node in before.graph.nodes if node.op != "get_attr" and node.name not in allowed]
    _require(not missing, f"nodes outside of all regions are missing from the rewritten graph: {missing}")
    regions = sorted(region.name for region in plan.regions if not region.within)
    calls = sorted(str(node.target) for node in after.graph.nodes if node.op == "call_module" and node.target in regions)
    _require(calls == regions, f"the regions {regions} are called as {calls}")
