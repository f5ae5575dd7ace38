"""Random straight-line programs, full of aliases and writes in place: whatever is rewritten must compute what it did, to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: F401  # the programs name it
from passes_models import linears, program, rewritten, traced
from torch import nn

from passes import plan


def overwrite(x: torch.Tensor, y: torch.Tensor) -> None:
    x.mul_(y)


torch.fx.wrap("overwrite")

BRANCHES = (
    "self.f[{i}]({x})",
    "self.f[{i}]({x}.relu()) * {a}",
    "self.f[{i}]({x}) + {a}",
    "self.g(self.f[{i}]({x})).relu_()",
    "F.relu(self.f[{i}]({x}), inplace=True)",
    "self.f[{i}]({a} * {x})",
    "self.f[{i}]({x}) + self.f[{j}]({x})",
    "self.f[{i}]({x}.view(-1)[:4])",
    "self.f[{i}]({a})",
)
STEPS = (
    "{v} = {x} + {branch}",
    "{v} = {branch} + {x}",
    "{v} = {branch}; {v} += {x}",
    "{v} = torch.relu({x} + {branch})",
    "{x} += {branch}; {v} = {x}",
    "{v} = ({x} + {branch}).relu_()",
)
VALUES = (
    "{v} = self.f[{i}]({a})",
    "{v} = {a} * {b}",
    "{v} = {a} + {b}",
    "{v} = {a}.view(4)",
    "{v} = {a}.contiguous()",
    "{v} = self.drop({a})",
    "{v} = torch.zeros(4); {v}[1] = 2.0",
)
WRITES = (
    "{a}.mul_(0.5)",
    "{a} += {b}",
    "{a}[0] = 1.0",
    "F.relu_({a})",
    "overwrite({a}, {b})",
    "{a}[:2].add_(1)",
    "{v} = {a}.view(-1); {v}.add_({b})",
)


def source(rng: random.Random) -> str:
    """A forward function; a third of the programs write in place all the time, a third never."""
    lines, values, stream = ["s = self.f[0](x)", "m = y * 1"], ["x", "y", "s", "m"], "s"
    writes = rng.choice([0.0, 0.3, 1.0])
    for t in range(rng.randint(6, 24)):
        pool = values[-6:] if rng.random() < 0.7 else values
        names = {"v": f"v{t}", "x": stream, "i": rng.randrange(4), "j": rng.randrange(4), "a": rng.choice(pool), "b": rng.choice(pool)}
        chance = rng.random()
        if chance < 0.5:
            step = rng.choice(STEPS if rng.random() < writes else STEPS[:4])
            line = step.format(branch=rng.choice(BRANCHES).format(**names), **names)
            stream = names["v"]
        elif chance < 0.6 and rng.random() < writes:
            line = rng.choice(WRITES).format(**names)
        elif chance < 0.65:
            stream = names["a"]
            continue
        else:
            line = rng.choice(VALUES).format(**names)
        lines.append(line)
        values += [names["v"]] * (f"{names['v']} =" in line)
    outputs = [*rng.sample(values, min(3, len(values))), stream]
    return "def forward(self, x, y):\n    " + "\n    ".join(lines) + f"\n    return {', '.join(outputs)}\n"


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_programs(first):
    rewrites, within = 0, 0
    for seed in range(first, first + 20):
        text, scope = source(random.Random(seed)), dict[str, Any]()
        exec(text, globals(), scope)  # in the globals of this file, where torch.fx.wrap finds `overwrite`
        model = program(scope["forward"], f=linears(4), g=nn.LayerNorm(4), drop=nn.Dropout(0.1))
        gm = traced(model)
        inputs = torch.randn(2, 4)
        for granularity, min_steps, nested in (("add", 1, False), ("add", 2, False), ("module", 2, False), ("add", 1, True)):
            found = plan(gm, granularity=granularity, min_steps=min_steps, nested=nested)
            rewrites += len(found.rewritten_adds)
            within += sum(bool(region.within) for region in found.regions)
            assert _run(rewritten(model, gm, found), inputs) == _run(model, inputs), f"seed {seed}\n{text}"
    assert rewrites > 200
    assert within > 0


@torch.no_grad()
def _run(model: nn.Module, inputs: torch.Tensor) -> list[list[float]]:
    """Outputs, and the arguments as the call left them."""
    x, y = inputs.clone()
    return [value.tolist() for value in (*model(x, y), x, y)]
