"""What is called first in a process finds nothing prepared: no compiled loops, no note of another call."""

import subprocess
import sys

import pytest

MODEL = """
import warnings
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
import mnet_fx

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(self.norm(x))))

torch.set_num_threads(1)
model, x = nn.Sequential(*[Block() for _ in range(8)]), torch.randn(64, 8)
"""
FIRST = {
    "estimate": "assert (found := mnet_fx.estimate(model, (x,))).momentum.kept_bytes < found.plain.kept_bytes",
    "plan": "assert mnet_fx.plan(model, (x,), memory=0.9).options",
    "fake": "with FakeTensorMode(allow_non_fake_inputs=True) as mode: mnet_fx.momentumize(model, regions=[''])(x).sum().backward()",
    "verify": "assert mnet_fx.verify(mnet_fx.momentumize(model, (x,)), x).ok",
    "vmap": "torch.func.vmap(mnet_fx.momentumize(model, backward='stored'))(x)",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ("estimate", "fake") else pytest.mark.slow) for name in FIRST])
def test_works_as_the_first_call(name):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MODEL + FIRST[name]], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
