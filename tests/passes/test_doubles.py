"""Equal layers are observed once: an operation that repeats an earlier one is not run, and is noted to do what running it would show."""

from contextlib import suppress

import pytest
import torch
from fuzz_programs import written
from test_effects import SHARING, WRITING, Shared
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import passes
from passes.graphs.effects import _mode_of, _Run


def graphs_of(model, *args, dynamic=False, read=lambda gm: passes.unlift(gm).graph_module):
    """The graphs that Dynamo makes of a call, as the passes read them unless `read` says otherwise."""
    found = []

    def backend(gm, inputs):
        with suppress(passes.LostContextError):
            found.append(read(gm))
        return gm

    torch._dynamo.reset()
    with suppress(Exception):  # what the model itself forbids
        torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    return found


def effects(gm, sharing):
    """The effects of the nodes, with storages numbered from 0, and how many operations were run for them."""
    run = _Run(gm, _mode_of(list(gm.graph.nodes)), sharing)
    numbers: dict[int, int] = {}

    def plain(found):
        return tuple(numbers.setdefault(number, len(numbers)) for number in found)

    noted = {}
    for node, e in run.effects().items():
        noted[node.name] = (plain(e.memory), plain(e.written), tuple((*plain([n]), size) for n, size in e.saved), e.known)
    return noted, run.ran


def assert_same_effects(gm):
    if _mode_of(list(gm.graph.nodes)) is None:
        return 0, 0
    (found, few), (expected, all_) = effects(gm, True), effects(gm, False)
    assert found == expected
    return few, all_


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, *more):
        for layer in self.layers:
            x = layer(x, *more)
        return x


class Autocast(nn.Module):
    def __init__(self, enabled):
        super().__init__()
        self.f, self.enabled = nn.Linear(4, 4), enabled

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, self.enabled):
            return x + self.f(x).tanh()


class NoGrad(nn.Module):
    def __init__(self, enabled):
        super().__init__()
        self.f, self.enabled = nn.Linear(4, 4), enabled

    def forward(self, x):
        with torch.set_grad_enabled(self.enabled):
            return x + self.f(x).tanh()


class Frozen(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.f = nn.Linear(4, 4).requires_grad_(not frozen)

    def forward(self, x):
        return x + self.f(x.detach()).tanh()


class Products(nn.Module):
    def forward(self, x):
        y = x.tanh()
        return (y * x) + (y * y) + (x * y)


class Masked(nn.Module):
    """Writes into tensors of its own, through views, and asks for gradients."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        y = torch.zeros_like(x)
        rows = y[:2]
        rows += self.f(x[:2])
        z = y.view(-1)[::2]
        z.mul_(x.view(-1)[::2])
        w = torch.zeros(4).requires_grad_()
        return x + y.tanh() * w.exp()


def conv_block():
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.1))


CASES = {
    "encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 6, enable_nested_tensor=False), torch.randn(3, 2, 8)),
    "convolutions": lambda: (Layers(*(conv_block() for _ in range(5))), torch.randn(2, 2, 4, 4)),
    "autocast": lambda: (Layers(*map(Autocast, (True, False, True, False))), torch.randn(3, 4)),
    "no_grad": lambda: (Layers(*map(NoGrad, (True, False, True, False))), torch.randn(3, 4)),
    "frozen": lambda: (Layers(*map(Frozen, (True, False, True, False))), torch.randn(3, 4, requires_grad=True)),
    "products": lambda: (Layers(Products(), Products()), torch.randn(3, 4, requires_grad=True)),
    "masked": lambda: (Layers(*(Masked() for _ in range(4))), torch.randn(3, 4)),
    "gated": lambda: (Layers(*(nn.Sequential(nn.Linear(4, 4), nn.GLU(), nn.Linear(2, 4)) for _ in range(4))), torch.randn(3, 4)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_run_is_noted_to_do_what_running_it_shows(name, dynamic):
    torch.manual_seed(0)
    model, x = CASES[name]()
    graphs = graphs_of(model, x, dynamic=dynamic)
    assert graphs
    for gm in graphs:
        assert_same_effects(gm)


@pytest.mark.parametrize("name", CASES)
def test_states_that_the_graph_itself_sets(name):
    torch.manual_seed(0)
    model, x = CASES[name]()
    for gm in graphs_of(model, x, read=lambda gm: gm):
        assert_same_effects(gm)


def test_a_call_that_changes_its_argument_is_run_each_time():
    graph, mode = torch.fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["example_value"] = torch.empty(4)
    for asks in (False, True, True):
        w = graph.call_function(torch.zeros_like, (x,))
        if asks:
            graph.call_method("requires_grad_", (w,))
        y = graph.call_function(torch.exp, (w,))
    graph.output(y)
    assert_same_effects(torch.fx.GraphModule({}, graph))


@pytest.mark.parametrize(
    ("sharing", "writing"),
    [
        pytest.param(sharing, writing, marks=[] if sharing == "view" or writing == "mul_" else pytest.mark.long)
        for sharing in SHARING
        for writing in WRITING
    ],
)
def test_writes_by_other_names(sharing, writing):
    for gm in graphs_of(Layers(*(Shared(sharing, writing) for _ in range(3))), torch.randn(3, 4)):
        assert_same_effects(gm)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_random_programs(seed):
    model = written(seed).model()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, s):
            x = torch.utils._pytree.tree_leaves(self.inner(x, s))[0]
            return self.inner(x, s)

    for gm in graphs_of(Twice(), torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)):
        assert_same_effects(gm)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 8)).unbind(-2)
        return x + F.dropout(self.out(F.scaled_dot_product_attention(q, k, v)), 0.1, self.training)


def test_equal_layers_are_run_once():
    """The first layer, and once more the views of what the last one gives."""
    ran = []
    for depth in (2, 12):
        (gm,) = graphs_of(Layers(*(Attention() for _ in range(depth))), torch.randn(2, 3, 8, requires_grad=True))
        ran.append(assert_same_effects(gm))
    assert ran[0][0] == ran[1][0] < 14
    assert ran[1][1] > 80
