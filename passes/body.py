"""The code of a step: its nodes as a graph of their own, shared by all steps that have the same one.

Names are made canonical (x, s0, s1, ... for inputs, m0, m1, ... for modules, a0, a1, ... for attributes), so that two steps are equal
exactly if they call the same operations with the same constants in the same pattern.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from enum import Enum
from typing import Any

import torch
import torch.fx as fx
from torch.fx.node import map_arg

from passes.facts import Facts
from passes.ops import OUT_OF_PLACE
from passes.regions import PlannedRegion, RegionCode, Step, StepCode
from passes.steps import copied_adds

__all__ = ["region_code"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)


def region_code(region: PlannedRegion, facts: Facts, bodies: dict[Hashable, fx.Graph]) -> RegionCode:
    """Write the code of a planned region.

    Args:
        region: the region.
        facts: facts of its graph.
        bodies: bodies made so far by structure; new ones are added.

    Returns:
        The region with one code per step.
    """
    named = {node.name: node for node in facts.nodes}
    position = {name: i for i, name in enumerate(region.sides)}
    return RegionCode(region, tuple(_Writer(step, named, facts).code(position, bodies) for step in region.steps))


class _Writer:
    """Writes one step. A value is referred to by a pair: ("x", 0), ("s", j), ("a", i), or ("n", k) for the k-th node."""

    def __init__(self, step: Step, named: dict[str, fx.Node], facts: Facts) -> None:
        self.step, self.named = step, named
        self.nodes = [named[name] for name in step.nodes if step.form == "block" or name != step.target]
        self.copied = copied_adds(named[step.source], self.nodes, facts)
        self.modules = _numbered(str(node.target) for node in self.nodes if node.op == "call_module")
        reads = [source for node in self.nodes for source in node.all_input_nodes if source.op == "get_attr"]
        self.attributes = _numbered(str(source.target) for source in reads)
        self.places: dict[fx.Node, tuple[str, int]] = {source: ("a", self.attributes[str(source.target)]) for source in reads}
        self.places |= {named[name]: ("s", j) for j, name in enumerate(step.sides)}
        self.places |= {node: ("n", k) for k, node in enumerate(self.nodes)}
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
        lines = (((*self.operation(node),), self.frozen(node.args), self.frozen(node.kwargs)) for node in self.nodes)
        return tuple(lines), self.frozen(self.outputs), len(self.step.sides), len(self.attributes)

    def operation(self, node: fx.Node) -> tuple[str, Any]:
        if node.op == "call_module":
            return node.op, f"m{self.modules[str(node.target)]}"
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

        def value(node: fx.Node) -> fx.Node:
            return values[self.places[node]]

        for node in self.nodes:
            op, target = self.operation(node)
            args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
            values[self.places[node]] = graph.create_node(op, target, args, kwargs)
        graph.output(tuple(value(node) for node in self.outputs))
        return graph


def _numbered(paths: Iterable[str]) -> dict[str, int]:
    return {path: i for i, path in enumerate(dict.fromkeys(paths))}
