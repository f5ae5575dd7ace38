"""What layers leave beside what they return, as losses in attributes: its gradients are right, or there is an error."""

import contextlib
import random
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mnet_fx

D = 8
MEANS, BANK, GENERATOR = {}, deque([torch.zeros(D)], maxlen=1), random.Random(0)


class Block(nn.Module):
    """A block that leaves a loss in an attribute, if any."""

    def __init__(self, aux=None, norm=False):
        super().__init__()
        self.linear, self.aux = nn.Linear(D, D), aux
        self.norm = nn.BatchNorm1d(D) if norm else nn.Identity()

    def forward(self, x):
        h = torch.tanh(self.norm(self.linear(x)))
        if self.aux is not None:
            self.loss = self.aux(h)
        return x + h


class Net(nn.Module):
    def __init__(self, aux=None, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = Block(aux, norm=True)
        self.blocks = nn.ModuleList(Block(aux, norm) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def losses(self):
        return [block.loss for block in (self.stem, *self.blocks) if block.aux is not None]


def of_a_global_dictionary(h):
    mean = MEANS.get("mean", 0.0)
    MEANS["mean"] = h.detach().mean(0)
    return (h.mean(0) - mean).square().mean()


def of_a_bounded_deque(h):
    loss = (h - BANK[0]).square().mean()
    BANK.append(h.detach().mean(0))
    return loss


def of_a_generator_of_its_own(h):
    return h[:, GENERATOR.randrange(D)].square().mean() * GENERATOR.random()


def of_what_it_computes(h):
    return h.square().mean() + h.sigmoid().mean()


def of_torchs_random(h):
    return (torch.rand_like(h) * h).square().mean()


UNSEEN = [of_a_global_dictionary, of_a_bounded_deque, of_a_generator_of_its_own]
REPEATED = [of_what_it_computes, of_torchs_random]


def loss_of(net, x, more=()):
    MEANS.clear()
    random.seed(0)
    torch.manual_seed(1)
    return 0.1 * net(x).square().mean() + sum(net.losses()) + sum(more)


def grads(net, x, more=()):
    net.zero_grad()
    loss = loss_of(net, x, more)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def named(model, **options):
    return mnet_fx.momentumize(model, gamma=0.5, regions=["blocks"], **options)


@pytest.mark.parametrize("aux", UNSEEN, ids=lambda f: f.__name__)
def test_a_loss_that_no_rerun_repeats_is_an_error(aux):
    net, x = named(Net(aux)), torch.randn(4, D)
    for _ in range(5):  # from the first call on, and in all
        with pytest.raises(mnet_fx.InversionError, match="what it leaves in an attribute or with a hook"):
            grads(net, x)
    stored = named(Net(aux), backward="stored")
    assert len(grads(stored, x)) == 1 + len(list(stored.parameters()))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("aux", REPEATED, ids=lambda f: f.__name__)
def test_one_that_is_repeated_is_right(aux, norm):
    """Also behind a batch norm, of which autograd saves the statistics, which move."""
    x = torch.randn(4, D)
    net, stored = named(Net(aux, norm)), named(Net(aux, norm), backward="stored")
    for _ in range(5):
        assert all(map(torch.equal, grads(net, x), grads(stored, x)))


def test_a_stem_that_runs_again():
    net, x = named(Net(of_a_global_dictionary), rest="checkpoint"), torch.randn(4, D)
    net.blocks = nn.ModuleList()  # which would be the first to differ
    with pytest.raises(mnet_fx.InversionError, match="stem: what it leaves in an attribute or with a hook"):
        grads(net, x)
    right, stored = (named(Net(of_what_it_computes), rest=rest) for rest in ("checkpoint", "store"))
    assert all(map(torch.equal, grads(right, x), grads(stored, x)))


def hooked(net, hook):
    for name, module in net.named_modules():
        if name.startswith("blocks") and isinstance(module, nn.Linear):
            module.register_forward_hook(hook)


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("traced", [False, True])
def test_a_hook_that_collects(traced, calls, repeats):
    """Whenever it comes: calls with other hooks are looked at anew."""

    def made(**options):
        return mnet_fx.momentumize(torch.fx.symbolic_trace(Net()), gamma=0.5, **options) if traced else named(Net(), **options)

    x, net = torch.randn(4, D), made()
    net.losses = list
    for _ in range(calls):
        grads(net, x)
    means, terms = {}, []

    def hook(module, args, out):
        terms.append((out.mean(0) - means.get(module, 0)).square().mean())
        if not repeats:
            means[module] = out.detach().mean(0)

    hooked(net, hook)
    net.zero_grad()
    loss = net(x).square().mean()
    loss = loss + sum(terms)
    assert len(terms) == 3
    if not repeats:
        with pytest.raises(mnet_fx.InversionError, match="with a hook"):
            loss.backward()
        return
    loss.backward()
    found = [p.grad.clone() for p in net.parameters()]
    terms.clear()
    stored = made(backward="stored")
    for _ in range(calls):
        stored(x)  # for the statistics of the stem
    hooked(stored, hook)
    out = stored(x).square().mean()
    (out + sum(terms)).backward()
    assert all(map(torch.equal, found, [p.grad for p in stored.parameters()]))


def test_layers_that_leave_nothing_are_looked_at_ever_more_rarely(monkeypatch):
    from mnet_fx.runtime import unreturned

    looks, own = [], unreturned.Unreturned.first_run
    monkeypatch.setattr(unreturned.Unreturned, "first_run", lambda self: looks.append(self.layer) or own(self))
    net, x = named(Net()), torch.randn(4, D)
    for _ in range(20):
        grads(net, x)
    assert looks == [f"blocks.{i}." for _ in (1, 2, 4, 8, 16) for i in range(3)]


def test_nothing_is_looked_at_where_nobody_wants_proof(monkeypatch):
    from mnet_fx.runtime import unreturned

    monkeypatch.setattr(unreturned.Unreturned, "first_run", None)
    grads(named(Net(of_a_global_dictionary), on_drift="ignore"), torch.randn(4, D))


def test_attention_maps_in_attributes_and_a_second_backward_pass():
    """Values that are left and that no gradient comes to; graphs that are kept."""

    class Attends(nn.TransformerEncoderLayer):
        aux = None

        def forward(self, x):
            y, self.map = self.self_attn(x, x, x, need_weights=True)
            return x + y

    class Stack(Net):
        def __init__(self):
            super().__init__()
            self.stem = Block()
            self.blocks = nn.ModuleList(Attends(D, 2, D, dropout=0.1, batch_first=True) for _ in range(3))

    x, results = torch.randn(2, 5, D), []
    for backward in ("reversible", "stored"):
        net = named(Stack(), backward=backward)
        for _ in range(3):
            net.zero_grad()
            loss = loss_of(net, x, [])
            loss.backward(retain_graph=True)
            loss.backward()
        results.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_parametrizations_that_are_cached(inside, reads):
    """A rerun finds what was kept before its step, and makes the rest again, once; the model may read what is kept."""

    class Twice(Block):
        def forward(self, x):
            return x + torch.tanh(self.linear(torch.tanh(self.linear(x))))

    def model():
        net = Net()
        net.blocks = nn.ModuleList(Twice() for _ in range(3))
        for block in net.blocks:
            block.linear = parametrizations.weight_norm(block.linear)
        return net

    x, results = torch.randn(4, D), []
    for backward in ("reversible", "stored"):
        net = named(model(), backward=backward)
        for _ in range(2):
            net.zero_grad()
            with parametrize.cached():
                loss = net(x).square().mean() + sum(block.linear.weight.square().sum() for block in net.blocks if reads)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            assert not parametrize._cache
            assert not parametrize._cache_enabled
        results.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *results))


class Pulled(nn.Module):
    """A force: the gradient of an energy, taken while the step runs, whose norm is a loss besides."""

    aux = True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        energy = self.linear(x).tanh().square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        self.loss = force.square().mean()
        return x - 0.1 * force


class Remembers(nn.Module):
    """Of an LSTM, autograd saves a workspace, not all of which is ever written."""

    aux = True

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(D, D, batch_first=True)

    def forward(self, x):
        h, (_, c) = self.recurrent(x[None])
        self.loss = c.square().mean()
        return x + h[0]


class Scripted(nn.Module):
    """A module whose code is not Python."""

    aux = None

    def __init__(self):
        super().__init__()
        self.script = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.Tanh()))

    def forward(self, x):
        return x + self.script(x)


@pytest.mark.parametrize("layer", [Pulled, Remembers])
def test_layers_that_are_hard_to_run_again(layer):
    x, results = torch.randn(6, D), []
    for backward in ("reversible", "stored"):
        torch.manual_seed(0)
        net = Net()
        net.blocks = nn.ModuleList(layer() for _ in range(3))
        net = named(net, backward=backward)
        results.append([t for _ in range(4) for t in grads(net, x)] + list(net.buffers()))
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripted_modules_repeat_or_are_an_error():
    """TorchScript takes another form of a graph once it has seen it run, which may save other tensors."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(6, D)
    net.blocks = nn.ModuleList(Scripted() for _ in range(3))
    reversible, stored = named(net), named(net, backward="stored")
    for _ in range(4):
        expected = grads(stored, x)
        with contextlib.suppress(mnet_fx.InversionError):
            for a, b in zip(grads(reversible, x), expected, strict=True):  # which differ in rounding from call to call
                torch.testing.assert_close(a, b)
