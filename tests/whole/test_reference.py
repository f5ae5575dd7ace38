"""The independent count of residual adds, `benchmarks/reference.py`, on models of which the number is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

SPEC = importlib.util.spec_from_file_location("reference", Path(__file__).parent.parent.parent / "benchmarks" / "reference.py")
reference = sys.modules["reference"] = importlib.util.module_from_spec(SPEC)  # which dataclasses look for
SPEC.loader.exec_module(reference)


def by_slices(y):
    out = y.new_zeros(y.shape)
    out[:, :2] = y[:, :2]
    out[:, 2:] = y[:, 2:]
    return out


class Chain(nn.Module):
    def __init__(self, change, norm):
        super().__init__()
        self.f, self.g, self.change = nn.Linear(4, 4), nn.Linear(4, 4), change
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x):
        for _ in range(3):
            x = self.norm(x + self.f(self.change(self.f(x))))
            x = self.norm(x + self.g(x))
        return x


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("change", "adds"),
    [
        (nn.Identity(), 6),
        (torch.zeros_like, 3),  # the first branch gives the bias alone, which a link may add
        (by_slices, 6),
        (lambda y: torch.empty_like(y).copy_(y), 6),
    ],
    ids=["plain", "zeros", "slices", "copy"],
)
def test_a_branch_depends_on_the_values_of_its_input(change, adds, norm):
    assert reference.count(Chain(change, norm), {"x": torch.randn(2, 4)}) == {"adds": adds, "in_chains": adds, "chains": 1}
