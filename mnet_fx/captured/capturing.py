"""The backend that Dynamo hands the graphs of a rewritten model to: as `compiled.backend`, with paths from the model, and with a memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.fx as fx
from torch import nn

from passes import Refusal, joined, modules_run, owner_stack

from ..compiled.backend import Backend, Found
from ..compiled.keeping import Keeping
from ..inner import Inner
from ..regions.region import ChainRegion
from ..reporting.build import relabelled
from ..reporting.report import Report
from ..settings import Settings
from .calls import PREFIX
from .configured import begin_anew_unsized
from .graphs import Chain, Graph, graph_of
from .merging import with_paths
from .network import Network
from .value_sizes import apart

__all__ = ["Capture", "cut", "list_of", "said"]


class Caller(Protocol):
    """The forward that a capture is for."""

    owner: nn.Module
    settings: Settings
    network: Network
    regions: list[ChainRegion]
    keepings: list[Keeping]

    def running(self) -> Any:
        """The call of the model that this thread is in, or None."""


class Capture(Backend):
    """The backend of one rewritten model.

    Args:
        forward: whose calls it serves.
        inner: as in `backend`.
    """

    def __init__(self, forward: Caller, inner: Inner) -> None:
        super().__init__(forward.settings, inner)
        self._forward = weakref.ref(forward)  # Dynamo holds this backend where the garbage collector does not see it

    @property
    def forward(self) -> Caller:
        """The forward, which is there as long as it is called."""
        forward = self._forward()
        assert forward is not None
        return forward

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **given: Any) -> Callable[..., Any]:
        call = self.forward.running()
        found = self.planned(gm)
        if call is not None and not call.whole and self._sized_apart(gm, found):
            begin_anew_unsized()
        if isinstance(found, Found):
            found = self._as_before(found, example_inputs)
            before = {id(graph): graph for graph in (*call.graphs, *call.new)} if call is not None else {}
            found = self._named(found, sum(len(graph.chains) for graph in before.values()))
        graph = self._noted(gm, found, self.report(gm, found), example_inputs)
        left = sum(refusal.code == "left_before" for refusal in graph.report.refusals)
        if left and torch.is_grad_enabled():
            name = type(self.forward.owner).__name__
            graph.broken = graph.broken or f"{name}: {left} residual adds stay as they are, as the first call of the model left them"
        graph.entered = call.place if call is not None else ""
        run = self.compiled(gm, found, example_inputs)
        self.forward.regions += getattr(run, "regions", [])
        self.forward.keepings += [run.keeping] if hasattr(run, "keeping") else []
        if call is not None:
            call.new.append(graph)

        def counted(*inputs: Any) -> Any:
            if (call := self.forward.running()) is not None:
                call.ran(graph)
            return run(*inputs)

        return counted

    def _sized_apart(self, gm: fx.GraphModule, found: Found | Refusal) -> bool:
        return apart(gm, None) if isinstance(found, Refusal) else apart(found.unlifted.graph_module, found.plan)

    def _as_before(self, found: Found, example_inputs: list[Any]) -> Found:
        """The plan with the chains that the captures before found in these modules, as far as it can have them."""
        network = self.forward.network
        if not network.ran:
            return found
        prefix = self._prefix(found, example_inputs)

        def divided(steps: Sequence[tuple[str, Sequence[str]]]) -> Sequence[range]:
            return network.divided([(joined(prefix, path), link) for path, link in steps])

        chains = [[(step.path, step.link) for step in region.steps] for region in found.plan.regions]
        if all(divided(steps) == (range(len(steps)),) for steps in chains):
            return found
        return found.divided(self.settings, divided)

    def _named(self, found: Found, before: int) -> Found:
        """The plan with names that no region of another graph of this call has."""
        if not before:
            return found
        names = {region.name: f"momentum_region_{before + i}" for i, region in enumerate(found.plan.regions)} | {"": ""}
        regions = (dataclasses.replace(r, name=names[r.name], within=names[r.within]) for r in found.plan.regions)
        return dataclasses.replace(found, plan=dataclasses.replace(found.plan, regions=tuple(regions)))

    def _noted(self, gm: fx.GraphModule, found: Found | Refusal, report: Report, example_inputs: list[Any]) -> Graph:
        if isinstance(found, Refusal):
            return Graph(report, (), frozenset({"", *modules_run(gm)}), frozenset())
        prefix = self._prefix(found, example_inputs)
        graph = graph_of(found.unlifted.graph_module, found.plan, _from(prefix, report), prefix, modules_run(gm), found.bodies.values())
        reason: Any = getattr(gm, "compile_subgraph_reason", None)
        if getattr(reason, "graph_break", False):
            graph.complete = False
            graph.broken = self._broken(reason, found, report, prefix)
            if graph.broken is not None:  # adds may be half in it, which nobody sees
                where = f"Dynamo breaks its graph of {type(self.forward.owner).__name__}{said([reason])}"
                graph.report = _with_break(graph.report, "", where)
        return graph

    def _prefix(self, found: Found, example_inputs: list[Any]) -> str:
        """Path of the module from which the paths of a graph start: not the model where Dynamo captured code of a module inside."""
        paths: dict[int, list[str]] = {}
        for name, tensor in _tensors(self.forward.owner):
            paths.setdefault(id(tensor), []).append(name)
        for name, tensor in zip(found.unlifted.inputs, example_inputs, strict=True):
            path = found.unlifted.attributes.get(name)
            known = [] if path is None else [full for full in paths.get(id(tensor), []) if f".{full}".endswith(f".{path}")]
            if path is not None and known:
                return min(known, key=len).removesuffix(path).rstrip(".")
        return ""

    def _broken(self, reason: Any, found: Found, report: Report, prefix: str) -> str | None:
        """The warning about a graph break inside of a chain; None where it is elsewhere."""
        last = [owner_stack(node) for node in found.unlifted.graph_module.graph.nodes if node.op != "output"]
        inside = [joined(prefix, path) for path in (last[-1] if last else [])] or [prefix]
        listed = next((parent for path in inside if (parent := list_of(self.forward.owner, path)) is not None), None)
        if listed is not None and _behind(self.forward.owner.get_submodule(listed), listed, inside, reason):
            return None
        if listed is None and not any(refusal.code == "graph_break" for refusal in report.refusals):
            return None
        return _warning(self.forward.owner, "inside of a chain", said([reason]), listed)


def cut(owner: nn.Module, graphs: Sequence[Graph], told: str) -> str | None:
    """The warning that graph breaks left each layer of a list to a graph of its own; None if that is not so. Their reports say it then."""
    among: dict[str, list[Graph]] = {}
    for graph in graphs:
        alone = {refusal.path for refusal in graph.report.refusals if refusal.code == "too_short"}
        for path in {list_of(owner, path) for path in alone} | {_list_around(owner, chain) for chain in graph.chains}:
            among.setdefault(path or "", []).append(graph)
    listed = next((path for path, found in among.items() if path and len(found) > 1), None)
    if listed is None:
        return None
    why = f"Dynamo breaks its graph between the layers of {listed}{told}"
    for graph in among[listed]:
        report = relabelled(graph.report, lambda at: list_of(owner, at) == listed, too_short=("graph_break", why))
        graph.report = _with_break(report, listed, f"{why}: each is a chain of its own")
    return _warning(owner, "between the layers of a list", told, listed)


def _list_around(owner: nn.Module, chain: Chain) -> str | None:
    """Path of the list of which one layer holds a whole chain."""
    lists = {list_of(owner, path) for path in chain}
    listed = lists.pop()
    layers = {path[len(listed or "") :].lstrip(".").partition(".")[0] for path in chain}
    return listed if not lists and len(layers) == 1 else None


def _with_break(report: Report, path: str, explanation: str) -> Report:
    """A report that tells of a graph break, if it does not already."""
    if any(refusal.code == "graph_break" for refusal in report.refusals):
        return report
    found = Refusal.of("graph_break", "", path, explanation)
    return dataclasses.replace(report, refusals=(*report.refusals, found))


def said(breaks: Sequence[Any]) -> str:
    """Where and why Dynamo broke its graph first, as ", at ... (...)"; nothing if it does not tell."""
    for reason in breaks:
        stack = [frame for frame in getattr(reason, "user_stack", None) or [] if PREFIX not in frame.name]
        if stack:
            why = " ".join(str(reason.reason).split())[:160]
            return f", at {stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name} ({why})"
    return ""


def _warning(owner: nn.Module, where: str, told: str, listed: str | None) -> str:
    regions = "" if listed is None else f"Use momentumize(model, regions=[{listed!r}]), which needs no capture. Or: "
    return (
        f"{type(owner).__name__}: Dynamo breaks its graph {where}{told}, so what follows is no part of the chain before. "
        f"{regions}Take that operation out of the blocks"
    )


def list_of(owner: nn.Module, path: str) -> str | None:
    """Path of the innermost ModuleList or Sequential, of several layers of one class, that a module is an element of, or lies in one."""
    parts = path.split(".")
    for i in range(len(parts) - 1, -1, -1):
        try:
            parent = owner.get_submodule(".".join(parts[:i]))
        except AttributeError:
            continue
        if isinstance(parent, (nn.ModuleList, nn.Sequential)) and len({type(layer) for layer in parent}) == 1 < len(parent):
            return ".".join(parts[:i])
    return None


def _behind(layers: nn.Module, path: str, inside: Sequence[str], reason: Any) -> bool:
    """Whether a graph that ends in the last of these layers does so behind it: in code that is none of its own."""
    *_, (name, last) = layers.named_children()
    frames = {(frame.filename, frame.lineno) for frame in getattr(reason, "user_stack", None) or []}
    codes = [code for module in last.modules() if (code := getattr(type(module).forward, "__code__", None)) is not None]
    own = {(code.co_filename, line) for code in codes for *_, line in code.co_lines()}
    return frames.isdisjoint(own) and all(f"{one}.".startswith(f"{path}.{name}.") for one in inside if f"{one}.".startswith(f"{path}."))


def _tensors(owner: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from owner.named_parameters(remove_duplicate=False)
    yield from owner.named_buffers(remove_duplicate=False)


def _from(prefix: str, report: Report) -> Report:
    """A report with paths from the model, captured as part of it."""
    found = with_paths(report, partial(joined, prefix))
    return dataclasses.replace(found, captured=tuple(dataclasses.replace(part, front_end="Dynamo") for part in found.captured))
