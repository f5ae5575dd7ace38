"""Chains that leave their state on the host while they wait: on a CPU that is told to do as CUDA does, but for streams and pinned memory.

The kernels of a device are tried with it in `arithmetic/device_cases.py`, a GPU in `tests/test_cuda.py`.
"""

import copy
import gc
import weakref

import pytest
import torch
from models import Encoder
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import mnet_fx
from mnet_fx import MnetWarning, SettingsError
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime import offload
from mnet_fx.runtime.cuda_streams import Handover
from mnet_fx.runtime.steps import watched
from mnet_fx.runtime.tape import ReversingTape


@pytest.fixture
def apart(monkeypatch):
    """The CPU has memory apart from the host's."""
    monkeypatch.setattr(offload, "_DEVICES", {"cpu"})


class Two(nn.Module):
    """Two chains, and more after each of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Encoder(4, d=16, heads=2, dropout=0.1), Encoder(5, d=16, heads=2, dropout=0.1)
        self.between, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.between(self.first(x)))))


WAYS = {"captured": {}, "named": {"regions": ["first.layers", "second.layers"]}, "kept": {"keep": "20KiB"}}


def away(tape):
    """Whether nothing of the state is in the memory of the device; all of it, or nothing."""
    sizes = {t.untyped_storage().nbytes() > 0 for t in (*tape.state.bulk(), *tape._spilled())}
    assert len(sizes) == 1
    return not sizes.pop()


def run(net, x):
    """The tapes of a forward pass, in order; and its output."""
    tapes = {}
    torch.manual_seed(1)
    with watched(lambda tape, t, x: tapes.setdefault(id(tape), tape)):
        out = net(x)
    return list(tapes.values()), out


def nets(**options):
    """The same network, with offload and without."""
    torch.manual_seed(0)
    model = Two()
    return [mnet_fx.momentumize(copy.deepcopy(model), offload=offload, **options) for offload in (True, False)]


def gradients(net, x):
    tapes, out = run(net, x)
    net.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())], tapes


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_and_no_state_is_there_meanwhile(apart, way):
    for gamma in (0.9, 0.03):
        a, b = nets(gamma=gamma, **WAYS[way])
        x = torch.randn(3, 7, 16)
        for _ in range(2):
            tapes, out = run(a, x)
            assert [type(tape) for tape in tapes] == [ReversingTape] * 2
            assert all(map(away, tapes))
            assert any(len(tape._spilled()) for tape in tapes) == (gamma < 0.1)
            assert any(tape.end < len(tape.factors) for tape in tapes) == (way == "kept")
            a.zero_grad()
            out.square().sum().backward()
            assert not any(map(away, tapes))
            expected, plain = gradients(b, x)
            assert not any(map(away, plain))
            assert all(map(torch.equal, [out, *(p.grad for p in a.parameters())], expected))


def test_a_chain_comes_back_when_its_turn_comes(apart):
    a, _ = nets()
    tapes, out = run(a, torch.randn(3, 7, 16))
    turns = []
    a.between.weight.register_hook(lambda grad: turns.append([away(tape) for tape in tapes]))
    a.head.weight.register_hook(lambda grad: turns.append([away(tape) for tape in tapes]))
    out.sum().backward()
    assert turns == [[True, True], [True, False]]


def test_parts_of_a_pass_passes_again_and_gradients_of_gradients(apart):
    a, b = nets(gamma=0.3)
    found = []
    for net in (a, b):
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # others have no second gradient
            _, out = run(net, x)
        wanted = [net.second.layers[3].attention.qkv.weight, net.first.layers[1].attention.qkv.weight]
        parts = [torch.autograd.grad(out.square().sum(), w, retain_graph=True)[0] for w in (wanted[0], *wanted)]
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append([*parts, *torch.autograd.grad(first.square().sum(), [x, *wanted])])
    assert all(map(torch.equal, *found))


class Full:
    """Memory of a device that has none left at first."""

    def __init__(self, here):
        self.here, self.asked = here, 0

    def untyped_storage(self):
        self.asked += 1
        if self.asked == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.here.untyped_storage()

    def copy_(self, there, non_blocking):
        return self.here.copy_(there, non_blocking)


def test_where_there_is_no_memory_the_pass_can_be_made_again(apart):
    a, b = nets()
    x = torch.randn(3, 7, 16)
    tapes, out = run(a, x)
    copies = tapes[0].handover.copies
    copies[0] = (Full(copies[0][0]), copies[0][1])
    with pytest.raises(torch.OutOfMemoryError):
        out.square().sum().backward(retain_graph=True)
    a.zero_grad()
    out.square().sum().backward()
    assert all(map(torch.equal, [p.grad for p in a.parameters()], gradients(b, x)[0][1:]))


def test_a_state_that_does_not_learn_of_its_move_at_first(apart, monkeypatch):
    a, _ = nets(on_drift="ignore")
    x, real, asked = torch.randn(3, 7, 16), State.moved, []

    def moved(self):
        asked.append(self)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self)

    monkeypatch.setattr(State, "moved", moved)
    tapes, out = run(a, x)
    with pytest.raises(torch.OutOfMemoryError):
        out.square().sum().backward(retain_graph=True)
    out.square().sum().backward()
    assert asked == [tapes[1].state, tapes[1].state, tapes[0].state]


def test_a_host_that_can_pin_no_more(apart, monkeypatch):
    a, b = nets()
    x, real, asked = torch.randn(3, 7, 16), torch.empty, []

    def empty(*size, pin_memory=None, **options):
        if pin_memory is not None:
            asked.append(size)
            if len(asked) == 2:
                raise RuntimeError("CUDA error: out of memory")
        return real(*size, **options)

    monkeypatch.setattr(offload.torch, "empty", empty)
    with pytest.warns(MnetWarning, match=r"the host has no pinned memory for the state of a chain"):
        tapes, out = run(a, x)
    assert [[t.untyped_storage().nbytes() > 0 for t in tape.state.bulk()] for tape in tapes] == [[False, True], [False, False]]
    a.zero_grad()
    out.square().sum().backward()
    assert all(map(torch.equal, [p.grad for p in a.parameters()], gradients(b, x)[0][1:]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_goes_where_nothing_waits(apart, reentrant):
    """Under a checkpoint, which drops the chain, and in the rerun, which the backward pass needs at once."""
    found = []
    for net in nets(gamma=0.3):
        x, tapes = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(), {}
        torch.manual_seed(1)
        with watched(lambda tape, t, x: tapes.setdefault(id(tape), tape)):  # noqa: B023
            out = checkpoint(net, x, use_reentrant=reentrant)
            out.square().sum().backward()
        assert {type(tape.handover) for tape in tapes.values() if isinstance(tape, ReversingTape)} == {Handover}
        found.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(map(torch.equal, *found))


class Nest(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Encoder(5, d=16, heads=2) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_chains_within_steps_stay(apart):
    torch.manual_seed(0)
    model, x = Nest(), torch.randn(2, 7, 16)
    a, b = (mnet_fx.momentumize(copy.deepcopy(model), offload=offload) for offload in (True, False))
    found, tapes = gradients(a, x)
    assert all(map(torch.equal, found, gradients(b, x)[0]))
    outer, *inner = sorted((tape for tape in tapes if isinstance(tape, ReversingTape)), key=lambda tape: -len(tape.factors))
    assert len(outer.factors) == 12
    assert type(outer.handover) is offload.Offload
    assert {(len(tape.factors), type(tape.handover)) for tape in inner} == {(10, Handover)}


def test_a_chain_that_is_dropped_and_one_without_gradients(apart):
    a, b = nets()
    x = torch.randn(3, 7, 16)
    run(a, x)
    with torch.no_grad():
        assert torch.equal(run(a, x)[1], run(b, x)[1])
    assert all(map(torch.equal, gradients(a, x)[0], gradients(b, x)[0]))


def test_a_cpu_keeps_what_is_there():
    tapes, _ = run(nets()[0], torch.randn(3, 7, 16))
    assert [type(tape.handover) for tape in tapes] == [Handover] * 2
    assert not any(map(away, tapes))


def test_the_option_is_checked_travels_and_makes_no_other_network():
    with pytest.raises(SettingsError, match=r"offload must be True or False, got 1"):
        mnet_fx.momentumize(Two(), offload=1)
    a, b = nets()
    assert mnet_fx.saved_options(a.state_dict())["offload"] is True
    b.load_state_dict(a.state_dict())  # warnings are errors here


def test_nothing_is_left_for_the_garbage_collector(apart):
    a, _ = nets(gamma=0.03)
    x = torch.randn(3, 7, 16)
    gradients(a, x)
    gc.collect()
    gc.disable()
    try:
        tapes, out = run(a, x)
        alive = [weakref.ref(tape.handover) for tape in tapes]
        del tapes
        out.sum().backward()
        del out
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()
