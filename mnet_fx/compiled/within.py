"""Which chains within steps of others go backwards by themselves.

A step is run again as a whole, so a chain within it may have autograd store its activations, for as long as that step's gradients take: it
keeps nothing from the forward pass on. Where these are most of the peak, as in a U-Net whose inner resolutions are one step of the outer
ones, it is better run as a chain of its own: its state is kept from the forward pass on, and its steps run once more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

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
    outermost = {region.name for region in plan.regions if not region.within}
    within = [region.name for region in plan.regions if region.within]
    if not within or settings.backward == "stored":
        return plan
    nest = _Nest(gm, plan, settings)
    if None in nest.own.values():
        return plan
    within.sort(key=nest.whole, reverse=True)
    peaks = [nest.peak(outermost | set(within[:count])) for count in range(len(within) + 1)]
    best = min(range(len(peaks)), key=lambda count: peaks[count])
    if not peaks[best] < _WORTH * peaks[0]:
        return plan
    chosen = set(within[:best])
    regions = (dataclasses.replace(r, backward="reversible") if r.name in chosen else r for r in plan.regions)
    return dataclasses.replace(plan, regions=tuple(regions))


class _Nest:
    """The bytes of steps that hold regions.

    Attributes:
        own: for each step, by the name of its region and its index, what autograd saves for it but for the regions within; None: not known.
        places: the steps of each region, as they are named there.
        inner: likewise the names of the regions right within it.
        states: what a region keeps as a chain of its own; inf: not known.
    """

    def __init__(self, gm: fx.GraphModule, plan: Plan, settings: Settings) -> None:
        self.own = passes.saved_by_own(gm, plan, [region.name for region in plan.regions])
        self.states = {region.name: _state(gm, region, settings) for region in plan.regions}
        self.places = {region.name: [(region.name, t) for t in range(len(region.steps))] for region in plan.regions}
        self.inner: dict[tuple[str, int], list[str]] = {place: [] for place in self.own}
        parents = {region.within for region in plan.regions}
        step_of = {
            (region.name, node): t
            for region in plan.regions
            if region.name in parents
            for t, s in enumerate(region.steps)
            for node in s.nodes
        }
        for region in plan.regions:
            if region.within:
                self.inner[region.within, step_of[region.within, region.steps[0].nodes[0]]].append(region.name)

    def whole(self, name: str, reversible: Collection[str] = ()) -> int:
        """What autograd saves for all steps of a region at once."""
        return sum(self._held(place, reversible) for place in self.places[name])

    def _held(self, place: tuple[str, int], reversible: Collection[str]) -> int:
        stored = (name for name in self.inner[place] if name not in reversible)
        return (self.own[place] or 0) + sum(self.whole(name, reversible) for name in stored)

    def peak(self, reversible: Collection[str]) -> float:
        """Of the states of these regions, and the largest of their steps while its gradients are taken."""
        steps = (self._held(place, reversible) for name in reversible for place in self.places[name])
        return sum(self.states[name] for name in reversible) + max(steps, default=0)


def _state(gm: fx.GraphModule, region: PlannedRegion, settings: Settings) -> float:
    """Bytes that a chain keeps; inf where they are not known."""
    count = passes.elements(gm, region)
    if count is None or region.dtype is None:
        return math.inf
    dtype = getattr(torch, region.dtype)
    return count * storage(settings.gammas(len(region.steps)), dtype, settings.velocity is None, settings.held)[1]
