"""Fingerprints that stay on a device until a backward pass ends; shown on a CPU, by calling it no host."""

import copy
import gc
import weakref

import pytest
import torch
from host_reads import noted_reads
from torch import nn
from torch._dynamo import compiled_autograd

from mnet_fx import InversionError, MnetWarning, StreamError, momentumize
from mnet_fx.arithmetic import fingerprints
from mnet_fx.runtime import replay
from mnet_fx.runtime.proofs import Proofs
from mnet_fx.runtime.steps import watched

D = 6


@pytest.fixture(autouse=True)
def _later(monkeypatch):
    monkeypatch.setattr(fingerprints, "ON_HOST", set())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


def net(steps=6, **options):
    torch.manual_seed(0)
    return momentumize(nn.Sequential(*(Block() for _ in range(steps))), regions=[""], gamma=0.9, **options)


@pytest.fixture
def reads(monkeypatch):
    return noted_reads(monkeypatch)


def test_proofs_are_read_once_when_a_backward_pass_ends(reads):
    model, x = net(), torch.randn(3, D, requires_grad=True)
    model(x).sum().backward()
    reads.clear()
    out = model(x)
    assert reads == ["tolist"] * (6 + 1)  # the largest of x[0] and of each residual
    reads.clear()
    out.sum().backward()
    assert reads == ["tolist"]


@pytest.mark.parametrize("differentiate", [lambda out, x: out.sum().backward(), lambda out, x: torch.autograd.grad(out.sum(), x)])
def test_a_difference_raises_out_of_the_pass(differentiate):
    model, x = net(), torch.randn(3, D, requires_grad=True)
    out = model(x)
    with torch.no_grad():
        model[2].linear.weight[0, 0] += 1
    with pytest.raises(InversionError, match=r"step 2: parameter .*linear.weight"):
        differentiate(out, x)


def test_the_first_difference_of_a_pass_is_reported_and_each_where_warnings_are_asked_for():
    model, x = net(on_drift="warn"), torch.randn(3, D, requires_grad=True)
    out = model(x)
    with torch.no_grad():
        model[4].linear.weight[0, 0] += 1
        model[1].linear.bias[0] += 1
    with pytest.warns(MnetWarning, match="differs") as caught:
        out.sum().backward()
    texts = [str(w.message) for w in caught]
    assert "step 4: parameter" in texts[0]
    assert any("step 1: parameter" in text for text in texts)


def test_a_write_to_the_stream_that_autograd_does_not_see_is_found_by_the_backward_pass():
    class Writing(nn.Module):
        def forward(self, x):
            x.data.mul_(2)
            return x + x.sin()

    model = momentumize(nn.Sequential(Block(), Writing(), Block()), regions=[""], gamma=0.9)
    out = model(torch.randn(3, D))
    with pytest.raises(StreamError, match="step 1: the stream was changed in place where autograd"):
        out.sum().backward()


@pytest.mark.parametrize("seen", [True, False], ids=["seen by autograd", "unseen"])
def test_a_large_buffer_that_steps_change_where_nobody_wants_proof(seen, monkeypatch):
    """A rerun reads a copy, and leaves the buffer alone; where autograd saw no change that takes a read."""
    monkeypatch.setattr(replay, "SMALL", 0)

    class Counting(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(D))

        def forward(self, x):
            (self.total if seen else self.total.data).add_(1.0)
            return x + self.total * torch.tanh(self.linear(x))

    torch.manual_seed(0)
    model, found = nn.Sequential(*(Counting() for _ in range(6))), []
    x = torch.randn(3, D, requires_grad=True)
    for options in ({"on_drift": "ignore"}, {"backward": "stored"}):
        own = momentumize(copy.deepcopy(model), regions=[""], gamma=0.9, **options)
        grads = [torch.autograd.grad(own(x).sum(), [x, *own.parameters()], allow_unused=True) for _ in range(2)][1]
        found.append([*(g for g in grads if g is not None), *own.buffers()])
    assert all(map(torch.equal, *found))


def test_each_of_two_passes_through_one_graph_is_proved():
    model, x = net(), torch.randn(3, D, requires_grad=True)
    out = model(x)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], first)
    with torch.no_grad():
        model[0].linear.weight[0, 0] += 1
    with pytest.raises(InversionError, match="step 0: parameter"):
        torch.autograd.grad(out.sum(), x)


def test_a_pass_within_another_is_proved_as_it_ends_itself():
    outer, inner, x = net(), net(), torch.randn(3, D, requires_grad=True)
    loss = inner(torch.randn(3, D)).sum()
    with torch.no_grad():
        inner[2].linear.weight[0, 0] += 1
    raised = []

    def within(grad):
        with pytest.raises(InversionError, match="step 2: parameter"):
            loss.backward()
        raised.append(True)

    h = x * 1.0
    h.register_hook(within)  # runs after the steps of the outer chain, whose comparisons wait for the end of its pass
    outer(h).sum().backward()
    assert raised == [True]


def test_double_backward_is_proved():
    model, x = net(), torch.randn(3, D, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    stored = net(backward="stored")
    (g_,) = torch.autograd.grad(stored(x).square().sum(), x, create_graph=True)
    (h_,) = torch.autograd.grad(g_.square().sum(), x)
    assert torch.equal(g, g_)
    assert torch.equal(h, h_)


def test_a_pass_that_runs_compiled_is_proved_though_it_calls_nothing_back():
    model, x = net(), torch.randn(3, D, requires_grad=True)
    out = model(x)
    with torch.no_grad():
        model[2].linear.weight[0, 0] += 1
    with compiled_autograd._enable(lambda graph: graph), pytest.raises(InversionError, match="step 2: parameter"):
        out.sum().backward()


def test_others_who_wait_for_the_end_of_a_pass_are_called_before_a_difference_raises():
    model, x, called = net(), torch.randn(3, D, requires_grad=True), []
    out = model(x)
    with torch.no_grad():
        model[2].linear.weight[0, 0] += 1
    model[0].linear.weight.register_hook(lambda grad: torch.autograd.Variable._execution_engine.queue_callback(lambda: called.append(1)))
    with pytest.raises(InversionError, match="step 2: parameter"):
        out.sum().backward()
    assert called == [1]


class Layers(nn.Module):
    """Two containers; `between` sees the gradient that passes between them, `after` the mask after each call."""

    def __init__(self, between=None, after=None):
        super().__init__()
        self.first, self.second = (nn.ModuleList(Masked() for _ in range(4)) for _ in range(2))
        self.between, self.after = between, after

    def forward(self, x, mask):
        for layer in self.first:
            x = layer(x, mask)
        if self.between is not None:
            x = x * 1
            x.register_hook(self.between)
        for layer in self.second:
            x = layer(x, mask)
        if self.after is not None:
            self.after(mask)
        return x


class Masked(Block):
    def forward(self, x, mask):
        return x + torch.tanh(self.linear(x) * mask)


@pytest.mark.parametrize("gamma", [0.9, 0.0])  # a tape that goes back, and one that stores
def test_what_waits_keeps_no_tape(gamma):
    tapes, alive = [], []
    model = momentumize(Layers(lambda grad: alive.append([tape() is not None for tape in tapes])), regions=["first", "second"], gamma=gamma)
    with watched(lambda tape, t, x: tapes.append(weakref.ref(tape)) if t == 1 else None):
        out = model(torch.randn(3, D, requires_grad=True), torch.ones(D))
    out.sum().backward()
    assert alive == [[True, False]]


def test_a_mask_that_is_overwritten_now_and_then_raises_once():
    overwritten = []
    model = momentumize(Layers(after=lambda mask: mask.add_(1) if overwritten else None), regions=["first", "second"], gamma=0.9)

    def call():
        model(torch.randn(3, D, requires_grad=True), torch.ones(D)).sum().backward()

    call()
    overwritten.append(True)
    with pytest.raises(InversionError, match="side input 1 differs"):
        call()
    overwritten.clear()
    call()
    overwritten.append(True)
    call()


def test_a_large_buffer_with_gaps_is_not_taken_for_changed():
    class Wide(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("mixing", torch.randn(300, 300).t()[:D, :D])
            self.register_buffer("sparse", torch.eye(D).to_sparse())

        def forward(self, x):
            return x + torch.tanh(self.linear(x) @ self.mixing)

    for options in ({"regions": [""]}, {}):
        model = momentumize(nn.Sequential(*(Wide() for _ in range(4))), gamma=0.9, **options)
        model(torch.randn(3, D, requires_grad=True)).sum().backward()


def test_a_pass_that_fails_leaves_nothing():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("lost")

    model, x = net(), torch.randn(3, D, requires_grad=True)
    out = model(Failing.apply(x))
    tape = weakref.ref(next(f for f in _functions(out.grad_fn) if hasattr(f, "place")))
    with pytest.raises(RuntimeError, match="lost"):
        out.sum().backward()
    del out
    gc.collect()
    assert tape() is None


def _functions(root):
    seen, todo = set(), [root]
    while todo:
        f = todo.pop()
        if f is not None and f not in seen:
            seen.add(f)
            yield f
            todo += [g for g, _ in f.next_functions]


def test_what_was_on_a_device_and_is_so_no_more_differs():
    found = []
    Proofs().compare([torch.tensor(3)], [3], found.append)
    Proofs().compare([3, 4], [3], found.append)
    Proofs().compare([3, torch.tensor(4)], [3, torch.tensor(4)], found.append)
    Proofs().compare([3, torch.tensor(4)], [2, torch.tensor(5)], found.append)
    assert found == [[0], [0, 1], [], [0, 1]]


class Reading(nn.Module):
    """A net whose layers read what it overwrites behind them, so that its chain has copies of its own."""

    def __init__(self, overwrites):
        super().__init__()
        self.layers, self.overwrites = nn.ModuleList(Told() for _ in range(4)), overwrites
        self.count = nn.Buffer(torch.zeros(D))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.count)
        y = x.sum()
        if self.overwrites:
            self.count += 1
        return y


class Told(Block):
    def forward(self, x, count):
        return super().forward(x) + 0.01 * count


@pytest.mark.parametrize("overwrites", [False, True])
def test_what_was_overwritten_is_found_by_the_same_one_read(overwrites, reads):
    torch.manual_seed(0)
    model = momentumize(Reading(overwrites), regions=["layers"])
    stored = momentumize(Reading(overwrites), regions=["layers"], backward="stored")
    stored.load_state_dict(model.state_dict())
    for _ in range(3):
        x = torch.randn(3, D)
        y, expected = model(x), stored(x)
        reads.clear()
        found = torch.autograd.grad(y, list(model.parameters()))
        assert reads == ["tolist"]
        assert all(map(torch.equal, found, torch.autograd.grad(expected, list(stored.parameters()))))
