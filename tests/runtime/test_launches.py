"""What a training step asks of a GPU: kernels counted, none of them run, and no number read but once. The values are nobody's."""

import collections

import pytest
import torch
from host_reads import noted_reads
from torch import nn

from mnet_fx import momentumize
from mnet_fx.arithmetic import device_planes, device_state, fingerprints
from mnet_fx.arithmetic.kernels import launching

pytest.importorskip("triton")
device_hash = pytest.importorskip("mnet_fx.arithmetic.kernels.device_hash")

STEPS, D = 6, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched since it was last cleared; the CPU counts as a device with Triton."""
    count = collections.Counter()

    def launch(self, device, programs, *arguments):
        count[self.kernel.__name__] += 1

    monkeypatch.setattr(launching.Launcher, "__call__", launch)
    monkeypatch.setattr(device_state, "usable", lambda device: True)
    monkeypatch.setattr(fingerprints, "ON_HOST", set())
    monkeypatch.setattr(fingerprints, "_on_device", lambda device: lambda tensors: device_hash.hashes_on_device(list(tensors)))
    monkeypatch.setattr(device_planes.Planes, "_wait", lambda self, t: None)  # for a device that will not answer
    monkeypatch.setattr(device_planes.Planes, "look", lambda self, wait=False: None)
    return count


@pytest.fixture
def read(monkeypatch):
    return noted_reads(monkeypatch)


@pytest.mark.parametrize(("way", "forward_hashes"), [({}, 1), ({"regions": [""]}, STEPS)], ids=["captured", "named"])
def test_launches_and_reads_of_a_training_step(way, forward_hashes, launched, read):
    net, x = momentumize(nn.Sequential(*(Block() for _ in range(STEPS))), gamma=0.9, **way), torch.randn(3, D, requires_grad=True)
    for _ in range(2):
        net(x).sum().backward()  # captured, all tables made, and looked at what layers leave beside what they return
    launched.clear()
    read.clear()
    out = net(x)
    assert launched == {"start": 1, "fill": 1, "read": 1, "reach": STEPS, "shear": STEPS, "hash_table": forward_hashes}
    assert read == []
    launched.clear()
    out.sum().backward()
    assert launched == {"unshear_x": STEPS, "unshear_u": STEPS, "hash_table": STEPS}
    assert read == ["tolist"]


def test_launches_and_reads_of_inference(launched, read):
    net, x = momentumize(nn.Sequential(*(Block() for _ in range(STEPS))), gamma=0.9).eval(), torch.randn(3, D)
    with torch.no_grad():
        net(x)
        launched.clear()
        read.clear()
        net(x)
    assert launched == {"start": 1, "fill": 1, "read": 1, "reach": STEPS, "shear": STEPS}
    assert read == ["tolist"]  # whether the stream was written to, which no backward pass will ask
