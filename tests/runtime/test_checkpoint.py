"""A function that is run again for its gradient: what is kept, how often it runs, and who may ask for what."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

import mnet_fx
from mnet_fx.runtime.checkpoint import CheckpointError, Saved, checkpoint


class Run:
    """x.exp().sin(), and how often it ran."""

    def __init__(self):
        self.x, self.times = torch.randn(5, requires_grad=True), 0

    def __call__(self):
        self.times += 1
        return self.x.exp().sin()

    def plain(self):
        return torch.autograd.grad(self.x.exp().sin().sum(), self.x)[0]


def filled():
    """Those that hold a tensor by now."""
    return [found for found in gc.get_objects() if type(found) is Saved and found]


def test_each_pass_runs_it_once_and_nothing_is_held_afterwards():
    run = Run()
    y = checkpoint(run)
    assert run.times == 1
    assert not filled()
    for times in (2, 3):
        assert torch.equal(torch.autograd.grad(y.sum(), run.x, retain_graph=True)[0], run.plain())
        assert run.times == times
        assert not filled()


def test_the_gradient_of_a_gradient():
    run, found = Run(), []
    for y in (checkpoint(run), run()):
        first = torch.autograd.grad(y.sum(), run.x, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), run.x)[0])
    assert torch.equal(*found)


def test_who_asks_outside_of_a_backward_pass_has_a_run_of_its_own():
    run = Run()
    y = checkpoint(run)
    assert torch.equal(y.grad_fn._saved_self, run.x.exp())
    assert run.times == 2
    assert not filled()
    assert torch.equal(torch.autograd.grad(y.sum(), run.x)[0], run.plain())


def test_without_grad_mode_it_only_runs():
    run = Run()
    with torch.no_grad():
        assert not checkpoint(run).requires_grad
    assert run.times == 1


@pytest.mark.parametrize("other", [lambda x: x.exp(), lambda x: x.exp().sin().cos(), lambda x: x.double().exp().sin()])
def test_a_rerun_that_saves_other_tensors_is_an_error(other):
    run = Run()
    functions = [run, lambda: other(run.x)]
    y = checkpoint(lambda: functions.pop(0)())
    with pytest.raises(CheckpointError, match="saves other tensors"):
        y.sum().backward()


def test_a_rerun_that_fails_leaves_the_next_pass_as_it_was():
    run, trouble = Run(), [False]

    def sometimes():
        if trouble.pop():
            raise MemoryError("no memory")
        return run()

    y = checkpoint(sometimes)
    trouble[:] = [False, True]
    with pytest.raises(MemoryError):
        torch.autograd.grad(y.sum(), run.x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y.sum(), run.x)[0], run.plain())


class ReadTwice(torch.autograd.Function):
    """Its backward asks for what it saved as often as it likes, which autograd lets it do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] + ctx.saved_tensors[0]) / 2


def test_who_asks_twice_in_a_pass_leaves_nothing_behind():
    x = torch.randn(5, requires_grad=True)
    y = checkpoint(lambda: ReadTwice.apply(x.sin()).cos())
    for _ in range(2):
        grad = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        assert torch.equal(grad, torch.autograd.grad(ReadTwice.apply(x.sin()).cos().sum(), x)[0])
        assert not filled()


def test_what_a_rerun_saved_keeps_nothing_of_its_graph():
    x, looked = torch.randn(5, requires_grad=True), []

    def run():
        h = x.exp()
        h.register_hook(lambda grad: looked.extend(t.grad_fn for saved in filled() for t in saved.values()))
        return h.sin()

    checkpoint(run).sum().backward()
    assert looked == [None]  # that of exp, between the gradients of sin and of exp


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = x + ReadTwice.apply(torch.tanh(layer(x)))
        return x


@pytest.mark.parametrize("options", [{}, {"regions": ["layers"]}], ids=["captured", "named"])
@pytest.mark.parametrize("rest", ["store", "checkpoint"])
def test_a_backward_that_reads_what_it_saved_twice(options, rest):
    if options:
        model = nn.Sequential()
        model.layers = nn.Sequential(*(Layer() for _ in range(5)))
        model.forward = lambda x: model.layers(x)
    else:
        model = Residual()
    x, found = torch.randn(3, 8, requires_grad=True), []
    for backward in ("reversible", "stored"):
        net = mnet_fx.momentumize(model, backward=backward, rest=rest, **options)
        found.append(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]))
    assert all(map(torch.equal, *found))


class Layer(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x):
        return x + ReadTwice.apply(torch.tanh(super().forward(x)))


def test_passes_of_one_group_share_a_rerun():
    run = Run()
    first, second = (torch.randn(5, requires_grad=True) for _ in range(2))

    def both():
        run.times += 1
        return first.exp().sin(), second.exp().sin()

    y, z = checkpoint(both)
    with torch.utils.checkpoint.GraphExecGroup():
        found = torch.autograd.grad(y.sum(), first)[0], torch.autograd.grad(z.sum(), second)[0]
    assert run.times == 2
    for x, grad in zip((first, second), found, strict=True):
        assert torch.equal(torch.autograd.grad(x.exp().sin().sum(), x)[0], grad)


PROGRAM = """
import sys
import torch.utils.checkpoint

calls = []

def offloading(function, *args, **kwargs):
    calls.append(function)
    return function(*args)

if {before}:
    torch.utils.checkpoint.checkpoint = offloading
import mnet_fx
torch.utils.checkpoint.checkpoint = offloading

torch.manual_seed(0)
layer = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2))

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(layer() for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

model, x = Net(), torch.randn(5, 8)
for options in (dict(), dict(rest="checkpoint")):
    found = []
    for backward in ("reversible", "stored"):
        net = mnet_fx.momentumize(model, backward=backward, **options)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(net(x).square().sum(), [*net.parameters()]))
    assert all(map(torch.equal, *found))
net = mnet_fx.momentumize(model)
y = net(x).sum()
with torch.no_grad():
    model.layers[3][0].weight.add_(1)
try:
    y.backward()
except mnet_fx.InversionError:
    pass
else:
    raise AssertionError("no error")
assert not calls
"""


@pytest.mark.parametrize("before", [True, False], ids=["before the import", "afterwards"])
def test_functions_that_libraries_put_in_the_place_of_torchs_checkpoint_are_not_called(before):
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM.format(before=before)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
