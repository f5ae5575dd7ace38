"""Which parts of a model are rewritten, captured how: the front ends in turn, and the one that finds more residual adds wins.

symbolic trace        needs no inputs, keeps submodules live; leaves out what a trace would lose
   | anything left over, and example inputs given?
torch.export          the whole model if it can be exported and that rewrites more adds, else the largest submodules of which this holds
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

import passes
from passes import Call, Captured, ExportError, Plan, Refusal

from .errors import SettingsError
from .forward import canonical, signature
from .settings import Settings

__all__ = ["Part", "Parts", "exported", "in_mode", "parts_of"]

_EXPECTED = frozenset({"projection_shortcut", "nested"})  # codes of adds that no other capture would make rewritable


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
        example_inputs: None, or a call of the model: a tuple of positional arguments, a dict of keyword arguments, or a tensor.

    Raises:
        SettingsError: `example_inputs` do not fit the model's signature.
    """
    traced = _traced(net, settings)
    return traced if example_inputs is None else _Exporter(net, settings, _call(net, example_inputs), traced).parts()


def _call(net: nn.Module, example_inputs: Any) -> Call:
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    kwargs = dict(example_inputs) if isinstance(example_inputs, dict) else {}
    try:
        return canonical(signature(net), () if isinstance(example_inputs, dict) else args, kwargs)
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


def exported(module: nn.Module, call: Call, settings: Settings, path: str = "", number: int = 0) -> dict[bool, Part]:
    """Capture a module by torch.export for one kind of call, in both modes.

    Args:
        module: the module.
        call: its arguments.
        settings: options of the plan.
        path: path that the parts should name.
        number: which capture of this module it is; makes the names of its regions and constants unique.

    Raises:
        ExportError: it cannot be captured.
    """
    suffix = f"_call{number}" if number else ""

    def captured(mode: bool) -> Captured:
        holder = f"_mnet_fx_constants{suffix}" + ("" if mode else "_eval")
        return in_mode(module, mode, lambda: passes.capture_by_export(module, *call, holder, path))

    return _both(captured, settings, suffix)


class _Exporter:
    """Tries torch.export from the root downwards, wherever the traced parts leave something over or do not fit the calls they get."""

    def __init__(self, net: nn.Module, settings: Settings, call: Call, traced: Parts) -> None:
        self.net, self.settings, self.call, self.traced = net, settings, call, traced
        self.refusals: list[Refusal] = []
        self.calls: dict[str, list[Call]] | None = None
        self.unfit = {path: other for path, both in traced.both.items() if (other := self._other_call(path, both[True])) is not None}

    def parts(self) -> Parts:
        if not self.unfit and not _leaves_over(self.traced):
            return self.traced
        chosen = dict(self._chosen("", self.net))

        def inside(path: str) -> bool:
            return any(_under(path, top) for top in chosen)

        kept = {path: both for path, both in self.traced.both.items() if not inside(path) and path not in self.unfit}
        refusals = [refusal for refusal in self.traced.refusals if not inside(refusal.path)]
        hint = passes.CODES["untraceable"].hint
        refusals += [
            Refusal("untraceable", "", path, f"example_inputs call it with {other}, for which it cannot be captured", hint)
            for path, other in self.unfit.items()
            if not inside(path)
        ]
        return Parts(kept | chosen, (*refusals, *self.refusals))

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

    def _chosen(self, path: str, module: nn.Module) -> Iterator[tuple[str, dict[bool, Part]]]:
        below = [both[True] for inner, both in self.traced.both.items() if _under(inner, path) and inner not in self.unfit]
        refused = any(_under(other, path) for other in (*self.unfit, *(refusal.path for refusal in self.traced.refusals)))
        if path and not refused:
            return  # traced as part of something larger, or completely
        try:
            both = exported(module, self._example(path), self.settings, path)
        except ExportError as error:
            self.refusals.append(Refusal("untraceable", "", path, f"exporting it failed: {error}", passes.CODES["untraceable"].hint))
            for name, child in passes.forward_children(module):
                yield from self._chosen(f"{path}.{name}" if path else name, child)
            return
        if _gain([both[True]]) > _gain(below):
            yield path, both

    def _example(self, path: str) -> Call:
        if not path:
            return self.call
        if self.calls is None:
            try:
                self.calls = in_mode(self.net, False, lambda: passes.inner_calls(self.net, *self.call))
            except Exception as error:
                raise SettingsError(f"{type(self.net).__name__} does not run on example_inputs: {type(error).__name__}: {error}") from error
        seen = self.calls.get(path, [])
        if not seen:
            raise ExportError("example_inputs do not reach the module")
        return canonical(signature(self.net.get_submodule(path)), *seen[0])


def _gain(parts: Sequence[Part]) -> tuple[int, int]:
    """What a capture is worth: more adds rewritten, and of as many, in fewer and so longer chains."""
    return sum(part.adds for part in parts), -sum(len(part.plan.regions) for part in parts)


def _under(path: str, top: str) -> bool:
    return not top or path == top or path.startswith(f"{top}.")
