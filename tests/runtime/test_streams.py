"""Streams that are subclasses of Tensor, streams that no chain can carry, and writes to the stream that autograd does not see."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_tape import TAPES, D, chain, factors
from torch import nn

import mnet_fx
from mnet_fx import MomentumNet, StreamError, momentumize
from mnet_fx.runtime.tape import PlainTape

ALL = [*TAPES, PlainTape]


class Base(torch.Tensor):
    """Adds nothing but its name, and whatever one sets."""


class Named(torch.Tensor):
    """Hands its attribute `tag` on to every result."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        tags = [a.tag for a in args if isinstance(a, Named) and hasattr(a, "tag")]
        if tags and type(result) is Named:
            result.tag = tags[0]
        return result


class Doubled(torch.Tensor):
    """Whose tanh is twice that of others."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        return result * 2 if func is torch.tanh else result


class Seeing(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.linear, self.name = nn.Linear(D, D), name

    def forward(self, x):
        SEEN.by_step.setdefault(self.name, []).append((type(x), dict(x.__dict__)))
        return torch.tanh(self.linear(x)) * (3 if getattr(x, "tag", "") == "b" else 1)


SEEN = SimpleNamespace(by_step={})  # within an object, where reruns leave their traces


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("cls", [Base, Named, Doubled])
@pytest.mark.parametrize("steps", [3, 12])
def test_a_subclass_arrives_in_the_rerun_as_in_the_first_run(kind, cls, steps):
    SEEN.by_step.clear()
    torch.manual_seed(0)
    fs, start = [Seeing(t) for t in range(steps)], torch.randn(5, D)
    x0 = start.as_subclass(cls)
    x0.tag, x0.requires_grad = "b", True
    reference = copy.deepcopy(fs)
    out, _ = chain(kind, fs, factors([0.9] * steps), x0)
    assert type(out) is cls
    assert getattr(out, "tag", None) == ("b" if cls is Named else None)
    out.exp().sum().backward()
    assert all(found[0] == again for found in SEEN.by_step.values() for again in found)
    assert all(len(found) == 1 + (kind is not PlainTape) for found in SEEN.by_step.values())
    assert SEEN.by_step[0][0] == (cls, {"tag": "b"})
    assert SEEN.by_step[2][0] == (cls, {"tag": "b"} if cls is Named else {})

    x = start.as_subclass(cls)
    x.tag, x.requires_grad = "b", True
    y, v = x * 1, 0.0
    y.tag = "b"
    for f in reference:
        v = 0.9 * v + 0.1 * f(y)
        y = y + v
    y.exp().sum().backward()
    assert (out - y).abs().max() < 1e-5
    assert (x0.grad - x.grad).abs().max() < 1e-4 * x.grad.abs().max()


@pytest.mark.parametrize("kind", ALL)
def test_the_stream_becomes_a_subclass_where_a_residual_is_one(kind):
    SEEN.by_step.clear()
    fs, x0 = [Seeing(0), lambda x: torch.tanh(x).as_subclass(Base), Seeing(2)], torch.randn(5, D, requires_grad=True)
    out, _ = chain(kind, fs, factors([0.9] * 3), x0)
    torch.autograd.grad(out.sum(), x0)
    assert {kind for kind, _ in SEEN.by_step[0]} == {torch.Tensor}
    assert {kind for kind, _ in SEEN.by_step[2]} == {Base} == {type(out)}


@pytest.mark.parametrize("kind", TAPES)
def test_a_side_input_that_is_a_subclass_may_not_change_behind_autograds_back(kind):
    side, scale = torch.ones(D).as_subclass(Base), nn.Parameter(torch.zeros(()))
    out, _ = chain(
        kind, [lambda x, s: torch.tanh(x) + scale * (x * s)] * 3, factors([0.9] * 3), torch.randn(5, D, requires_grad=True), sides=(side,)
    )
    side.data.add_(1)
    with pytest.raises(mnet_fx.InversionError, match="side input 0"):
        out.sum().backward()


class Wrapping(torch.Tensor):
    """Holds another tensor."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype)

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapping, lambda w: w.inside, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapping, func(*args, **kwargs))


def nets():
    def layers():
        return nn.Sequential(*(_Block() for _ in range(3)))

    yield momentumize(torch.fx.symbolic_trace(layers()))
    yield momentumize(layers(), regions=[""])
    yield momentumize(layers(), regions=[""], backward="stored")
    yield MomentumNet([nn.Linear(D, D)] * 3)
    yield MomentumNet([nn.Linear(D, D)] * 3, use_backprop=False)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)], layout=torch.jagged), "nested tensor.*pad it"),
        (lambda: torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)]), "nested tensor.*pad it"),
        (lambda: torch.randn(5, D).to_sparse(), r"torch.sparse_coo.*to_dense\(\)"),
        (lambda: Wrapping(torch.randn(5, D)), "is a Wrapping, which wraps other tensors"),
    ],
    ids=["jagged", "nested", "sparse", "wrapping"],
)
def test_streams_that_no_chain_can_carry(make, words):
    for net in nets():
        with pytest.raises(StreamError, match=words):
            net(make())


def test_a_dtensor_is_refused():
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.randn(2, 6, D), mesh, [Shard(1)])
        for backward in ("reversible", "stored"):
            net = momentumize(distribute_module(nn.Sequential(*(_Block() for _ in range(3))), mesh), regions=[""], backward=backward)
            with pytest.raises(StreamError, match=r"is a DTensor.*x.to_local\(\)"):
                net(x)
    finally:
        dist.destroy_process_group()


def relu(x):
    return torch.relu_(x)


def data(x):
    x.data.mul_(0.5)
    return x


class Writing(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.linear, self.write = nn.Linear(D, D), write

    def forward(self, x):
        x = self.write(x)
        return x + torch.tanh(self.linear(x))


MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def finished(out):
    """With the backward pass, if there is one: on a device, it is at its end that fingerprints are compared."""
    if out.requires_grad:
        out.sum().backward()


@pytest.mark.parametrize("write", [relu, data])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", ["reversible", "stored"])
def test_a_step_that_writes_to_the_stream(write, mode, backward):
    layers = [Writing(lambda x: x), Writing(write), Writing(lambda x: x)]
    net = momentumize(nn.Sequential(*layers), regions=[""], backward=backward)
    seen = write is relu and mode is not torch.inference_mode
    words = "step 1: the step writes to the stream in place" if seen else "step 1: the stream was changed in place where autograd"
    with mode(), pytest.raises(StreamError, match=words):
        finished(net(torch.randn(5, D)))


@pytest.mark.parametrize("write", [relu, data])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backward", ["reversible", "stored"])
def test_a_model_that_writes_to_the_stream_between_two_layers(write, mode, backward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(_Block() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = write(layer(x))
            return x

    with mode(), pytest.raises(StreamError, match=r"the stream was changed in place (since layers.0 returned it|where autograd does not)"):
        finished(momentumize(Net(), regions=["layers"], backward=backward)(torch.randn(5, D)))


@torch.library.custom_op("mnet_fx_tests::lying", mutates_args=())
def lying(x: torch.Tensor) -> torch.Tensor:
    """Writes to its input and does not say so."""
    x.data.mul_(2)
    return x.clone()


lying.register_fake(torch.empty_like)
lying.register_autograd(lambda ctx, g: g)


@pytest.mark.parametrize("mode", MODES)
def test_an_operation_that_lies_about_what_it_writes_to_is_found_in_a_captured_step(mode):
    class Residual(nn.Module):
        def __init__(self, lies):
            super().__init__()
            self.lies, self.linear = lies, nn.Linear(D, D)

        def forward(self, x):
            return x + self.linear(lying(x) if self.lies else x.tanh())

    net = momentumize(nn.Sequential(*map(Residual, (False, True, False))), gamma=0.9)
    with mode(), pytest.raises(StreamError, match="step 1: the stream was changed in place where autograd"):
        finished(net(torch.randn(5, D)))


class Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(0.5)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("t", [0, 1, 2])
def test_who_writes_to_the_gradient_of_what_a_step_adds_is_told(kind, t):
    linear, x = nn.Linear(D, D), torch.randn(5, D, requires_grad=True)
    v = torch.randn(5, D, requires_grad=True)
    functions = [lambda x: linear(x) for _ in range(3)]
    functions[t] = lambda x: Halving.apply(linear(x))
    with pytest.raises(StreamError, match=f"writes to the gradient of what step {t} adds"):
        chain(kind, functions, factors([0.9] * 3), x, v)[0].sum().backward()


def test_the_gradient_that_a_chain_is_given_may_have_been_written_to():
    linear, x, given = nn.Linear(D, D), torch.randn(5, D, requires_grad=True), torch.ones(5, D).mul_(2)
    out = chain(TAPES[0], [linear] * 3, ((0.9, 1.0),) * 3, x)[0]
    out.backward(given)
    assert torch.equal(given, torch.full((5, D), 2.0))
