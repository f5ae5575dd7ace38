"""Models that log in their forward: no graph is cut, and what they log is heard at every call, in order."""

import functools
import logging

import pytest
import torch
from torch import nn

from mnet_fx import momentumize

LOG = logging.getLogger("a model's own")


class Block(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.i, self.inner = i, nn.Linear(4, 4)

    def forward(self, x):
        LOG.info("block %d of %s", self.i, len(x))
        LOG.debug(f"mean {self.measured(x)}")
        return x + self.inner(x).tanh()

    def measured(self, x):
        LOG.info("measured %s", x.mean())
        return x.dim()


class Model(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(map(block, range(3)))

    def forward(self, x):
        LOG.warning("begins")
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "ignore_logging_functions"), reason="this Dynamo cuts its graphs there")
def test_what_a_model_logs_cuts_no_chain_and_is_heard(caplog):
    caplog.set_level(logging.DEBUG, LOG.name)
    model, x = Model(), torch.ones(2, 4)
    net = momentumize(model, gamma=0.0)
    for _ in range(2):
        wanted, got = (_heard(caplog, m, x) for m in (model, net))
        assert [line.split()[0] for line in got] == ["begins", *["block", "measured", "mean"] * 3]
        assert [line[:40] for line in got] == [line[:40] for line in wanted]
    assert [region.steps for region in net.report.regions] == [3]
    assert len(net.report.captured) == 1


def _heard(caplog, model, x):
    caplog.clear()
    model(x)
    return [record.getMessage() for record in caplog.records if record.name == LOG.name]


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "ignore_logging_functions"), reason="this Dynamo cuts its graphs there")
def test_what_a_library_adds_to_loggers(caplog, monkeypatch):
    @functools.lru_cache
    def warning_once(self, *args):
        self.warning(*args)

    class Once(Block):
        def forward(self, x):
            LOG.warning_once("once")
            return super().forward(x)

    monkeypatch.setattr(logging.Logger, "warning_once", print, raising=False)  # another library's, before
    momentumize(Model())(torch.ones(2, 4))
    monkeypatch.setattr(logging.Logger, "warning_once", warning_once)
    net = momentumize(Model(Once), gamma=0.5)
    heard = [_heard(caplog, net, torch.ones(2, 4)) for _ in range(2)]
    assert [lines.count("once") for lines in heard] == [1, 0]
    assert len(net.report.regions) == len(net.report.captured) == 1


def test_dynamo_is_left_as_it_was():
    before = set(torch._dynamo.config.reorderable_logging_functions)
    momentumize(Model())(torch.ones(2, 4))
    assert torch._dynamo.config.reorderable_logging_functions == before
