"""The code of a step: its nodes as a graph of their own, shared by all steps that have the same one.

Names are made canonical (x, s0, s1, ... for inputs, m0, m1, ... for modules, a0, a1, ... for attributes), so that two steps are equal
exactly if they call the same operations with the same constants in the same pattern. A region within the step is the call of a module.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from passes.graphs.facts import Facts
from passes.graphs.ops import OUT_OF_PLACE
from passes.graphs.orders import Order, laid, orders_of
from passes.regions import PlannedRegion, RegionCode, Step, StepCode

__all__ = ["call_region", "outputs_of", "region_code"]

_Unit = fx.Node | PlannedRegion
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)


def region_code(
    region: PlannedRegion,
    facts: Facts,
    bodies: dict[Hashable, fx.Graph],
    inner: Sequence[PlannedRegion] = (),
    position: Mapping[str, int] = MappingProxyType({}),
) -> RegionCode:
    """Write the code of a planned region.

    Args:
        region: the region.
        facts: facts of its graph.
        bodies: bodies made so far by structure; new ones are added.
        inner: the regions within its steps.
        position: where there are such, an order by name of the nodes and of these, in which each of these can be one call.

    Returns:
        The region with one code per step.
    """
    sides = {name: i for i, name in enumerate(region.sides)}
    step_of = {name: t for t, step in enumerate(region.steps) for name in step.nodes} if inner else {}
    held: dict[int, list[PlannedRegion]] = {}
    for found in inner:
        held.setdefault(step_of[found.steps[-1].target], []).append(found)
    _, own = orders_of(region, facts.named)
    writers = (_Writer(step, held.get(t, []), facts, position, own[t]) for t, step in enumerate(region.steps))
    return RegionCode(region, tuple(writer.code(sides, bodies) for writer in writers))


def outputs_of(region: PlannedRegion, named: Mapping[str, fx.Node]) -> list[fx.Node]:
    """The nodes of a graph whose values a region returns, in the order of `RegionCode`."""
    names = [region.steps[-1].target, *(region.steps[t].source for t in region.escapes)]
    return [named[name] for name in (*names, *region.extras, *(total.nodes[-1] for total in region.totals))]


def call_region(
    graph: fx.Graph, target: str, region: PlannedRegion, args: Sequence[fx.Node], named: Mapping[str, fx.Node]
) -> list[fx.Node]:
    """Write the call of a region.

    Args:
        graph: where to.
        target: the module to call.
        region: the region.
        args: x[0] and the side inputs, in that graph.
        named: the nodes of the graph that was planned, by name.

    Returns:
        The nodes of the values it returns, as in `outputs_of`; if these are several, each is a getitem. What the model has in another order
        of memory than the chain is brought into it: x[0] before the call, the others after.
    """
    x, *sides = args
    order, own = orders_of(region, named)
    outputs = outputs_of(region, named)
    call = graph.create_node("call_module", target, (laid(graph, x, order) if order and own[0] else x, *sides), name=target)
    values = [call]
    if len(outputs) > 1:
        values = [graph.create_node("call_function", operator.getitem, (call, i), name=old.name) for i, old in enumerate(outputs)]
    for new, old in zip(values, outputs, strict=True):
        new.meta = dict(old.meta)
    orders = [own[-1], *(own[t] for t in region.escapes)]
    streams = [value if order is None else laid(graph, value, order) for value, order in zip(values[: len(orders)], orders, strict=True)]
    return [*streams, *values[len(orders) :]]


class _Writer:
    """Writes one step. A value is referred to by a pair: ("x", 0), ("s", j), ("a", i), or ("n", k) for the k-th value computed."""

    def __init__(self, step: Step, inner: list[PlannedRegion], facts: Facts, position: Mapping[str, int], order: Order | None) -> None:
        self.step, self.named, self.order = step, (named := facts.named), order
        held = {name for region in inner for within in region.steps for name in within.nodes}
        self.nodes = [named[name] for name in step.nodes if name not in held and (step.form == "block" or name != step.target)]
        self.units: list[_Unit] = [*self.nodes, *inner]
        if inner:
            self.units.sort(key=lambda unit: position[unit.name])
        self.copied = facts.copied_adds(named[step.source], self.nodes)
        self.modules = _numbered(self._module(unit) for unit in self.units if isinstance(unit, PlannedRegion) or unit.op == "call_module")
        handed = {named[name] for name in step.sides}
        reads = [n for node in self.nodes for n in node.all_input_nodes if n.op == "get_attr" and n not in handed]
        self.attributes = _numbered(str(source.target) for source in reads)
        self.places: dict[fx.Node, tuple[str, int]] = {source: ("a", self.attributes[str(source.target)]) for source in reads}
        self.places |= {named[name]: ("s", j) for j, name in enumerate(step.sides)}
        values = [node for unit in self.units for node in (outputs_of(unit, named) if isinstance(unit, PlannedRegion) else [unit])]
        self.places |= {node: ("n", k) for k, node in enumerate(values)}
        self.places[named[step.source]] = ("x", 0)
        self.outputs = [named[step.branch or step.target], *(named[name] for name in step.extras)]

    def code(self, position: dict[str, int], bodies: dict[Hashable, fx.Graph]) -> StepCode:
        key = self.structure()
        if key not in bodies:
            bodies[key] = self.body()
        return StepCode(
            body=bodies[key],
            form=self.step.form,
            modules=tuple(self.modules),
            attributes=tuple(self.attributes),
            sides=tuple(position[name] for name in self.step.sides),
            extras=len(self.step.extras),
            path=self.step.path,
            written=self.step.written,
        )

    def structure(self) -> Hashable:
        """Everything that decides the text of the body."""
        return tuple(map(self.line, self.units)), self.frozen(self.outputs), len(self.step.sides), len(self.attributes), self.order

    def line(self, unit: _Unit) -> Hashable:
        if isinstance(unit, PlannedRegion):
            inputs, orders = self.frozen(self.inputs(unit)), orders_of(unit, self.named)
            return "region", self.called(unit), inputs, orders, len(outputs_of(unit, self.named))
        return self.operation(unit), self.frozen(unit.args), self.frozen(unit.kwargs)

    def inputs(self, region: PlannedRegion) -> tuple[fx.Node, ...]:
        return tuple(self.named[name] for name in (region.steps[0].source, *region.sides))

    def called(self, unit: _Unit) -> str:
        return f"m{self.modules[self._module(unit)]}"

    @staticmethod
    def _module(unit: _Unit) -> str:
        return unit.name if isinstance(unit, PlannedRegion) else str(unit.target)

    def operation(self, node: fx.Node) -> tuple[str, Any]:
        if node.op == "call_module":
            return node.op, self.called(node)
        return node.op, OUT_OF_PLACE[node.target] if node in self.copied else node.target

    def frozen(self, value: Any) -> Hashable:
        """An argument as a value that is equal for equal code; constants keep their type, since 1 == 1.0 == True."""
        if isinstance(value, fx.Node):
            return self.places[value]
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple, *map(self.frozen, value))
        if isinstance(value, dict):
            return (dict, *((key, self.frozen(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return (slice, self.frozen(value.start), self.frozen(value.stop), self.frozen(value.step))
        return (type(value), repr(value)) if isinstance(value, _PLAIN) else ("object", id(value))

    def body(self) -> fx.Graph:
        graph = fx.Graph()
        values = {("x", 0): graph.placeholder("x")}
        values |= {("s", j): graph.placeholder(f"s{j}") for j in range(len(self.step.sides))}
        values |= {("a", i): graph.create_node("get_attr", f"a{i}") for i in range(len(self.attributes))}

        if self.order is not None:
            values["x", 0] = laid(graph, values["x", 0], self.order)

        def value(node: fx.Node) -> fx.Node:
            return values[self.places[node]]

        for unit in self.units:
            if isinstance(unit, PlannedRegion):
                new = call_region(graph, self.called(unit), unit, [value(node) for node in self.inputs(unit)], self.named)
                values |= {self.places[old]: made for old, made in zip(outputs_of(unit, self.named), new, strict=True)}
                continue
            op, target = self.operation(unit)
            args, kwargs = map_arg(unit.args, value), map_arg(unit.kwargs, value)
            values[self.places[unit]] = graph.create_node(op, target, args, kwargs)
        graph.output(tuple(value(node) for node in self.outputs))
        return graph


def _numbered(paths: Iterable[str]) -> dict[str, int]:
    return {path: i for i, path in enumerate(dict.fromkeys(paths))}
