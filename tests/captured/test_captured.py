"""What capturing through Dynamo promises: a call computes the momentum network or says why not, and capturing leaves no traces.

Two oracles: with gamma=0 the result is the original, outputs, gradients and buffers; and "reversible" is "stored" bit for bit.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections import Counter, UserDict, deque
from contextvars import ContextVar
from pathlib import Path
from random import sample

import numpy as np
import pytest
import torch
import zoo
from captures import Checked
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations, prune
from torch.torch_version import TorchVersion
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map_only

from mnet_fx import MnetError, MnetWarning, errors, momentumize
from mnet_fx.captured.doors import passed_by
from mnet_fx.captured.graphs import Graph
from mnet_fx.captured.network import Network
from mnet_fx.reporting import Report

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    def __init__(self, steps=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(steps))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Scaled(Stack):
    """Its residuals are multiplied by what `factor` reads."""

    def factor(self):
        return 1.0

    def forward(self, x):
        factor = self.factor()
        for block in self.blocks:
            x = x + factor * torch.tanh(block.linear(x))
        return x


class Statistics(Stack):
    """Batch statistics, a counter that is assigned, one that is moved in place, and dropout."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in self.blocks)
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("moved", torch.zeros(()))

    def forward(self, x):
        self.assigned = self.assigned + 1
        self.moved += 1
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + nn.functional.dropout(torch.tanh(norm(block.linear(x))), 0.3, self.training)
        return x


def points(rows=4):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))


def tensors(result):
    result = vars(result) if dataclasses.is_dataclass(result) else result
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def trained(net, call):
    """Outputs, gradients and buffers of a call."""
    torch.manual_seed(1)
    random.seed(1)
    net.zero_grad()
    results = tensors(call(net))
    sum(t.square().sum() for t in results if t.requires_grad).backward()
    return [t.detach().clone() for t in results], [p.grad for p in net.parameters()], [b.clone() for b in net.buffers()]


def assert_right(model, call, **options):
    """Both oracles, for the first call and one after it."""
    original, zero = copy.deepcopy(model), momentumize(copy.deepcopy(model), gamma=0, **options)
    stored = momentumize(copy.deepcopy(model), backward="stored", **options)
    ours = momentumize(copy.deepcopy(model), **options)
    for _ in range(2):
        zoo.assert_agree(trained(zero, call), trained(original, call))
        torch.testing.assert_close(trained(ours, call), trained(stored, call), rtol=0, atol=0)
    return ours


def is_momentum(result, model, x=None):
    """Whether a result is not that of the original network."""
    return not torch.allclose(result, model(points() if x is None else x), atol=1e-3)


# ---- what Python reads is asked at each call

SETTING, STACK, LEVELS = {"value": 1.0}, [1.0], ContextVar("levels", default=1.0)


class Elsewhere:
    value = 1.0


class Closure:
    def __init__(self):
        value = 1.0

        def read():
            return value

        def write(new):
            nonlocal value
            value = new

        self.read, self.write = read, write


class Reads(Scaled):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(value=1.0, inner=types.SimpleNamespace(value=1.0), array=np.ones(2), known=set())
        self.config.inner.back = self.config
        self.table, self.queue, self.hidden, self.closure = {"a": {"b": 1.0}}, deque([1.0]), 1.0, Closure()
        self.scale = functools.partial(float, 1.0)

    @property
    def shown(self):
        return self.hidden


READS = {
    "alias": (lambda m: (lambda config: config.value)(m.config), lambda m: setattr(m.config, "value", 2.0)),
    "cycle": (lambda m: m.config.inner.back.value, lambda m: setattr(m.config, "value", 2.0)),
    "inner object": (lambda m: m.config.inner.value, lambda m: setattr(m.config.inner, "value", 2.0)),
    "numpy": (lambda m: float(m.config.array[1]), lambda m: m.config.array.__setitem__(1, 2.0)),
    "set": (lambda m: 2.0 if 3 in m.config.known else 1.0, lambda m: m.config.known.add(3)),
    "dict": (lambda m: m.table["a"]["b"], lambda m: m.table["a"].update(b=2.0)),
    "size of a dict": (lambda m: float(len(m.table)), lambda m: m.table.update(c=2.0)),
    "deque": (lambda m: m.queue[-1], lambda m: m.queue.append(2.0)),
    "property": (lambda m: m.shown, lambda m: setattr(m, "hidden", 2.0)),
    "closure": (lambda m: m.closure.read(), lambda m: m.closure.write(2.0)),
    "partial": (lambda m: m.scale(), lambda m: setattr(m, "scale", functools.partial(float, 2.0))),
    "default of getattr": (lambda m: getattr(m, "later", 1.0), lambda m: setattr(m, "later", 2.0)),
    "hasattr": (lambda m: 2.0 if hasattr(m, "later") else 1.0, lambda m: setattr(m, "later", 2.0)),
    "class": (lambda m: Elsewhere.value, lambda m: setattr(Elsewhere, "value", 2.0)),
    "global": (lambda m: SETTING["value"], lambda m: SETTING.update(value=2.0)),
    "global list": (lambda m: STACK[-1], lambda m: STACK.append(2.0)),
    "context variable": (lambda m: LEVELS.get(), lambda m: LEVELS.set(2.0)),
    "mode of a child": (lambda m: 1.0 if m.blocks[0].training else 2.0, lambda m: m.blocks[0].eval()),
    "attribute of a parameter": (
        lambda m: getattr(m.blocks[0].linear.weight, "tag", 1.0),
        lambda m: setattr(m.blocks[0].linear.weight, "tag", 2.0),
    ),
    "requires_grad": (
        lambda m: 1.0 if m.blocks[0].linear.weight.requires_grad else 2.0,
        lambda m: m.blocks[0].linear.weight.requires_grad_(False),
    ),
    "hooks": (lambda m: 1.0 + len(m.blocks[0]._forward_hooks), lambda m: m.blocks[0].register_forward_hook(lambda *a: None)),
}


@pytest.mark.parametrize("name", READS)
def test_what_a_forward_reads_is_asked_at_each_call(name, monkeypatch):
    read, change = READS[name]
    monkeypatch.setitem(SETTING, "value", 1.0)
    monkeypatch.setattr(Elsewhere, "value", 1.0)
    STACK[:] = [1.0]
    token = LEVELS.set(1.0)
    try:
        net, x = momentumize(type("Model", (Reads,), {"factor": read})(), gamma=0), points()
        before = net(x)
        change(net)
        expected = x
        for block in net.blocks:
            expected = expected + 2.0 * torch.tanh(nn.functional.linear(expected, block.linear.weight, block.linear.bias))
        zoo.assert_agree(net(x), expected)
        assert not torch.allclose(before, expected)
    finally:
        LEVELS.reset(token)


def test_an_old_dynamo_that_does_not_ask_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    monkeypatch.setattr(errors, "_TOLD", set())
    with pytest.warns(MnetWarning, match="torch 2.11.0"):
        momentumize(Reads())


def test_questions_about_arguments_are_asked_at_each_call():
    class Asks(Stack):
        def forward(self, x, y):
            factor = 1.0 + 2.0 * (x is y) + 3.0 * (x.shape[0] == 1) + 5.0 * x.is_contiguous() + 7.0 * x.requires_grad
            factor = factor + 11.0 * (x.stride(0) == 1) + x.storage_offset()
            for block in self.blocks:
                x = x + factor * torch.tanh(block.linear(x))
            return x

    model = Asks()
    net = momentumize(model, gamma=0)
    for x in (points(), points(1), points().requires_grad_(), points(WIDTH).T[:, :WIDTH], torch.randn(4, 12)[:, 3:9]):
        for y in (x, x.clone()):
            zoo.assert_agree(net(x, y), model(x, y))


def test_what_dynamo_does_not_ask_twice_is_named():
    class Asks(Stack):
        def forward(self, x):
            return super().forward(x if x.is_leaf else 2 * x)

    with pytest.warns(MnetWarning, match="Asks asks a tensor's is_leaf, .* Dynamo keeps the answer of the first call"):
        momentumize(Asks())


def test_a_generator_of_pythons_own_is_refused_and_getenv_is_named():
    class Draws(Stack):
        def __init__(self):
            super().__init__()
            self.generator = random.Random(0)

        def forward(self, x):
            return super().forward(x) if self.generator.random() < 0.5 else x

    class Asks(Stack):
        def forward(self, x):
            return super().forward(x) if os.getenv("MNET_FX_TEST_HALF") is None else x

    with pytest.raises(MnetError, match=r"Draws has generator, a random.Random of its own, whose first draw Dynamo would keep"):
        momentumize(Draws())
    with pytest.warns(MnetWarning, match=r"Asks asks os.getenv, and Dynamo keeps the answer of the first call"):
        momentumize(Asks())


class Picks(Stack):
    def forward(self, x):
        return super().forward(x[:, random.sample(range(x.shape[1]), x.shape[1])])


class Shuffles(Stack):
    def forward(self, x):
        order = list(range(x.shape[1]))
        self.shuffled(order)
        return super().forward(x[:, order])

    def shuffled(self, order):
        random.shuffle(order)


class PicksByAFunction(Stack):
    def forward(self, x):
        return super().forward(picked(x))


def picked(x):
    return x[:, sample(range(x.shape[1]), x.shape[1])]


LAST = deque(maxlen=2)


class Remembers(Stack):
    def __init__(self):
        super().__init__()
        self.seen = deque([torch.zeros(WIDTH)] * 2, maxlen=2)

    def forward(self, x):
        self.seen.append(x.detach().mean(0))
        return super().forward(x - sum(self.seen))


class RemembersGlobally(Stack):
    def forward(self, x):
        LAST.appendleft(x.detach().mean(0))
        return super().forward(x - sum(LAST))


@pytest.mark.parametrize("make", [Picks, Shuffles, PicksByAFunction, Remembers, RemembersGlobally])
def test_what_dynamo_does_once_for_all_calls_is_refused(make):
    LAST.clear()
    with pytest.raises(MnetError, match=f"{make.__name__} (draws by random.sample or random.shuffle|appends to (seen|LAST), a deque)"):
        momentumize(make())
    model = make()
    net = momentumize(copy.deepcopy(model), gamma=0, regions=["blocks"])  # where Python runs that itself
    for _ in range(4):
        x, found = points(), []
        for one in (model, net):
            random.seed(0)
            LAST.clear()
            found.append(one(x))
        zoo.assert_agree(*found)


class MakesItsMean(Stack):
    def forward(self, x):
        try:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        except AttributeError:
            self.mean = x.detach().mean(0)
        return super().forward(x - self.mean)


class Tries(MakesItsMean):
    def forward(self, x):
        try:
            return super().forward(x)
        except (KeyError, AttributeError):
            return x


def test_attributes_that_are_missing_are_named():
    for make in (MakesItsMean, Tries):
        with pytest.warns(
            MnetWarning, match=f"{make.__name__} catches AttributeError, .*; getattr.self, name, None. and hasattr are asked"
        ):
            momentumize(make())


def test_nothing_is_said_of_what_dynamo_does_right():
    class Draws(Stack):
        def __init__(self):
            super().__init__()
            self.seen, self.order = deque([torch.zeros(WIDTH)] * 2, maxlen=2), []

        def forward(self, x):
            self.seen.popleft()
            self.seen.append(x.detach().mean(0))
            if not isinstance(x, torch.Tensor):
                raise AttributeError
            return super().forward(x - sum(self.seen)) * random.choice([0.5, 1.0])

        def reorder(self):  # which no forward calls
            random.shuffle(self.order)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Draws()
        net = momentumize(copy.deepcopy(model), gamma=0)
    for _ in range(4):
        x, found = points(), []
        for one in (model, net):
            random.seed(0)
            found.append(one(x))
        zoo.assert_agree(*found)


def test_keys_that_a_dict_of_attributes_lacks_are_named():
    class Asks(Stack):
        def forward(self, x):
            return super().forward(self.scaled(x))

        def scaled(self, x):
            return vars(self).get("scale", 1.0) * x

    class AsksItsDict(Asks):
        def scaled(self, x):
            return x if "scale" in self.__dict__ else 2 * x

    class Prints(Stack):  # where a forward does not come, nobody minds
        def __repr__(self):
            return str(vars(self))

    for make in (Asks, AsksItsDict):
        with pytest.warns(MnetWarning, match=f"{make.__name__} reads the dict of a module's attributes, .*; getattr is asked at each"):
            momentumize(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        momentumize(Prints())


# ---- what Python writes

SEEN, COUNTS = [], Counter()


class Writes(Stack):
    def __init__(self):
        super().__init__()
        self.log, self.cache, self.last, self.number = [], {}, None, 0

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            self.log.append(i)
            self.number += 1
            self.cache.setdefault(i, torch.ones(WIDTH) * i)
            self.last = x
            SEEN.append(x.square().mean())
            COUNTS["blocks"] += 1
        return x


def test_writes_of_a_forward_are_made_at_each_call_and_none_by_a_capture():
    model = Writes()
    COUNTS.clear()
    SEEN.clear()
    net, original = momentumize(model, (points(),), gamma=0), copy.deepcopy(model)
    for written in (model, net):
        assert (written.log, written.cache, written.last, written.number) == ([], {}, None, 0)
    assert not SEEN
    assert not COUNTS
    for call in range(1, 3):
        gradients = []
        for written in (original, net):
            SEEN.clear()
            written.zero_grad()
            (written(points()).sum() + sum(SEEN)).backward()  # the loss that was noted counts
            gradients.append([p.grad.clone() for p in written.parameters()])
            assert (len(SEEN), len(written.log), written.number, sorted(written.cache)) == (3, 3 * call, 3 * call, [0, 1, 2])
        zoo.assert_agree(*gradients)
        zoo.assert_agree(net.last, original.last)
    assert COUNTS["blocks"] == 12


def test_a_capture_moves_no_buffer_no_generator_and_no_flag():
    model, x = Statistics(), points()
    model.norms[0].eval()
    state, generators = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    flags = [module.training for module in model.modules()]
    net = momentumize(model, (x,))
    assert net.report.rewritten_adds == 3
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert [module.training for module in net.modules()] == [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model)


# ---- both oracles


class Tied(Stack):
    def __init__(self):
        super().__init__()
        self.blocks[1].linear.weight = self.blocks[0].linear.weight
        self.blocks.append(self.blocks[2])
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.blocks[2].linear.weight

    def forward(self, x):
        return self.head(super().forward(x))


class Drawn(Scaled):
    def factor(self):
        return random.random()


@dataclasses.dataclass
class Output:
    last: torch.Tensor
    hidden: list


class Structured(Stack):
    def forward(self, *, x, options):
        hidden = [x * options["scale"]]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return Output(hidden[-1], hidden[1:])


class Generates(Stack):
    def states(self, x):
        for block in self.blocks:
            x = block(x)
            yield x

    def forward(self, x):
        return list(self.states(x))[-1]


class Handles(Stack):
    def forward(self, x):
        try:
            raise KeyError
        except KeyError:
            for block in self.blocks:
                try:
                    x = block(x)
                finally:
                    pass
        return x


class OnInstance(Stack):
    """Its forward is an attribute of the instance."""

    def __init__(self):
        super().__init__()
        self.forward = super().forward


MODELS = {
    "statistics": (Statistics, lambda net: net(points())),
    "tied": (Tied, lambda net: net(points())),
    "Python's generator": (Drawn, lambda net: net(points())),
    "structures": (Structured, lambda net: net(x=points(), options={"scale": 1.5})),
    "a generator": (Generates, lambda net: net(points())),
    "handlers": (Handles, lambda net: net(points())),
    "forward on the instance": (OnInstance, lambda net: net(points())),
    "one row": (Stack, lambda net: net(points(1))),
    "no row": (Stack, lambda net: net(points()[:0])),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, call = MODELS[name]
    assert len(assert_right(make(), call).forward.network.chains) == 1


def test_outputs_keep_type_and_identity():
    class Aliases(Stack):
        def forward(self, x):
            x = super().forward(x)
            return UserDict(x=x, again=x, view=x.view(-1), dtype=x.dtype)

    result = momentumize(Aliases())(points())
    assert type(result) is UserDict
    assert result["x"] is result["again"]
    assert result["view"].data_ptr() == result["x"].data_ptr()
    assert result["dtype"] is torch.float32


@pytest.mark.parametrize("inner", ["aot_eager"])
def test_compiled_inside(inner):
    net = assert_right(Stack(), lambda net: net(points()), inner=inner)
    assert torch.equal(pickle.loads(pickle.dumps(net))(points()), net(points()))
    zoo.assert_agree(torch.export.export(net.eval(), (points(),)).module()(points()), net(points()))


def test_sizes_and_numbers_vary():
    class Numbered(Stack):
        def forward(self, x, number, factor=1.0):
            for block in self.blocks:
                x = x + torch.tanh(block.linear(x)) * number * factor
            return x

    model = Numbered()
    net = momentumize(model, gamma=0)
    for i, rows in enumerate((4, 3, 1, 7, 0, 2)):
        zoo.assert_agree(net(points(rows), i, factor=0.3 * i), model(points(rows), i, factor=0.3 * i))


class PostNorm(Block):
    """With a dropout and a scale between the sums, whose numbers may vary from call to call."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.scale = nn.LayerNorm(WIDTH), nn.Dropout(0.1), 1.0

    def forward(self, x):
        return self.scale * self.dropout(self.norm(super().forward(x)))


def test_a_dropout_and_a_scale_that_vary_between_steps():
    class Stacked(Stack):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(PostNorm() for _ in range(3))

    model = Stacked()
    nets = [momentumize(model, backward=backward) for backward in ("reversible", "stored")]
    zero, x = momentumize(model, gamma=0), points()
    for p, scale in ((0.1, 1.0), (0.0, 1.0), (0.3, 0.9), (0.2, 0.8), (1.0, 1.1)):
        found = []
        for net in (model, zero, *nets):
            for block in net.blocks:
                block.dropout.p, block.scale = p, scale
            torch.manual_seed(0)
            result = net(x)
            found.append((result, torch.autograd.grad(result.square().sum(), [*net.parameters()])))
        for one, other in zip(tree_leaves(found[0]), tree_leaves(found[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert all(map(torch.equal, tree_leaves(found[2]), tree_leaves(found[3])))
    assert set(nets[0].forward.network.chains) == {("blocks.0", "blocks.1", "blocks.2")}


class Routed(Block):
    """Picks rows by a mask of its own, as experts do."""

    def forward(self, x):
        mask, y = x[:, 0] > 0, torch.zeros_like(x)
        y[mask] = self.linear(x[mask])
        return x + torch.tanh(y)


class Routes(Stack):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Routed() for _ in range(3))


class RoutesOnce(Stack):
    """Picks rows by a mask that all blocks share."""

    def forward(self, x):
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        for block in self.blocks:
            x = x + torch.zeros_like(x).index_add(0, rows, torch.tanh(block.linear(x[rows])))
        return x


@pytest.mark.parametrize("make", [Routes, RoutesOnce])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_sizes_that_depend_on_values(make, inner):
    model = make()
    zero = momentumize(model, gamma=0, inner=inner)
    nets = [momentumize(model, backward=backward, inner=inner) for backward in ("reversible", "stored")]
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(5, WIDTH) if seed < 3 else -torch.rand(5, WIDTH)  # no rows at all
        found = [(result := net(x), torch.autograd.grad(result.square().sum(), [*net.parameters()])) for net in (model, zero, *nets)]
        for one, other in zip(tree_leaves(found[0]), tree_leaves(found[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert all(map(torch.equal, tree_leaves(found[2]), tree_leaves(found[3])))
    assert [len(chain) for chain in nets[0].forward.network.chains] == [3]


def test_draws_from_numpy_are_those_of_the_model():
    class Draws(Stack):
        def forward(self, x):
            return super().forward(x * float(np.random.rand()) + torch.from_numpy(np.random.rand(*x.shape)).float())

    model = Draws()
    net, results = momentumize(model, gamma=0), []
    for each in (model, net):
        np.random.seed(3)
        results.append([each(points()) for _ in range(3)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_another_depth_is_another_network():
    class Deep(Stack):
        def forward(self, x, depth):
            for block in self.blocks[:depth]:
                x = block(x)
            return x

    model = Deep(4)
    net = momentumize(model)
    first = net(points(), 4)
    for _ in range(2):  # the second is not captured any more
        with pytest.raises(MnetError, match=r"another momentum network .* chains of 3 steps from blocks.0 to blocks.2, where there were 4"):
            net(points(), 3)
    assert torch.equal(net(points(), 4), first)


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def without_gradients(model, x):
    with torch.no_grad():
        return model(x)


class Wraps(torch.Tensor):
    """A tensor that wraps another one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wraps(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


def switched(around, what):
    class Switched(Stack):
        def forward(self, x, switched=False):
            if switched and what == "all at once":
                return around(lambda x: Stack.forward(self, x), x)
            for i, block in enumerate(self.blocks):
                x = around(block, x) if switched and (what == "all blocks" or i == 0) else block(x)
            return x

    return momentumize(Switched(4))


@pytest.mark.parametrize("what", ["all at once", "all blocks", "one block"])
def test_blocks_without_gradients_are_the_same_network(what):
    net = switched(without_gradients, what)
    first, second = net(points()), net(points(), True)
    assert torch.equal(first, second)
    assert second.requires_grad == (what == "one block")


@pytest.mark.parametrize("what", ["all at once", "all blocks", "one block"])
def test_blocks_that_are_no_steps_under_a_context_are_another_network(what):
    net = switched(under_autocast, what)
    first = net(points())
    for _ in range(2):
        with pytest.raises(MnetError, match=r"another momentum network .* where there were 4 steps"):
            net(points(), True)
    assert torch.equal(net(points()), first)


@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
def test_a_check_in_train_mode_only_breaks_the_chain_in_eval_mode_too():
    """As in DETR's encoder: layers that are chains of their own for training are not one chain for validation."""

    net = momentumize(nn.Sequential(*[Checked(Block(), Block()) for _ in range(3)]), gamma=0.9)
    first = net(points())
    assert [(region.path, region.steps) for region in net.report.regions] == [(f"{i}.blocks", 2) for i in range(3)]
    assert {refusal.code for refusal in net.report.refusals} == {"graph_break"}
    assert {refusal.path.partition(".")[0] for refusal in net.report.refusals} == {"0", "1", "2"}
    with torch.no_grad():
        assert torch.equal(net.eval()(points()), first)
    assert torch.equal(net.train()(points()), first)


@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
def test_a_chain_that_would_end_with_another_operation_is_another_network():
    """The norm between two lists stands outside of chains in train mode, and in the last step of the first in eval mode."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower, self.norm, self.upper = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH), nn.Sequential(Block(), Block())

        def forward(self, x, normed=True):
            x = self.lower(x)
            if self.training:
                torch._dynamo.graph_break()
            return self.upper(self.norm(x) if normed else x)

    for normed in (True, False):
        net = momentumize(Two(), gamma=0.9)
        first = net(points(), normed)
        assert [region.steps for region in net.report.regions] == [2, 2]
        with torch.no_grad(), pytest.raises(MnetError, match="another momentum network") if normed else contextlib.nullcontext():
            assert torch.equal(net.eval()(points(), normed), first)
        assert torch.equal(net.train()(points(), normed), first)


@pytest.mark.parametrize("flat", [False, True])
def test_what_is_a_chain_in_one_pass_and_left_in_another_is_another_network(flat):
    """A list that runs twice; and adds that are all the model's own."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(Block(), Block())
            self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 3 for _ in range(4))

        def forward(self, x, passes=2):
            for number in range(passes):
                for layer, weight in zip(self.layers, self.weights, strict=False):
                    x = x + torch.tanh(x @ weight) if flat else layer(x)
                    if number == 1:
                        x = x.cumsum(-1) if self.training else x
                x = x.sin().cumsum(-1)
            return x

    for first in (True, False):
        net = momentumize(Twice().train(first), gamma=0.9)
        found = net(points())
        with pytest.raises(MnetError, match=r"chain of 2 steps from .* runs \d times in this kind of call, with \d residual adds"):
            net.train(not first)(points())
        assert torch.equal(net.train(first)(points()), found)
        net(points(), 1)
    net = momentumize(Twice().eval())
    net(points(), 1)
    net(points(), 2)


def test_what_lies_in_a_module_that_python_called_has_run():
    empty, chain = Report(0, 0, (), ()), ("blocks.0.add", "blocks.1.add")
    there, nothing = Graph(empty, (chain,), frozenset(chain), frozenset(chain)), Graph(empty, (), frozenset({""}), frozenset())
    network = Network()
    network.add([nothing], training=True, entered=["blocks.0", "block"], unseen=["blocks.0.add"])
    with pytest.raises(MnetError, match=r"another momentum network .* chains of 2 steps .*, where there were none there"):
        network.add([there], training=False)
    network = Network()
    network.add([nothing], training=True, entered=["block", "blocks", "blocks.0"])  # which call what they have through its own door
    network.add([there], training=False)
    for path in ("blocks.1.add", "blocks.1.add.inner"):
        with pytest.raises(MnetError, match=r"another momentum network .* chains of none there, where there were 2 steps"):
            network.add([nothing], training=False, entered=[path])


def test_what_may_run_unseen_where_python_entered():
    modules = dict(nn.ModuleDict({"a": nn.Sequential(nn.Tanh(), nn.Sequential(nn.ReLU())), "b": nn.Tanh()}).named_modules())
    assert passed_by(modules, ["a"]) == {"a.0", "a.1.0"}
    assert passed_by(modules, ["a.1", "b"]) == {"a.1.0"}


def test_tensors_that_no_chain_can_carry_are_another_network():
    net = momentumize(Stack())
    net(points())
    with pytest.raises(MnetError, match=r"another momentum network .* where there were 3 steps"):
        net(Wraps(points()))


def test_train_under_autocast_and_eval_without_are_one_network():
    model = Stack()
    net, zero = momentumize(model), momentumize(model, gamma=0)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(net.parameters(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(zero(points()), model(points()), rtol=0.05, atol=0.05)
        loss = net(points()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    net.eval()
    with torch.no_grad():
        result = net(points())
    with torch.inference_mode():
        assert torch.equal(net(points()), result)
    assert [len(chain) for chain in net.forward.network.chains] == [3]
    assert is_momentum(result, model)


def test_inference_first_then_training():
    net = momentumize(Stack())
    with torch.inference_mode():
        first = net(points())
    result = net(points())
    result.sum().backward()
    assert torch.equal(first, result)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_gradients_and_checkpoints_around(reentrant):
    model, found = Stack(), []
    for backward in ("reversible", "stored"):
        net, x = momentumize(copy.deepcopy(model), backward=backward), points().requires_grad_()
        y = net(x).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        y.backward(retain_graph=True)
        y.backward(retain_graph=True)
        gradient.square().sum().backward()
        checkpoint.checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_functional_calls():
    model, found = Stack(), []
    for backward in ("reversible", "stored"):
        net = momentumize(model, backward=backward)
        values = {name: (1.1 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
        result = functional_call(net, values, (points(),))
        result.square().sum().backward()
        found.append([result.detach(), *(value.grad for value in values.values())])
        assert is_momentum(result, model)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_frozen_part_in_eval_mode():
    model = nn.Sequential(Statistics(), nn.Linear(WIDTH, 2))
    model[0].eval().requires_grad_(False)
    assert_right(model, lambda net: net(points()))


# ---- never silently the original network


class NotCaptured(Stack):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class NotCapturedBlock(Block):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class NotCapturedBlocks(Stack):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(NotCapturedBlock() for _ in range(3))


class NotCapturedMethod(Stack):
    @torch.compiler.disable
    def loop(self, x):
        for weight in [block.linear.weight for block in self.blocks]:
            x = x + torch.tanh(x @ weight)
        return x

    def forward(self, x):
        return self.loop(x)


class Measures(Stack):
    """Asks for a value in each step."""

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block.linear(x)) * max(x.abs().max().item(), 1.0)
        return x


@pytest.mark.parametrize("make", [NotCaptured, NotCapturedBlocks, NotCapturedMethod, Measures])
@pytest.mark.parametrize("given", [False, True], ids=["", "example_inputs"])
def test_a_forward_that_is_left_to_python_is_an_error(make, given):
    with pytest.raises(MnetError, match=r"left the whole forward to Python.*name its list of layers with regions"):
        momentumize(make(), (points(),) if given else None)(points())


def test_a_forward_that_is_left_to_python_in_some_calls_is_an_error_there():
    class Sometimes(Stack):
        def forward(self, x, compute):
            if not compute:
                return None
            return self.loop(x)

        loop = NotCapturedMethod.loop

    net = momentumize(Sometimes())
    with pytest.warns(MnetWarning, match="no residual chain was rewritten"):
        assert net(points(), False) is None
    for _ in range(2):
        with pytest.raises(MnetError, match="left the whole forward to Python"):
            net(points(), True)


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "eager_then_compile"])
@pytest.mark.parametrize("captured", [False, True], ids=["first call", "later call"])
def test_where_dynamo_is_told_not_to_capture(stance, captured):
    net = momentumize(Stack())
    if captured:
        net(points())
    with torch.compiler.set_stance(stance), pytest.raises(MnetError, match=r"set_stance|left it to Python"):
        net(points(5))
    assert is_momentum(net(points(5)), functools.partial(functional_original, net), points(5))


def functional_original(net, x):
    for block in net.blocks:
        x = x + torch.tanh(nn.functional.linear(x, block.linear.weight, block.linear.bias))
    return x


def test_where_dynamo_is_switched_off():
    model = Stack()
    net = momentumize(model)
    for _ in range(2):
        with torch._dynamo.config.patch(disable=True), pytest.raises(MnetError, match="switched off"):
            net(points())
        assert is_momentum(net(points()), model)
    assert is_momentum(torch.compiler.disable(net)(points()), model)  # outside of the model it does no harm
    torch._dynamo.reset()
    assert is_momentum(net(points()), model)


@pytest.mark.parametrize("make", [lambda: nn.ModuleList([Block(), Block()]), lambda: nn.ModuleDict({"a": Block(), "b": Block()})])
def test_a_model_without_a_forward_is_an_error(make):
    with pytest.raises(MnetError, match="has no forward, so what calls its layers would compute the original network"):
        momentumize(make())


def test_roots_of_torch_nn_take_no_fast_path():
    x = torch.randn(2, 5, 8)
    layer = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0, batch_first=True)
    for model in (nn.TransformerEncoder(layer(), 2), layer(), nn.Sequential(layer(), layer())):
        model.eval()
        net, zero = momentumize(model), momentumize(model, gamma=0)
        with torch.no_grad():
            zoo.assert_agree(zero(x), model(x))
            assert is_momentum(net(x), model, x)
            assert torch.equal(copy.deepcopy(net)(x), net(x))


class Sums(nn.Module):
    """With a method of its own, in which the steps are."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def features(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block.linear(x))
        return x

    def forward(self, x):
        return self.features(x).sum(-1)


def by_loop(net, x):
    for block in net.blocks:
        x = block(x)
    return x


WAYS = {
    "method": (Sums, lambda net, x: net.features(x)),
    "loop": (Stack, by_loop),
    "in another model": (Stack, lambda net, x: nn.Sequential(*net.blocks)(x)),
    "forward of the class": (Stack, lambda net, x: type(net).forward(net, x)),
    "forward of a block": (Stack, lambda net, x: net.blocks[1].forward(x)),
    "torch.compile of a block": (Stack, lambda net, x: torch.compile(net.blocks[1], backend="eager")(x)),
    "torch.compile of a part": (lambda: nn.Sequential(Stack()), lambda net, x: torch.compile(net[0], backend="eager")(x)),
    "shallow copy": (Stack, lambda net, x: copy.copy(net)(x)),
    "torch.fx": (Stack, lambda net, x: torch.fx.symbolic_trace(net)(x)),
    "export of a part": (Stack, lambda net, x: torch.export.export(nn.Sequential(*net.blocks), (x,))),
}
STATES = {
    "fresh": lambda net: net,
    "called": lambda net: (net(points()), net)[1],
    "copied": copy.deepcopy,
    "pickled": lambda net: pickle.loads(pickle.dumps(net)),
    "called, pickled": lambda net: pickle.loads(pickle.dumps((net(points()), net)[1])),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_other_ways_in_are_an_error(way, state):
    make, enter = WAYS[way]
    net = STATES[state](momentumize(make()))
    with pytest.raises(MnetError, match=r"part of a momentum chain|shallow copy"):
        enter(net, points())
    assert torch.equal(net.forward(points()), net(points()))


def test_a_module_that_is_put_in_later_is_the_users_own():
    model = Stack()
    net, own = momentumize(model, gamma=0), Block()
    net.blocks[1] = model.blocks[1] = own
    for _ in range(2):
        torch.testing.assert_close(net(points()), model(points()), rtol=1e-4, atol=1e-4)
        own(points())


def test_copies_of_data_parallel_are_an_error():
    net = momentumize(Stack())
    assert torch.equal(DataParallel(net)(points()), net(points()))
    with pytest.raises(MnetError, match="shallow copy"):
        net._replicate_for_data_parallel()(points())


# ---- graph breaks


def breaks():
    torch._dynamo.graph_break()


class BreaksInLoop(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            breaks()
        return x


class BreaksInTry(Stack):
    def forward(self, x):
        for block in self.blocks:
            try:
                x = block(x)
                breaks()
            finally:
                pass
        return x


class BreaksInWith(Stack):
    def forward(self, x):
        with warnings.catch_warnings():
            for block in self.blocks:
                x = block(x)
                breaks()
        return x


@pytest.mark.parametrize("make", [BreaksInLoop, BreaksInTry, BreaksInWith])
def test_a_break_between_layers_is_named_with_its_line_and_the_regions_to_give(make):
    net, x = momentumize(make()), points()
    with pytest.warns(MnetWarning) as caught:
        net(x)
    text = next(str(warning.message) for warning in caught if "Dynamo breaks its graph" in str(warning.message))
    assert Path(__file__).name in text
    assert "regions=['blocks']" in text
    assert is_momentum(momentumize(make(), regions=["blocks"])(x), net)


class Drops(nn.Module):
    """LayerDrop, as transformers write it, over layers of two adds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Twice(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            if not (self.training and torch.rand([]) < 0.4):
                x = layer(x)
        return x


class Twice(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        return x + torch.tanh(self.second(x))


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_are_dropped_at_random_train_on_and_a_warning_names_the_list(seed):
    torch.manual_seed(seed)
    model = Drops()
    nets = [momentumize(model, gamma=0.5, backward=way) for way in ("reversible", "stored")]
    zero = momentumize(model, gamma=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(12):
            found = []
            for net in (*nets, zero, model):
                torch.manual_seed(100 * seed + call)
                y = net(points())
                found.append(
                    [y.detach(), *torch.autograd.grad(y.sum() + 0 * sum(map(torch.sum, net.parameters())), list(net.parameters()))]
                )
            assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
            zoo.assert_agree(found[2], found[3])
    told = [str(warning.message) for warning in caught if "between the layers of a list" in str(warning.message)]
    assert len(told) <= len(nets) + 1  # one for each
    assert told
    assert all("regions=['layers']" in text and Path(__file__).name in text for text in told)
    paths = [region.path for region in nets[0].report.regions]
    assert len(set(paths)) == len(paths)  # each layer under its own name, though Dynamo has one graph for several
    assert "graph_break" in {refusal.code for refusal in nets[0].report.refusals} or len(paths) < 2


class ReadsValue(Stack):
    """Python asks for a value of the stream, before the blocks or between them."""

    def __init__(self, between):
        super().__init__()
        self.between = between

    def forward(self, x):
        if not self.between and x.mean().item() > 1e9:
            x = x + 1
        for block in self.blocks:
            x = block(x)
            if self.between and x.mean().item() > 1e9:
                x = x + 1
        return x


@pytest.mark.parametrize("between", [False, True], ids=["before", "between"])
def test_a_report_names_the_break_that_it_cannot_see_beyond(between):
    with pytest.warns(MnetWarning, match="breaks its graph"):
        net = momentumize(ReadsValue(between), (points(),))
    assert {refusal.code for refusal in net.report.refusals} == {add.code for add in net.report.adds} == {"graph_break"}
    assert all(f"{Path(__file__).name}:" in refusal.explanation for refusal in net.report.refusals)
    assert "The first call makes it final" in str(net.report)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net(points())
    if not between:
        assert (len(net.report.regions), net.report.refusals) == (1, ())
        return
    assert {refusal.code for refusal in net.report.refusals} == {add.code for add in net.report.adds} == {"graph_break"}
    assert all("between the layers of blocks, at " in refusal.explanation for refusal in net.report.refusals)
    assert f"{Path(__file__).name}:" in net.report.refusals[0].explanation
    assert any("regions=['blocks']" in str(warning.message) for warning in caught)


def test_a_step_that_a_preview_reads_by_itself_is_not_said_to_be_too_short():
    report = momentumize(ReadsValue(False)).report
    assert {refusal.code for refusal in report.refusals} == {"untraceable"}
    assert "The first call, or example_inputs, makes it final" in str(report)


def test_a_break_elsewhere_is_none_of_our_business():
    class Before(Stack):
        def forward(self, x):
            x = x + 1
            breaks()
            return super().forward(x)

    model = Before()
    net, zero = momentumize(model), momentumize(model, gamma=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_momentum(net(points()), model)
    zoo.assert_agree(zero(points()), model(points()))


class Counts(Stack):
    """Python goes through a tensor of which only values tell the size, before the blocks or behind another break."""

    def __init__(self, late=False):
        super().__init__()
        self.late = late

    def forward(self, x, numbers):
        if self.late:
            x = super().forward(x)
            breaks()
        x = x + 0.01 * sum(torch.repeat_interleave(numbers, numbers).tolist())
        return x if self.late else super().forward(x)


@pytest.mark.parametrize("example", [False, True])
def test_python_goes_through_a_tensor_of_which_values_tell_the_size(example):
    model, calls = Counts(), [(points(), torch.tensor(numbers)) for numbers in ([3, 5], [1, 2, 3])]
    net, zero = momentumize(model, calls[0] if example else None), momentumize(model, gamma=0)
    for x, numbers in calls:
        zoo.assert_agree(zero(x, numbers), model(x, numbers))
        alone = Stack()
        alone.load_state_dict(model.state_dict())
        assert torch.equal(net(x, numbers), momentumize(alone)(x + 0.01 * int((numbers**2).sum())))
    assert [region.steps for region in net.report.regions] == [3]


def test_such_a_tensor_behind_a_break_is_an_error_that_says_so():
    with pytest.raises(MnetError, match=r"a size decides that depends on values.*regions="):
        momentumize(Counts(late=True))(points(), torch.tensor([3, 5]))


# ---- example_inputs


@pytest.mark.parametrize(
    "example",
    [
        lambda x: (x,),
        lambda x: [x],
        lambda x: x,
        lambda x: {"x": x},
        lambda x: UserDict(x=x),
        lambda x: (x.to("meta"),),
        lambda x: {"x": FakeTensorMode().from_tensor(x)},
    ],
    ids=["tuple", "list", "tensor", "dict", "mapping", "meta", "fake"],
)
def test_example_inputs_capture_both_modes(example):
    net = momentumize(Stack(), example(points()))
    assert [part.front_end for part in net.report.captured] == ["Dynamo"]
    assert sorted(net.forward.network.reports) == [False, True]
    assert is_momentum(net(points()), functools.partial(functional_original, net))


def test_example_inputs_tell_no_more_than_what_is_before_a_graph_break():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Stack(), Stack(4)

        def forward(self, x):
            x = self.first(x).sin()
            breaks()
            return self.second(x)

    with pytest.warns(MnetWarning, match=r"breaks its graph, at .*test_captured.py:\d+ .* net.report is a preview until the first call"):
        net = momentumize(Parts(), (points(),))
    assert {part.front_end for part in net.report.captured} == {"preview"}
    net(points())
    assert {part.front_end for part in net.report.captured} == {"Dynamo"}
    assert [(region.name, region.steps) for region in net.report.regions] == [("momentum_region_0", 3), ("momentum_region_1", 4)]


def test_a_root_that_is_left_to_python_has_no_program_of_its_own():
    """Dynamo captures the parts that it calls: nothing is known of the whole before it runs, and there is nothing to export."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Stack(), Stack(4)

        @torch._dynamo.disable(recursive=False)
        def forward(self, x):
            return self.second(self.first(x).sin())

    model = Root()
    with pytest.warns(MnetWarning, match="net.report is a preview until the first call"):
        net = momentumize(model, (points(),))
    with pytest.raises(MnetError, match="there is no one program to export"):
        torch.export.export(copy.deepcopy(net).eval(), (points(),))
    assert is_momentum(net(points()), model)
    assert [(region.path, region.steps) for region in net.report.regions] == [("first.blocks", 3), ("second.blocks", 4)]


def test_a_model_on_the_meta_device_is_captured_and_filled_later():
    with torch.device("meta"):
        net = momentumize(Stack(), (points(),))
    net = net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = Stack()
    model.load_state_dict(net.state_dict())
    assert torch.equal(momentumize(model)(points()), net(points()))


# ---- exports


@pytest.mark.parametrize("make", [Stack, Statistics])
def test_an_export_is_the_momentum_network(make):
    model = make().eval()
    net = momentumize(model)
    exported = torch.export.export(net, (points(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    zoo.assert_agree(exported(points(3)), net(points(3)))
    assert is_momentum(exported(points()), model)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own deprecations
def test_a_trace_and_a_compiled_net_are_the_momentum_network():
    net = momentumize(Stack()).eval()
    whole = nn.Sequential(nn.Linear(WIDTH, WIDTH), net)
    expected = whole(points())
    zoo.assert_agree(torch.jit.trace(whole, (points(),))(points()), expected)
    zoo.assert_agree(torch.export.export(whole, (points(),)).module()(points()), expected)
    zoo.assert_agree(torch.compile(whole, backend="eager")(points()), expected)
    assert is_momentum(net(points()), functools.partial(functional_original, net))


# ---- changes after a capture

HOOKS = {
    "forward": lambda net: net.blocks[1].register_forward_hook(lambda module, args, result: None),
    "forward with kwargs": lambda net: net.blocks[1].register_forward_hook(lambda m, a, k, result: None, with_kwargs=True),
    "forward that changes": lambda net: net.blocks[1].linear.register_forward_hook(lambda module, args, result: 2 * result),
    "pre-hook that changes": lambda net: net.blocks[1].linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "forward that notes": lambda net: net.blocks[1].register_forward_hook(lambda module, args, result: SEEN.append(1)),
    "forward of the root": lambda net: net.register_forward_hook(lambda module, args, result: 3 * result),
    "backward of the root": lambda net: net.register_full_backward_hook(lambda module, before, after: (3 * before[0],)),
    "of a parameter": lambda net: net.blocks[1].linear.weight.register_hook(lambda g: 3 * g),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_come_later(kind):
    found = []
    for options in (None, {"gamma": 0}, {"backward": "stored"}, {}):
        torch.manual_seed(3)
        net = Stack() if options is None else momentumize(Stack(), **options)
        net(points())
        SEEN.clear()
        HOOKS[kind](net)
        found.append(trained(net, lambda net: net(points().requires_grad_())))
        assert len(SEEN) == (kind == "forward that notes") or options == {}  # a rerun in the backward pass notes it again
    zoo.assert_agree(found[1], found[0])
    torch.testing.assert_close(found[3], found[2], rtol=0, atol=0)


def test_a_hook_that_is_removed():
    net = momentumize(Stack())
    before = net(points())
    handle = net.blocks[1].linear.register_forward_hook(lambda module, args, result: 2 * result)
    assert not torch.equal(net(points()), before)
    handle.remove()
    assert torch.equal(net(points()), before)


def test_changes_of_modules_and_parameters_after_a_capture():
    net = momentumize(Stack(), gamma=0)

    def check():
        zoo.assert_agree(net(points()), functional_original(net, points()))

    check()
    net.load_state_dict({name: 0.3 * torch.randn_like(p) for name, p in net.state_dict().items()}, assign=True)
    check()
    net.blocks[1].linear = nn.Linear(WIDTH, WIDTH)
    check()
    net.blocks[0].linear.weight = net.blocks[2].linear.weight
    check()
    prune.l1_unstructured(net.blocks[1].linear, "weight", 0.5)
    check()
    parametrizations.weight_norm(net.blocks[2].linear)
    check()
    net.blocks[2].requires_grad_(False)
    trained(net, lambda net: net(points()))
    net.double()
    assert net(points().double()).dtype is torch.float64
    assert [len(chain) for chain in net.forward.network.chains] == [3]


def test_a_copy_amid_training():
    net = momentumize(Statistics())
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        net(points()).sum().backward()
        optimizer.step()
    loss, file = net(points()).sum(), io.BytesIO()
    twin = copy.deepcopy(net)
    loss.backward()
    torch.save(net, file)
    file.seek(0)
    net.eval()
    for other in (twin, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other.eval()(points()), net(points()))
        assert all(p is not q for p, q in zip(other.parameters(), net.parameters(), strict=True))


def test_a_pickle_in_another_process(tmp_path):
    net = momentumize(nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))).eval()
    x = torch.randn(2, 5, 8)
    torch.save((net, x, net(x)), tmp_path / "net.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); net, x, y = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(net(x), y); print(net.report)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "net.pt"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 residual adds rewritten" in done.stdout


# ---- nets within models


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.blocks = inner, nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        return by_loop(self, self.inner(x))


@pytest.mark.parametrize("options", [{}, {"regions": ["blocks"]}], ids=["captured", "named"])
def test_a_net_inside_of_a_model(options):
    model = Outer(momentumize(Stack(), gamma=0.5, **options))
    net, zero = momentumize(model), momentumize(model, gamma=0)
    zoo.assert_agree(zero(points()), model(points()))
    assert is_momentum(net(points()), model)
    stored = momentumize(model, backward="stored")
    torch.testing.assert_close(trained(net, lambda net: net(points())), trained(stored, lambda net: net(points())), rtol=0, atol=0)


def test_a_second_rewrite_starts_over():
    model = Stack()
    net = momentumize(model, gamma=0.5)
    net(points())
    assert torch.equal(momentumize(net)(points()), momentumize(model)(points()))


# ---- memory


def after(use):
    """Weak references to a net, its model, a parameter, and what Dynamo made, after some use of it."""
    model = OnInstance() if use is on_instance else Stack()
    net = momentumize(model)
    use(net)
    made = [value for name, value in net.forward.compiled[0].__globals__.items() if name.startswith("__compiled_fn")]
    return [weakref.ref(found) for found in (net, model, model.blocks[0].linear.weight, net.forward, *made)]


def train(net):
    net(points()).sum().backward()


def on_instance(net):
    train(net)


def in_both_modes(net):
    train(net)
    net.eval()(points(5))


def copied(net):
    train(net)
    pickle.loads(pickle.dumps(copy.deepcopy(net)))(points())


def exported(net):
    torch.export.export(net, (points(),))
    train(net)


@pytest.mark.parametrize("use", [train, on_instance, in_both_modes, copied, exported])
def test_a_net_that_is_dropped_is_freed(use):
    found = [after(use) for _ in range(3)]
    gc.collect()
    assert not [reference() for references in found for reference in references if reference() is not None]


def test_a_backward_pass_after_its_net_was_dropped():
    model = Stack()
    loss = momentumize(model)(points()).sum()
    gc.collect()
    loss.backward()
    assert model.blocks[0].linear.weight.grad is not None


def test_many_nets_of_one_class():
    """More than Dynamo's limit for one function, which counts each model by itself."""
    for _ in range(20):
        model = Stack()
        net, zero = momentumize(model), momentumize(model, gamma=0)
        zoo.assert_agree(zero(points()), model(points()))
        assert is_momentum(net(points()), model)


# ---- threads


def run_all(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_call_one_net_with_new_kinds_of_calls():
    model = Stack()
    net = momentumize(model, gamma=0)

    def work(first):
        for rows in range(first, first + 4):
            with torch.set_grad_enabled(rows % 2 == 0):
                zoo.assert_agree(net(points(rows)), model(points(rows)))

    run_all(functools.partial(work, 2), functools.partial(work, 20))


def test_a_capture_beside_an_unrelated_model():
    done = threading.Event()
    plain, layer = Stack(), nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0).eval()
    expected = plain(points()), layer(points())

    def capture():
        try:
            for _ in range(2):
                net = momentumize(Stack(), (points(),))
                train(net)
                torch.export.export(net.eval(), (points(),))
        finally:
            done.set()

    def run():
        while not done.is_set():
            assert torch.equal(plain(points()), expected[0])
            assert torch.equal(layer(points()), expected[1])
            assert torch.is_grad_enabled()

    run_all(capture, run)


class Normed(nn.Module):
    """Residual blocks that move statistics, as those of a ResNet do."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.convs, self.norms = nn.ModuleList(nn.Conv1d(4, 4, 1, bias=False) for _ in range(4)), nn.ModuleList(norm() for _ in range(4))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x)).relu()
        return x


@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm1d(4), lambda: nn.InstanceNorm1d(4, track_running_stats=True)], ids=["batch", "instance"]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_last_smaller_batch_is_no_other_network(norm, training):
    """Where sizes vary, fake tensors show the writes of a norm to its statistics, which they hide where they are fixed."""
    plain = Normed(norm).train(training)
    net = momentumize(copy.deepcopy(plain), gamma=0).train(training)
    for batch in (4, 6, 3, 5):
        x = torch.randn(batch, 4, 5)
        outs = [each(x) for each in (plain, net)]
        for each, out in zip((plain, net), outs, strict=True):
            each.zero_grad()
            out.square().sum().backward()
        torch.testing.assert_close(outs[1], outs[0])
        for (name, got), want in zip(net.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5, msg=name)
        for got, want in zip(net.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(got, want)
        assert net.report.rewritten_adds == 4


@pytest.mark.parametrize("options", [{}, {"rest": "checkpoint"}, {"regions": ["layers"]}], ids=["plain", "rest", "named"])
def test_two_forwards_before_one_backward_with_a_norm_that_iterates(options):
    """A discriminator on what is true and on what is made: each forward moves the vectors of the spectral norms, and keeps a clone."""

    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Normed() for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.mean()

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

        def forward(self, x):
            return x + torch.tanh(self.linear(x))

    torch.manual_seed(0)
    model, (true, made) = Discriminator(), torch.randn(2, 6, 8)
    found = []
    for backward in ("reversible", "stored"):
        net = momentumize(copy.deepcopy(model), backward=backward, **options)
        (net(made) - net(true)).backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers()])
    assert all(map(torch.equal, *found))
