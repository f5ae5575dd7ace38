"""Which parts of a model are rewritten, captured how: the front ends in turn, and the one that finds more residual adds wins.

symbolic trace        needs no inputs, keeps submodules live; leaves out what a trace would lose
   | anything left over, and example inputs given?
torch.export          the whole model if it can be exported and that rewrites more adds, else the largest submodules of which this holds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import nn

import passes
from passes import Call, Calls, Captured, ExportError, Plan, Refusal

from .errors import SettingsError
from .forward import canonical, signature
from .settings import Settings

__all__ = ["Part", "Parts", "exported", "in_mode", "parts_of"]

_EXPECTED = frozenset({"projection_shortcut", "nested"})  # codes of adds that no other capture would make rewritable


_REGIONS = "or name the list of layers with regions=[...], which needs no capture."
_ALTHOUGH_GIVEN = {  # hints where example inputs were given
    "untraceable": f"Call it without what torch.export does not take (a cache: use_cache=False among the example_inputs), {_REGIONS}",
    "lost_context": f"Move a custom function or a context to a small submodule of its own, {_REGIONS}",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One captured module, in one mode, and its plan."""

    captured: Captured
    plan: Plan

    @property
    def adds(self) -> int:
        return len(self.plan.rewritten_adds)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What was captured of a model.

    Attributes:
        both: for the path of each captured module, outermost first, its part in train mode (True) and in eval mode (False).
        refusals: why modules stayed ordinary Python.
    """

    both: dict[str, dict[bool, Part]]
    refusals: tuple[Refusal, ...]


def in_mode(net: nn.Module, training: bool, work: Callable[[], Any]) -> Any:
    """What `work()` returns with the whole of `net` in that mode; each module's own flag comes back afterwards."""
    flags = {module: module.training for module in net.modules()}
    try:
        for module in flags:  # not net.train(): people's own may do more, or return nothing
            module.training = training
        return work()
    finally:
        for module, flag in flags.items():
            module.training = flag


def parts_of(net: nn.Module, settings: Settings, example_inputs: Any) -> Parts:
    """Capture a model in both modes.

    Args:
        net: the model.
        settings: options of the plan.
        example_inputs: None, or a call of the model: a tuple of positional arguments, a mapping of keyword arguments, or a tensor.

    Raises:
        SettingsError: `example_inputs` do not fit the model's signature.
    """
    traced = _traced(net, settings)
    return traced if example_inputs is None else _Exporter(net, settings, _call(net, example_inputs), traced).parts()


def _call(net: nn.Module, example_inputs: Any) -> Call:
    by_name = isinstance(example_inputs, Mapping)  # also what a tokenizer of Hugging Face returns, which is no dict
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    try:
        return canonical(signature(net).bind(**example_inputs) if by_name else signature(net).bind(*args))
    except TypeError as error:
        raise SettingsError(
            f"example_inputs do not fit {type(net).__name__}.forward{signature(net)}: {error}; "
            "give a tuple of positional arguments or a dict of keyword arguments"
        ) from error


def _planned(captured: Captured, settings: Settings, suffix: str) -> Part:
    plan = passes.plan(captured.graph_module, granularity=settings.granularity, min_steps=settings.min_steps, nested=True)
    names = {region.name: region.name + suffix for region in plan.regions} | {"": ""}
    regions = tuple(dataclasses.replace(region, name=names[region.name], within=names[region.within]) for region in plan.regions)
    return Part(captured, dataclasses.replace(plan, regions=regions))


def _both(parts: Callable[[bool], Captured], settings: Settings, suffix: str) -> dict[bool, Part]:
    """Plans of both modes; the same object where their graphs are the same."""
    train, evaluate = parts(True), parts(False)
    if train.graph_module.code == evaluate.graph_module.code and not train.constants:
        part = _planned(train, settings, suffix)
        return {True: part, False: dataclasses.replace(part, captured=dataclasses.replace(train, interface=evaluate.interface))}
    return {True: _planned(train, settings, suffix), False: _planned(evaluate, settings, f"{suffix}_eval")}


def _traced(net: nn.Module, settings: Settings) -> Parts:
    captures = {mode: in_mode(net, mode, lambda: passes.capture(net)) for mode in (True, False)}
    found = {mode: {part.path: part for part in captures[mode].parts} for mode in (True, False)}
    paths = [path for path in found[True] if path in found[False]]
    return Parts(
        {path: _both(lambda mode, path=path: found[mode][path], settings, "") for path in paths},  # type: ignore[misc]
        captures[True].refusals,
    )


def _leaves_over(parts: Parts) -> bool:
    """Whether an export may find more than the trace did, which is worth its seconds."""
    if parts.refusals:
        return True
    for both in parts.both.values():
        codes = {refusal.code for refusal in both[True].plan.refusals} - _EXPECTED
        if codes - {"too_short"} or (codes and passes.may_join(both[True].captured.graph_module, both[True].plan)):
            return True
    return False


def exported(
    module: nn.Module,
    call: Call,
    settings: Settings,
    path: str = "",
    number: int = 0,
    seen: Callable[[bool], Calls] | None = None,
) -> dict[bool, Part]:
    """Capture a module by torch.export for one kind of call, in both modes.

    Args:
        module: the module.
        call: its arguments.
        settings: options of the plan.
        path: path that the parts should name.
        number: which capture of this module it is; makes the names of its regions and constants unique.
        seen: by mode, how a run of the model calls the submodules of this one; None to run the module.

    Raises:
        ExportError: it cannot be captured.
    """
    suffix = f"_call{number}" if number else ""

    def captured(mode: bool) -> Captured:
        holder = f"_mnet_fx_constants{suffix}" + ("" if mode else "_eval")
        calls = None if seen is None else partial(seen, mode)
        return in_mode(module, mode, lambda: passes.capture_by_export(module, *call, holder, path, calls))

    return _both(captured, settings, suffix)


class _Exporter:
    """Tries torch.export from the root downwards, wherever the traced parts leave something over or do not fit the calls they get."""

    def __init__(self, net: nn.Module, settings: Settings, call: Call, traced: Parts) -> None:
        self.net, self.settings, self.call, self.traced = net, settings, call, traced
        self.refusals: list[Refusal] = []
        self.seen = cache(self._run)
        self.unfit = {path: other for path, both in traced.both.items() if (other := self._other_call(path, both[True])) is not None}

    def parts(self) -> Parts:
        if not self.unfit and not _leaves_over(self.traced):
            return self.traced
        chosen = self._chosen("", self.net)
        kept = {path: both for path, both in self._fit("").items() if not _inside(path, chosen)}
        refusals = [refusal for refusal in self.traced.refusals if not _inside(refusal.path, chosen)]
        hint = passes.CODES["untraceable"].hint
        refusals += [
            Refusal("untraceable", "", path, f"example_inputs call it with {other}, for which it cannot be captured", hint)
            for path, other in self.unfit.items()
            if not _inside(path, chosen)
        ]
        both = kept | chosen
        in_order = [path for path, _ in self.net.named_modules(remove_duplicate=False) if path in both]
        refusals = [replace(r, hint=_ALTHOUGH_GIVEN.get(r.code, r.hint)) for r in (*refusals, *self.refusals)]
        return Parts({path: both[path] for path in in_order}, tuple(refusals))

    def _fit(self, path: str) -> dict[str, dict[bool, Part]]:
        """The traced parts at a path and below that fit the calls they get."""
        return {inner: both for inner, both in self.traced.both.items() if _under(inner, path) and inner not in self.unfit}

    def _other_call(self, path: str, part: Part) -> str | None:
        """The argument that a traced part is called with although its trace fixed it to something else; None if there is none."""
        if not part.captured.pinned or (path and not part.adds):
            return None
        try:
            args, kwargs = self._example(path)
        except ExportError:
            return None
        given = signature(self.net.get_submodule(path)).bind(*args, **kwargs).arguments
        return next((name for name in given if name in part.captured.pinned), None)

    def _chosen(self, path: str, module: nn.Module, live: bool = False) -> dict[str, dict[bool, Part]]:
        """What to export of a module; `live` where the graph around it calls it, so that no trace of something larger stands for it."""
        refused = any(_under(other, path) for other in (*self.unfit, *(refusal.path for refusal in self.traced.refusals)))
        if path and not refused and not live:
            return {}  # traced as part of something larger, or completely
        try:
            both = exported(module, self._example(path), self.settings, path, seen=partial(self._below, path))
        except ExportError as error:
            self.refusals.append(Refusal("untraceable", "", path, f"exporting it failed: {error}", passes.CODES["untraceable"].hint))
            return self._children(path, module)
        chosen = {path: both} if both[True].adds else {}
        for inner, blame in _live(both).items():
            found = f"the graph around it calls it as it is, since it {blame.reason}"
            self.refusals.append(Refusal(blame.code, "", inner, found, passes.CODES[blame.code].hint))
            below = self.net.get_submodule(inner)
            fails_alone = blame.code == "lost_context"
            chosen |= self._children(inner, below) if fails_alone else self._chosen(inner, below, live=True)
        kept = {inner: part for inner, part in self._fit(path).items() if not _inside(inner, chosen)}
        return chosen if _gain({**kept, **chosen}) > _gain(self._fit(path)) else {}

    def _children(self, path: str, module: nn.Module) -> dict[str, dict[bool, Part]]:
        found: dict[str, dict[bool, Part]] = {}
        for name, child in passes.forward_children(module):
            found |= self._chosen(f"{path}.{name}" if path else name, child)
        return found

    def _run(self, mode: bool) -> Calls:
        try:
            return in_mode(self.net, mode, lambda: passes.inner_calls(self.net, *self.call))
        except Exception as error:
            raise SettingsError(f"{type(self.net).__name__} does not run on example_inputs: {type(error).__name__}: {error}") from error

    def _below(self, path: str, mode: bool) -> Calls:
        """How the submodules of a module are called, by their paths from it."""
        return {inner.removeprefix(path).removeprefix("."): calls for inner, calls in self.seen(mode).items() if _under(inner, path)}

    def _example(self, path: str) -> Call:
        if not path:
            return self.call
        seen = self.seen(False).get(path, [])
        if not seen:
            raise ExportError("example_inputs do not reach the module")
        args, kwargs = seen[0].call
        return canonical(signature(self.net.get_submodule(path)).bind(*args, **kwargs))


def _live(both: dict[bool, Part]) -> dict[str, passes.Blame]:
    """Modules that the exported graphs call as they are."""
    return {**both[False].captured.live, **both[True].captured.live}


def _inside(path: str, chosen: dict[str, dict[bool, Part]]) -> bool:
    """True for a module whose Python one of the exported graphs stands for."""
    return any(_under(path, top) and not any(_under(path, inner) for inner in _live(both)) for top, both in chosen.items())


def _gain(parts: dict[str, dict[bool, Part]]) -> tuple[int, int]:
    """What captures are worth: more adds rewritten, and of as many, in fewer and so longer chains."""
    return sum(both[True].adds for both in parts.values()), -sum(len(both[True].plan.regions) for both in parts.values())


def _under(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(f"{top}.")
