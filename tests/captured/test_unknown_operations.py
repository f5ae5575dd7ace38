"""Models that call what torch.ops knows by name alone."""

import pytest
import torch
from torch import nn

import mnet_fx


@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.as_tensor([3.0]),
        lambda x: torch.as_tensor(True),
        lambda x: torch.tensor([x.shape[0], 2]).sum(),
        lambda x: torch.zeros(torch.Size((x.shape[0], 2))).sum() + 1,
    ],
)
def test_operations_that_no_dispatcher_knows(made):
    """Such as aten::as_tensor and aten::Size, which are TorchScript's alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).tanh()
            return x.sum() * made(x)

    net = mnet_fx.momentumize(Net())
    assert "residual adds" in str(net.report)  # the preview
    for n in (2, 3):
        net(torch.randn(n, 5, 4)).sum().backward()
    assert net.report.rewritten_adds == 3
