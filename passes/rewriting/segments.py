"""Cuts what lies between regions into segments, of which most can be run again in the backward pass in place of keeping what they save.

    a -> b -> c | d -> e | f -> g          of a segment that is run again, only its inputs are kept until then:

    kept   = the inputs of all segments that are run again, and what the others save
    peak   = kept + the most that one segment saves while it is run again

A cut costs the values that cross it, so it belongs where these are few. For each bound on what a segment may save, the cuts that keep
fewest bytes are found by dynamic programming; of the bounds, the one with the lowest peak wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from passes.graphs.effects import Effect, noted, work_of
from passes.graphs.facts import bytes_of, recorded
from passes.graphs.writes import running_statistics
from passes.regions import Plan

__all__ = ["Cost", "Memory", "Segment", "cutting", "largest_step", "saved_by", "segmented"]

_BOUNDS = 12  # on what a segment may save, from the least possible to all


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
        cost: of keeping what it saves, where it has a proof.
    """

    nodes: list[fx.Node]
    proof: fx.Node | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Memory:
    """What is known about the memory of one graph. Storages are numbers, as in `Effect`.

    Attributes:
        inputs: storages that are there anyway: of the graph's inputs, parameters and buffers.
        attributes: those of parameters and buffers.
        sizes: bytes of each storage.
        last_write: for each storage, the position of the last node that overwrites it.
        index: position of each node.
    """

    inputs: frozenset[int]
    attributes: frozenset[int]
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
        own = [node for node in given if node.op == "get_attr" or node.name in attributes]
        memory = cls(frozenset(_memory(given)), frozenset(_memory(own)))
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


def largest_step(gm: fx.GraphModule, plan: Plan) -> int:
    """The most bytes that autograd saves for one step of the regions of a graph."""
    named = {node.name: node for node in gm.graph.nodes}
    memory = Memory.of(gm.graph, ())
    steps = [[named[name] for name in step.nodes] for region in plan.regions for step in region.steps]
    return max((sum(saved_by(nodes, memory).values()) for nodes in steps), default=0)


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
    total = sum(run.saves(0, len(run.nodes)) for run in runs)
    if total == 0:
        return [[Segment(group)] for group in groups]
    least = max(run.least for run in runs)
    bounds = {max(least, floor), *(round(least * (total / max(least, 1)) ** (i / (_BOUNDS - 1))) for i in range(_BOUNDS))}
    found = [[run.cut(bound) for run in runs] for bound in sorted(bounds)]
    return min(found, key=lambda segments: _peak(segments, memory, floor))


def _peak(groups: list[list[Segment]], memory: Memory, floor: int) -> int:
    kept: dict[int, int] = {}
    work = floor
    for segment in (segment for group in groups for segment in group):
        saved, given = saved_by(segment.nodes, memory), _given_to(segment.nodes, memory)
        if segment.proof is None:
            kept |= saved
        else:
            kept |= {number: memory.sizes.get(number, 0) for number in given}
            work = max(work, sum(size for number, size in saved.items() if number not in given))
    return sum(kept.values()) + work


def saved_by(nodes: Iterable[fx.Node], memory: Memory) -> dict[int, int]:
    """The storages that autograd saves for some nodes, without those that are there anyway."""
    effects = [effect for node in nodes if (effect := noted(node)) is not None]
    return {number: size or 0 for effect in effects for number, size in effect.saved if number not in memory.inputs}


def _given_to(nodes: Sequence[fx.Node], memory: Memory) -> set[int]:
    """The storages that some nodes read and do not make, without those that are there anyway."""
    inside = set(nodes)
    return _memory(source for node in nodes for source in node.all_input_nodes if source not in inside) - memory.inputs


class _Run:
    """One run of nodes, and where it may be cut.

    Attributes:
        places: positions of the cuts that are possible, from 0 to the number of nodes.
        least: the bytes that the largest stretch between two of them saves.
    """

    def __init__(self, nodes: list[fx.Node], memory: Memory) -> None:
        self.nodes, self.memory = nodes, memory
        self.position = {node: i for i, node in enumerate(nodes)}
        self.places = self._places() if nodes else [0]
        self.least = max((self.saves(i, j) for i, j in pairwise(self.places)), default=0)

    def _places(self) -> list[int]:
        if any(map(_changes_state, self.nodes)):
            return [0, len(self.nodes)]
        position, closed = self.position, [False] * (len(self.nodes) + 1)
        makers: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            last = i if _crosses(recorded(node)) else max((position[user] for user in node.users if user in position), default=i)
            _close(closed, i, last)
            for number in _written(node):
                if number in makers:  # who writes to a value stays with who made it
                    _close(closed, makers[number], i)
            for number in _memory([node]):
                makers.setdefault(number, i)
        return [i for i in range(len(self.nodes) + 1) if i in (0, len(self.nodes)) or not closed[i]]

    def saves(self, start: int, end: int) -> int:
        """Bytes that some nodes save."""
        return sum(saved_by(self.nodes[start:end], self.memory).values())

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
        start = self.places[at]
        saved: dict[int, int] = {}
        given: set[int] = set()
        for begin, end in pairwise(self.places[at:]):
            nodes = self.nodes[begin:end]
            saved |= saved_by(nodes, self.memory)
            given |= _memory(s for node in nodes for s in node.all_input_nodes if self.position.get(s, -1) < start) - self.memory.inputs
            saves = sum(saved.values())
            if saves > bound and begin != start:
                return
            yield end, saves, self.memory.weigh(given)

    def _proof(self, nodes: list[fx.Node]) -> fx.Node | None:
        """An output in memory of its own, of nodes that can be run again; None if they cannot."""
        inside, made = set(nodes), _memory(nodes) - _given_to(nodes, self.memory) - self.memory.inputs
        if not all(self._repeats(node, made) for node in nodes):
            return None
        last = self.memory.index[nodes[-1]]
        read = _memory(source for node in nodes for source in node.all_input_nodes) - made
        own = {number for node in nodes for number in _written(node)}
        if any(self.memory.last_write.get(number, -1) > last for number in read - own):
            return None  # a rerun would read what is written later
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        numbers = [number for node in outputs for number in _memory([node])]
        graded = (node for node in outputs if getattr(recorded(node), "requires_grad", False) and _memory([node]) <= made)
        return next((node for node in graded if all(numbers.count(number) == 1 for number in _memory([node]))), None)

    def _cost(self, nodes: list[fx.Node]) -> Cost:
        there = _given_to(nodes, self.memory)
        return Cost(sum(size for number, size in saved_by(nodes, self.memory).items() if number not in there), sum(map(work_of, nodes)))

    def _repeats(self, node: fx.Node, made: set[int]) -> bool:
        """Whether a node can be run again: it is known what it does, and it writes to nothing but what the segment makes, and buffers."""
        effect: Effect | None = noted(node)
        known = effect is not None and effect.known and not _changes_state(node)
        return known and _written(node) <= made | self.memory.attributes

    def _traced(self, best: dict[int, tuple[float, int, fx.Node | None]]) -> list[Segment]:
        found, end = list[Segment](), len(self.nodes)
        while end > 0:
            _, start, proof = best[end]
            nodes = self.nodes[start:end]
            found.append(Segment(nodes, proof, None if proof is None else self._cost(nodes)))
            end = start
        return found[::-1]


def _close(closed: list[bool], first: int, last: int) -> None:
    """Forbids the cuts between two nodes."""
    for i in range(first + 1, last + 1):
        closed[i] = True


def _changes_state(node: fx.Node) -> bool:
    """Whether a node is there for what it does to something other than tensors, such as a level of vmap."""
    return not node.users and not node.all_input_nodes


def _crosses(value: Any) -> bool:
    """Whether a part can hand on such a value to another."""
    return isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, int, float, bool))
