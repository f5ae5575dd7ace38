"""Caches in the code of a model: a capture fills none of them with what only stands for tensors."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from torch import nn

import mnet_fx
from passes.capturing.leftovers import Outside

TABLES: dict = {"old": {}}
LOG: list = [1]
CURRENT = None


@functools.lru_cache
def by_lru(n):
    return torch.arange(n).float()


def by_dict(n):
    if n not in TABLES:
        TABLES[n] = torch.arange(n).float()
    return TABLES[n]


def by_inner_dict(n):
    inner = TABLES["old"]
    if n not in inner:
        inner[n] = (torch.arange(n).float(), "a pair")
    return inner[n][0]


def by_variable(n):
    global CURRENT
    if CURRENT is None:
        CURRENT = torch.arange(n).float()
    return CURRENT


def by_list(n):
    if len(LOG) == 1:
        LOG.append(torch.arange(n).float())
    return LOG[-1]


class Holder:
    def __init__(self):
        self.table, self.count = None, 0


HOLDER = Holder()


def by_object(n):
    if HOLDER.table is None:
        HOLDER.table = torch.arange(n).float()
    return HOLDER.table


class Own(nn.Module):
    tables: dict = {}  # noqa: RUF012

    @staticmethod
    @functools.lru_cache
    def by_static(n):
        return torch.arange(n).float()

    def __init__(self, table, untraceable):
        super().__init__()
        self.blocks, self.table, self.untraceable = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), table, untraceable

    def by_own_class(self, n):
        if n not in self.tables:
            self.tables[n] = torch.arange(n).float()
        return self.tables[n]

    def forward(self, x):
        if self.untraceable and x.dim() != 2:
            raise ValueError
        table = getattr(self, self.table) if isinstance(self.table, str) else self.table
        for block in self.blocks:
            x = x + block(x + table(4))
        return x


TABLE_MAKERS = [by_lru, by_dict, by_inner_dict, by_variable, by_list, by_object, "by_static", "by_own_class"]


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr("test_leftovers.TABLES", {"old": {}})
    monkeypatch.setattr("test_leftovers.LOG", [1])
    monkeypatch.setattr("test_leftovers.CURRENT", None)
    HOLDER.__init__()
    Own.tables.clear()
    by_lru.cache_clear()
    Own.by_static.cache_clear()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped function")
@pytest.mark.parametrize("table", TABLE_MAKERS)
@pytest.mark.parametrize("untraceable", [False, True], ids=["readable", "unreadable"])
def test_a_model_with_a_cache_is_rewritten_and_the_cache_left_as_it_was(table, untraceable):
    model, x = Own(table, untraceable), torch.randn(2, 4)
    net = mnet_fx.momentumize(model, gamma=0)
    assert net.report.rewritten_adds == (0 if untraceable else 3)  # a preview
    net = mnet_fx.momentumize(model, (x,), gamma=0)
    assert net.report.rewritten_adds == 3
    assert TABLES == {"old": {}}
    assert LOG == [1]
    assert CURRENT is None
    assert vars(HOLDER) == {"table": None, "count": 0}
    assert not Own.tables
    found = net(x)
    kept = [*TABLES.values(), *(pair[0] for pair in TABLES["old"].values()), *LOG, CURRENT, HOLDER.table, *Own.tables.values()]
    assert {type(value) for value in kept} <= {dict, int, type(None), torch.Tensor}  # what a call keeps is real
    zoo.assert_agree(found, model(x))


def test_what_was_in_a_cache_before_stays():
    table, _, _ = by_dict(3), by_lru(3), by_inner_dict(3)
    mnet_fx.momentumize(Own(by_dict, False), gamma=0)
    assert TABLES[3] is table
    assert 3 in TABLES["old"]
    assert by_lru.cache_info().currsize == 1


class Logs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen, self.holder = nn.Linear(4, 4), {"means": []}, Holder()

    def forward(self, x):
        self.seen["means"].append(x.mean())
        self.holder.table = x.mean()
        return self.linear(x)


class Logging(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Logs() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_list_inside_a_dictionary_of_a_module_goes_on_to_be_filled():
    model, x = Logging().double(), torch.randn(2, 4).double()  # means are small beside what they are of
    net = mnet_fx.momentumize(model, (x,), gamma=0)
    assert net.report.rewritten_adds == 3
    assert net.blocks[1].seen == {"means": []}
    assert vars(net.blocks[1].holder) == {"table": None, "count": 0}
    for calls in (1, 2):
        net(x)
        model(x)
        for found, expected in zip(net.blocks, model.blocks, strict=True):
            assert [type(mean) for mean in found.seen["means"]] == [torch.Tensor] * calls
            zoo.assert_agree(found.seen["means"], expected.seen["means"])
            assert type(found.holder.table) is torch.Tensor
            zoo.assert_agree(found.holder.table, expected.holder.table)


def test_a_namespace_is_left_alone_where_nothing_stands_for_a_value():
    outside = Outside(Own(by_dict, False))
    TABLES[5], TABLES["old"]["five"] = torch.ones(5), [torch.ones(5)]
    outside.clean()
    assert set(TABLES) == {"old", 5}
    assert len(TABLES["old"]["five"]) == 1
