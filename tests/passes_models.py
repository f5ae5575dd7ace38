"""A plain network behind `build_region`: it runs the steps of a region as they are, so a rewritten graph must compute what it did."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import nn

from passes import RegionCode, StepCode


class PlainStep(nn.Module):
    """One step of a region over the live modules and attributes of a model."""

    def __init__(self, model: nn.Module, code: StepCode) -> None:
        super().__init__()
        self.code = code
        targets: dict[str, Any] = {f"m{i}": model.get_submodule(path) for i, path in enumerate(code.modules)}
        for i, path in enumerate(code.attributes):
            owner, _, name = path.rpartition(".")
            targets[f"a{i}"] = getattr(model.get_submodule(owner), name)
        self.body = fx.GraphModule(targets, code.body)

    def forward(self, x: torch.Tensor, *sides: Any) -> tuple[torch.Tensor, list[Any]]:
        y, *extras = self.body(x, *(sides[j] for j in self.code.sides))
        return (x + y if self.code.form == "branch" else y), extras


class PlainRegion(nn.Module):
    """A region that is the plain network."""

    def __init__(self, model: nn.Module, code: RegionCode) -> None:
        super().__init__()
        self.region = code.region
        self.steps = nn.ModuleList(PlainStep(model, step) for step in code.steps)

    def forward(self, x: torch.Tensor, *sides: Any) -> Any:
        stream, extras = [x], []
        for step in self.steps:
            x, more = step(x, *sides)
            stream.append(x)
            extras += more
        rest = [*(stream[t] for t in self.region.escapes), *extras]
        return (x, *rest) if rest else x
