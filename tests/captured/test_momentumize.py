"""The options of `momentumize`, what it says about its work, and what it says where it cannot work."""

import copy
import logging
import math
import pickle
import re
import warnings
from collections import UserDict

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from oracles import numeric_gradient, recurrence
from torch import nn
from torch._dynamo.utils import counters
from zoo import Everyday, Perceptron, one_thread, tokens  # noqa: F401  (one_thread is a fixture)

import mnet_fx
from mnet_fx.reporting.build import report_of
from mnet_fx.settings import matched_weights, momentum_weights


class Chain(nn.Module):
    """x + tanh(linear(x)), several times over; the stream is the caller's tensor."""

    def __init__(self, steps=6, width=6):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(steps)])

    def residual(self, t):
        return lambda x: torch.tanh(self.blocks[t](x))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


class Layer(nn.Module):
    """Two residual adds in one block, as in a transformer."""

    def __init__(self, width=6):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = x + torch.tanh(self.a(x))
        return x + torch.tanh(self.b(x))


# ---- settings that cannot work

BAD_OPTIONS = [
    ({"gamma": 1.0}, r"in \[0, 1\), got 1.0: at 1 the residual branch has no weight; use 0.99"),
    ({"gamma": 1}, r"in \[0, 1\), got 1"),
    ({"gamma": -0.1}, r"in \[0, 1\), got -0.1"),
    ({"gamma": 1.5}, r"in \[0, 1\), got 1.5"),
    ({"gamma": math.nan}, r"in \[0, 1\), got nan"),
    ({"gamma": math.inf}, r"in \[0, 1\), got inf"),
    ({"gamma": "0.9"}, r"in \[0, 1\), got '0.9'"),
    ({"gamma": None}, r"in \[0, 1\), got None"),
    ({"gamma": True}, r"in \[0, 1\), got True"),
    ({"gamma": [0.9, 0.8]}, r"got \[0.9, 0.8\]; a schedule is a function \(t, steps\) -> number"),
    ({"example_inputs": 0.5}, "example_inputs must be a tuple .*, got 0.5; options are given by name, as in gamma=0.9"),
    ({"example_inputs": "blocks", "regions": ["blocks"]}, "example_inputs must be a tuple"),
    ({"regions": 3}, r"by their paths in the model, as in \['encoder.layers'\], got 3"),
    ({"regions": [None]}, r"by their paths in the model, .*, got \[None\]"),
    ({"weights": "paper"}, "weights must be one of 'momentum', 'matched', 'signed', got 'paper'"),
    ({"granularity": 0}, "granularity must be 'add', 'module' or how many blocks make a step, got 0"),
    ({"granularity": True}, "granularity must be 'add', 'module' or how many blocks make a step, got True"),
    ({"granularity": "block"}, "granularity must be 'add', 'module' or how many blocks make a step, got 'block'"),
    ({"backward": "checkpoint"}, "backward must be one of 'reversible', 'stored', got 'checkpoint'"),
    ({"precision": "float64"}, "precision must be one of 'standard', 'high', got 'float64'"),
    ({"on_drift": "log"}, "on_drift must be one of 'raise', 'warn', 'ignore', got 'log'"),
    ({"initial_velocity": "random"}, "initial_velocity must be 'zero', 'first' or a module"),
    ({"initial_velocity": 0.0}, "initial_velocity must be 'zero', 'first' or a module"),
    ({"initial_velocity": nn.Linear(6, 6), "weights": "matched"}, r"weights='matched' needs v\[0\] = 0"),
    ({"min_steps": 0}, "min_steps must be a whole number of steps, 1 or more, got 0"),
    ({"min_steps": 2.0}, "min_steps must be a whole number of steps, 1 or more, got 2.0"),
    ({"min_steps": True}, "min_steps must be a whole number of steps, 1 or more, got True"),
]

BAD_SCHEDULES = {
    "one": (lambda t, steps: t / (steps - 1), r"gamma\(5, 6\) must be .* got 1.0"),
    "nan": (lambda t, steps: math.nan, r"gamma\(0, 6\) must be .* got nan"),
    "text": (lambda t, steps: "high", r"gamma\(0, 6\) must be .* got 'high'"),
    "arguments": (lambda t: 0.9, r"gamma\(0, 6\) failed \(TypeError: .*a schedule is a function \(t, steps\)"),
}


def facts(model):
    """All that momentumize could leave behind in a model."""
    tree = [(name, id(m), m.training, sorted(vars(m)), list(m._modules)) for name, m in model.named_modules()]
    return tree, [(name, id(t), t._version, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()]


def unchanged(model, before, x):
    assert facts(model) == before
    assert model(x).isfinite().all()


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_a_setting_that_cannot_work_is_an_error(options, message):
    model = Chain()
    before = facts(model)
    with pytest.raises(mnet_fx.SettingsError, match=message) as raised:
        mnet_fx.momentumize(model, **options)
    assert isinstance(raised.value, (mnet_fx.MnetError, ValueError))
    unchanged(model, before, tokens())


@pytest.mark.parametrize("name", BAD_SCHEDULES)
def test_a_schedule_that_cannot_work_is_an_error_as_soon_as_the_number_of_steps_is_known(name):
    schedule, message = BAD_SCHEDULES[name]
    model = Chain()
    before = facts(model)
    with pytest.raises(mnet_fx.SettingsError, match=message):
        mnet_fx.momentumize(model, (tokens(),), gamma=schedule)
    net = mnet_fx.momentumize(model, gamma=schedule)
    for _ in range(2):
        with pytest.raises(mnet_fx.SettingsError, match=message):
            net.report.regions  # noqa: B018
        with pytest.raises(mnet_fx.SettingsError, match=message):
            net(tokens())
    assert mnet_fx.momentumize(copy.deepcopy(net), gamma=0.5).report.rewritten_adds == 6
    unchanged(model, before, tokens())


# ---- models that cannot work


@pytest.mark.parametrize("thing", ["resnet101", None, torch.tanh, Chain], ids=["name", "None", "function", "class"])
def test_something_else_than_a_module_is_an_error(thing):
    with pytest.raises(mnet_fx.SettingsError, match=r"takes an nn\.Module, got"):
        mnet_fx.momentumize(thing)


def test_a_model_on_meta_is_captured_there_and_runs_once_it_has_values():
    model = Chain().to("meta")
    before = facts(model)
    net = mnet_fx.momentumize(model, (tokens(),))
    assert [part.front_end for part in net.report.captured] == ["Dynamo"]
    assert net.report.rewritten_adds == 6
    with pytest.raises(mnet_fx.StreamError, match=r"meta device.*move model and input"):
        net(tokens().to("meta"))
    assert facts(model) == before
    loaded = Chain()
    net.to_empty(device="cpu").load_state_dict(loaded.state_dict())
    assert torch.equal(net(tokens()), mnet_fx.momentumize(loaded)(tokens()))


def test_one_parameter_on_meta_is_an_error_that_names_the_device():
    model = Chain()
    model.blocks[3].bias = nn.Parameter(torch.empty(6, device="meta"))
    net = mnet_fx.momentumize(model)
    for run in (model, net):
        with pytest.raises(RuntimeError, match="meta"):
            run(tokens())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, tokens())], ids=["script", "trace"])
def test_a_script_module_is_an_error(compiled):
    with pytest.raises(mnet_fx.MnetError, match=r"ScriptModule.*that it was made from"):
        mnet_fx.momentumize(compiled(Layer()))


class Unique(Chain):
    def __deepcopy__(self, memo):
        raise TypeError("there is only one")


def test_a_model_that_cannot_be_copied_is_an_error():
    model = Unique()
    before = facts(model)
    with pytest.raises(mnet_fx.MnetError, match=r"Unique cannot be copied \(TypeError: there is only one\)"):
        mnet_fx.momentumize(model)
    unchanged(model, before, tokens())


@pytest.mark.parametrize("options", [{}, {"gamma": 0}, {"backward": "stored"}, {"granularity": "module"}, {"granularity": 2}], ids=str)
def test_a_model_without_residual_adds_comes_back_working(options):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
    before = facts(model)
    net = mnet_fx.momentumize(model, **options)
    assert str(net.report).startswith("0 of 0 residual adds rewritten, in 0 region(s)")
    assert facts(model) == before
    x = torch.randn(4, 6)
    expected = zoo.seeded(copy.deepcopy(model), x)
    with pytest.warns(mnet_fx.MnetWarning, match="Sequential: no residual chain was rewritten"):
        found = zoo.seeded(net, x)
    assert (net.report.residual_adds, net.report.rewritten_adds, net.report.regions, net.report.refusals) == (0, 0, (), ())
    assert str(net.report).splitlines()[0] == "0 of 0 residual adds rewritten, in 0 region(s)"
    assert torch.equal(found, expected)
    found.sum().backward()
    assert net[0].weight.grad.any()
    net(x)  # the warning comes once
    assert torch.equal(pickle.loads(pickle.dumps(net)).eval()(x), model.eval()(x))


def test_chains_that_are_too_short_are_left_alone():
    model = Chain(4)
    net = mnet_fx.momentumize(model, min_steps=5)
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        out = net(tokens())
    assert torch.equal(out, model(tokens()))
    for report in (net.report, mnet_fx.momentumize(model, min_steps=5).report):  # of the call, and the preview
        assert (report.residual_adds, report.rewritten_adds) == (4, 0)
        assert [refusal.code for refusal in report.refusals] == ["too_short"] * 4
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        mnet_fx.momentumize(model, (tokens(),), min_steps=5)
    net = mnet_fx.momentumize(model, (tokens(),), min_steps=4)
    assert net.report.rewritten_adds == 4


def test_one_step_may_be_a_region():
    model = Chain(1)
    net = mnet_fx.momentumize(model, min_steps=1, gamma=0.9)
    assert [region.steps for region in net.report.regions] == [1]
    zoo.assert_agree(net(tokens()), tokens() + 0.1 * torch.tanh(model.blocks[0](tokens())))


# ---- inputs that cannot work


class Counting(nn.Module):
    """A residual chain on integers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(5)])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x.float()).to(x.dtype)
        return x


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64], ids=str)
def test_a_stream_that_is_not_real_floating_point_computes_what_it_did_and_the_report_says_why(dtype):
    model = Counting()
    net, x = mnet_fx.momentumize(model), torch.ones(2, 6, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, expected = net(x), model(x)
    assert any(issubclass(w.category, mnet_fx.MnetWarning) and "no residual chain was rewritten" in str(w.message) for w in caught)
    assert found.dtype is dtype
    assert torch.equal(found, expected)
    assert {(refusal.code, refusal.explanation.split()[-1]) for refusal in net.report.refusals} == {("not_real", str(dtype)[6:])}
    with pytest.warns(mnet_fx.MnetWarning, match="5 residual adds stay as they are, as the first call of the model left them"):
        found = net(torch.ones(2, 6))  # what is one network for one of them is for all
    assert torch.equal(found, model(torch.ones(2, 6)))
    assert not torch.equal(mnet_fx.momentumize(model)(torch.ones(2, 6)), found)


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6)])
def test_a_batch_without_elements_does_what_it_does_to_the_original(shape):
    x, model = torch.zeros(shape, requires_grad=True), Chain()
    out = mnet_fx.momentumize(model)(x)
    assert out.shape == model(x).shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_an_input_on_meta_is_an_error():
    """On a model with values, torch itself says so; what a model on meta says is above."""
    model = Chain()
    for run in (model, mnet_fx.momentumize(model)):
        with pytest.raises(RuntimeError, match="meta"):
            run(tokens().to("meta"))


def test_something_else_than_a_tensor_is_the_error_of_the_original():
    model = Chain()
    with pytest.raises(TypeError) as expected:
        model([1.0, 2.0])
    with pytest.raises(TypeError, match=re.escape(str(expected.value))):
        mnet_fx.momentumize(model)([1.0, 2.0])


def test_a_step_that_changes_the_shape_of_the_stream_stays_outside_of_the_chain():
    """A stream of width 1 to which residuals of width 6 are added."""
    model, x = Chain(), torch.randn(3, 1)
    model.blocks[0] = nn.Linear(1, 6)
    net = mnet_fx.momentumize(model, gamma=0)
    zoo.assert_agree(net(x), model(x))
    assert [region.steps for region in net.report.regions] == [5]
    assert [refusal.code for refusal in net.report.refusals] == ["broadcast"]


@pytest.mark.parametrize("velocity", [nn.Linear(6, 3), nn.Linear(6, 1), nn.Flatten(), nn.LSTM(6, 6)], ids=lambda v: type(v).__name__)
def test_a_velocity_that_does_not_fit_the_stream_is_an_error(velocity):
    net = mnet_fx.momentumize(Chain(), initial_velocity=velocity)
    with pytest.raises(mnet_fx.MnetError, match="velocity"):
        net(tokens())


# ---- the recurrence


@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=12), st.integers(0, 2**31))
def test_matched_weights_follow_the_original_recurrence(gammas, seed):
    """z = x + c v obeys z' = z + f, and ends at x[T]."""
    weights = matched_weights(gammas)
    rest = [0.0]
    for gamma in reversed(gammas):
        rest.insert(0, gamma * (1 + rest[0]))
    residuals = torch.randn(len(gammas), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    x = z = 0.7
    v = 0.0
    for t, (gamma, weight, f) in enumerate(zip(gammas, weights, residuals, strict=True)):
        assert z == pytest.approx(x + rest[t] * v, rel=1e-9, abs=1e-9)
        v = gamma * v + weight * f
        x, z = x + v, z + f
    assert x == pytest.approx(z, rel=1e-9, abs=1e-9)
    assert all(0 < weight <= 1 for weight in weights)


def test_weights_by_hand():
    assert momentum_weights([0.5, 0.0, 0.9]) == pytest.approx([0.5, 1.0, 0.1])
    assert matched_weights([0.5, 0.5, 0.5]) == pytest.approx([1 / 1.75, 1 / 1.5, 1.0])
    assert matched_weights([0.0] * 4) == momentum_weights([0.0] * 4) == (1.0,) * 4


def rising(t, steps):
    return 0.2 + 0.79 * t / steps


ACCURACY = [(steps, gamma) for steps in (8, 100) for gamma in (0.05, 0.5, 0.9, 0.99, rising)]


@pytest.mark.parametrize("weights", ["momentum", "matched"])
@pytest.mark.parametrize(("steps", "gamma"), ACCURACY, ids=lambda v: getattr(v, "__name__", str(v)))
def test_values_and_gradients_are_as_accurate_as_the_float32_recurrence(steps, gamma, weights):
    """Against plain autograd of the recurrence in float64; each quantity may be twice as far off as the recurrence in float32 is."""
    model, x = Chain(steps, 16), torch.randn(32, 16)
    given = model if steps < 100 else torch.fx.symbolic_trace(model)  # Dynamo takes its time for a hundred steps
    net = mnet_fx.momentumize(given, gamma=gamma, weights=weights)
    gammas = [gamma(t, steps) if callable(gamma) else gamma for t in range(steps)]
    factors = list(zip(gammas, (momentum_weights if weights == "momentum" else matched_weights)(gammas), strict=True))

    def by_hand(dtype):
        plain, x0 = copy.deepcopy(model).to(dtype), x.clone().to(dtype).requires_grad_()
        out = recurrence(x0, [plain.residual(t) for t in range(steps)], factors)[-1]
        out.square().sum().backward()
        return [out.detach(), x0.grad, torch.cat([p.grad.flatten() for p in plain.parameters()])]

    x0 = x.clone().requires_grad_()
    out = net(x0)
    out.square().sum().backward()
    found = [out.detach(), x0.grad, torch.cat([p.grad.flatten() for p in net.parameters()])]
    for ours, single, exact in zip(found, by_hand(torch.float32), by_hand(torch.float64), strict=True):
        allowed = 2 * (single - exact).square().mean().sqrt()
        assert (ours - exact).square().mean().sqrt() <= allowed
        assert allowed < 1e-4 * exact.abs().max()


@pytest.mark.parametrize(
    "options", [{}, {"weights": "matched", "gamma": 0.5}, {"initial_velocity": "first"}, {"initial_velocity": nn.Linear(6, 6)}], ids=str
)
def test_the_gradient_is_the_slope(options):
    """Finite differences in float64, which know nothing of any backward."""
    net = mnet_fx.momentumize(Chain().double(), **options).double()
    x = tokens().double().requires_grad_()

    def loss(x):
        return net(x).sin().sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    direction = grad + torch.randn(4, 5, 6, dtype=torch.float64)  # some way uphill, so that the slope is not near zero by chance
    assert (grad * direction).sum().item() == pytest.approx(numeric_gradient(loss, x.detach(), direction, 1e-4), rel=1e-6)


def test_the_schedule_is_asked_for_each_step_of_each_region():
    asked = []
    model = nn.Sequential(Chain(3), nn.Linear(6, 6), Chain(2))
    net = mnet_fx.momentumize(model, gamma=lambda t, steps: asked.append((t, steps)) or 0.5)
    net(tokens())
    assert sorted(asked) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]  # once each


def test_first_is_a_first_step_without_momentum():
    model = Chain()
    first = mnet_fx.momentumize(model, gamma=0.9, initial_velocity="first")
    by_schedule = mnet_fx.momentumize(model, gamma=lambda t, steps: 0.9 if t else 0.0)
    assert torch.equal(first(tokens()), by_schedule(tokens()))
    assert not torch.equal(first(tokens()), mnet_fx.momentumize(model, gamma=0.9)(tokens()))


def test_a_velocity_module_becomes_part_of_the_net():
    model, velocity = Everyday(), nn.Linear(6, 6)
    net = mnet_fx.momentumize(model, initial_velocity=velocity)
    assert net.initial_velocity is velocity
    assert [*net.state_dict()] == [*model.state_dict(), "initial_velocity.weight", "initial_velocity.bias"]
    assert "initial_velocity" not in dict(model.named_children())
    net(tokens()).sum().backward()
    assert velocity.weight.grad.any()


# ---- the report


def test_the_report_is_data():
    model = nn.Sequential(Chain(6), nn.Linear(6, 6), Chain(1), nn.Linear(6, 6), Layer(), Layer())
    net = mnet_fx.momentumize(model, gamma=0.9)
    report = mnet_fx.report(net)
    assert report is net.report
    assert (report.residual_adds, report.rewritten_adds) == (11, 10)
    first, second = report.regions
    assert (first.name, first.path, first.steps, first.adds, first.kind) == ("momentum_region_0", "0", 6, 6, "pre-activation")
    assert (first.gamma, first.shape, first.storage, first.state_bytes_per_element) == (0.9, None, "reverse", 12.0)
    assert (second.name, second.path, second.steps, second.adds, second.storage) == ("momentum_region_1", "", 4, 4, "reverse")
    (refusal,) = report.refusals
    assert (refusal.code, refusal.path) == ("too_short", "2")
    assert refusal.explanation
    assert refusal.hint
    by_module = mnet_fx.momentumize(model, granularity="module").report.regions
    assert [(region.steps, region.adds, region.kind) for region in by_module] == [(6, 6, "pre-activation"), (2, 4, "block")]


def test_the_report_of_other_settings():
    def only(**options):
        (region,) = mnet_fx.momentumize(Chain(), **options).report.regions
        return region

    assert only(gamma=rising).gamma == pytest.approx((rising(1, 6), rising(5, 6)))
    assert only(gamma=0.9, initial_velocity="first").gamma == 0.9
    assert (only(gamma=0).storage, only(gamma=0).state_bytes_per_element) == ("inputs", 24.0)
    assert (only(backward="stored").storage, only(backward="stored").state_bytes_per_element) == ("autograd", None)


def test_the_report_prints_as_tables():
    model = nn.Sequential(Chain(6), nn.Linear(6, 6), Chain(1))
    lines = str(mnet_fx.momentumize(model, gamma=0.9).report).splitlines()
    assert lines[0] == "6 of 7 residual adds rewritten, in 1 region(s)"
    header, rule, row = (line.split() for line in lines[2:5])
    assert header == ["region", "path", "steps", "adds", "kind", "gamma", "shape", "storage", "bytes/element"]
    assert set("".join(rule)) == {"-"}
    assert row == ["momentum_region_0", "0", "6", "6", "pre-activation", "0.9", "-", "reverse", "12"]
    assert "Not rewritten" in lines
    table = lines[lines.index("Not rewritten") + 2 :]
    assert table[0].split() == ["path", "node", "code", "explanation"]
    assert table[2].split()[0] == "2"
    assert table[2].split()[2] == "too_short"
    assert any(line.startswith("too_short: ") for line in table)


def test_refusals_that_are_alike_share_a_line():
    report = zoo.rewritten(nn.Sequential(*[nn.Sequential(Chain(1), nn.Linear(6, 6)) for _ in range(5)])).report
    lines = str(report).splitlines()
    assert [refusal.code for refusal in report.refusals] == ["too_short"] * 5
    assert sum("too_short" in line for line in lines) == 2  # one of the table, one with the hint
    assert any(line.startswith("0.0 and 4 more ") for line in lines)


def test_a_model_that_was_not_rewritten_has_no_report_of_its_own_and_a_preview():
    with pytest.raises(mnet_fx.MnetError, match="Chain has no report"):
        report_of(Chain())
    assert mnet_fx.report(Chain()).captured[0].front_end == "preview"


# ---- the result as a module


def test_a_second_momentumize_starts_over():
    model = Everyday().eval()
    once = mnet_fx.momentumize(model, gamma=0.9)
    before, expected = facts(once), once(tokens())
    twice = mnet_fx.momentumize(once, gamma=0)
    assert [(region.steps, region.gamma) for region in twice.report.regions] == [(6, 0.0)]
    assert list(twice.state_dict()) == list(model.state_dict())
    zoo.assert_agree(twice(tokens()), model(tokens()))
    assert torch.equal(mnet_fx.momentumize(twice, gamma=0.9)(tokens()), expected)
    assert facts(once) == before
    assert torch.equal(once(tokens()), expected)


def test_a_second_momentumize_forgets_the_velocity():
    model = Everyday().eval()
    once = mnet_fx.momentumize(model, initial_velocity=nn.Linear(6, 6))
    twice = mnet_fx.momentumize(once)
    assert list(twice.state_dict()) == list(model.state_dict())
    assert torch.equal(twice(tokens()), mnet_fx.momentumize(model)(tokens()))


class WithOptions(Chain):
    def forward(self, x, mask=None, *, scale=1.0):
        if mask is not None:
            x = x * mask
        return scale * super().forward(x)


def test_arguments_are_taken_as_before():
    model = WithOptions().eval()
    net = mnet_fx.momentumize(model, gamma=0)
    expected = model(tokens())
    for out in [net(tokens()), net(x=tokens()), net(tokens(), None), net(tokens(), mask=None, scale=1.0)]:
        zoo.assert_agree(out, expected)
    for arguments in [{}, {"x": tokens(), "masks": None}]:
        with pytest.raises(TypeError, match=r"^WithOptions\.forward\(\) (missing|got) "):
            net(**arguments)
    for others in [{"mask": torch.rand(6)}, {"scale": 2.0}]:
        zoo.assert_agree(net(tokens(), **others), model(tokens(), **others))


CALLS = {"dict": lambda x: {"x": x}, "mapping": lambda x: UserDict(x=x), "list": lambda x: [x], "tensor": lambda x: x}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_may_be_given_in_many_ways(call):
    """A tokenizer of Hugging Face returns a mapping that is no dict."""

    class Looks(Chain):
        def forward(self, x):
            return super().forward(x) if x.size(0) < 100 else x

    model = Looks()
    net = mnet_fx.momentumize(model, call(tokens()), gamma=0)
    report = net.report
    assert [part.front_end for part in report.captured] == ["Dynamo"]
    assert report.rewritten_adds == 6
    graphs = counters["stats"]["unique_graphs"]
    given = call(tokens())
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found = net.train(training)(**given) if hasattr(given, "keys") else net.train(training)(tokens())
            zoo.assert_agree(found, model(tokens()))
    assert counters["stats"]["unique_graphs"] == graphs  # it was captured in both modes
    assert net.report is report


def test_stored_is_the_same_forward_bit_for_bit():
    reversible, stored = zoo.twins(Everyday(), gamma=0.3)
    assert torch.equal(zoo.seeded(reversible, tokens()), zoo.seeded(stored, tokens()))


def test_the_class_and_the_shape_of_the_model_are_kept():
    model = Everyday()
    net = mnet_fx.momentumize(model)
    assert isinstance(net, Everyday)
    assert isinstance(net.blocks[1], Perceptron)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert sum(1 for _ in net.parameters()) == sum(1 for _ in model.parameters())


def test_each_region_logs_a_line_when_it_runs(caplog):
    net = mnet_fx.momentumize(nn.Sequential(Chain(5), nn.Linear(6, 6), Chain(2)))
    with caplog.at_level(logging.DEBUG, logger="mnet_fx"):
        net(torch.randn(4, 5, 6))
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG and r.name == "mnet_fx"]
    assert len(lines) == 2
    assert lines[0].startswith("momentum_region_0: 5 steps of torch.float32 (4, 5, 6), ReversingTape")
    assert lines[1].startswith("momentum_region_1: 2 steps of torch.float32 (4, 5, 6), StoringTape")


# ---- precision


class Growing(nn.Module):
    """Elements that never mix, and grow from almost nothing."""

    def __init__(self, steps=12):
        super().__init__()
        self.layers = nn.ModuleList(Grown() for _ in range(steps))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Grown(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Linear(24, 24, bias=False)
        nn.init.eye_(self.slope.weight).detach().mul_(3)

    def forward(self, x):
        return x + torch.tanh(self.slope(x))


WAYS = {
    "captured": lambda model, **options: mnet_fx.momentumize(model, **options),
    "named": lambda model, **options: mnet_fx.momentumize(model, regions=["layers"], **options),
    "compiled": lambda model, **options: torch.compile(model, backend=mnet_fx.backend(inner="eager", **options)),
}


@pytest.mark.parametrize("way", WAYS)
def test_high_precision_reaches_the_state_and_keeps_gradients_exact(way):
    model, x = Growing(), 10.0 ** (-5 * torch.rand(50, 24))
    functions = [lambda x, layer=layer: torch.tanh(x @ layer.slope.weight.detach().to(x.dtype)) for layer in model.layers]
    exact, float32 = (recurrence(x.to(dtype), functions, [(0.3, 0.7)] * 12)[-1] for dtype in (torch.float64, torch.float32))
    error, gradients = {}, []
    for precision, backward in (("standard", "reversible"), ("high", "reversible"), ("high", "stored")):
        net = WAYS[way](model, gamma=0.3, precision=precision, backward=backward)
        out = net(x)
        error[precision] = (out.double() - exact).abs().max()
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    assert all(map(torch.equal, gradients[1], gradients[2]))
    assert error["high"] <= 2 * (float32.double() - exact).abs().max() < error["standard"]


def test_the_report_knows_the_price_of_precision():
    deep = Growing(40)
    rows = [mnet_fx.momentumize(deep, precision=precision).report.regions[0] for precision in ("standard", "high")]
    assert [row.storage for row in rows] == ["reverse", "reverse"]
    assert rows[0].state_bytes_per_element + 4 <= rows[1].state_bytes_per_element <= 20
    short = mnet_fx.momentumize(Growing(4), precision="high").report.regions[0]
    assert (short.storage, short.state_bytes_per_element) == ("inputs", 16.0)
