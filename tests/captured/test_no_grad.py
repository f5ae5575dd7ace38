"""Blocks under torch.no_grad within a forward: their chains are the momentum network's too, and no gradient comes from them."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import mnet_fx
from passes.capturing.grad_modes import detached

WIDTH = 8


class Body(nn.Module):
    def __init__(self, depth=4, drop=0.2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(drop), nn.Linear(WIDTH, WIDTH))
            for _ in range(depth)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Distilled(nn.Module):
    """One body as student and as its own teacher."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(WIDTH, WIDTH), Body()

    def forward(self, x):
        x = self.stem(x)
        student = self.body(x)
        with torch.no_grad():
            teacher = self.body(x * 1.5)
        return student, (student - teacher).square()


class MeanTeacher(nn.Module):
    """A teacher of its own, which each call moves towards the student, and a queue."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = Body(), Body()
        self.register_buffer("queue", torch.zeros(WIDTH))

    def forward(self, x):
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(0.9).add_(theirs, alpha=0.1)
            teacher = self.teacher(x)
            self.queue.mul_(0.5).add_(teacher.mean((0, 1)))
        return self.student(x), teacher, self.queue.clone()


class Recycled(nn.Module):
    """All runs but the last without gradients."""

    def __init__(self):
        super().__init__()
        self.body = Body()

    def forward(self, x):
        seen = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(2):
                seen = self.body(x + seen)
        return self.body(x + seen)


class Besides(nn.Module):
    """What a chain under no_grad gives besides its stream was made with gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        with torch.no_grad():
            x = x + self.first(x).tanh()
        learnt = self.second(x + 1).tanh()
        with torch.no_grad():
            total = self.third((x + learnt).tanh())
        return (x * torch.sigmoid(total)).sub(self.second(learnt).tanh())


class Frozen(nn.Module):
    """One chain, the first half of which is under no_grad."""

    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(WIDTH, WIDTH), Body(6).layers

    def forward(self, x):
        x = self.stem(x)
        with torch.no_grad():
            for layer in self.layers[:3]:
                x = x + layer(x)
        for layer in self.layers[3:]:
            x = x + layer(x)
        return x


class Within(nn.Module):
    """Gradients on again within, for a vector that the block makes."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = Body(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        with torch.no_grad():
            a = self.body(x)
            with torch.enable_grad():
                b = a * self.scale
            c = b.cos()
        return self.body(x) + b + c


class Written(nn.Module):
    """What needs a gradient is written to under no_grad, and keeps its history."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(WIDTH, WIDTH), Body()

    def forward(self, x):
        x = self.stem(x) * 2
        with torch.no_grad():
            x.clamp_(-1, 1)
        return self.body(x)


class Returned(Written):
    """The same, and what the operation returns is used."""

    def forward(self, x):
        x = self.stem(x) * 2
        with torch.no_grad():
            y = x.clamp_(-1, 1)
        return self.body(y)


class Flipped(Written):
    """What the block reads needs a gradient then, and none later."""

    def forward(self, x):
        x = self.stem(x)
        y = x * 2
        with torch.no_grad():
            z = y * self.stem.weight.sum()
        y.detach_()
        return self.body(x) + y * z


class Middle(Frozen):
    """Gradients end in the middle."""

    def forward(self, x):
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            if i == 2:
                with torch.no_grad():
                    x = x + layer(x)
            else:
                x = x + layer(x)
        return x


class Truncated(Frozen):
    """They end at a `detach` of the stream."""

    def forward(self, x):
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            if i == 2:
                x = x.detach()
            x = x + layer(x)
        return x


MODELS = [Distilled, MeanTeacher, Recycled, Besides, Frozen, Within, Written, Returned, Flipped, Middle, Truncated]
WAYS = {
    "captured": lambda model, **o: mnet_fx.momentumize(model, **o),
    "aot": lambda model, **o: mnet_fx.momentumize(model, inner="aot_eager", **o),
    "rest": lambda model, **o: mnet_fx.momentumize(model, rest="checkpoint", **o),
    "backend": lambda model, **o: torch.compile(model, backend=mnet_fx.backend(inner="eager", **o)),
}


def built(model):
    torch.manual_seed(0)
    return model().double()


def entered(n=3):
    return torch.randn(n, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def outcome(net, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    outputs = net(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [x, *net.parameters()]
    loss = sum(y.square().sum() for y in outputs if y.requires_grad)
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)), *net.buffers()], [
        *(y.requires_grad for y in outputs),
        *(g is None for g in gradients),
    ]


@pytest.mark.parametrize("way", ["captured", *(pytest.param(way, marks=pytest.mark.long) for way in WAYS if way != "captured")])
@pytest.mark.parametrize("model", MODELS, ids=lambda cls: cls.__name__)
def test_the_original_at_gamma_zero_and_exact(model, way):
    original = built(model)
    zero = WAYS[way](copy.deepcopy(original), gamma=0.0)
    for n in (3, 2):
        (ours, which), (theirs, expected) = outcome(zero, entered(n)), outcome(original, entered(n))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert which == expected
    nets = [WAYS[way](copy.deepcopy(original), gamma=0.9, backward=b) for b in ("reversible", "stored")]
    (ours, which), (theirs, expected) = (outcome(net, entered()) for net in nets)
    assert all(map(torch.equal, ours, theirs))
    assert which == expected


@pytest.mark.parametrize("model", [model for model in MODELS if model is not Middle], ids=lambda cls: cls.__name__)
def test_all_kinds_of_call_are_one_network(model):
    net = mnet_fx.momentumize(built(model), gamma=0.9)
    net.eval()
    for other in (copy.deepcopy(net), copy.deepcopy(net).train()):
        other(entered())
        other.eval()
        before = copy.deepcopy(other).requires_grad_(False)(entered())
        first, second = copy.deepcopy(other), copy.deepcopy(other)
        with torch.no_grad():
            ours = first(entered())
        theirs = second(entered())
        for a, b, c in zip(*(y if isinstance(y, tuple) else (y,) for y in (ours, theirs, before)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_where_gradients_end_a_chain_ends():
    for model, steps in ((Middle, [2, 4]), (Truncated, [2, 4])):
        net = mnet_fx.momentumize(built(model))
        net(entered())
        assert [region.steps for region in net.report.regions] == steps


class Layer(nn.Module):
    """A layer with two adds of its own; its output goes through `around`, and not all of it goes where nothing needs gradients."""

    def __init__(self, around):
        super().__init__()
        self.f, self.g, self.around = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), around

    def forward(self, x):
        x = x + torch.tanh(self.f(x))
        return self.around(x + torch.tanh(self.g(x)))


class Layers(nn.Module):
    def __init__(self, *around):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, around))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def as_it_is(x):
    return x


def stops_where_there_are_gradients(x):
    return x.detach() if torch.is_grad_enabled() else x


def mixed_where_there_are_gradients(x):
    return x @ torch.eye(WIDTH, dtype=x.dtype) if torch.is_grad_enabled() else x


@pytest.mark.parametrize(
    ("around", "steps"),
    [
        ([as_it_is, stops_where_there_are_gradients, as_it_is, as_it_is], [4, 4]),
        ([as_it_is, stops_where_there_are_gradients, stops_where_there_are_gradients, as_it_is], [4, 2, 2]),
    ],
)
def test_where_a_chain_ended_in_the_first_call_it_ends_in_all(around, steps):
    """Without gradients, all of it would be one chain, and so another network."""
    net = mnet_fx.momentumize(built(lambda: Layers(*around)), gamma=0.9)
    first = net(entered())
    assert [region.steps for region in net.report.regions] == steps
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(net(entered()), first)
        assert torch.equal(net(entered()), first)
    net = mnet_fx.momentumize(built(lambda: Layers(*around)), gamma=0.9)
    with torch.no_grad():
        net(entered())
    with pytest.raises(mnet_fx.MnetError, match=r"another momentum network .* chains of .*, where there were 8 steps"):
        net(entered())


class Parted(Layer):
    def forward(self, x):
        x = mixed_where_there_are_gradients(x + torch.tanh(self.f(x)))
        return mixed_where_there_are_gradients(x + torch.tanh(self.g(x)))


@pytest.mark.parametrize(("parted", "missing", "steps"), [(2, 3, [4, 2]), (4, 1, [6])])
def test_what_the_first_call_left_is_left_in_all(parted, missing, steps):
    """One layer has adds that no chain had. Where another one first runs amid a chain, that is another network."""

    class Some(Layers):
        def forward(self, x, missing=missing):
            for i, layer in enumerate(self.layers):
                if i != missing:
                    x = mixed_where_there_are_gradients(layer(x)) if i == parted - 1 else layer(x)
            return x

    def build():
        model = Some(*[as_it_is] * 5)
        model.layers[parted] = Parted(as_it_is)
        return model

    net = mnet_fx.momentumize(built(build), gamma=0.9)
    first = net(entered())
    assert [region.steps for region in net.report.regions] == steps
    with torch.no_grad():
        assert torch.equal(net.eval()(entered()), first)
        assert torch.equal(net.train()(entered()), first)
    assert {refusal.code for refusal in net.report.refusals} == {"interrupted"}
    assert {refusal.code for refusal in net.forward.network.reports[False].refusals} == {"left_before"}
    amid = pytest.raises(mnet_fx.MnetError, match="another momentum network") if parted == 4 else contextlib.nullcontext()
    with torch.no_grad(), amid:
        net(entered(), missing=None)


def test_chains_of_one_module_are_not_told_apart_by_its_path():
    """All adds are the model's own."""
    net = mnet_fx.momentumize(built(Middle))
    net(entered())
    with torch.no_grad(), pytest.raises(mnet_fx.MnetError, match="another momentum network"):
        net(entered())


def test_student_and_teacher_are_the_same_function():
    class Same(Distilled):
        def forward(self, x):
            student = self.body(x)
            with torch.no_grad():
                teacher = self.body(x)
            return student, teacher

    net = mnet_fx.momentumize(built(Same).eval(), gamma=0.9)
    student, teacher = net(entered())
    assert torch.equal(student, teacher)
    assert student.requires_grad
    assert not teacher.requires_grad
    assert len(net.report.regions) == 2
    assert not torch.equal(student, built(Same).eval()(entered())[0])


def test_an_initial_velocity_gets_no_gradient_from_there():
    velocity = nn.Linear(WIDTH, WIDTH).double()

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            with torch.no_grad():
                return self.body(x)

    net = mnet_fx.momentumize(built(Teacher), initial_velocity=velocity)
    assert not net(entered().requires_grad_()).requires_grad
    assert len(net.report.regions) == 1
    with pytest.raises(mnet_fx.MnetError, match="no_grad in part, and initial_velocity"):
        mnet_fx.momentumize(built(Frozen), initial_velocity=velocity)(entered())
    frozen = copy.deepcopy(velocity).requires_grad_(False)
    net = mnet_fx.momentumize(built(Frozen), initial_velocity=frozen)
    net(entered()).sum().backward()
    assert net.layers[3][1].weight.grad is not None
    assert net.layers[0][1].weight.grad is None


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.autocast("cpu", enabled=False), torch.inference_mode]
)
def test_layers_that_would_be_two_networks_are_an_error(context):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body(drop=0.0)

        def forward(self, x, both=True):
            with context():
                y = self.body(x)
            return (self.body(x) if both else x), y

    net = mnet_fx.momentumize(built(Twice).float(), gamma=0.9)
    with pytest.raises(mnet_fx.MnetError, match="4 steps from body to body would be a momentum network"):
        net(entered().float())
    with pytest.raises(mnet_fx.MnetError, match="would be a momentum network"):
        net(entered().float())
    net = mnet_fx.momentumize(built(Twice).float(), gamma=0.9)
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        net(entered().float(), both=False)
    with pytest.warns(mnet_fx.MnetWarning, match="4 residual adds stay as they are, as the first call of the model left them"):
        net(entered().float())
    assert {refusal.code for refusal in net.report.refusals} == {"lost_context"}


@pytest.mark.filterwarnings("ignore:.*no residual chain")
def test_each_block_under_autocast_of_its_own_is_said_to_be_so():
    """Not that each is too short."""

    class Off(Layer):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return x + torch.tanh(self.f(x))

    model = built(lambda: Layers(*[as_it_is] * 3))
    model.layers = nn.ModuleList(Off(as_it_is) for _ in range(3)).double()
    net = mnet_fx.momentumize(model, (entered(),))
    assert [(add.path, add.code) for add in net.report.adds] == [(f"layers.{i}", "lost_context") for i in range(3)]


def test_what_is_done_without_the_mode():
    """Where all that the block gives is new, it is done on detached values; each parameter is detached where it is read."""
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm

    torch.compile(built(Distilled), backend=keep)(entered().requires_grad_())
    (gm,) = graphs
    result = detached(gm, lambda node: "parameters" in node.name)
    targets = [node.target for node in result.graph.nodes]
    assert targets.count("detach") == 1 + 4 * 6  # x, and six parameters of each layer
    assert not any("grad_enabled" in str(target) for target in targets)
    assert any("grad_enabled" in str(node.target) for node in gm.graph.nodes)
    with torch.no_grad():
        assert detached(gm, lambda node: False) is gm
    graphs.clear()
    torch.compile(built(Recycled), backend=keep)(entered().requires_grad_())
    targets = [node.target for node in detached(graphs[0], lambda node: "parameters" in node.name).graph.nodes]
    assert targets.count("detach") == 1 + 2 * 4 * 6  # each parameter for each of its two readers, so that each step has its own
    graphs.clear()
    torch.compile(built(Returned), backend=keep)(entered())
    assert detached(graphs[0], lambda node: False) is graphs[0]
