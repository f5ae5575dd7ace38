"""Modules that no graph can hold, inside of ones that can: they stay Python, the graph calls them, and the chains go on past them."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import mnet_fx
import passes
from mnet_fx.region import MomentumRegion
from passes.live import live_results


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g  # not the derivative, so that a trace through the forward shows


class Custom(nn.Module):
    """Its backward is its own; has state and randomness too."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(Doubled.apply(self.norm(x)))


class Decides(nn.Module):
    """Goes by the values of what it is given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x) + 1


class Structured(nn.Module):
    def forward(self, x, options, *, flag=None):
        first = Doubled.apply(x if flag else -x)
        return {"out": (first, None, "text"), "given": x, "second": options["more"][0] + 1}


class Block(nn.Module):
    def __init__(self, odd):
        super().__init__()
        self.fc, self.odd = nn.Linear(8, 8), odd

    def forward(self, x):
        return torch.tanh(self.odd(self.fc(x)))


class Trunk(nn.Module):
    """Blocks in a forward that only torch.export can read."""

    def __init__(self, odd, depth=3, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block(odd()) for _ in range(depth))

    def forward(self, x):
        if x.dim() != 3:
            raise ValueError
        for block in self.blocks:
            x = x + block(x)
        return x


def tokens(batch=2, length=5):
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch + length))


def steps(net):
    return [region.steps for region in net.report.regions]


def gradients(model, x):
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(model, net, x):
    state = copy.deepcopy(model.state_dict())
    expected, moved = gradients(model, x), copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    for a, b in zip(gradients(net, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, moved[name], rtol=1e-4, atol=1e-5)


def assert_exact(net, x):
    """Gradients and buffers of "reversible" are those of "stored"; switched over, since captures take long."""
    state = copy.deepcopy(net.train().state_dict())
    regions = [value for module in net.modules() for value in vars(module).values() if isinstance(value, MomentumRegion)]
    found = []
    for backward in ("reversible", "stored"):
        net.load_state_dict(state)
        for region in regions:
            region.backward = backward
        found.append([*gradients(net, x), *(value.clone() for value in net.state_dict().values())])
    assert regions
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("odd", [Custom, Decides])
def test_a_chain_goes_on_past_modules_that_no_graph_holds(odd):
    model = Trunk(odd)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [3]
    assert [part.path for part in net.report.captured if part.rewritten_adds] == [""]
    why = {refusal.path: refusal.explanation for refusal in net.report.refusals if "calls it as it is" in refusal.explanation}
    assert set(why) == {f"blocks.{i}.odd" for i in range(3)}
    for training in (True, False):
        for x in (tokens(), tokens(4), -tokens()):
            assert_same(model.train(training), net.train(training), x)
    assert_exact(mnet_fx.momentumize(model.train(), (tokens(),)) if odd is Custom else net, tokens())


class Asks(nn.Module):
    """Does something else without gradients, and under autocast."""

    def forward(self, x):
        return x * (3 if torch.is_grad_enabled() else 5) * (7 if torch.is_autocast_enabled("cpu") else 1)


def test_a_module_that_asks_for_a_mode_gets_the_answer_of_each_call():
    model, x = Trunk(Asks), tokens()
    net = mnet_fx.momentumize(model, (x,), gamma=0)
    assert steps(net) == [3]
    for grad in (True, False):
        for autocast in (True, False):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                torch.testing.assert_close(net(x), model(x), rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)


class Doubles(nn.Module):
    """Doubles the gradient by a hook on a value in between."""

    def forward(self, x):
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: 2 * g)
        return x


class Mapped(nn.Module):
    """Applies a layer to each sample."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.func.vmap(self.fc)(x)


@pytest.mark.parametrize("odd", [Doubles, Mapped])
def test_hooks_on_tensors_and_transforms_stay_python(odd):
    model = Trunk(odd)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [3]
    for training in (True, False):
        assert_same(model.train(training), net.train(training), tokens(4))
    assert_exact(net, tokens())


class Reads(Block):
    def forward(self, x):
        found = self.odd(self.fc(x), {"more": [x, 2.0]}, flag=True)
        return found["out"][0] + found["given"] * found["second"]


@pytest.fixture
def _in_float64():
    """Sums that cancel differ between processors in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_in_float64")
def test_a_live_module_may_return_a_structure():
    model = Trunk(Structured, block=Reads)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [3]
    assert_same(model, net, tokens(3, 4))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_a_live_module_that_several_blocks_share():
    shared = Custom()
    model = Trunk(lambda: shared)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [3]
    assert_same(model, net, tokens(3))


def test_what_was_traced_inside_a_live_module_stays_rewritten():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + torch.tanh(self.a(x))
            return x + torch.tanh(self.b(x))

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, x):
            return Doubled.apply(self.inner(x))

    model = Trunk(Wraps, depth=2)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [2, 2, 2]
    assert {part.front_end for part in net.report.captured if part.rewritten_adds} == {"torch.export", "symbolic trace"}
    assert_same(model, net, tokens())


class Sometimes(nn.Module):
    def forward(self, x, custom):
        return (Doubled.apply(x) if custom else 2 * x,)


class Passes(Block):
    def forward(self, x, custom=True):
        return torch.tanh(self.odd(self.fc(x), custom)[0])


def test_calls_of_another_kind_are_captured_again_if_they_keep_the_live_modules():
    class Told(Trunk):
        def forward(self, x, scale=None, custom=True):
            if x.dim() != 3:
                raise ValueError
            for block in self.blocks:
                x = x + block(x, custom)
            return x if scale is None else x * scale

    model = Told(Sometimes, block=Passes)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    torch.testing.assert_close(net(tokens(), 2.0), model(tokens(), 2.0), rtol=1e-5, atol=1e-5)
    with pytest.raises(mnet_fx.MnetError, match=r"would hold blocks\.0\.odd, .* which the first one calls as it is"):
        net(tokens(), 2.0, False)


def test_live_modules_are_live():
    """Their hooks fire, once a call; replacing one has its effect."""
    model, seen = Trunk(Custom), []
    model.eval()
    model.blocks[1].odd.register_forward_hook(lambda module, args, out: (seen.append(1), out * 2)[1])
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(net(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)
        assert len(seen) == 2
        net.blocks[2].odd = nn.Identity()
        model.blocks[2].odd = nn.Identity()
        torch.testing.assert_close(net(tokens()), model(tokens()), rtol=1e-5, atol=1e-5)


def test_what_is_inside_a_live_module_is_captured_on_its_own():
    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Trunk(nn.Identity, depth=4)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else self.inner(-x)

    model = Trunk(Wraps, depth=2)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert sorted(steps(net)) == [2, 4, 4]
    assert_same(model, net, tokens())
    assert_same(model, net, -tokens(3))
    assert_exact(net, tokens())


# ---- What a graph must not stand around


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.ones(8))
        self.kept = None


class WritesInput(Odd):
    def forward(self, x):
        y = Doubled.apply(x)
        x.mul_(2)
        return y


class WritesInputByValue(Odd):
    def forward(self, x):
        y = x * 2 if x.sum() > 1e9 else x * 3
        x.mul_(2)
        return y


class WritesParameter(Odd):
    def forward(self, x):
        with torch.no_grad():
            self.scale.mul_(1.0)
        return Doubled.apply(x) * 1


class ReturnsView(Odd):
    def forward(self, x):
        Doubled.apply(x)
        return x.view(x.shape)


class ReturnsOwn(Odd):
    def forward(self, x):
        Doubled.apply(x)
        return self.table.view(8)


class Keeps(Odd):
    def forward(self, x):
        self.kept = 1 if self.kept is None else self.kept + 1
        return Doubled.apply(x)


class KeepsByValue(Odd):
    def forward(self, x):
        self.kept = 1 if self.kept is None else self.kept + 1
        return x * 2 if x.sum() > 1e9 else x * 3


class Draws(Odd):
    def forward(self, x):
        return Doubled.apply(x) * random.choice([1.0, 1.0])


class DrawsByValue(Odd):
    def forward(self, x):
        return x * random.choice([2.0, 2.0]) if x.sum() > -1e9 else x * 3


class ReturnsObject(Odd):
    def forward(self, x):
        return Doubled.apply(x), object()


class ReturnsSome(Odd):
    def forward(self, x):
        return Doubled.apply(x), x[x > 0].relu()


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (WritesInput, "writes in place"),
        (WritesInputByValue, "writes in place"),
        (WritesParameter, "writes in place"),
        (ReturnsView, "returns memory"),
        (ReturnsOwn, "returns memory"),
        (Keeps, "sets its attribute kept"),
        (KeepsByValue, "sets its attribute kept"),
        (Draws, "random module"),
        (DrawsByValue, "random module"),
        (ReturnsObject, "returns a object"),
        (ReturnsSome, "size depends on values"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_module_that_reaches_beyond_its_result_is_no_live_one(odd, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.trunk = odd(), Trunk(nn.Identity, depth=2)

        def forward(self, x):
            if x.dim() != 3:
                raise ValueError
            out = self.odd(x * 1)
            return self.trunk(x + (out[0] if isinstance(out, tuple) else out))

    with pytest.raises(passes.ExportError, match=reason):
        passes.capture_by_export(Model(), (tokens(),), {}, "held")


def test_a_buffer_that_a_live_module_may_move_is_not_read_around_it():
    class Model(Trunk):
        def forward(self, x):
            return super().forward(x) + self.blocks[0].odd.norm.running_mean.sum()

    with pytest.raises(passes.ExportError, match=r"buffer .* is read both in the graph and by a module"):
        passes.capture_by_export(Model(Custom), (tokens(),), {}, "held")


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "autocast"])
def test_a_live_call_in_another_mode_is_refused(context):
    class Model(Trunk):
        def forward(self, x):
            with context():
                y = self.blocks[0].odd(x)
            return super().forward(x + y)

    with pytest.raises(passes.ExportError, match="under another grad or autocast mode"):
        passes.capture_by_export(Model(Custom), (tokens(),), {}, "held")


def test_a_live_call_that_serves_nothing_but_its_effect_is_not_lost():
    class Model(Trunk):
        def forward(self, x):
            self.blocks[0].odd(x)
            return super().forward(x)

    model = Model(Custom)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [2]  # a call of which nobody reads the result might write to its input
    assert_same(model, net, tokens())
    assert model.blocks[0].odd.norm.num_batches_tracked == 2


def test_instead_of_a_module_called_with_what_no_graph_holds_its_caller_stays_python():
    class Asks(Block):
        def forward(self, x):
            return self.odd(self.fc(x), {"more": [x, object()]})["out"][0]

    class Structured(nn.Module):
        def forward(self, x, options):
            return {"out": (Doubled.apply(x),)}

    captured = passes.capture_by_export(Trunk(Structured, block=Asks), (tokens(),), {}, "held")
    assert set(captured.live) == {f"blocks.{i}" for i in range(3)}
    assert all("is called with a object" in blame.reason for blame in captured.live.values())


class Sized(nn.Module):
    """The size of its result depends on values, and looks like that of its input in the example."""

    def forward(self, x):
        return x[:, : 5 if x.sum() > -1e9 else 2] * 2


def test_a_result_of_another_size_than_in_the_capture_is_an_error():
    class Pooled(Block):
        def forward(self, x):
            return self.fc(self.odd(x)).mean(1, keepdim=True)

    net = mnet_fx.momentumize(Trunk(Sized, block=Pooled), (tokens(),), gamma=0)
    assert steps(net) == [3]
    assert net(tokens(4)).shape == (4, 5, 8)
    with pytest.raises(RuntimeError, match=r"stays Python .* returned \(2, 5, 8\), .* captured for \(2, 7, 8\)"):
        net(tokens(2, 7))


class MayGiveBack(nn.Module):
    """Returns what it is given, or something else."""

    def forward(self, x):
        return x if x.sum() > 1e9 else x * 2


@pytest.mark.parametrize("target", ["result", "argument"])
def test_what_may_be_an_argument_is_not_written_to(target):
    """With other values than in the capture the two are the same memory."""

    class Model(Trunk):
        def forward(self, x):
            h = x * 1
            y = self.blocks[0].odd(h)
            (y if target == "result" else h).add_(1)
            return super().forward(x) + y + h

    with pytest.raises(passes.ExportError, match=r"blocks\.0\.odd stays Python, and may return memory that it is given"):
        passes.capture_by_export(Model(MayGiveBack), (tokens(),), {}, "held")


def test_a_module_that_gives_back_the_stream_is_called_beside_the_chain():
    class Passes(nn.Module):
        def forward(self, x):
            return x if x.sum() < 1e9 else x * 2

    class Direct(Trunk):
        def forward(self, x):
            if x.dim() != 3:
                raise ValueError
            for block in self.blocks:
                x = block.odd(x)
                x = x + torch.tanh(block.fc(x))
            return x

    model = Direct(Passes)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [3]
    assert_same(model, net, tokens(3))
    assert_exact(net, tokens())
    with torch.no_grad(), pytest.raises(RuntimeError, match="captured for"):
        net(tokens() + 1e9)


def test_a_result_that_is_an_argument_must_stay_one():
    class Gives(nn.Module):
        def forward(self, x):
            return (x, x * 2) if x.sum() > -1e9 else (x * 3, x * 2)

    class Takes(Block):
        def forward(self, x):
            first, second = self.odd(self.fc(x))
            return first + second

    model = Trunk(Gives, block=Takes)
    net = mnet_fx.momentumize(model, (tokens(),), gamma=0)
    assert steps(net) == [3]
    assert_same(model, net, tokens(3))
    with torch.no_grad():
        model.blocks[1].fc.bias.fill_(-1e10)
    with pytest.raises(RuntimeError, match="stays Python"):
        net(tokens())


@pytest.mark.parametrize(
    ("result", "form"),
    [
        ((torch.ones(2),), ("tensor", "tensor")),
        ((torch.ones(2), None), ("tensor", "tensor")),
        ((torch.ones(2), 2), ("tensor", (3,))),
        ((torch.ones(2), True), ("tensor", (1,))),
        ((torch.ones(2), None), ("tensor", "given")),
        ((torch.ones(2), torch.ones(2)), ("tensor", "given")),
    ],
)
def test_a_result_of_another_form_is_an_error(result, form):
    with pytest.raises(RuntimeError, match="returned"):
        live_results(result, form, None, [torch.ones(2)])
