"""Chains -> steps: which nodes compute x[t+1] from x[t].

x[t] = source --> every node on a path to the target --> x[t+1] = target
                  + what only these nodes use and that is newer than the source (masks, weights computed on the fly)
                  + checks that lead nowhere (assertions on shapes)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Literal

import torch
import torch.fx as fx

from passes.graphs.facts import Facts, owner_keys, owner_path, recorded, shape_of
from passes.graphs.ops import OUT_OF_PLACE, operands
from passes.planning.matching import Chain, ResidualSum
from passes.regions import Form, Granularity, Step

__all__ = ["Span", "common_path", "dead_ends_of", "spans_of", "takes_from_list"]

_CLONES = ("clone", torch.clone, torch.ops.aten.clone.default)
_CHECKS = frozenset({"shape", "layout", "elementwise", "scale", "add", "reduce"})


@dataclass(frozen=True)
class Span:
    """A step with its nodes; `Step` is what others see of it."""

    source: fx.Node
    target: fx.Node
    nodes: tuple[fx.Node, ...]
    sums: tuple[ResidualSum, ...]
    link: tuple[str, ...]  # kinds of the link operations after the last add
    handed: frozenset[fx.Node] = frozenset()  # attributes that come as side inputs, so that a copy can come in their place

    @property
    def add(self) -> fx.Node:
        return self.sums[-1].add

    @property
    def path(self) -> str:
        """Path of the module that owns the step."""
        return common_path(owner_path(found.add) for found in self.sums)

    def branch(self, facts: Facts) -> fx.Node | None:
        """The node of f where the step is exactly source + f, so that the add itself need not run."""
        found = self.sums[0]
        exact = len(self.sums) == 1 and found.add is self.target and found.branch is not None
        if not exact or found.add in facts.stale:  # somebody reads the memory that the add writes to
            return None
        return found.branch if shape_of(found.add) == shape_of(found.branch or found.add) else None

    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes outside that the step reads besides the source and the attributes of modules, in order of first use."""
        own, handed = {self.source, *self.nodes}, self.handed
        read = (n for node in self.nodes for n in node.all_input_nodes if n not in own and (n.op != "get_attr" or n in handed))
        return tuple(dict.fromkeys(read))

    def copied_adds(self, facts: Facts) -> set[fx.Node]:
        """In-place adds onto the step's input; the code of the region does them out of place."""
        return facts.copied_adds(self.source, self.nodes)

    def named(self, facts: Facts) -> Step:
        inside, branch = set(self.nodes), self.branch(facts)
        extras = (node.name for node in self.nodes if node is not self.target and facts.users_outside(node, inside))
        form: Form = "block" if branch is None else "branch"
        return Step(
            source=self.source.name,
            target=self.target.name,
            nodes=tuple(node.name for node in self.nodes),
            adds=tuple(found.add.name for found in self.sums),
            form=form,
            branch=branch.name if branch else None,
            sides=tuple(node.name for node in self.inputs()),
            extras=tuple(extras),
            path=self.path,
            written=self._written() if form == "branch" else None,
            link=self.link,
        )

    def _written(self) -> Literal["skip", "branch"] | None:
        if self.target.target not in OUT_OF_PLACE:
            return None
        return "branch" if operands(self.target)[0] is self.sums[0].branch else "skip"


def common_path(paths: Iterable[str]) -> str:
    """Deepest module path that contains all the given ones."""
    return ".".join(_common_start([path.split(".") for path in paths]))


def _common_start(sequences: Iterable[Sequence[str]]) -> list[str]:
    return [place[0] for place in takewhile(lambda place: len(set(place)) == 1, zip(*sequences, strict=False))]


def spans_of(
    chain: Chain, granularity: Granularity, facts: Facts, sums: dict[fx.Node, ResidualSum], dead_ends: set[fx.Node]
) -> tuple[Span, ...]:
    """Cut a chain into steps.

    Args:
        chain: the chain.
        granularity: "add" for one step per add, "module" for one per block that owns one or more consecutive adds, k for one per k blocks.
        facts: facts of the graph.
        sums: all residual sums of the graph by add.
        dead_ends: nodes that lead nowhere, see `dead_ends_of`.

    Returns:
        Steps in order, each beginning where the one before ends.
    """
    ends = [*(found.skip for found in chain.sums[1:]), [chain.sums[-1].add, *chain.tail][-1]]
    links = [*chain.links[1:], chain.tail]
    spans: list[Span] = []
    for group in _groups(chain, granularity):
        source, target = chain.sums[group[0]].skip, ends[group[-1]]
        nodes = _with_checks(_cone(source, target, facts, sums, first=group[0] == 0), source, target, facts, dead_ends)
        link = tuple(facts.kinds[node] for node in links[group[-1]])
        spans.append(Span(source, target, nodes, tuple(chain.sums[t] for t in group), link))
    return tuple(spans)


def _groups(chain: Chain, granularity: Granularity) -> list[list[int]]:
    """Indices of the sums of each step."""
    keys = [owner_keys(found.add) for found in chain.sums]
    if granularity == "add":
        return [[t] for t in range(len(keys))]
    same = len(_common_start(keys))
    owners = [key[: same + 1] if len(key) > same else t for t, key in enumerate(keys)]
    blocks = [list(group) for _, group in groupby(range(len(keys)), key=owners.__getitem__)]
    together = 1 if granularity == "module" else granularity
    return [[t for block in blocks[i : i + together] for t in block] for i in range(0, len(blocks), together)]


def _cone(source: fx.Node, target: fx.Node, facts: Facts, sums: dict[fx.Node, ResidualSum], first: bool) -> set[fx.Node]:
    """Nodes between source and target, and the side computations that serve them alone.

    What reads the shape of the first step's source stays outside unless it serves this step alone: other steps may use the same sizes.
    """
    lowest = facts.index[source]
    seen, stack = {target}, [target]
    while stack:
        for node in facts.flow[stack.pop()]:
            if facts.index[node] > lowest and node not in seen:
                seen.add(node)
                stack.append(node)
    in_order = sorted(seen, key=facts.index.__getitem__)
    cone: set[fx.Node] = set()
    for node in in_order:
        inside = any(before in cone for before in facts.flow[node])
        if inside or (source in facts.flow[node] and not (first and facts.kinds[node] == "shape")):
            cone.add(node)
    return cone | _serving(cone, in_order, facts, sums)


def _serving(cone: set[fx.Node], in_order: list[fx.Node], facts: Facts, sums: dict[fx.Node, ResidualSum]) -> set[fx.Node]:
    """Side computations whose results only the cone reads.

    One that writes in place comes in only together with the memory it writes to: a rerun would find it overwritten. One that takes a tensor
    from a list comes in only with what makes the list: the inputs of a step are tensors.
    """
    blocked: set[fx.Node] = set()
    while True:
        serving: set[fx.Node] = set()
        for node in reversed(in_order):
            private = node.users and all(user in cone or user in serving for user in node.users)
            if private and not (node in cone or node in sums or node in blocked or facts.kinds[node] == "input"):
                serving.add(node)
        outside = {node for node in serving if any(memory not in serving for memory in facts.writes.get(node, ()))}
        outside |= {node for node in serving if takes_from_list(node) and node.args[0] not in serving and node.args[0] not in cone}
        outside |= {node for node in serving if _is_a_copy_to_keep(node, facts)}
        if not outside:
            return serving
        blocked |= outside


def _is_a_copy_to_keep(node: fx.Node, facts: Facts) -> bool:
    """Whether a node clones what each call overwrites, such as the vector of a spectral norm: the gradient needs the value before that."""
    if node.target not in _CLONES:
        return False
    written = {memory for targets in facts.writes.values() for memory in targets}
    return any(memory in written and facts.kinds[memory] == "input" for memory in facts.shares[node.all_input_nodes[0]])


def takes_from_list(node: fx.Node) -> bool:
    """Whether a node is an element of a list of tensors."""
    return node.target is operator.getitem and isinstance(recorded(node.args[0]), (list, tuple))  # type: ignore[arg-type]


def dead_ends_of(facts: Facts) -> set[fx.Node]:
    """Assertions, and cheap computations whose results reach nothing else."""
    found: set[fx.Node] = set()
    for node in reversed(facts.nodes):
        if facts.kinds[node] in _CHECKS and node not in facts.writes and all(user in found for user in node.users):
            found.add(node)
    return found


def _with_checks(cone: set[fx.Node], source: fx.Node, target: fx.Node, facts: Facts, dead_ends: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The cone and the dead ends that read nothing but it, so that an assertion does not keep a value of the stream alive."""
    known = (cone | {source}) - {target}
    stack = [user for node in known for user in node.users]
    while stack:
        node = stack.pop()
        if node in dead_ends and node not in cone and all(n in known or n.op == "get_attr" for n in facts.flow[node]):
            cone.add(node)
            known.add(node)
            stack.extend(node.users)
    return tuple(sorted(cone, key=facts.index.__getitem__))
