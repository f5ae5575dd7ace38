"""Cuts what lies between regions into segments, of which most can be run again in the backward pass in place of keeping what they save.

    a -> b -> c | d -> e | f -> g          of a segment that is run again, only its inputs are kept until then:

    kept   = the inputs of all segments that are run again, and what the others save
    peak   = kept + the most that one segment saves while it is run again

A cut costs the values that cross it, so it belongs where these are few. For each bound on what a segment may save, the cuts that keep
fewest bytes are found by dynamic programming; of the bounds, the one with the lowest peak wins, or about that and fewer segments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from passes.graphs.effects import is_measured, noted, work_of
from passes.graphs.facts import bytes_of, recorded
from passes.graphs.writes import running_statistics

__all__ = ["Cost", "Memory", "Segment", "cutting", "saved_by", "segmented"]

_PLACES = 256  # of one run that are tried as cuts, since each is tried with each
_BOUNDS = 12  # on what a segment may save, from the least possible to all
_ALIKE = 1.03  # times the lowest peak: no more than what is not counted, so the fewest segments are taken


@dataclass(frozen=True)
class Cost:
    """What it takes to keep what could be run again, and what that saves.

    Attributes:
        size: bytes that autograd keeps then, and that are not there anyway.
        work: what running it again takes, as in `graphs.work`.
    """

    size: int
    work: int


@dataclass(frozen=True)
class Segment:
    """A run of nodes.

    Attributes:
        nodes: in graph order.
        proof: the output by which it is shown that a rerun gave what the first run did; None where the segment cannot be run again, or
            nothing is gained by it.
        cost: of keeping what it saves, where it has a proof and that is known.
    """

    nodes: list[fx.Node]
    proof: fx.Node | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Memory:
    """What is known about the memory of one graph. Storages are numbers, as in `Effect`.

    Attributes:
        inputs: storages that are there anyway: of the graph's inputs, parameters and buffers.
        buffers: those that one buffer alone lies in: a rerun works on a copy of each buffer, and of parameters on none.
        sizes: bytes of each storage.
        last_write: for each storage, the position of the last node that overwrites it.
        index: position of each node.
    """

    inputs: frozenset[int]
    buffers: frozenset[int]
    sizes: dict[int, int] = field(default_factory=dict)
    last_write: dict[int, int] = field(default_factory=dict)
    index: dict[fx.Node, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.Graph, attributes: Collection[str]) -> Memory:
        """
        Args:
            graph: whose nodes' effects have been noted.
            attributes: names of its placeholders that are parameters and buffers.
        """
        given = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        own = Counter(number for node in given if node.name in attributes for number in _memory([node]))
        fixed = _memory(node for node in given if node.name not in attributes or isinstance(recorded(node), nn.Parameter))
        buffers = {number for number, count in own.items() if count == 1} - fixed
        memory = cls(frozenset(_memory(given)), frozenset(buffers))
        for i, node in enumerate(graph.nodes):
            memory.index[node] = i
            for number in _memory([node]):
                memory.sizes[number] = max(memory.sizes.get(number, 0), bytes_of(node) or 0)
            memory.last_write.update(dict.fromkeys(_written(node), i))
        return memory

    def of_node(self, node: fx.Node) -> set[int]:
        """The storages that the value of a node lies in."""
        return _memory([node])

    def weigh(self, numbers: Iterable[int]) -> int:
        return sum(self.sizes.get(number, 0) for number in numbers)


def _memory(nodes: Iterable[fx.Node]) -> set[int]:
    return {number for node in nodes if (effect := noted(node)) is not None for number in effect.memory}


def _written(node: fx.Node) -> set[int]:
    """The storages that a node overwrites, the statistics of norms included."""
    effect = noted(node)
    return (set() if effect is None else set(effect.written)) | _memory(running_statistics(node))


def cutting(graph: fx.Graph, attributes: Collection[str], floor: int) -> Callable[[Sequence[list[fx.Node]]], list[list[Segment]]]:
    """What `pieces` is to cut a graph with.

    Args:
        graph: whose nodes' effects have been noted.
        attributes: names of its placeholders that are parameters and buffers.
        floor: as in `segmented`.
    """
    return partial(segmented, memory=Memory.of(graph, attributes), floor=floor)


def segmented(groups: Sequence[list[fx.Node]], memory: Memory, floor: int) -> list[list[Segment]]:
    """Cuts some runs of nodes.

    Args:
        groups: the runs, each in graph order.
        memory: of their graph.
        floor: bytes that something else takes at its peak, while all that is kept here is kept: more than that a segment need not save
            bytes in the rerun for its own sake.

    Returns:
        The segments of each group.
    """
    runs = [_Run(group, memory) for group in groups]
    total = sum(run.saves for run in runs)
    if total == 0:
        return [[Segment(group)] for group in groups]
    least = max(1, *(run.least for run in runs))
    bounds = {max(least, floor), *(round(least * (total / least) ** (i / (_BOUNDS - 1))) for i in range(_BOUNDS))}
    found = [[run.cut(bound) for run in runs] for bound in sorted(bounds)]
    peaks = [_peak(segments, memory, floor) for segments in found]
    fixed = sum(run.fixed for run in runs)
    good = [i for i, peak in enumerate(peaks) if peak - fixed <= _ALIKE * (min(peaks) - fixed)]
    return found[min(good, key=lambda i: (sum(map(len, found[i])), peaks[i]))]


def _peak(groups: list[list[Segment]], memory: Memory, floor: int) -> int:
    """The most bytes of the backward pass, which goes from the last segment to the first: while it is in one, there is what those before
    it keep, what it saves itself, and the gradients of what is read behind it. Of what is between segments, only the floor is known.
    """
    segments = [segment for group in groups for segment in group]
    kept, given = set[int](), [_given_to(segment.nodes, memory) for segment in segments]
    read, behind = set[int](), list[set[int]]()  # what later segments are given, and did not make
    for segment, inputs in zip(reversed(segments), reversed(given), strict=True):
        behind.append(read)
        read = (read - _memory(segment.nodes)) | inputs
    most = 0
    for segment, inputs, pending in zip(segments, given, reversed(behind), strict=True):
        saved = set(saved_by(segment.nodes, memory))
        kept |= saved if segment.proof is None else inputs
        most = max(most, memory.weigh(kept | saved) + memory.weigh(pending))
    return max(most, memory.weigh(kept) + floor)


def saved_by(nodes: Iterable[fx.Node], memory: Memory) -> dict[int, int]:
    """The storages that autograd saves for some nodes, without those that are there anyway."""
    effects = [effect for node in nodes if (effect := noted(node)) is not None]
    return {number: size or 0 for effect in effects for number, size in effect.saved if number not in memory.inputs}


def _given_to(nodes: Sequence[fx.Node], memory: Memory) -> set[int]:
    """The storages that some nodes read and do not make, without those that are there anyway."""
    inside = set(nodes)
    return _memory(source for node in nodes for source in node.all_input_nodes if source not in inside) - memory.inputs


@dataclass(frozen=True)
class _Stretch:
    """The nodes from one place where a run may be cut to the next.

    Attributes:
        end: position of that place.
        saved: the storages that they save, with their bytes.
        given: the storages that they read, each with the position of who gives it; -1 outside of the run.
        again: whether they can be run again.
    """

    end: int
    saved: dict[int, int]
    given: list[tuple[int, int]]
    again: bool


class _Run:
    """One run of nodes, and where it may be cut.

    Attributes:
        places: positions of the cuts that are possible, from 0 to the number of nodes.
        stretches: what lies between each two of them.
        saves, least, fixed: the bytes that all of it saves, the largest stretch that can be run again, and all those that cannot.
    """

    def __init__(self, nodes: list[fx.Node], memory: Memory) -> None:
        self.nodes, self.memory = nodes, memory
        self.position = {node: i for i, node in enumerate(nodes)}
        self.places = self._places() if nodes else [0]
        self.stretches = [self._stretch(i, j) for i, j in pairwise(self.places)]
        self.saves = sum(saved_by(nodes, memory).values())
        self.least = max((sum(stretch.saved.values()) for stretch in self.stretches if stretch.again), default=0)
        self.fixed = sum(sum(stretch.saved.values()) for stretch in self.stretches if not stretch.again)

    def _stretch(self, start: int, end: int) -> _Stretch:
        nodes = self.nodes[start:end]
        sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        given = [(number, self.position.get(source, -1)) for source in sources for number in _memory([source]) - self.memory.inputs]
        return _Stretch(end, saved_by(nodes, self.memory), given, self._proof(nodes) is not None)

    def _places(self) -> list[int]:
        if any(map(_changes_state, self.nodes)):
            return [0, len(self.nodes)]
        position, closed = self.position, [False] * (len(self.nodes) + 1)
        first: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            last = i if _crosses(recorded(node)) else max((position[user] for user in node.users if user in position), default=i)
            _close(closed, i, last)
            written = _written(node)
            for number in written:  # who writes to a value stays with who made it, or reads it before, of which a compiler may save it
                _close(closed, first.get(number, i), i)
            for number in _memory([node, *node.all_input_nodes]) - written:
                first.setdefault(number, i)
        return self._cheapest([i for i in range(len(self.nodes) + 1) if i in (0, len(self.nodes)) or not closed[i]])

    def _cheapest(self, places: list[int]) -> list[int]:
        """The places; of too many, of each few that follow each other the one that fewest bytes cross."""
        crossing = [0] * (len(self.nodes) + 2)
        for i, node in enumerate(self.nodes):
            last = max((self.position.get(user, i) for user in node.users), default=i)
            crossing[i + 1] += bytes_of(node) or 0
            crossing[last + 1] -= bytes_of(node) or 0
        crossing, inner = list(accumulate(crossing)), places[1:-1]
        few = -(-len(inner) // _PLACES)
        return [0, *(min(inner[i : i + few], key=crossing.__getitem__) for i in range(0, len(inner), max(few, 1))), len(self.nodes)]

    def cut(self, bound: int) -> list[Segment]:
        """The segments that keep fewest bytes, where none may save more than so many bytes if it can be cut."""
        best: dict[int, tuple[float, int, fx.Node | None]] = {0: (0.0, 0, None)}
        for at, start in enumerate(self.places[:-1]):
            for end, saves, given in self._from(at, bound):
                proof = None
                cost, least = best[start][0] + min(saves, given), best.get(end, (math.inf,))[0]
                if given < saves and cost < least:
                    proof = self._proof(self.nodes[start:end])
                    cost = cost if proof is not None else best[start][0] + saves
                if cost < least:
                    best[end] = (cost, start, proof)
        return self._traced(best)

    def _from(self, at: int, bound: int) -> Iterator[tuple[int, int, int]]:
        """The ends of the segments that begin at a place; bytes that each saves, and bytes of what it is given."""
        start, saves, gives = self.places[at], 0, 0
        saved, given = set[int](), set[int]()
        for stretch in islice(self.stretches, at, None):
            saves += sum(size for number, size in stretch.saved.items() if number not in saved)
            if saves > bound and stretch is not self.stretches[at]:
                return
            saved |= stretch.saved.keys()
            more = {number for number, position in stretch.given if position < start} - given
            given |= more
            gives += self.memory.weigh(more)
            yield stretch.end, saves, gives

    def _proof(self, nodes: list[fx.Node]) -> fx.Node | None:
        """An output in memory of its own, of nodes that can be run again; None if they cannot."""
        inside, memory = set(nodes), self.memory
        sources = {source for node in nodes for source in node.all_input_nodes if source not in inside}
        made = _memory(nodes) - _memory(sources) - memory.inputs
        handed = _memory(source for source in sources if source.op != "placeholder")  # as they are: of these a rerun has no copies
        if not _repeat(nodes, made | (memory.buffers - handed)):
            return None
        last = memory.index[nodes[-1]]
        own = {number for node in nodes for number in _written(node)}
        if any(memory.last_write.get(number, -1) > last for number in (_memory(sources) | _memory(nodes)) - made - own):
            return None  # a rerun would read what is written later
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        numbers = [number for node in outputs for number in _memory([node])]
        graded = (node for node in outputs if getattr(recorded(node), "requires_grad", False) and _memory([node]) <= made)
        return next((node for node in graded if all(numbers.count(number) == 1 for number in _memory([node]))), None)

    def _cost(self, nodes: list[fx.Node]) -> Cost:
        there = _given_to(nodes, self.memory)
        return Cost(sum(size for number, size in saved_by(nodes, self.memory).items() if number not in there), sum(map(work_of, nodes)))

    def _traced(self, best: dict[int, tuple[float, int, fx.Node | None]]) -> list[Segment]:
        found, end = list[Segment](), len(self.nodes)
        while end > 0:
            _, start, proof = best[end]
            nodes = self.nodes[start:end]
            found.append(Segment(nodes, proof, self._cost(nodes) if proof is not None and is_measured(nodes) else None))
            end = start
        return found[::-1]


def _repeat(nodes: list[fx.Node], own: set[int]) -> bool:
    """Whether nodes can be run again: it is known what they do, they write to nothing but some storages, and to nothing that one of them
    has saved: by the time of the rerun autograd alone would know whether that is needed.
    """
    saved = set[int]()
    for node in nodes:
        effect = noted(node)
        if effect is None or not effect.known or _changes_state(node) or not _written(node) <= own or not saved.isdisjoint(effect.written):
            return False
        saved.update(number for number, _ in effect.saved)
    return True


def _close(closed: list[bool], first: int, last: int) -> None:
    """Forbids the cuts between two nodes."""
    for i in range(first + 1, last + 1):
        closed[i] = True


def _changes_state(node: fx.Node) -> bool:
    """Whether a node is there for what it does to something other than tensors, such as a level of vmap; torchvision's only count calls."""
    return not node.users and not node.all_input_nodes and node.target is not torch._C._log_api_usage_once


def _crosses(value: Any) -> bool:
    """Whether a part can hand on such a value to another. AOTAutograd saves no float that was read from a tensor elsewhere."""
    if isinstance(value, torch.SymFloat):
        return value.node.has_hint()
    return isinstance(value, (Tensor, torch.SymInt, int, float, bool))
