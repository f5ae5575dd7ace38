"""The running sums of what steps give besides the stream, formed while a chain runs, see `passes.planning.totals`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from passes import PlannedRegion, Total

__all__ = ["Running", "Totals"]


class Totals:
    """Those of a region.

    Args:
        region: as planned.
    """

    def __init__(self, region: PlannedRegion) -> None:
        place = {name: (t, i) for t, step in enumerate(region.steps) for i, name in enumerate(step.extras)}
        self.firsts = [self._first(total, region.sides) for total in region.totals]
        self.terms: dict[int, list[tuple[int, int, bool]]] = {}  # for each step: which total, which extra, whether the total stands left
        for k, total in enumerate(region.totals):
            names = [(name, is_left) for _, name, is_left in total.terms]
            for name, is_left in names if total.begins < 0 else [(str(total.first), True), *names]:
                t, i = place[name]
                self.terms.setdefault(t, []).append((k, i, is_left))

    @staticmethod
    def _first(total: Total, sides: Sequence[str]) -> tuple[int | None, float | None]:
        """Index of the side input that it begins with, or the number; neither if it begins with an extra."""
        if isinstance(total.first, str):
            return sides.index(total.first) if total.begins < 0 else None, None
        return None, total.first

    def start(self, sides: Sequence[Any]) -> Running:
        """The sums of one run, of which `sides` are the side inputs."""
        return Running(self.terms, [number if i is None else sides[i] for i, number in self.firsts])


class Running:
    """The sums of one run so far.

    Attributes:
        values: they themselves; None for one without a term.
    """

    def __init__(self, terms: dict[int, list[tuple[int, int, bool]]], values: list[Any]) -> None:
        self.terms, self.values = terms, values

    def without(self, t: int, extras: list[Any]) -> list[Any]:
        """Adds what step t gave to the sums that it is a term of; returns the rest."""
        terms = self.terms.get(t, ())
        for k, i, is_left in terms:
            total, term = self.values[k], extras[i]
            self.values[k] = term if total is None else total + term if is_left else term + total
        taken = {i for _, i, _ in terms}
        return [extra for i, extra in enumerate(extras) if i not in taken] if taken else extras
