"""Batches that are calibrated side by side: as many calls whatever the depth, the same maps, and models that do not bear it."""

import contextlib
import logging
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import mnet_fx
from mnet_fx import calibration
from mnet_fx.lockstep import NAME, OutOfStep, Walk, walking

WIDTH = 8


class Layer(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.__dict__["net"] = net

    def forward(self, x):
        return x + self.net.around(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(Layer(self) for _ in range(depth))

    def around(self, y):
        return y

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Shared(Net):
    """Its calls leave to the layers, on the model, what they need."""

    def around(self, y):
        return y * self.scale

    def forward(self, x):
        self.scale = x.mean() + 1
        return super().forward(x)


class Lock:
    """A lock of each copy's own."""

    def __init__(self):
        self.lock = threading.Lock()

    def __deepcopy__(self, memo):
        return Lock()


class Locked(Net):
    """One call at a time."""

    def __init__(self):
        super().__init__()
        self.lock = Lock()

    def forward(self, x):
        with self.lock.lock:
            return super().forward(x)


class Raising(Net):
    """Does not run in a thread that is not the main one."""

    def forward(self, x):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("not here")
        return super().forward(x)


class TwoChains(Net):
    """Two chains, of which a batch of few rows runs one."""

    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList(Layer(self) for _ in range(3))

    def forward(self, x):
        x = super().forward(x)
        if len(x) > 3:
            for layer in self.more:
                x = layer(x)
        return x


def batches(sizes=(4,) * 8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 16, WIDTH, generator=generator) for n in sizes]


def net_of(cls, *arguments, regions=("layers",)):
    torch.manual_seed(0)
    return mnet_fx.momentumize(cls(*arguments), gamma=0.5, weights="matched", regions=list(regions))


def under_way():
    """The calls that have not ended. Not the count of all threads: inductor's workers start one when the first of them is ready."""
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def one_by_one(monkeypatch, net, calls):
    def never(*arguments):
        raise OutOfStep
        yield

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_side_by_side", never)
        return mnet_fx.calibrate(net, calls)


def same(ours, theirs):
    assert (ours.regions, ours.error_after) == (theirs.regions, theirs.error_after)
    assert len(ours.maps) == len(theirs.maps) > 0
    leaves, expected = (pytree.tree_leaves(c.maps) for c in (ours, theirs))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, expected, strict=True))
    assert any(isinstance(leaf, torch.Tensor) for leaf in leaves)


@pytest.mark.parametrize("depth", [3, 9])
def test_as_many_calls_whatever_the_depth(depth):
    net, calls = net_of(Net, depth), []
    net.layers[-1].norm.register_forward_hook(lambda *_: calls.append(0))
    mnet_fx.calibrate(net, batches())
    assert len(calls) == 3 * 6 + 3 * 2  # six batches to fit on, two held out


@pytest.mark.parametrize("sizes", [(4,) * 8, (2, 4, 3, 4, 2, 4, 4, 2)])
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_maps_of_calls_made_one_by_one(monkeypatch, caplog, sizes, context):
    with context(), caplog.at_level(logging.INFO, "mnet_fx"):
        ours = mnet_fx.calibrate(net_of(TwoChains, regions=("layers", "more")), batches(sizes))
        assert not [r for r in caplog.records if "disturb" in r.message]
        same(ours, one_by_one(monkeypatch, net_of(TwoChains, regions=("layers", "more")), batches(sizes)))


@pytest.mark.parametrize("cls", [Shared, Locked, Raising])
def test_models_whose_calls_disturb_each_other(monkeypatch, caplog, cls):
    monkeypatch.setattr(calibration, "PATIENCE", (0.5, 0.0))
    with caplog.at_level(logging.INFO, "mnet_fx"):
        ours = mnet_fx.calibrate(net_of(cls), batches())
    assert [r for r in caplog.records if "disturb" in r.message]
    same(ours, one_by_one(monkeypatch, net_of(cls), batches()))
    until = time.monotonic() + 30.0  # which a busy machine may need to end one
    while under_way() and time.monotonic() < until:
        time.sleep(0.05)
    assert not under_way()


def test_a_walk_stops_where_it_is_told_to_and_ends():
    passed = []

    def call(stop):
        for i in "abc":
            stop(i)
            passed.append(i)
        return "result"

    with walking([call], 5.0) as (walk,):
        walk.to("b")
        assert (walk.at, passed) == ("b", ["a"])
        assert under_way() == [walk.thread]
        walk.to(None)
        assert (walk.at, walk.result, passed) == (None, "result", ["a", "b", "c"])
    with walking([call], 5.0) as (walk,), pytest.raises(OutOfStep):
        walk.to("d")
    with walking([call, call], 5.0) as walks:
        walks[0].to("a")
    assert not any(walk.thread.is_alive() for walk in walks)


def test_a_walk_has_the_settings_of_the_thread_that_made_it():
    def call(stop):
        stop(0)
        return (
            torch.is_grad_enabled(),
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            torch.get_num_threads(),
        )

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        walk = Walk(call, 5.0)
    walk.to(None)
    assert walk.result == (False, torch.float16, torch.get_num_threads())
