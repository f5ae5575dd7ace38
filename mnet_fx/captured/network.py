"""What the captures of one model made of it, and that they all make the same momentum network.

A chain is known by the paths of the modules that own its steps, as ("layer1.0", "layer1.1"). The first capture in which a module runs
decides which chain it is part of, if any; a later one that would decide otherwise (after a graph break, for another number of layers)
would be another network with other outputs, and is an error.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.fx as fx

from passes import Plan, Step, joined, owner_stack

from ..errors import MnetError
from ..reporting.report import AddReport, Report, Stretch

__all__ = ["Chain", "Graph", "Network", "chains_of", "graph_of", "with_paths"]

Chain = tuple[str, ...]
"""The paths of the modules that own the steps of a chain, in order."""


_numbers = itertools.count()


@dataclass
class Graph:
    """What is remembered of one captured graph.

    Attributes:
        report: what was rewritten in it.
        chains: its chains.
        left: chains that it runs as they are in the original, in bodies of their own.
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
    return Graph(report, tuple(chains), frozenset(ran), frozenset(closed - {""}), left)


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


@dataclass
class Network:
    """The momentum network that a model was found to be.

    Attributes:
        chains: those of all captures so far.
        left: as in `Graph`, of all captures.
        ran: paths of the modules that ran in a capture, or may have.
        entered: paths of the modules that Python called in one.
        closed: as in `Graph`, of all captures.
        reports: by the training flag of the model, the report of the first call of that kind, if possible of one that ran a chain.
    """

    chains: set[Chain] = field(default_factory=set)
    left: set[Chain] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    entered: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    reports: dict[bool, Report] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.lock = threading.Lock()

    @property
    def captured(self) -> bool:
        """Whether there was a capture."""
        return bool(self.reports)

    @property
    def report(self) -> Report:
        """The report of the first call in train mode, or if there was none, in eval mode."""
        return self.reports[max(self.reports)]

    def add(
        self,
        graphs: Sequence[Graph],
        training: bool,
        complete: bool = True,
        entered: Collection[str] = (),
        unseen: Collection[str] = (),
    ) -> None:
        """Takes in the graphs of one call, of which some are new.

        Args:
            graphs: those that the call ran, in order.
            training: the training flag of the model.
            complete: False if the call was stopped after its first graph and that ended in a graph break, so that nothing is known yet.
            entered: paths of the modules that Python called.
            unseen: of those that may have run without anybody seeing it.

        Raises:
            MnetError: they make another momentum network than the captures before; then a later call that runs one of them raises it too.
        """
        with self.lock:
            chains = {chain for graph in graphs for chain in graph.chains}
            ran = {path for graph in graphs for path in graph.ran}.union(unseen)
            left = {chain for graph in graphs for chain in graph.left}
            if complete and (reason := self._contradiction(chains, ran, entered) or self._both(chains, left)) is not None:
                for graph in graphs:
                    graph.refused = reason
                raise MnetError(reason)
            if not complete:
                return
            self.chains |= chains
            self.left |= left
            self.ran |= ran
            self.entered |= set(entered)
            self.closed |= {path for graph in graphs for path in graph.closed}
            known, found = self.reports.get(training), merged([graph.report for graph in graphs])
            if known is None or (found.regions and not known.regions):
                self.reports[training] = found

    def divided(self, chain: Chain) -> Sequence[range] | None:
        """The steps of a chain that are chains of this network, or lie in modules that never ran; None where these and others are one."""
        if chain in self.chains or not _meets(chain, self.ran, self.entered):
            return (range(len(chain)),)
        found, loose, t = list[range](), list[int](), 0
        owners = [set(known) for known in self.chains]
        if len(set().union(*owners)) < sum(map(len, owners)):
            return None  # chains of one module, which its path does not tell apart
        while t < len(chain):
            known = next((known for known in self.chains if chain[t : t + len(known)] == known), None)
            found += [range(t, t + len(known))] if known else []
            loose += [] if known else [t]
            t += len(known) if known else 1
        twice = len({chain[part.start] for part in found}) < len(found)
        if twice or any(_overlap(chain[t], owner) for t in loose for owner in set().union(*owners)):
            return None
        fresh = [t for t in loose if not _meets((chain[t],), self.ran, self.entered)]
        starts = [t for t in fresh if t - 1 not in fresh]
        found += [range(t, next(end for end in itertools.count(t) if end not in fresh)) for t in starts]
        return sorted(found, key=lambda part: part.start)

    def none_ran(self, entered: Collection[str], unseen: Collection[str]) -> bool:
        """Whether a call without graphs surely ran no step of the chains that there are, as where each layer was dropped."""
        return bool(self.chains) and not any(_meets(chain, {"", *unseen}, entered) for chain in self.chains)

    def _both(self, chains: set[Chain], left: set[Chain]) -> str | None:
        """Why the same layers are two networks."""
        both = (self.chains | chains) & (self.left | left)
        if not both:
            return None
        return (
            f"the chain of {_described(min(both))} would be a momentum network where the model calls it as it is, and the original where "
            "it calls it under torch.autocast, torch.inference_mode, torch.vmap or a checkpoint of its own: call it in one "
            "way, put the context around the call of the whole model, or name its layers with regions=[...]"
        )

    def _contradiction(self, chains: set[Chain], ran: set[str], entered: Collection[str]) -> str | None:
        reached = ran | {""} if ran else ran  # whatever runs, the root has run, if only in Python
        lost = [chain for chain in self.chains if chain not in chains and _meets(chain, reached, entered)]
        new = [chain for chain in chains if chain not in self.chains and _meets(chain, self.ran, self.entered)]
        if not lost and not new:
            return None
        before, now = sorted(map(_described, lost)) or ["none there"], sorted(map(_described, new)) or ["none there"]
        return (
            f"this kind of call would make another momentum network of the model than its first call did: chains of {', '.join(now)}, "
            f"where there were {', '.join(before)}. A graph break (TORCH_LOGS=graph_breaks), another number of layers, another dtype or "
            "kind of tensor, or a context (autocast, no_grad) around some layers does that. Call it as at first, momentumize a second "
            "model for this kind of call, or name its layers with regions=[...]"
        )


def _meets(chain: Chain, ran: Collection[str], entered: Collection[str]) -> bool:
    """Whether a module of a chain is among those that ran, or Python called it or one inside of it."""
    return any(path in ran or any(f"{inner}.".startswith(f"{path}.") for inner in entered) for path in chain)


def _overlap(a: str, b: str) -> bool:
    """Whether one of two modules is the other or lies in it."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _described(chain: Chain) -> str:
    return f"{len(chain)} steps from {chain[0] or 'the root'} to {chain[-1] or 'the root'}"


def merged(reports: Iterable[Report]) -> Report:
    """The report of several graphs of one call."""
    found = list(reports)
    return Report(
        sum(report.residual_adds for report in found),
        sum(report.rewritten_adds for report in found),
        tuple(region for report in found for region in report.regions),
        tuple(dict.fromkeys(refusal for report in found for refusal in report.refusals)),
        tuple(part for report in found for part in report.captured),
        None if None in (kept := [report.kept_outside for report in found]) else sum(size or 0 for size in kept),
        _numbered(found),
        _renumbered(found),
        "checkpoint" if any(report.rest == "checkpoint" for report in found) else "store",
        tuple(head for report in found for head in report.heads),
    )


def with_paths(report: Report, renamed: Callable[[str], str]) -> Report:
    """A report with other paths."""
    parts = ("regions", "refusals", "adds", "stretches", "captured")
    found: dict[str, Any] = {part: tuple(replace(row, path=renamed(row.path)) for row in getattr(report, part)) for part in parts}
    return replace(report, **found)


def _numbered(reports: Sequence[Report]) -> tuple[AddReport, ...]:
    """The adds of several graphs, each with the number of its stretch among those of all."""
    adds, before = [], 0
    for report in reports:
        adds += [add if add.stretch is None else replace(add, stretch=add.stretch + before) for add in report.adds]
        before += len(report.stretches)
    return tuple(adds)


def _renumbered(reports: Sequence[Report]) -> tuple[Stretch, ...]:
    """The stretches of several graphs; what one reads of its graph's inputs is taken to come from the graph before."""
    found: list[Stretch] = []
    for report in reports:
        before = len(found)
        found += [replace(s, reads=tuple(max(n, -1) + before for n in s.reads)) for s in report.stretches]
    return tuple(found)
