"""What is kept though it could be run again, as memory allows: the last steps of regions, segments, and the logits of heads.

What saves most work for its bytes comes first; of a region, the steps from the last on, whose activations are let go first. So what is kept
for fewer bytes is part of what is kept for more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from passes import Cost

from ..regions.region import ChainRegion
from .head import ChunkedHead
from .segment import CompiledSegment

__all__ = ["Keeping"]

Keeper = ChainRegion | CompiledSegment | ChunkedHead


class Keeping:
    """The choice for one compiled graph.

    Args:
        steps: for each region the costs of its steps, the last one first.
        segments: those that can be run again, heads among them.

    Attributes:
        items: region, segment or head, and cost, in the order in which they are kept.
    """

    def __init__(self, steps: Sequence[tuple[ChainRegion, list[Cost]]], segments: Iterable[CompiledSegment | ChunkedHead]) -> None:
        queues: list[list[tuple[Keeper, Cost]]] = [[(region, cost) for cost in costs] for region, costs in steps]
        queues += [[(segment, segment.cost)] for segment in segments if segment.cost is not None]
        self.items: list[tuple[Keeper, Cost]] = []
        while queues := [queue for queue in queues if queue]:
            self.items.append(max(queues, key=lambda queue: queue[0][1].work / max(queue[0][1].size, 1)).pop(0))

    def counts(self) -> list[tuple[Keeper, int]]:
        """Each region and segment, and how many items it has."""
        return list(Counter(keeper for keeper, _ in self.items).items())

    def spend(self, size: int) -> int:
        """Keeps for so many bytes at most; for 0 nothing, also not what takes none. Returns the bytes."""
        spent = 0
        for keeper, _ in self.items:
            keeper.stored = 0
        for keeper, cost in self.items if size else ():
            if spent + cost.size > size:
                break
            keeper.stored += 1
            spent += cost.size
        return spent
