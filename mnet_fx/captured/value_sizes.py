"""Sizes that depend on values, such as the number of rows that a mask picks.

Dynamo can keep them in a graph, as symbols. It supposes then that such a size is not 1 where something could broadcast, and has the graph
raise where that turns out to be wrong. That is worth it within a chain, which a graph break would cut. Elsewhere such an operation ends the
graph, as under `torch.compile`, and any size will do.
"""

from __future__ import annotations

import torch.fx as fx
from torch import nn

from passes import Plan

from ..errors import MnetError
from ..inner import value_sized

__all__ = ["apart", "cannot", "explained"]

_ASSERTION = "Runtime assertion failed"  # as torch begins what it says of a size that is not as supposed


def apart(gm: fx.GraphModule, plan: Plan | None) -> bool:
    """Whether a graph has sizes that depend on values, all of them before, between or behind its chains."""
    place = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    made = [place[node.name] for node in gm.graph.nodes if node.op != "placeholder" and value_sized(node)]
    spans = [[place[name] for step in region.steps for name in step.nodes if name in place] for region in (plan.regions if plan else ())]
    return bool(made) and not any(min(span) <= i <= max(span) for span in spans if span for i in made)


def cannot(model: nn.Module, error: Exception) -> MnetError:
    """Where Dynamo has to know such a size, and it is too late to end the graph."""
    return MnetError(
        f"{type(model).__name__}: Dynamo cannot capture what a size decides that depends on values ({' '.join(str(error).split())[:200]}): "
        "keep it out of the model, or name its list of layers with regions=[...], which needs no capture"
    )


def explained(model: nn.Module, error: RuntimeError) -> MnetError | None:
    """Where a graph found such a size to be another than was supposed; None for other errors."""
    if _ASSERTION not in str(error):
        return None
    return MnetError(
        f"{type(model).__name__}: a size that depends on values, such as the number of rows that a mask picks, is not what Dynamo supposed "
        f"when it captured the model ({' '.join(str(error).split())[:200]}): one row broadcasts where others do not. Name its list of "
        "layers with regions=[...], which needs no capture, or take that operation out of the blocks"
    )
