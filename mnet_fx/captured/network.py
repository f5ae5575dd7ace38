"""What the captures of one model made of it, and that they all make the same momentum network.

A chain is known by the paths of the modules that own its steps, as ("layer1.0", "layer1.1"). The first capture in which a module runs
decides which chain it is part of, if any; a later one that would decide otherwise (after a graph break, for another number of layers)
would be another network with other outputs, and is an error.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints import OTHER
from ..errors import MnetError, MnetWarning
from ..reporting.report import Report
from .graphs import Chain, Ends, Graph, end_of
from .merging import merged

__all__ = ["Network"]


@dataclass
class Network:
    """The momentum network that a model was found to be.

    Attributes:
        chains: those of all captures so far, each with its ends.
        left: as in `Graph`, of all captures.
        ran: paths of the modules that ran in a capture, or may have.
        entered: paths of the modules that Python called in one.
        closed: as in `Graph`, of all captures.
        passes: for each chain how often it ran in the first call that had it, and how many adds of its modules were left there.
        reports: by the training flag of the model, the report of the first call of that kind, if possible of one that ran a chain.
    """

    chains: Ends = field(default_factory=dict)
    left: set[Chain] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    entered: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    passes: dict[Chain, tuple[int, int]] = field(default_factory=dict)
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

    @property
    def record(self) -> dict[str, list[Any]] | None:
        """What checkpoints carry of it, as plain data; None before the first capture."""
        chains = [[list(chain), sorted(map(list, links))] for chain, links in sorted(self.chains.items())]
        return {"chains": chains, "ran": sorted(self.ran | self.entered)} if self.captured else None

    def expect(self, record: Mapping[str, list[Any]]) -> bool:
        """Takes over a record, for the first capture to make that network; after that one, returns whether it did."""
        chains = {tuple(chain): set(map(tuple, links)) for chain, links in record["chains"]}
        ran = set(record["ran"])
        with self.lock:
            if not self.captured:
                self.chains, self.ran = chains, ran
                return True
            alike = all(self.chains[chain] == chains[chain] for chain in self.chains if chain in chains)
            return alike and self._contradiction(chains, ran, ()) is None

    def add(
        self,
        graphs: Sequence[Graph],
        training: bool,
        complete: bool = True,
        entered: Collection[str] = (),
        unseen: Collection[str] = (),
        left_out: Report | None = None,
    ) -> None:
        """Takes in the graphs of one call, of which some are new.

        Args:
            graphs: those that the call ran, in order.
            training: the training flag of the model.
            complete: False if the call was stopped after its first graph and that ended in a graph break, so that nothing is known yet.
            entered: paths of the modules that Python called.
            unseen: of those that may have run without anybody seeing it.
            left_out: what there is in modules that no graph has.

        Raises:
            MnetError: they make another momentum network than the captures before; then a later call that runs one of them raises it too.
        """
        with self.lock:
            chains = Ends()
            for graph in graphs:
                chains |= {chain: chains.get(chain, set()) | graph.ends.get(chain, set()) for chain in graph.chains}
            ran = {path for graph in graphs for path in graph.ran}.union(unseen)
            left = {chain for graph in graphs for chain in graph.left}
            if complete and not self.captured and self._contradiction(chains, ran, entered) is not None:
                warnings.warn(OTHER, MnetWarning, stacklevel=6)
                self.chains, self.ran = {}, set()
            passes = _passes(graphs)
            reason = self._contradiction(chains, ran, entered) or self._both(chains, left) or self._in_part(passes)
            if complete and reason is not None:
                for graph in graphs:
                    graph.refused = reason
                raise MnetError(reason)
            if not complete:
                return
            self.chains = chains | self.chains
            self.passes = passes | self.passes
            self.left |= left
            self.ran |= ran
            self.entered |= set(entered)
            self.closed |= {path for graph in graphs for path in graph.closed}
            known, found = self.reports.get(training), merged([*(graph.report for graph in graphs), *([left_out] if left_out else [])])
            if known is None or (found.regions and not known.regions):
                self.reports[training] = found

    def divided(self, steps: Sequence[tuple[str, Sequence[str]]]) -> Sequence[range]:
        """The steps of a chain that are chains of this network, or lie in modules that never ran; all of it where that cannot be.

        Args:
            steps: the path and the link of each.
        """
        chain, found, loose, t = tuple(path for path, _ in steps), list[range](), list[int](), 0
        whole = (range(len(chain)),)
        if chain in self.chains or not _meets(chain, self.ran, self.entered):
            return whole
        owners = [set(known) for known in self.chains]
        if len(set().union(*owners)) < sum(map(len, owners)):
            return whole  # chains of one module, which its path does not tell apart
        while t < len(chain):
            known = next((known for known in self.chains if chain[t : t + len(known)] == known), None)
            if known is not None and end_of(steps[t + len(known) - 1][1]) not in self.chains[known]:
                return whole
            found += [range(t, t + len(known))] if known else []
            loose += [] if known else [t]
            t += len(known) if known else 1
        twice = len({chain[part.start] for part in found}) < len(found)
        if twice or any(f"{chain[t]}.".startswith(f"{owner}.") for t in loose for owner in set().union(*owners)):
            return whole
        fresh = [t for t in loose if not _meets((chain[t],), self.ran, self.entered)]
        starts = [t for t in fresh if t - 1 not in fresh]
        found += [range(t, next(end for end in itertools.count(t) if end not in fresh)) for t in starts]
        return sorted(found, key=lambda part: part.start)

    def none_ran(self, entered: Collection[str], unseen: Collection[str]) -> bool:
        """Whether a call without graphs surely ran no step of the chains that there are, as where each layer was dropped."""
        return bool(self.chains) and not any(_meets(chain, {"", *unseen}, entered) for chain in self.chains)

    def _both(self, chains: Collection[Chain], left: set[Chain]) -> str | None:
        """Why the same layers are two networks."""
        both = {*self.chains, *chains} & (self.left | left)
        if not both:
            return None
        return (
            f"the chain of {_described(min(both))} would be a momentum network where the model calls it as it is, and the original where "
            "it calls it under torch.autocast, torch.inference_mode, torch.vmap or a checkpoint of its own: call it in one "
            "way, put the context around the call of the whole model, or name its layers with regions=[...]"
        )

    def _in_part(self, passes: Mapping[Chain, tuple[int, int]]) -> str | None:
        """Why modules that run several times are two networks: in one call as a chain what in the other is left as it is."""
        for chain, (often, left) in passes.items():
            before, left_before = self.passes.get(chain, (often, left))
            if (often - before) * (left - left_before) < 0:
                return (
                    f"the chain of {_described(chain)} runs {often} times in this kind of call, with {left} residual adds of its modules "
                    f"left as they are, and ran {before} times with {left_before} left in the first, which is another momentum network: "
                    "call it as at first, momentumize a second model for this kind of call, or name its layers with regions=[...]"
                )
        return None

    def _contradiction(self, chains: Ends, ran: set[str], entered: Collection[str]) -> str | None:
        reached = ran | {""} if ran else ran  # whatever runs, the root has run, if only in Python
        lost = [chain for chain in self.chains if chain not in chains and _meets(chain, reached, entered)]
        new = [chain for chain in chains if chain not in self.chains and _meets(chain, self.ran, self.entered)]
        if not lost and not new:
            return None
        before, now = (sorted(map(_described, found)) or ["none there"] for found in (lost, new))
        return (
            f"this kind of call would make another momentum network of the model than its first call did: chains of {', '.join(now)}, "
            f"where there were {', '.join(before)}. A graph break (TORCH_LOGS=graph_breaks), another number of layers, another dtype or "
            "kind of tensor, a context (autocast, no_grad) around some layers, or a block that is left out by a draw of Python's random "
            "(draw by torch.rand, and multiply by it) does that. Call it as at first, momentumize a second "
            "model for this kind of call, or name its layers with regions=[...]"
        )


def _meets(chain: Chain, ran: Collection[str], entered: Collection[str]) -> bool:
    """Whether a module of a chain is among those that ran, or Python called it or one inside of it."""
    return any(path in ran or any(f"{inner}.".startswith(f"{path}.") for inner in entered) for path in chain)


def _passes(graphs: Sequence[Graph]) -> dict[Chain, tuple[int, int]]:
    often = Counter(chain for graph in graphs for chain in graph.chains)
    left = Counter(add.path for graph in graphs for add in graph.report.adds if add.code not in ("", "nested"))
    return {chain: (often[chain], sum(left[path] for path in set(chain))) for chain in often}


def _described(chain: Chain) -> str:
    return f"{len(chain)} steps from {chain[0] or 'the root'} to {chain[-1] or 'the root'}"
