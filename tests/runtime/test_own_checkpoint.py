"""Libraries put functions of their own in place of `torch.utils.checkpoint.checkpoint`; chains run under torch's."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch.utils.checkpoint

calls = []

def offloading(function, *args, **kwargs):
    calls.append(function)
    return function(*args)

if {before}:
    torch.utils.checkpoint.checkpoint = offloading
import mnet_fx
from mnet_fx.runtime.own_checkpoint import checkpoint
torch.utils.checkpoint.checkpoint = offloading
assert checkpoint.__module__ == "torch.utils.checkpoint"

torch.manual_seed(0)
layer = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2))

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(layer() for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

model, x = Net(), torch.randn(5, 8)
for options in (dict(), dict(rest="checkpoint")):
    found = []
    for backward in ("reversible", "stored"):
        net = mnet_fx.momentumize(model, backward=backward, **options)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(net(x).square().sum(), [*net.parameters()]))
    assert all(map(torch.equal, *found))
net = mnet_fx.momentumize(model)
y = net(x).sum()
with torch.no_grad():
    model.layers[3][0].weight.add_(1)
try:
    y.backward()
except mnet_fx.InversionError:
    pass
else:
    raise AssertionError("no error")
assert not calls
"""


@pytest.mark.parametrize("before", [True, False], ids=["before the import", "afterwards"])
def test_it_is_torchs_own(before):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM.format(before=before)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
