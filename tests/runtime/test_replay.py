"""Reruns of steps whose modules, parameters or outputs are shared in odd ways."""

import itertools
import threading

import pytest
import torch
from test_tape import TAPES, D, chain, factors
from torch import nn
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

import mnet_fx
from mnet_fx import InversionError
from mnet_fx.arithmetic.fingerprints import fingerprints
from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.runtime import noted, replay
from mnet_fx.runtime.noted import version
from mnet_fx.runtime.replay import SMALL, _may_differ
from mnet_fx.runtime.steps import Chain, run_chain
from mnet_fx.runtime.tape import PlainTape


class Twice(nn.Module):
    """A norm under two names, and its running mean under a third."""

    def __init__(self, norm, linear):
        super().__init__()
        self.first, self.second, self.linear = norm, norm, linear
        self.register_buffer("mean", norm.running_mean)

    def forward(self, x):
        return torch.tanh(self.second(self.linear(self.first(x)))) + self.mean.sum()


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("shared", [True, False], ids=["one norm", "a norm each"])
def test_a_buffer_by_several_names(kind, shared):
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        norms = [nn.BatchNorm1d(D)] * 4 if shared else [nn.BatchNorm1d(D) for _ in range(4)]
        fs = nn.ModuleList(Twice(norm, nn.Linear(D, D)) for norm in norms)
        buffers = list(fs.named_buffers(remove_duplicate=False))
        out, _ = chain(tape, fs, factors([0.9] * 4), x0)
        gradients = [g for i in (0, 3, 1) for g in torch.autograd.grad(out.exp().sum(), fs[i].parameters(), retain_graph=True)]
        assert all(a is b for (_, a), (_, b) in zip(buffers, fs.named_buffers(remove_duplicate=False), strict=True))
        found.append([*gradients, *(b for _, b in buffers)])
        assert norms[0].num_batches_tracked == (8 if shared else 2)
    assert all(map(torch.equal, *found))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D)
        self.b, self.c = self.a, nn.Linear(D, D)

    def forward(self, x):
        return torch.tanh(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("change", ["replaced", "tied"])
def test_parameters_replaced_or_tied_after_the_forward_are_those_of_the_first_run_and_stay_replaced(kind, change):
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs = nn.ModuleList(Tied() for _ in range(4))
        before = list(fs.parameters())
        out, _ = chain(tape, fs, factors([0.9] * 4), x0)
        for f in fs:
            if change == "replaced":
                f.a.weight = nn.Parameter(torch.zeros(D, D))
            else:
                f.c.weight = f.a.weight
        now = list(fs.named_parameters(remove_duplicate=False))
        found.append(torch.autograd.grad(out.exp().sum(), before))
        assert all(a is b for (_, a), (_, b) in zip(now, fs.named_parameters(remove_duplicate=False), strict=True))
    assert all(map(torch.equal, *found))


class WithExtra(nn.Module):
    """(f(x), extras that f(x) does not depend on); what differs from run to run is chosen."""

    def __init__(self, differs):
        super().__init__()
        self.f, self.weight, self.differs, self.runs = nn.Linear(D, D), nn.Parameter(torch.ones(D)), differs, itertools.count()

    def forward(self, x):
        run = next(self.runs)
        noise = x.detach() + run
        graded = (x * self.weight * (noise if self.differs == "graded" else 2)).square()
        return torch.tanh(self.f(x)), graded, noise, run, None


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("on_drift", ["raise", "ignore"])
@pytest.mark.parametrize("differs", ["graded", "nothing that has a gradient"])
def test_extra_outputs_with_gradients_must_repeat(kind, differs, on_drift):
    x0, fs = torch.randn(5, D, requires_grad=True), [WithExtra(differs) for _ in range(3)]
    out, _, extras = run_chain(Chain(kind("region", State(x0.detach()), factors([0.9] * 3), on_drift), x0, None), [(f, ()) for f in fs])
    loss = out.sum() + extras[4].sum()
    if differs == "graded" and on_drift == "raise":
        with pytest.raises(InversionError, match="what step 2 gives besides the stream"):
            loss.backward()
    else:
        loss.backward()
        assert fs[1].weight.grad.any()


class OnlyExtra(nn.Module):
    """Its value has no gradient, its extra output does, and differs from run to run."""

    def __init__(self):
        super().__init__()
        self.f, self.weight, self.runs = nn.Linear(D, D), nn.Parameter(torch.ones(D)), itertools.count()

    def forward(self, x):
        return torch.tanh(self.f(x)).detach(), (x * self.weight * (x.detach() + next(self.runs))).square()


@pytest.mark.parametrize("kind", TAPES)
def test_extra_outputs_must_repeat_also_where_the_value_has_no_gradient(kind):
    x0, fs = torch.randn(5, D, requires_grad=True), [OnlyExtra() for _ in range(3)]
    _, _, extras = run_chain(Chain(kind("region", State(x0.detach()), factors([0.9] * 3)), x0, None), [(f, ()) for f in fs])
    with pytest.raises(InversionError, match="what step 1 gives besides the stream"):
        extras[1].sum().backward()


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(D)], ids=["", "buffers"])
def test_lists_and_dictionaries_among_the_side_inputs_hold_what_they_held(kind, norm):
    """The steps add to them, as to a cache, and the caller changes them before the backward pass."""
    x0, found = torch.randn(5, D, requires_grad=True), []
    for tape in (kind, PlainTape):
        torch.manual_seed(1)
        fs, cache, scale = nn.ModuleList(nn.Sequential(norm(), nn.Linear(D, D)) for _ in range(4)), [], {"scale": torch.ones(D), "runs": 0}
        state = State(x0.detach())
        steps = [(Caching(f), (cache, scale)) for f in fs]
        out, _, _ = run_chain(Chain(tape("region", state, factors([0.9] * 4)), x0, None), steps)
        assert (len(cache), scale["runs"]) == (4, 4)
        scale["scale"] = torch.zeros(D)
        found.append([g for i in (3, 0, 3) for g in torch.autograd.grad(out.exp().sum(), fs[i].parameters(), retain_graph=True)])
        assert (len(cache), scale["runs"]) == (4, 4)
    assert found[0][0].any()
    assert all(map(torch.equal, *found))


class Caching(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, cache, scale):
        scale["runs"] += 1
        y = self.f(x).tanh()
        cache.append(y.detach())
        return (y + sum(cache) * scale["scale"] * len(cache),)


@pytest.mark.parametrize("kind", TAPES)
def test_threads_that_go_back_through_one_graph(kind):
    torch.set_num_threads(1)
    fs, x0 = [nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(12)], torch.randn(100, D, requires_grad=True)
    out, _ = chain(kind, fs, factors([0.5] * 12), x0)
    expected, found = torch.autograd.grad(out.sum(), x0, retain_graph=True)[0], []

    def work():
        for _ in range(10):
            found.append(torch.autograd.grad(out.sum(), x0, retain_graph=True)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(torch.equal(g, expected) for g in found)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize")
def test_of_tensors_that_are_more_than_numbers_in_memory_the_version_counts():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    odd = {"nested": nested, "sparse": torch.eye(3).to_sparse(), "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}
    plain = {"real": torch.ones(3), "parameter": nn.Parameter(torch.ones(3))}
    before = noted.fingerprints(odd | plain)
    assert {name: before[name] for name in odd} == {name: t._version for name, t in odd.items()}
    assert [before[name] for name in plain] == fingerprints(list(plain.values()))
    nested.mul_(2)
    assert noted.fingerprints(odd)["nested"] != before["nested"]


SPOILS = {
    "mul_": lambda y: y.exp().mul_(0.5),
    "square": lambda y: (h := y * 1, h * h, h.add_(1))[1],
    "view": lambda y: (h := y.tanh(), h[:2].detach().mul_(0.5))[0],
    "iadd": lambda y: (h := y.sigmoid(), h.__iadd__(1))[1],
}


class Spoils(nn.Module):
    """Layers that overwrite in place what their gradients need."""

    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(SpoilsLayer(how) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class SpoilsLayer(nn.Linear):
    def __init__(self, how):
        super().__init__(D, D)
        self.how = how

    def forward(self, x):
        return x + 0.1 * SPOILS[self.how](super().forward(x))


@pytest.mark.parametrize(("how", "way"), [(how, way) for how in SPOILS for way in ({}, {"regions": ["layers"]}) if how != "square" or way])
def test_a_step_that_overwrites_what_its_gradient_needs_is_an_error(how, way):
    """As in autograd: torch.utils.checkpoint hands the overwritten value out, and the gradient would be wrong."""
    x = torch.randn(4, D)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Spoils(how)(x).sum().backward()
    net = mnet_fx.momentumize(Spoils(how), **way)
    with pytest.raises(mnet_fx.MnetError, match="overwrites in place a value that its gradient needs"):
        net(x).sum().backward()


def test_a_write_that_nothing_in_the_step_reads_is_made_outside():
    """Captured, to what the step gives out: its rerun does not meet it, and the gradient is that of y * y."""
    net, safe, x = mnet_fx.momentumize(Spoils("square")), Spoils("square"), torch.randn(4, D)
    safe.load_state_dict(net.state_dict())
    net(x).sum().backward()
    v, y = 0.0, x
    for layer in safe.layers:
        v = 0.9 * v + 0.1 * (0.1 * nn.Linear.forward(layer, y).square())
        y = y + v
    y.sum().backward()
    for got, want in zip(net.parameters(), safe.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)


def test_what_counts_as_changed_of_a_buffer_whose_fingerprints_stay_on_a_device():
    """Nobody reads them where a step is proved: a write that autograd saw counts, whatever it wrote, and so does any small buffer."""
    large, small = torch.zeros(SMALL), torch.zeros(2)
    now, other = torch.ones(2), torch.zeros(2)
    for proof in (True, False):
        then = version(large)
        assert not _may_differ(large, now, now.clone(), then, proof)
        assert _may_differ(large, now, other, then, proof) == (not proof)
        assert _may_differ(small, now, now.clone(), version(small), proof)
        large.add_(0)
        assert _may_differ(large, now, now.clone(), then, proof)


class DrawsIf(nn.Module):
    def __init__(self, draws):
        super().__init__()
        self.linear, self.draws = nn.Linear(D, D), draws

    def forward(self, x, generator=None):
        y = torch.tanh(self.linear(x))
        return y * torch.rand(D, generator=generator) if self.draws else y


@pytest.mark.parametrize("kind", TAPES)
def test_random_states_are_kept_of_steps_that_draw(kind):
    _, tape = chain(kind, [DrawsIf(draws) for draws in (True, False, True)], factors([0.9] * 3), torch.randn(5, D, requires_grad=True))
    assert [len(rerun.conditions.random) for rerun in tape.reruns] == [1, 0, 1]


def test_a_generator_that_is_an_argument_of_a_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(DrawsIf(True) for _ in range(4))

        def forward(self, x):
            generator = torch.Generator().manual_seed(5)
            for layer in self.layers:
                x = layer(x, generator=generator)
            return x

    x, found = torch.randn(3, D), []
    for backward in ("reversible", "stored"):
        net = mnet_fx.momentumize(Net(), regions=["layers"], backward=backward)
        net(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *found))


def test_what_a_step_overwrites_in_a_list_is_afterwards_what_it_was_before_the_backward_pass():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(D, D), [torch.zeros(())]

        def forward(self, x):
            self.seen[0].add_(1.0)
            return x + torch.tanh(self.linear(x)) * self.seen[0]

    net = mnet_fx.momentumize(nn.Sequential(*(Counts() for _ in range(3))), regions=[""])
    out = net(torch.randn(3, D))
    for layer in net:
        layer.seen[0].mul_(10)  # in between
    out.sum().backward()
    assert [layer.seen[0].item() for layer in net] == [10.0] * 3


def test_reruns_take_turns(monkeypatch):
    """Those that a forward pass brings about too, which are not within a backward pass that does."""
    _, tape = chain(TAPES[0], [DrawsIf(True)] * 3, factors([0.9] * 3), torch.randn(5, D, requires_grad=True))
    entered, own = [], replay._TURNS

    class Turns:
        def __enter__(self):
            entered.append(True)
            return own.__enter__()

        def __exit__(self, *error):
            return own.__exit__(*error)

    monkeypatch.setattr(replay, "_TURNS", Turns())
    tape.reruns[0].conditions.run(torch.randn(5, D))
    assert entered


def test_a_functional_mode_without_a_tracer_takes_the_recurrence_in_floats():
    """As where AOTAutograd looks at a function once without recording it."""
    net, x = mnet_fx.momentumize(nn.Sequential(*(DrawsIf(False) for _ in range(3))), gamma=0.5, regions=[""]), torch.randn(3, D)
    with torch.no_grad(), FunctionalTensorMode():
        out = net(FunctionalTensor.to_functional(x))
    torch._sync(out)
    torch.testing.assert_close(torch._from_functional_tensor(out.elem), net(x).detach())
