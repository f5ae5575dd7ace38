"""`rest="checkpoint"` of named regions: modules outside of the chains run again in the backward pass, and nothing else changes."""

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from captures import tiny
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from zoo import ConvolutionalBlock as Block

import mnet_fx
from mnet_fx import InversionError, StreamError, momentumize


class Twice(nn.Sequential):
    """Two convolutions, statistics, dropout, an activation in place."""

    def __init__(self, a, b):
        parts = (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Dropout(0.2))
        super().__init__(*parts, nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class Up(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.up, self.twice = nn.ConvTranspose2d(a, b, 2, 2), Twice(2 * b, b)

    def forward(self, x, *, skip):
        return self.twice(torch.cat([self.up(x), skip], 1))


class UNet(nn.Module):
    """A chain at each level."""

    def __init__(self, w=4):
        super().__init__()
        self.stem = Twice(3, w)
        self.levels = nn.ModuleList(nn.Sequential(*(Block(w * 2**i) for _ in range(2))) for i in range(3))
        self.downs = nn.ModuleList(Twice(w * 2**i, w * 2 ** (i + 1)) for i in range(2))
        self.ups = nn.ModuleList(Up(w * 2 ** (i + 1), w * 2**i) for i in reversed(range(2)))
        self.head = nn.Conv2d(w, 5, 1)

    def forward(self, x):
        x, skips = self.stem(x), []
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < 2:
                skips.append(x)
                x = self.downs[i](nn.functional.max_pool2d(x, 2))
        for up in self.ups:
            x = up(x, skip=skips.pop())
        return self.head(x)


LEVELS = [f"levels.{i}" for i in range(3)]


def both(model, regions, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [momentumize(copy.deepcopy(model), gamma=0.5, regions=regions, rest=rest, **options) for rest in ("store", "checkpoint")]


def trained(net, *args, steps=2, loss=lambda out: out.square().mean(), **kwargs):
    """Everything that some steps give and leave."""
    torch.manual_seed(1)
    net.zero_grad()
    args = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    found = []
    for _ in range(steps):
        value = loss(net(*args, **kwargs))
        value.backward()
        found.append(value.detach())
    grads = [a.grad for a in args] + [p.grad for p in net.parameters()]
    return [*found, *(g.clone() for g in grads if g is not None), *(b.clone() for b in net.buffers()), torch.get_rng_state()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def taken(net, *args, **kwargs):
    def forward():
        out = net(*args, **kwargs)
        return (out if isinstance(out, torch.Tensor) else out[0]).square().mean()

    for _ in range(2):
        forward().backward()
    return mnet_fx.measure(forward, lambda value: value.backward())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def test_a_unet():
    model, x = UNet(), torch.randn(3, 3, 16, 16)
    stored, again = both(model, LEVELS)
    assert again.report.again == ("stem", "downs.0", "downs.1", "ups.0", "ups.1")
    assert again.report.rest == "checkpoint"
    assert "5 module(s) run again in the backward pass, each by itself: stem, downs.0" in str(again.report)
    assert again.report.to_dict()["again"] == list(again.report.again)
    assert stored.report.again == ()
    assert same(trained(stored, x), trained(again, x))
    assert list(again.state_dict()) == list(model.state_dict())
    assert again.mnet_fx_options["rest"] == "checkpoint"
    kept, less = taken(stored, x), taken(again, x)
    assert less.kept < 0.4 * kept.kept
    assert less.peak < 0.7 * kept.peak


def test_the_estimate_knows():
    model, x = UNet(), torch.randn(3, 3, 16, 16)
    found = taken(both(model, LEVELS)[1], x)
    way = mnet_fx.estimate(model, x, gamma=0.5, regions=LEVELS, rest="checkpoint", loss=lambda out: out.square().mean()).momentum
    assert way.kept_bytes == pytest.approx(found.kept, rel=0.01)
    assert way.peak_bytes == pytest.approx(found.peak, rel=0.05)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_hugging_face(name):
    model, inputs = tiny(name)
    stored, again = both(model, "auto")

    def loss(out):
        return sum(t.square().mean() for t in out.values() if isinstance(t, torch.Tensor) and t.requires_grad)

    assert same(trained(stored, loss=loss, **inputs), trained(again, loss=loss, **inputs))
    assert ("embeddings" in again.report.again) == (name in ("bert", "vit"))


def test_a_bert_keeps_less():
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 400}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    ids = torch.randint(400, (4, 64))
    stored, again = both(model, "auto")
    assert again.report.again == ("bert.embeddings", "cls.predictions.transform")
    assert same(*(trained(net, loss=lambda out: out.loss, input_ids=ids, labels=ids) for net in (stored, again)))
    kept, less = (taken(net.bert, input_ids=ids) for net in (stored, again))
    assert less.kept < 0.8 * kept.kept
    assert less.peak <= kept.peak


class Residual(nn.Module):
    def __init__(self, d=6):
        super().__init__()
        self.f = nn.Linear(d, d)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


class Part(nn.Module):
    """What a test has run again: `way` decides how."""

    def __init__(self, way, d=6):
        super().__init__()
        self.a, self.b, self.drop, self.norm = nn.Linear(d, d), nn.Linear(d, d), nn.Dropout(0.3), nn.BatchNorm1d(d)
        self.way, self.calls, self.last = way, [], None
        self.register_buffer("count", torch.zeros(()))

    def work(self, x):
        return self.b(torch.sin(self.drop(torch.exp(torch.tanh(self.norm(self.a(x)))))))

    def forward(self, *args, **kwargs):
        return self.way(self, *args, **kwargs)


class Net(nn.Module):
    """part, chain, part: `body` calls them."""

    def __init__(self, way, body=None, d=6):
        super().__init__()
        self.stem, self.layers, self.part = Part(Part.work, d), nn.ModuleList(Residual(d) for _ in range(3)), Part(way, d)
        self.body = body or Net.plain

    def chain(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def plain(self, x):
        return self.part(self.chain(self.stem(x)))

    def forward(self, x, **kwargs):
        return self.body(self, x, **kwargs)


def points():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def assert_same(way=Part.work, body=None, steps=3, prepare=lambda net: None, **kwargs):
    nets = both(Net(way, body), ["layers"])
    assert nets[1].report.again == ("stem", "part")
    for net in nets:
        prepare(net)
    assert same(*(trained(net, points(), steps=steps, **kwargs) for net in nets))
    return nets[1]


def test_statistics_dropout_and_the_same_weights_twice():
    def tie(net):
        net.part.a.weight = net.stem.b.weight

    assert_same(prepare=tie)


def test_a_module_that_is_called_twice():
    assert_same(body=lambda net, x: net.part(torch.sin(net.part(net.chain(net.stem(x))))))


@dataclass
class Found:
    """As libraries return it; torch knows no such structure."""

    y: torch.Tensor
    more: dict[str, Any]
    own: Any = None


def given_much(part, x, scale, *, sides, names, none=None):
    y = part.work(x * scale + sides["more"][0])
    sides["seen"].append("part")
    found = Found(y, {"mean": y.mean(), "names": names, "none": none, "first": y[:, 0]})
    found.own = [found]
    return found


def test_any_arguments_and_results():
    def body(net, x):
        h = net.chain(net.stem(x))
        sides = {"more": (torch.exp(h), 3), "seen": []}
        found = net.part(h, 2.0, sides=sides, names=("a", None))
        assert sides["seen"] == ["part"]
        assert (found.more["names"], found.more["none"]) == (("a", None), None)
        return found.y.sum(1) * found.more["mean"] + found.more["first"]

    assert_same(given_much, body)


def into_its_input(part, x):
    return part.work(torch.relu_(x))


def into_an_alias_of_its_input(part, x):
    x.view(-1).mul_(2)
    return part.work(x)


def from_its_double(part, x):
    """Autograd saves no input of it."""
    return part.work(x * 2)


def what_the_chain_gives_is_not_written_to(net, x):
    return net.part(net.chain(net.stem(x)) * 1)


def already_positive(net, x):
    """What is written are the values that were there."""
    h = torch.sin(net.chain(net.stem(x))) + 2
    return net.part(h) + torch.sin(h)


def overwritten_later(net, x):
    h = torch.sin(net.chain(net.stem(x))) + 2
    y = net.part(h)
    h += y
    return h


@pytest.mark.parametrize(
    ("way", "body"),
    [
        (into_its_input, what_the_chain_gives_is_not_written_to),
        (into_its_input, already_positive),
        (into_an_alias_of_its_input, what_the_chain_gives_is_not_written_to),
        (from_its_double, overwritten_later),
    ],
)
def test_inputs_that_are_overwritten(way, body):
    assert_same(way, body)


@pytest.mark.parametrize("body", [what_the_chain_gives_is_not_written_to, overwritten_later])
def test_a_forward_pass_without_a_backward_pass_leaves_nothing_behind(body):
    given = []

    def way(part, x):
        given.append(weakref.ref(x))
        return part.work(torch.relu_(x)) if body is what_the_chain_gives_is_not_written_to else from_its_double(part, x)

    net = both(Net(way, body), ["layers"])[1]
    for _ in range(3):
        net(points())
    gc.collect()
    assert [ref() for ref in given] == [None] * 3


@pytest.mark.parametrize(("way", "body"), [(into_its_input, what_the_chain_gives_is_not_written_to), (from_its_double, overwritten_later)])
def test_an_estimate_where_inputs_are_overwritten(way, body):
    model, x = Net(way, body, d=64), torch.randn(256, 64)
    found = taken(both(model, ["layers"])[1], x)
    options = {"gamma": 0.5, "regions": ["layers"], "rest": "checkpoint"}
    estimated = mnet_fx.estimate(model, x, loss=lambda out: out.square().mean(), **options).momentum
    unforeseen = x.nbytes * (body is overwritten_later)  # a copy that only a backward pass shows to be needed
    assert estimated.kept_bytes == pytest.approx(found.kept - unforeseen, rel=0.01)


def test_only_what_is_overwritten_is_copied_from_the_second_step_on():
    def body(net, x):
        return net.part(net.chain(net.stem(x)) * 1)

    net = assert_same(into_its_input, body)
    wanted = {name: known for (_, name), known in net.part.forward.learnt.overwritten.items()}
    assert wanted.pop("side input 0") is True
    assert not any(wanted.values())
    assert not any(net.stem.forward.learnt.overwritten.values())


def test_an_input_that_is_overwritten_for_the_first_time_is_an_error():
    def way(part, x):
        part.calls.append(0)
        return part.work(x.mul_(2) if len(part.calls) > 2 else x)

    net = both(Net(way, what_the_chain_gives_is_not_written_to), ["layers"])[1]
    trained(net, points())
    with pytest.raises(StreamError, match="part writes in place to side input 0"):
        net(points())
    net = both(Net(into_its_input, what_the_chain_gives_is_not_written_to), ["layers"], on_drift="ignore")[1]
    with pytest.raises(StreamError, match="on_drift='ignore'"):
        net(points())


def returns_its_input(part, x):
    part.last = part.work(x).detach()
    return x


def returns_a_view_of_its_input(part, x):
    return x[:, :3], part.work(x * 2)[:, :3].t()


def returns_no_tensor_but_keeps_one(part, x):
    part.last = part.work(x)
    return "done"


def writes_after(net, x):
    """To a view of what a module was given, to which autograd must see that."""
    h = torch.sin(net.chain(net.stem(x))) + 2
    view, y = net.part(h)
    h.mul_(3)
    return torch.sin(view) + y.t()


def writes_to_what_a_module_gave(net, x):
    net.stem.calls.clear()
    hook = net.stem.b.register_forward_hook(lambda _, args, out: net.stem.calls.append(out))
    y = net.stem(x)
    hook.remove()
    torch.relu_(y)  # the very tensor that the hook has
    return net.part(net.chain(y)) + torch.sin(net.stem.calls.pop())


BODIES = [
    (returns_its_input, None),
    (returns_a_view_of_its_input, writes_after),
    (returns_no_tensor_but_keeps_one, lambda net, x: (net.part(net.chain(net.stem(x))), net.part.last)[1]),
    (Part.work, writes_to_what_a_module_gave),
]


@pytest.mark.parametrize(("way", "body"), BODIES)
def test_what_a_module_gives(way, body):
    assert_same(way, body)


def counts(part, x):
    part.count += 1
    part.calls.append(len(part.calls))
    part.last = part.calls[-1]
    return part.work(x) * part.count * (1 + part.last)


def test_state_in_attributes_and_buffers():
    net = assert_same(counts)
    assert (len(net.part.calls), net.part.last, net.part.count.item()) == (3, 2, 3)


class Anywhere:
    """State that is no attribute of a module."""

    runs = 0


class Dictionary(dict):
    """As Hugging Face's results."""


@pytest.mark.parametrize("given", [lambda y: y, lambda y: (1, [y]), lambda y: Found(y, {}), lambda y: [Dictionary(y=y)]])
def test_what_does_not_repeat_is_an_error(given):
    def counts_elsewhere(part, x):
        Anywhere.runs += 1
        part.last = part.work(x) * Anywhere.runs
        return given(part.last)

    net = both(Net(counts_elsewhere, lambda net, x: (net.part(net.chain(net.stem(x))), net.part.last)[1]), ["layers"])[1]
    loss = net(points()).sum()
    with pytest.raises(InversionError, match=r"part: what it gives differs.*rest='store'") as raised:
        loss.backward()
    assert raised.value.step is None


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error():
    net = both(Net(Part.work), ["layers"])[1]
    loss = net(points()).sum()
    net.part.b.weight.data.mul_(2)
    with pytest.raises(InversionError, match=r"part: parameter 'part\.b\.weight' differs"):
        loss.backward()


def test_a_course_that_differs_is_an_error():
    def way(part, x):
        Anywhere.runs += 1
        if Anywhere.runs % 2:
            raise ValueError("another course")
        return part.work(x)

    Anywhere.runs = 1
    net = both(Net(way), ["layers"])[1]
    loss = net(points()).sum()
    with pytest.raises(InversionError, match="another course"):
        loss.backward()


def test_what_a_gradient_needs_is_not_overwritten():
    def way(part, x):
        y = torch.exp(part.work(x))
        with torch.autocast("cpu", enabled=False):
            y.mul_(2)
        return y

    for net in both(Net(way), ["layers"]):
        with pytest.raises((RuntimeError, mnet_fx.MnetError), match=r"in.?place"):
            net(points()).sum().backward()


def test_frozen_parts():
    nets = both(Net(Part.work), ["layers"])
    found = []
    for net in nets:
        net.stem.requires_grad_(False)
        net.part.requires_grad_(False)
        torch.manual_seed(1)
        runs = []
        for part in (net.stem, net.part):
            part.a.register_forward_hook(lambda module, *_, runs=runs: runs.append(module))
        net(points()).square().mean().backward()
        assert runs == [net.stem.a, net.part.a] + [net.part.a] * (net is nets[1])  # nobody needs the gradients of the stem
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert same(*found)


def test_eval_and_no_grad():
    stored, again = both(Net(Part.work), ["layers"])
    assert same(trained(stored.eval(), points()), trained(again.eval(), points()))
    with torch.no_grad():
        assert torch.equal(stored(points()), again(points()))
    with torch.inference_mode():
        assert torch.equal(stored(points()), again(points()))
    net = both(Net(into_its_input), ["layers"], on_drift="ignore")[1]
    with torch.no_grad():
        net(points())  # which needs no copies


def test_transforms_of_torch_func():
    stored, again = both(Net(lambda part, x: part.b(torch.tanh(part.a(x)))), ["layers"], backward="stored")
    for net in (stored, again):
        net.eval()
    weights = dict(stored.named_parameters())

    def loss(weights, x, net):
        return functional_call(net, weights, (x[None],)).square().sum()

    found = [vmap(grad(loss), (None, 0, None))(weights, points(), net) for net in (stored, again)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in weights)


def test_exported():
    stored, again = (net.eval() for net in both(Net(Part.work), ["layers"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(again, (points(),))
    program = torch.export.export(again, (points(),), strict=False).module()
    for net in (traced, program):
        torch.testing.assert_close(net(points()), stored(points()))


def test_parameters_that_are_swapped_in():
    def body(net, x):
        return net.part(net.chain(net.stem(x)))

    found = []
    for net in both(Net(Part.work, body), ["layers"]):
        torch.manual_seed(2)
        other = {name: (p * 2).detach().requires_grad_() for name, p in net.named_parameters()}
        out = functional_call(net, other, (points(),))
        found.append(list(torch.autograd.grad(out.square().sum(), list(other.values()))))
    assert same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_users_around_or_inside(reentrant):
    def around(net, x):
        h = net.chain(checkpoint(net.stem, x, use_reentrant=reentrant))
        return checkpoint(net.part, h, use_reentrant=reentrant)

    nets = both(Net(Part.work, around), ["layers"])
    for net in nets:  # whose statistics a user's own checkpoint moves twice, unless the module under it is run again by ours
        for part in (net.stem, net.part):
            part.norm.track_running_stats, part.norm.running_mean, part.norm.running_var = False, None, None
    assert same(*(trained(net, points()) for net in nets))
    assert_same(lambda part, x: torch.sin(checkpoint(part.work, torch.exp(x), use_reentrant=reentrant)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    def body(net, x):
        with torch.autocast("cpu", dtype):
            return net.part(net.chain(net.stem(x).float())).float()

    assert_same(body=body)


def test_hooks_of_the_users():
    def prepare(net):
        net.part.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        net.part.register_forward_hook(lambda _, args, out: out * 3)
        net.part.a.register_forward_hook(lambda _, args, out: torch.sin(out))
        net.part.b.register_full_backward_hook(lambda _, grads, out: (grads[0] * 2,))
        net.part.register_full_backward_hook(lambda _, grads, out: (grads[0] * 2,))

    assert_same(prepare=prepare)


def test_accumulation_partial_and_second_derivatives():
    def found(net):
        torch.manual_seed(1)
        a = points().requires_grad_()
        out = net(a)
        (first,) = torch.autograd.grad(out.square().sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), net.stem.a.weight, retain_graph=True)
        (partly,) = torch.autograd.grad(out.sum(), net.part.b.weight, retain_graph=True)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return [first.detach(), second, partly, *(p.grad for p in net.parameters())]

    assert same(*map(found, both(Net(Part.work), ["layers"])))


def test_copies_and_the_way_back():
    model = UNet()
    net = both(model, LEVELS)[1]
    x = torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(m.forward.owner is m for m in twin.modules() if "forward" in vars(m))
        assert same(trained(copy.deepcopy(net), x), trained(twin, x))
    there = copy.deepcopy(model)
    momentumize(there, regions=LEVELS, rest="checkpoint", inplace=True)
    assert "forward" in vars(there.stem)
    assert same(trained(momentumize(copy.deepcopy(model), gamma=0.9, regions=LEVELS), x), trained(there, x))
    assert mnet_fx.restore(there) is there
    assert not any("forward" in vars(m) for m in there.modules())
    again = momentumize(net, regions=LEVELS)  # starts over
    assert [path for path, m in again.named_modules() if "forward" in vars(m)] == [f"{level}.{i}" for level in LEVELS for i in range(2)]
    with pytest.raises(mnet_fx.SettingsError):
        momentumize(there, regions=["stem", "nowhere"], rest="checkpoint", inplace=True)
    assert not any("forward" in vars(m) for m in there.modules())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.weight


class Positions(nn.Embedding):
    pass


class Ways(nn.Module):
    """One of each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(2))
        self.words, self.act, self.none = nn.Embedding(5, 6), nn.Sequential(nn.ReLU(), nn.Tanh()), None
        self.one, self.dropped = nn.Linear(6, 6), nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.Dropout())
        self.recurrent, self.attention = nn.LSTM(6, 6), nn.MultiheadAttention(6, 2)
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.stages = nn.ModuleDict({"a": nn.Sequential(Part(Part.work), Part(Part.work)), "b": nn.Sequential(Residual(), nn.ReLU())})
        self.own, self.shared = Part(Part.work), nn.ModuleList([self.layers[0], self.mlp])
        self.own.forward = self.own.work
        self.scaled, self.positions = Scaled(), Positions(5, 6)
        self.words_of = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), nn.Linear(6, 60))
        self.bounded = nn.Sequential(nn.Embedding(5, 6, max_norm=0.1), nn.LayerNorm(6))
        self.holds = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.ReLU()), nn.Linear(6, 6))
        self.compiled, self.script = torch.compile(Part(Part.work)), torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.mlp(x)


def test_which_modules_run_again():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = momentumize(Ways(), regions=["layers"], rest="checkpoint")
    assert net.report.again == ("recurrent", "attention", "mlp", "stages.a.0", "stages.a.1", "stages.b", "scaled", "words_of.0")
    assert "stages.a.0, stages.a.1, stages.b" in str(net.report)


def test_where_nothing_would_run_again():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.Sequential(Residual(), Residual()), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.layers(x))

    net = momentumize(Bare(), regions="layers", rest="checkpoint")
    assert net.report.again == ()
    assert "no module saves much more than its input" in str(net.report)


def test_who_asks_for_its_signature():
    assert list(inspect.signature(both(UNet(), LEVELS)[1].ups[0].forward).parameters) == ["x", "skip"]


def test_verify():
    net = both(Net(Part.work), ["layers"])[1]
    found = {check.name: check.ok for check in mnet_fx.verify(net, points()).checks}
    assert found.pop("saves") is False  # of so small a model
    assert all(found.values())
