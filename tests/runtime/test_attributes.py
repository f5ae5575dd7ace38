"""What modules hold in Python is, for a rerun, what the first run found, and afterwards what it was."""

import gc
import itertools
import time
import weakref
from collections import deque

import pytest
import torch
import zoo
from test_tape import TAPES, D, chain, factors
from torch import nn

import mnet_fx
from mnet_fx import InversionError
from mnet_fx.runtime import replay
from mnet_fx.runtime.tape import PlainTape


class Growing(nn.Module):
    """Reads and changes attributes of every kind."""

    def __init__(self):
        super().__init__()
        self.linear, self.runs, self.seen, self.table, self.last = nn.Linear(D, D), 0, [], {"inside": [1.0]}, deque(maxlen=2)
        self.names, self.ema, self.length = set(), torch.zeros(()), 0
        self.register_buffer("cos", torch.zeros(0, D), persistent=False)

    def forward(self, x):
        self.runs += 1
        self.seen.append(self.runs)
        self.table["inside"].append(0.5)
        self.table[self.runs] = self.runs
        self.last.append(float(self.runs))
        self.names.add(str(self.runs))
        self.ema.mul_(0.5).add_(x.detach().mean())
        if len(x) > self.length:
            self.length, self.cos = len(x), torch.arange(float(len(x))).cos()[:, None].expand(len(x), D)
        if self.runs == 2:
            self.late = 3.0
        factor = (
            len(self.seen) + sum(self.table["inside"]) + sum(self.last) + len(self.names) + getattr(self, "late", 1.0) + len(self.table)
        )
        return torch.tanh(self.linear(x)) * self.cos[: len(x)] * factor + self.ema.clone()


def state(f):
    return f.runs, list(f.seen), str(f.table), list(f.last), set(f.names), f.ema.item(), f.length, len(f.cos), getattr(f, "late", None)


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("shared", [True, False], ids=["one layer", "a layer each"])
def test_attributes_that_the_step_changes_are_put_back_and_forward_again(kind, shared):
    found = []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs = nn.ModuleList([Growing()] * 3 if shared else [Growing() for _ in range(3)])
        gradients = []
        for rows in (4, 7, 3):
            x0 = torch.randn(rows, D, requires_grad=True)
            out, _ = chain(tape, fs, factors([0.5] * 3), x0)
            before = [state(f) for f in fs]
            gradients += [g for i in (0, 2, 1) for g in torch.autograd.grad(out.exp().sum(), fs[i].parameters(), retain_graph=True)]
            assert [state(f) for f in fs] == before
        found.append(gradients)
    assert all(map(torch.equal, *found))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act, self.scales, self.scale = nn.Linear(D, D), nn.Tanh(), [1.0], torch.ones(())

    def forward(self, x):
        return self.act(self.linear(x)) * sum(self.scales) * self.scale


def flip_training(f):
    f.act.eval()


def add_hook(f):
    f.linear.register_forward_hook(lambda module, args, result: result * 2)


def replace(f):
    f.act = nn.ReLU()


def extend(f):
    f.scales.append(2.0)


def set_tensor(f):
    f.scale = torch.zeros(())


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("change", [flip_training, add_hook, replace, extend, set_tensor])
def test_attributes_that_others_change_after_the_forward(kind, change):
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs = nn.ModuleList(Scaled() for _ in range(3))
        out, _ = chain(tape, fs, factors([0.9] * 3), x0)
        for f in fs:
            change(f)
        now = [[f.act, f.scale, list(f.scales), dict(f.linear._forward_hooks), f.act.training] for f in fs]
        found.append(torch.autograd.grad(out.exp().sum(), [x0, *fs.parameters()]))
        assert [[f.act, f.scale, list(f.scales), dict(f.linear._forward_hooks), f.act.training] for f in fs] == now
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", TAPES)
def test_a_tensor_attribute_that_others_write_to_is_named(kind, monkeypatch):
    monkeypatch.setattr(replay, "SMALL", 0)  # on a device, a rerun reads the copies of small buffers
    fs = nn.ModuleList(Scaled() for _ in range(3))
    out, _ = chain(kind, fs, factors([0.9] * 3), torch.randn(5, D, requires_grad=True))
    fs[1].scale.data.fill_(0.5)
    with pytest.raises(InversionError, match=r"buffer 'f.scale'"):
        out.sum().backward()


class Own(nn.Module):
    """Noise from a generator of its own."""

    def __init__(self, seed):
        super().__init__()
        self.linear, self.generator = nn.Linear(D, D), torch.Generator().manual_seed(seed)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * torch.rand(D, generator=self.generator)


@pytest.mark.parametrize("kind", TAPES)
def test_a_generator_of_the_steps_own(kind):
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs = nn.ModuleList(Own(seed) for seed in range(3))
        out, _ = chain(tape, fs, factors([0.9] * 3), x0)
        states = [f.generator.get_state() for f in fs]
        found.append(torch.autograd.grad(out.exp().sum(), [x0, *fs.parameters()]))
        assert all(torch.equal(f.generator.get_state(), s) for f, s in zip(fs, states, strict=True))
    assert all(map(torch.equal, *found))


class Keeping(nn.Module):
    """Keeps what it gave in its last run, as models do that are looked into."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how, self.kept, self.many = nn.Linear(D, D), how, None, []

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        kept = {"tensor": y, "tuple": (y,), "object": Box(y), "list": [y]}[self.how]
        if self.how == "list":
            self.many[:] = kept
        self.kept = kept
        return y


class Box:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("how", ["tensor", "tuple", "object", "list"])
def test_what_steps_keep_of_one_pass_does_not_outlive_the_next(kind, how):
    fs, inputs = nn.ModuleList(Keeping(how) for _ in range(3)), []
    for _ in range(4):
        x0 = torch.randn(5, D, requires_grad=True)
        out, _ = chain(kind, fs, factors([0.9] * 3), x0)
        inputs.append(weakref.ref(x0))
        del x0
    gc.collect()
    assert [ref() is not None for ref in inputs] == [False, False, False, True]
    out.sum().backward()


@pytest.mark.parametrize("kind", TAPES)
def test_what_steps_read_of_one_pass_does_not_outlive_the_next(kind):
    class Reading(Scaled):
        def forward(self, x):
            return torch.tanh(self.linear(x)) * self.scale.detach()

    fs, inputs = nn.ModuleList(Reading() for _ in range(3)), []
    for _ in range(4):
        x0 = torch.randn(5, D, requires_grad=True)
        out, _ = chain(kind, fs, factors([0.9] * 3), x0)
        for f in fs:
            f.scale = out.mean()  # for the next pass, which does not change it
        inputs.append(weakref.ref(x0))
        del x0, out
    gc.collect()
    assert [ref() is not None for ref in inputs[:2]] == [False, False]
    assert inputs[-1]() is not None


class Recurrent(nn.Module):
    """Its state, an attribute with a history, goes on from call to call."""

    def __init__(self):
        super().__init__()
        self.linear, self.state = nn.Linear(D, D), torch.zeros(D)

    def forward(self, x):
        self.state = torch.tanh(self.linear(x.mean(0)) + self.state)
        return torch.sin(self.linear(x)) * self.state


@pytest.mark.parametrize("kind", TAPES)
def test_a_state_with_a_history(kind):
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        f = Recurrent()
        out, _ = chain(tape, [f] * 4, factors([0.5] * 4), x0)
        found.append(torch.autograd.grad(out.exp().sum() + f.state.sum(), [x0, *f.parameters()]))
    assert all(map(torch.equal, *found))


class Halves(nn.Module):
    """Two layers of which one is trained at a time, on values that autograd saves as many of either way."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(D, D), nn.Linear(D, D), torch.ones(D)

    def forward(self, x, *sides):
        return self.a(torch.tanh(x)) + self.b(torch.sin(x)) + sum(side * x for side in sides) * self.scale


def train(fs, which):
    for name, p in fs.named_parameters():
        p.requires_grad_(f".{which}." in name)


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("sides", [0, 2])
def test_which_tensors_require_gradients_may_change_after_the_forward(kind, sides):
    x0, found = torch.randn(D, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs, given = nn.ModuleList(Halves() for _ in range(4)), [torch.randn(D) for _ in range(sides)]
        for i, side in enumerate(given):
            side.requires_grad_(i == 0)
        train(fs, "a")
        out, _ = chain(tape, fs, factors([0.9] * 4), x0, sides=given)
        loss = out.square().mean()
        train(fs, "b")
        for i, side in enumerate(given):
            side.requires_grad_(i == 1)
        found.append(torch.autograd.grad(loss, x0))
        assert [p.requires_grad for p in (x0, *fs.parameters(), *given)] == [True] + [False, False, True, True] * 4 + [False, True][:sides]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", TAPES)
def test_a_tensor_that_can_no_longer_be_without_gradients_is_named(kind):
    side, weight = torch.ones(D), torch.zeros(D, requires_grad=True)
    out, _ = chain(kind, [lambda x, s: torch.tanh(x * s)] * 3, factors([0.9] * 3), torch.randn(5, D, requires_grad=True), sides=(side,))
    side.add_(weight)
    with pytest.raises(InversionError, match="whether side input 0 requires a gradient"):
        out.sum().backward()


@pytest.mark.parametrize("backward", ["reversible", "stored"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_freezing_between_the_forward_and_the_backward_of_a_compiled_model(backward, inner):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return x + (self.a(torch.tanh(x)) + self.b(torch.sin(x)))

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), *(Block() for _ in range(4))), torch.randn(5, D)
    found = []
    for net in (model, torch.compile(model, backend=mnet_fx.backend(inner=inner, backward=backward, gamma=0.0))):
        train(model[1:], "a")
        loss = net(x).square().mean()
        train(model[1:], "b")
        model.zero_grad()
        loss.backward()
        found.append(model[0].weight.grad.clone())
    zoo.assert_agree(found[1], found[0])


def test_regions_of_every_kind_put_attributes_back():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.count = nn.Linear(D, D), 1

        def forward(self, x):
            self.count += 1
            return x + torch.tanh(self.linear(x)) * self.count

    for make in (
        lambda net, how: mnet_fx.momentumize(net, regions=["1"], backward=how),
        lambda net, how: nn.Sequential(net[0], mnet_fx.MomentumNet(net[1], use_backprop=how == "stored", is_residual=False)),
    ):
        found = []
        for how in ("stored", "reversible"):
            torch.manual_seed(0)
            net = make(nn.Sequential(nn.Linear(D, D), nn.Sequential(*(Block() for _ in range(5)))), how)
            for _ in range(2):
                net(torch.ones(3, D)).exp().sum().backward()
            found.append([p.grad for p in net.parameters()])
            assert {m.count for m in net.modules() if isinstance(m, Block)} == {3}
        assert all(map(torch.equal, *found))


def test_other_state_is_proved():
    counts = itertools.count()

    class Hidden(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * next(counts)

    out, _ = chain(TAPES[0], [Hidden()] * 3, factors([0.9] * 3), torch.randn(5, D, requires_grad=True))
    with pytest.raises(InversionError):
        out.sum().backward()


LOGGED: list[torch.Tensor] = []
LATEST: dict[str, torch.Tensor] = {}


def log_loss(h):
    """A helper of the layers' own module."""
    LOGGED.append(h.square().mean())


class Logs(nn.Module):
    """Keeps an auxiliary loss in a global list, and its newest activation in a global dictionary."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.f(x))
        log_loss(h)
        LATEST["h"] = h
        return x + h


class LogsToItsClass(Logs):
    losses: list[torch.Tensor] = LOGGED

    def forward(self, x):
        h = torch.tanh(self.f(x))
        type(self).losses.append(h.square().mean())
        LATEST["h"] = h
        return x + h


class Logging(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("layer", [Logs, LogsToItsClass])
def test_a_rerun_leaves_no_trace_in_globals(layer):
    found = []
    for net in (Logging(layer), mnet_fx.momentumize(Logging(layer), gamma=0, regions=["layers"])):
        LOGGED.clear()
        LATEST.clear()
        out = net(torch.ones(3, 4))
        newest = LATEST["h"]
        (out.sum() + sum(LOGGED)).backward()
        assert len(LOGGED) == 4
        assert {"h": newest} == LATEST
        found.append([p.grad for p in net.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


LOOP: list = []
LOOP.append(LOOP)
LARGE = {i: [i] for i in range(100000)}


class ReadsLarge(nn.Linear):
    """Names a global that holds itself, and a large one, which no rerun should copy; and has an attribute that holds itself."""

    def __init__(self):
        super().__init__(4, 4)
        self.own: dict = {}
        self.own["own"] = self.own

    def forward(self, x):
        return x + torch.tanh(super().forward(x)) * (1 if LOOP and LARGE[0] else 2)


def test_containers_that_hold_themselves_and_large_ones():
    net = mnet_fx.momentumize(nn.Sequential(*(ReadsLarge() for _ in range(4))), regions=[""])
    net(torch.ones(3, 4)).sum().backward()
    start = time.process_time()
    net(torch.ones(3, 4)).sum().backward()
    assert time.process_time() - start < 0.1
