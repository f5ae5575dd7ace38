"""What is remembered of one captured graph: its chains, by the paths of the modules that own their steps, and what it ran.

Dynamo has one graph for the layers of a list that are alike, which then runs under the paths of each of them (`Graph.at`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch.fx as fx

from passes import Plan, Step, joined, owner_stack

from ..reporting.report import Report
from .merging import with_paths

__all__ = ["Chain", "Ends", "Graph", "chains_of", "end_of", "graph_of"]

Chain = tuple[str, ...]
"""The paths of the modules that own the steps of a chain, in order."""
Ends = dict[Chain, set[tuple[str, ...]]]
"""What follows the last sums of chains within their last steps, as norms: each such link that there was."""


_numbers = itertools.count()


@dataclass
class Graph:
    """What is remembered of one captured graph.

    Attributes:
        report: what was rewritten in it.
        chains: its chains.
        left: chains that it runs as they are in the original, in bodies of their own.
        ends: of its chains.
        ran: paths of the modules whose code it holds.
        closed: paths of the modules that plain Python must not run: those that own steps, and those called in the steps of a module that
            owns several.
        broken: the warning that it deserves, where it ends in a graph break, or leaves adds as a call before did; else None.
        complete: whether it does not end in a graph break.
        refused: why a call that runs it is an error, or None.
        entered: path of the module that Python was in when it was captured, "" for the model itself.
        number: its own.
    """

    report: Report
    chains: tuple[Chain, ...]
    ran: frozenset[str]
    closed: frozenset[str]
    left: frozenset[Chain] = frozenset()
    ends: Ends = field(default_factory=dict)
    broken: str | None = None
    complete: bool = True
    refused: str | None = None
    entered: str = ""
    number: int = field(default_factory=_numbers.__next__)

    def __post_init__(self) -> None:
        self._elsewhere: dict[str, Graph] = {}

    def at(self, entered: str) -> Graph:
        """The graph as it runs for another module than it was captured for: Dynamo has one for the layers of a list that are alike.

        What is captured or run outside of any module is a function's, and whose tensors it gets is not known.
        """
        if entered == self.entered or not entered or not self.entered:
            return self
        if entered not in self._elsewhere:
            self._elsewhere[entered] = self._moved(entered)
        return self._elsewhere[entered]

    def _moved(self, entered: str) -> Graph:
        def moved(path: str) -> str:
            return f"{entered}{path[len(self.entered) :]}" if f"{path}.".startswith(f"{self.entered}.") else path

        def chains(found: Iterable[Chain]) -> Iterable[Chain]:
            return (tuple(map(moved, chain)) for chain in found)

        return replace(
            self,
            report=with_paths(self.report, moved),
            chains=tuple(chains(self.chains)),
            ran=frozenset(map(moved, self.ran)),
            closed=frozenset(map(moved, self.closed)),
            left=frozenset(chains(self.left)),
            ends={tuple(map(moved, chain)): links for chain, links in self.ends.items()},
            entered=entered,
            number=next(_numbers),
        )


def graph_of(gm: fx.GraphModule, plan: Plan, report: Report, prefix: str, run: Iterable[str] = (), bodies: Iterable[Plan] = ()) -> Graph:
    """What to remember of a graph.

    Args:
        gm: the planned graph.
        plan: its plan.
        report: its report.
        prefix: path of the module that the graph's paths start from.
        run: paths of modules that it runs where the planned graph does not show them, such as those under a context.
        bodies: what would be rewritten of its bodies.
    """
    named = {node.name: node for node in gm.graph.nodes}
    computed = [node for node in named.values() if node.op not in ("placeholder", "get_attr", "output")]
    ran = {joined(prefix, path) for node in computed for path in ("", *owner_stack(node))} | {joined(prefix, path) for path in run}
    chains = chains_of(plan, prefix)
    owned = [path for chain in chains for path in chain]
    closed = set(owned)
    for step in (step for region in plan.regions for step in region.steps):
        owner = joined(prefix, step.path)
        if owned.count(owner) > 1 or not owner:
            for node in _leading(step, named):
                closed |= set(_below(owner, [joined(prefix, path) for path in owner_stack(node)]))
    left = frozenset(chain for body in bodies for chain in chains_of(body, prefix))
    ends = Ends()
    for chain, region in zip(chains, plan.regions, strict=True):
        ends.setdefault(chain, set()).add(end_of(region.steps[-1].link))
    return Graph(report, tuple(chains), frozenset(ran), frozenset(closed - {""}), left, ends)


def end_of(link: Sequence[str]) -> tuple[str, ...]:
    """A link without what autocast or eval mode may leave out."""
    return tuple(kind for kind in link if kind not in ("cast", "dropout", "identity"))


def chains_of(plan: Plan, prefix: str) -> list[Chain]:
    return [tuple(joined(prefix, step.path) for step in region.steps) for region in plan.regions]


def _leading(step: Step, named: dict[str, fx.Node]) -> list[fx.Node]:
    """The nodes of a step that its end is computed from; the others make what it gives to others, and their modules may run anywhere."""
    inside = set(step.nodes)
    found = {named[step.target]: None}
    stack = list(found)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source.name in inside and source not in found:
                found[source] = None
                stack.append(source)
    return list(found)


def _below(owner: str, stack: list[str]) -> list[str]:
    """The module of a stack that `owner` calls, as a list of one or none."""
    inner = stack[stack.index(owner) + 1 :] if owner in stack else stack if not owner else []
    return inner[:1]
