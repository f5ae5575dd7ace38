"""Which chains within steps of others go backwards by themselves.

A step is run again as a whole, so a chain within it may have autograd store its activations, for as long as that step's gradients take: it
keeps nothing from the forward pass on. Where these are most of the peak, as in a U-Net whose inner resolutions are one step of the outer
ones, it is better run as a chain of its own: its state is kept from the forward pass on, and its steps run once more.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

import passes
from passes import Plan, PlannedRegion

from ..arithmetic.cost import storage
from ..settings import Settings

__all__ = ["with_reversed"]

_WORTH = 0.9  # of the bytes otherwise, at most


def with_reversed(gm: fx.GraphModule, plan: Plan, settings: Settings) -> Plan:
    """A plan in which those chains within steps are reversible that make the peak lowest, if they lower it by a tenth.

    Args:
        gm: the planned graph, whose nodes' effects have been noted.
        plan: its regions; those within others are stored.
        settings: the recurrence.
    """
    outermost = [region.name for region in plan.regions if not region.within]
    within = [region.name for region in plan.regions if region.within]
    if not within or settings.backward == "stored":
        return plan
    alone = passes.saved_by_own(gm, plan, within)
    weight = {name: sum(size or 0 for (owner, _), size in alone.items() if owner == name) for name in within}
    states = {region.name: _state(gm, region, settings) for region in plan.regions}
    within.sort(key=lambda name: weight[name], reverse=True)
    peaks = [_peak(gm, plan, [*outermost, *within[:count]], states) for count in range(len(within) + 1)]
    best = min(range(len(peaks)), key=lambda count: peaks[count])
    if not peaks[best] < _WORTH * peaks[0]:
        return plan
    chosen = set(within[:best])
    regions = (dataclasses.replace(r, backward="reversible") if r.name in chosen else r for r in plan.regions)
    return dataclasses.replace(plan, regions=tuple(regions))


def _peak(gm: fx.GraphModule, plan: Plan, reversible: list[str], states: dict[str, float]) -> float:
    """Bytes of all states, and of the largest step while its gradients are taken; inf where not known."""
    own = passes.saved_by_own(gm, plan, reversible)
    if None in own.values():
        return math.inf
    return sum(states[name] for name in reversible) + max(size or 0 for size in own.values())


def _state(gm: fx.GraphModule, region: PlannedRegion, settings: Settings) -> float:
    """Bytes that a chain keeps; inf where they are not known."""
    count = passes.elements(gm, region)
    if count is None or region.dtype is None:
        return math.inf
    dtype = getattr(torch, region.dtype)
    return count * storage(settings.gammas(len(region.steps)), dtype, settings.velocity is None, settings.held)[1]
