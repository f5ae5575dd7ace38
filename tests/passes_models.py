"""A plain network behind `build_region`: it runs the steps of a region as they are, so a rewritten graph must compute what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import nn

from passes import Granularity, Plan, RegionCode, StepCode, plan, preview, rewrite, unlift


class PlainStep(nn.Module):
    """One step of a region over the live modules and attributes of a model."""

    def __init__(self, model: nn.Module, code: StepCode, regions: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.code = code
        targets: dict[str, Any] = {f"m{i}": regions.get(path) or model.get_submodule(path) for i, path in enumerate(code.modules)}
        for i, path in enumerate(code.attributes):
            owner, _, name = path.rpartition(".")
            targets[f"a{i}"] = getattr(model.get_submodule(owner), name)
        self.body = fx.GraphModule(targets, code.body)

    def forward(self, x: torch.Tensor, *sides: Any) -> tuple[torch.Tensor, list[Any]]:
        y, *extras = self.body(x, *(sides[j] for j in self.code.sides))
        return (x + y if self.code.form == "branch" else y), extras


class PlainRegion(nn.Module):
    """A region that is the plain network; `regions` are those made before it, which may lie within its steps."""

    def __init__(self, model: nn.Module, code: RegionCode, regions: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        super().__init__()
        self.region = code.region
        self.steps = nn.ModuleList(PlainStep(model, step, regions) for step in code.steps)

    def forward(self, x: torch.Tensor, *sides: Any) -> Any:
        stream, extras = [x], []
        for step in self.steps:
            x, more = step(x, *sides)
            stream.append(x)
            extras += more
        rest = [*(stream[t] for t in self.region.escapes), *extras]
        return (x, *rest) if rest else x


def program(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module with the given forward function and the given submodules, lists of submodules, parameters and attributes."""
    module: nn.Module = type("Program", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, nn.ModuleList(part) if isinstance(part, list) else part)
    return module.eval()


def linears(number: int, width: int = 4) -> list[nn.Module]:
    """Mixing branches."""
    return [nn.Linear(width, width) for _ in range(number)]


def traced(model: nn.Module) -> fx.GraphModule:
    """The graph of a model that can be traced as a whole."""
    seen = preview(model)
    assert list(seen.parts) == [""], seen.opaque
    return seen.parts[""]


def by_dynamo(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    """The graph that Dynamo makes of a model for some inputs, which records shapes and dtypes, as the passes read it."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(unlift(gm).graph_module)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*inputs)
    (gm,) = found
    return gm


def planned(model: nn.Module, granularity: Granularity = "add", min_steps: int = 2, nested: bool = False) -> Plan:
    return plan(traced(model), granularity=granularity, min_steps=min_steps, nested=nested)


def codes(found: Plan) -> list[str]:
    return [refusal.code for refusal in found.refusals]


def lengths(found: Plan) -> list[int]:
    return [len(region.steps) for region in found.regions]


def rewritten(model: nn.Module, gm: fx.GraphModule, found: Plan) -> fx.GraphModule:
    """The graph with plain regions; the given graph must keep its text."""
    text = gm.code
    regions: dict[str, nn.Module] = {}

    def build(code: RegionCode) -> nn.Module:
        return regions.setdefault(code.region.name, PlainRegion(model, code, regions))

    result = rewrite(gm, found, build)
    assert gm.code == text
    assert result.modified == bool(found.regions)
    return result.graph_module


def check_same(
    model: nn.Module, *inputs: torch.Tensor, granularity: Granularity = "add", gradients: bool = True, nested: bool = False
) -> Plan:
    """Plan and rewrite a model; its outputs must be those of the model to the bit, its input gradients up to their order of summation."""
    model.double()
    gm = traced(model)
    found = plan(gm, granularity=granularity, nested=nested)
    assert found == plan(gm, granularity=granularity, nested=nested)
    new = rewritten(model, gm, found)
    expected, got = (_outputs_and_gradients(run, inputs, gradients) for run in (model, new))
    assert [torch.equal(a, b) for a, b in zip(expected[0], got[0], strict=True)] == [True] * len(expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-12)
    return found


def _outputs_and_gradients(
    run: nn.Module, inputs: tuple[torch.Tensor, ...], gradients: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    leaves = [value.double().requires_grad_(gradients) for value in inputs]
    outputs = [output for output in pytree.tree_leaves(run(*leaves)) if isinstance(output, torch.Tensor)]
    if gradients:
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return outputs, [leaf.grad for leaf in leaves if leaf.is_leaf and leaf.grad is not None]
