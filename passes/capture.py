"""Model -> graphs, in the model's current mode.

the root, or if it cannot be traced each of its children, and so on down
  |-- traced again with one more leaf for each module that a trace would misrepresent
  `-- those leaves are captured on their own in turn

Captured(path="")             the whole model, with leaves inside
Captured(path="backbone")     part of a model whose forward stays ordinary Python
Refusal(path="head", ...)     why a module was not traced
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch.fx as fx
from torch import nn

from passes.calls import Calls, inner_calls
from passes.exporting import ExportError, Interface, SetsAttribute, export
from passes.facts import owner_path
from passes.layout import level_layouts
from passes.legality import CODES
from passes.live import Result
from passes.live_calls import LiveCalls
from passes.regions import Refusal
from passes.standins import Outside
from passes.torch_layers import opened
from passes.tracer import Blame, ChainTracer, replaced_reason
from passes.watch import Attributes

__all__ = ["Capture", "Captured", "capture", "capture_by_export", "forward_children"]

_MOST_EXPORTS = 6  # each finds modules that have to stay Python, inside of which the next one does not look


@dataclass(frozen=True)
class Captured:
    """One traced module.

    Attributes:
        path: path of the module that was traced, "" for the whole model.
        graph_module: its graph over its own live submodules and parameters; node targets are relative to `path`.
        training: the `training` flag of the module while it was traced.
        pinned: arguments of forward that were fixed, by name, and to what; the graph has an unused placeholder for each named one, and
            none for `*args` (pinned to `()`) and `**kwargs` (pinned to `{}`).
        interface: None for a symbolic trace, whose graph has the signature of forward; for an export, how calls map to its flat inputs.
        constants: what the graph of an export reads and the module does not have, by name.
        holder: attribute of the module under which the graph looks for them.
        live: for the path of each module that stays Python inside the graph of an export, why; the graph calls it.
    """

    path: str
    graph_module: fx.GraphModule
    training: bool
    pinned: dict[str, Any] = field(default_factory=dict)
    interface: Interface | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    holder: str = ""
    live: dict[str, Blame] = field(default_factory=dict)


@dataclass(frozen=True)
class Capture:
    """What capturing a model gave.

    Attributes:
        parts: the traced modules, outermost first; a part inside another part is a leaf there.
        refusals: one for each module that had to stay ordinary Python.
    """

    parts: tuple[Captured, ...]
    refusals: tuple[Refusal, ...]


def capture(model: nn.Module, path: str = "") -> Capture:
    """Trace a model in its current mode, and what of it cannot be traced in parts.

    The model is not changed. Only one thread traces at a time.

    Args:
        model: any module; call once in train() and once in eval() mode, since a trace bakes the mode.
        path: path of `model` from the root that the results should name.

    Returns:
        The traced parts and a refusal for each module that stays ordinary Python.
    """
    found = list(_captured(model, path, set()))
    return Capture(
        tuple(item for item in found if isinstance(item, Captured)),
        tuple(item for item in found if isinstance(item, Refusal)),
    )


def _captured(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[Captured | Refusal]:
    """Capture `module`, then on their own the modules inside that had to become leaves."""
    if module in seen:  # a module that several parts share is rewritten once
        return
    seen.add(module)
    traced, blames = _trace(module)
    for inner, blame in blames.items():
        yield _refusal(blame, _join(path, inner))
    if traced is not None:
        tracer, graph = traced
        yield Captured(path, fx.GraphModule(module, graph), module.training, dict(tracer.pinned))
    for inner in blames:
        for name, child in forward_children(module.get_submodule(inner)):
            yield from _captured(child, _join(path, inner, name), seen)


def _trace(module: nn.Module) -> tuple[tuple[ChainTracer, fx.Graph] | None, dict[str, Blame]]:
    """Trace until no new leaf is needed; the number of rounds is bounded, since each adds a leaf."""
    blames: dict[str, Blame] = {}
    repeated: fx.Graph | None = None
    if (reason := replaced_reason(module)) is not None:  # its hooks are in nobody's way: they fire around its graph
        return None, {"": Blame("opaque_module", reason)}
    while True:
        tracer, attributes, outside = ChainTracer(frozenset(blames)), Attributes(module), Outside(module)
        try:
            graph = tracer.trace(module)
        except Exception as error:
            tracer.blame("untraceable", f"{type(error).__name__}: {error}"[:200])
        outside.clean()
        for inner, name in attributes.restore():
            while inner and inner in blames:  # a module that stays Python is changed by one that calls it
                inner = inner.rpartition(".")[0]
            tracer.blames.setdefault(inner, Blame("lost_context", f"sets its attribute {name}, which a trace would do once and for all"))
        new = {inner: blame for inner, blame in tracer.blames.items() if inner not in blames}
        if not new and repeated is not None and (where := _difference(repeated, graph)) is not None and where not in blames:
            new = {where: Blame("lost_context", "does not trace to the same graph twice: it has state that a trace would bake in")}
            repeated = None
        elif not new and repeated is None:
            repeated = graph  # sound so far; the same must come once more
            continue
        if not new:
            return (tracer, graph), blames
        if "" in new and len(new) == 1:
            return None, {"": new[""]}
        blames |= {inner: blame for inner, blame in new.items() if inner}
        repeated = None


def _difference(a: fx.Graph, b: fx.Graph) -> str | None:
    """Path of the module that made the first node in which two traces of it differ; None if they are the same."""
    for first, second in zip_longest(a.nodes, b.nodes):
        if first is None or second is None or first.format_node() != second.format_node():
            return owner_path(second or first)
    return None


def forward_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children worth tracing on their own; lists and dictionaries of modules have no forward, so their children stand for them.

    The insides of torch.nn's own modules are left alone where they hold nothing but single layers.
    """
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", grandchild) for inner, grandchild in forward_children(child))
        elif next(child.children(), None) is not None and (
            isinstance(child, nn.Sequential) or opened(child) is not None or not type(child).__module__.startswith("torch.")
        ):
            yield name, child


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _refusal(blame: Blame, path: str) -> Refusal:
    return Refusal(
        blame.code,
        "",
        path,
        f"the module {blame.reason}" if blame.code != "untraceable" else f"tracing it failed: {blame.reason}",
        CODES[blame.code].hint,
    )


def capture_by_export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], holder: str, path: str = "", seen: Callable[[], Calls] | None = None
) -> Captured:
    """Capture a whole module in its current mode by `torch.export`; modules inside that it cannot hold are called by the graph.

    Args:
        model: any module, which is not changed, except that one which sets itself up at its first call has done so.
        args, kwargs: a call of it, as `Interface` describes.
        holder: attribute name under which the graph looks for its constants.
        path: path of `model` from the root that the result should name.
        seen: gives what `inner_calls` saw of this call, by paths from `model`; None to run the model where that is needed.

    Raises:
        ExportError: it cannot be exported, or the graph would lose something.
    """
    if (reason := replaced_reason(model)) is not None:
        raise ExportError(f"the module {reason}")
    live: dict[str, Blame] = {}
    results: dict[str, list[Result]] | None = None
    warm = False
    for _ in range(_MOST_EXPORTS):
        watcher = LiveCalls(model, live, results)
        try:
            graph_module, interface, constants = export(model, args, kwargs, holder, watcher)
        except ExportError as error:
            new = {inner: blame for inner, blame in watcher.blames.items() if inner not in live}
            if isinstance(error, SetsAttribute) and not warm:
                warm = True
                inner_calls(model, args, kwargs, warm_up=True)
            elif not new or "" in watcher.blames:
                raise
            live |= new
            if new and results is None:
                results = _results(model, args, kwargs, error) if seen is None else _only_results(seen())
        else:
            break
    else:
        raise ExportError(f"after {_MOST_EXPORTS} exports there are still modules that have to stay Python: {', '.join([*live][-3:])}")
    level_layouts(graph_module)
    made = {call.path: live[call.path] for call in watcher.made}
    return Captured(path, graph_module, model.training, interface=interface, constants=constants, holder=holder, live=made)


def _results(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: ExportError) -> dict[str, list[Result]]:
    try:
        return _only_results(inner_calls(model, args, kwargs))
    except Exception:  # the model itself fails
        raise error from None


def _only_results(calls: Calls) -> dict[str, list[Result]]:
    return {inner: [call.result for call in found] for inner, found in calls.items()}
