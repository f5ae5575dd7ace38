"""Bytes kept and peak bytes do not grow with depth."""

import pytest
import torch
from models import Encoder
from torch import Tensor

from mnet_fx import momentumize
from mnet_fx.memory import measure

GENERATOR_STATE = 5056  # bytes of a CPU generator's state, kept by a step that draws


def memory(layers: int, dropout: float):
    torch.set_num_threads(2)
    net = momentumize(Encoder(layers, dropout=dropout), gamma=0.9)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(8, 256, 256)
    return measure(lambda: net(x).sum(), Tensor.backward)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_and_peak_bytes_of_an_encoder_do_not_grow_with_depth(dropout):
    memory(1, dropout)  # lazily made buffers
    shallow, deep = memory(8, dropout), memory(64, dropout)
    drawn = 2 * 56 * GENERATOR_STATE if dropout else 0
    assert deep.kept <= 1.02 * shallow.kept + drawn
    assert deep.peak <= 1.02 * shallow.peak + drawn
    assert shallow.kept <= 8 * 2**20 * 1.02 + 16 * GENERATOR_STATE  # X, U and the output: 16 bytes for each of 2**19 elements


def test_the_meter_counts_what_is_kept_and_the_peak():
    a = torch.ones(1000, requires_grad=True)
    a.grad = torch.zeros(1000)
    (a * 2).sum().backward()
    counted = measure(lambda: (a * a).exp(), lambda y: y.backward(torch.ones(1000)))
    assert 4000 <= counted.kept <= 4000 + 4096  # exp keeps its result; a is not counted
    assert 12000 <= counted.peak <= 12000 + 3 * 4096
