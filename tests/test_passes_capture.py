"""What capture records, what it leaves as a leaf and why, and that the model is as it was afterwards."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from passes_models import check_same, lengths, linears, program, traced
from torch import nn
from torch.utils.checkpoint import checkpoint

from passes import capture, plan


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def under(context):
    def forward(self, x):
        with context():
            return self.f(x)

    return forward


def decorated(self, x):
    return self.f(x)


LOST = {
    "torch.autocast": under(lambda: torch.autocast("cpu")),
    "gradient mode": under(torch.no_grad),
    "gradient mode ": under(torch.enable_grad),
    "gradient mode  ": under(lambda: torch.set_grad_enabled(False)),
    "gradient mode   ": torch.no_grad()(decorated),
    "torch.inference_mode": under(torch.inference_mode),
    "torch.autograd.Function": lambda self, x: Double.apply(self.f(x)),
    "torch.utils.checkpoint": lambda self, x: checkpoint(self.f, x, use_reentrant=False),
    "torch.autograd.Function ": lambda self, x: checkpoint(self.f, x, use_reentrant=True),
    "saved-tensor hooks": under(lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)),
    "torch.is_grad_enabled": lambda self, x: self.f(x) if torch.is_grad_enabled() else x,
    "torch.is_autocast_enabled": lambda self, x: self.f(x).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype),
    "Python's random module": lambda self, x: self.f(x) * (1 + (random.random() < 0.5)),
}
FAILS = {
    "control flow": lambda self, x: self.f(x) if x.sum() > 0 else x,
    "cannot be iterated": lambda self, x: torch.stack([self.f(row) for row in x]),
    "neither a parameter": lambda self, x: self.f(x) + self.table[0],
    "sets the attribute 'grad'": lambda self, x: setattr(x, "grad", None) or self.f(x),
    "no broom": lambda self, x: (_ for _ in ()).throw(RuntimeError("no broom")),
}


def residual(self, x):
    for f in self.f:
        x = x + f(x)
    return x


def surrounded(forward) -> nn.Module:
    """The module in question between two residual steps, with a chain of its own inside."""
    inner = program(forward, f=program(residual, f=linears(2)))
    inner.table = [torch.ones(4)]
    return program(residual, f=[nn.Linear(4, 4), inner, nn.Linear(4, 4)])


@pytest.mark.parametrize(("text", "code"), [(text, "lost_context") for text in LOST] + [(text, "untraceable") for text in FAILS])
def test_what_a_trace_would_lose_becomes_a_leaf(text, code):
    model = surrounded((LOST | FAILS)[text])
    found = capture(model)
    (refusal,) = found.refusals
    assert (refusal.code, refusal.path, refusal.node) == (code, "f.1", "")
    assert text.strip() in refusal.explanation
    assert [part.path for part in found.parts] == ["", "f.1.f"]
    outer, inner = (plan(part.graph_module) for part in found.parts)
    assert (lengths(outer), lengths(inner)) == ([3], [2])
    assert "self.f" in found.parts[0].graph_module.code


def test_a_root_that_cannot_be_traced_is_taken_apart():
    def forward(self, x):
        if x.sum() > 0:
            x = self.stages[0](x)
        return self.stages[1](x)

    stage = [program(residual, f=linears(n)) for n in (2, 3)]
    found = capture(program(forward, stages=stage, table=nn.ModuleDict({"head": program(residual, f=linears(4))})), "net")
    assert [part.path for part in found.parts] == ["net.stages.0", "net.stages.1", "net.table.head"]
    assert [lengths(plan(part.graph_module)) for part in found.parts] == [[2], [3], [4]]
    (refusal,) = found.refusals
    assert (refusal.path, refusal.explanation) == (
        "net",
        "tracing it failed: TraceError: symbolically traced variables cannot be used as inputs to control flow",
    )


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_hooks_are_kept(register):
    model = surrounded(lambda self, x: self.f(x))
    getattr(model.f[1], register)(lambda *args: None)
    model.f[0].register_forward_hook(lambda module, args, output: 2 * output)  # of a leaf, so it fires by itself
    found = capture(model)
    assert [(refusal.code, refusal.path) for refusal in found.refusals] == [("opaque_module", "f.1")]
    assert lengths(plan(found.parts[0].graph_module)) == [3]
    x = torch.randn(2, 4)
    assert torch.equal(found.parts[0].graph_module(x), model(x))


def test_a_replaced_forward_is_kept():
    model = surrounded(lambda self, x: self.f(x))
    model.f[1].forward = lambda x: x
    assert [(refusal.code, refusal.path) for refusal in capture(model).refusals] == [("opaque_module", "f.1")]
    model.forward = lambda x: x
    assert [(refusal.code, refusal.path) for refusal in capture(model).refusals] == [("opaque_module", ""), ("opaque_module", "f.1")]


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, but still met in old models
def test_scripts_are_not_traced():
    script = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))
    assert [refusal.code for refusal in capture(script).refusals] == ["opaque_module"]
    model = program(residual, f=[program(lambda self, x: self.f(x), f=script), nn.Linear(4, 4)])
    found = capture(model)
    assert lengths(plan(found.parts[0].graph_module)) == [2]
    assert [(refusal.code, refusal.path) for refusal in found.refusals] == [("opaque_module", "f.0.f")]


def test_optional_arguments_are_pinned():
    def forward(self, x, mask=None, *, scale=2.0, **kwargs):
        for f in self.f:
            x = x + f(x) * scale if mask is None else x * mask
        return x

    model = program(forward, f=linears(2))
    (part,) = capture(model).parts
    assert part.pinned == {"mask": None, "scale": 2.0, "kwargs": {}}
    placeholders = [node for node in part.graph_module.graph.nodes if node.op == "placeholder"]
    assert [(node.name, len(node.users) > 0) for node in placeholders] == [("x", True), ("mask", False), ("scale", False)]
    x = torch.randn(2, 4)
    assert torch.equal(part.graph_module(x), model(x))


def test_required_keywords():
    model = program(lambda self, x, *, y: x + self.f[0](x) * y, f=linears(1))
    (part,) = capture(model).parts
    x = torch.randn(2, 4)
    assert torch.equal(part.graph_module(x, y=x), model(x, y=x))


@pytest.mark.parametrize("forward", [lambda self, *args: args[0], lambda self, x=None: x, lambda self: self.f[0].weight])
def test_signatures_without_required_arguments_are_refused(forward):
    found = capture(program(forward, f=linears(1)))
    assert found.parts == ()
    assert "no argument that a caller must give" in found.refusals[0].explanation


def test_modes_are_captured_as_they_are():
    model = program(lambda self, x: F.dropout(x, 0.5, self.training), f=linears(1))
    for training in (True, False):
        (part,) = capture(model.train(training)).parts
        assert part.training is training
        assert part.graph_module.training is training
        assert f"training = {training}" in part.graph_module.code


class ReadsMode(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


def test_modules_that_read_their_mode_are_leaves():
    model = nn.Sequential(ReadsMode())
    (part,) = capture(model).parts
    assert torch.equal(part.graph_module.eval()(torch.ones(1)), torch.ones(1))


def test_the_model_is_left_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return self.f(x) * torch.rand(4) / self.count + torch.zeros(4)

    model = program(residual, f=[Counts(), Counts()])
    before, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    state, python = torch.get_rng_state(), random.getstate()
    gm = traced(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    x = torch.randn(2, 4)
    torch.manual_seed(0)
    expected = copy.deepcopy(model)(x)
    torch.manual_seed(0)
    assert torch.equal(gm(x), expected)
    assert (model.f[0].count, model.f[1].count) == (1, 1)
    assert lengths(plan(gm)) == [2]


def test_watched_functions_are_restored():
    def snapshot():
        return [
            torch.autocast.__enter__,
            torch.inference_mode.__enter__,
            torch.autograd.graph.saved_tensors_hooks.__enter__,
            torch.autograd.Function.__dict__["apply"],
            nn.Module.__call__,
        ]

    before = snapshot()
    capture(surrounded(FAILS["no broom"]))
    capture(program(FAILS["no broom"], f=linears(1)))
    assert snapshot() == before


def test_other_threads_are_not_blamed():
    ran = []

    def forward(self, x):
        thread = threading.Thread(target=lambda: ran.append(Double.apply(torch.ones(1))))
        thread.start()
        thread.join()
        return x + self.f[0](x)

    assert capture(program(forward, f=linears(1))).refusals == ()
    assert torch.equal(ran[0], torch.full((1,), 2.0))


def test_outputs_keep_their_type():
    model = program(lambda self, x: OrderedDict(out=self.f[0](x), more=[x, {"x": x}]), f=linears(1))
    result = traced(model)(torch.randn(2, 4))
    assert type(result) is OrderedDict
    assert list(result) == ["out", "more"]


def test_augmented_and_item_assignment_are_recorded():
    def forward(self, x):
        y = self.f[0](x)
        y += x
        y *= 2
        y[0] = 1
        z = y.T
        z -= 1
        return y

    gm = traced(program(forward, f=linears(1)))
    assert [name for name in ("iadd", "imul", "setitem", "isub") if name in gm.code] == ["iadd", "imul", "setitem", "isub"]
    check_same(program(forward, f=linears(1)), torch.randn(2, 4), gradients=False)


def test_a_captured_graph_can_be_pickled_and_copied():
    model = program(lambda self, x, mask=None: residual(self, F.relu_(self.stem(x))), f=linears(2), stem=nn.Linear(4, 4))
    gm = traced(model)
    x = torch.randn(2, 4)
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(other(x), gm(x))
        assert plan(other) == plan(gm)


class SetsAttributes(nn.Module):
    """Keeps what it computed on itself, as torchvision's MultiScaleRoIAlign does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.cache, self.seen = None, []

    def forward(self, x):
        if self.cache is None:
            self.cache = x.mean()
        self.seen.append(x.shape)
        return self.inner(x) + self.cache


def test_a_module_that_sets_attributes_on_itself_stays_python_and_is_left_clean():
    model = nn.Sequential(SetsAttributes(), nn.Linear(4, 4))
    found = capture(model)
    assert [(r.code, r.path) for r in found.refusals] == [("lost_context", "0")]
    assert "cache" in found.refusals[0].explanation
    assert (model[0].cache, model[0].seen) == (None, [])
    assert any(node.op == "call_module" and node.target == "0" for node in found.parts[0].graph_module.graph.nodes)


class AsksForType(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.inner, self.question = nn.Linear(4, 4), question

    def forward(self, x):
        return self.inner(x * 3) if self.question(x) else self.inner(x)


@pytest.mark.parametrize("question", [lambda x: isinstance(x, torch.Tensor), torch.is_tensor], ids=["isinstance", "is_tensor"])
def test_a_module_that_asks_for_the_type_of_a_value_stays_python(question):
    found = capture(nn.Sequential(AsksForType(question), nn.Linear(4, 4)))
    assert [(r.code, r.path) for r in found.refusals] == [("lost_context", "0")]


class Counting(nn.Module):
    """State that neither an attribute of the module nor a generator shows."""

    def __init__(self):
        super().__init__()
        self.inner, self.state = nn.Linear(4, 4), type("State", (), {"calls": 0})()

    def forward(self, x):
        self.state.calls += 1
        return self.inner(x) / self.state.calls


def test_a_module_that_does_not_trace_to_the_same_graph_twice_stays_python():
    found = capture(nn.Sequential(Counting(), nn.Linear(4, 4)))
    assert [(r.code, r.path) for r in found.refusals] == [("lost_context", "0")]


def test_a_draw_from_numpy_is_noticed_and_taken_back():
    numpy = pytest.importorskip("numpy")

    class Draws(AsksForType):
        def forward(self, x):
            return self.inner(x) * float(numpy.random.rand())

    numpy.random.seed(3)
    found = capture(nn.Sequential(Draws(None), nn.Linear(4, 4)))
    assert [(r.code, r.path) for r in found.refusals] == [("lost_context", "0")]
    drawn = numpy.random.rand()
    numpy.random.seed(3)
    assert drawn == numpy.random.rand()
