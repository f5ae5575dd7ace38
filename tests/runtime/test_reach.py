"""What a rerun finds as the first run found it: whatever the layer's Python reaches, and whatever it is called with."""

import copy
import dataclasses
import functools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import zoo
from torch import nn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx
from mnet_fx.runtime.reach import reached

WIDTH, DEPTH = 4, 6


@dataclasses.dataclass
class State:
    count: int = 0
    mean: torch.Tensor | None = None


class Block(nn.Module):
    """x + b(tanh(a(x))) that keeps a count or a mean on the side, at `kind`."""

    def __init__(self, kind, used=True):
        super().__init__()
        self.a, self.b, self.kind, self.used = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), kind, used
        zero = torch.zeros(())
        if kind == "None buffer":
            self.register_buffer("mean", None)
        if kind in ("list", "dict", "deep list"):
            self.kept = {"list": [zero], "dict": {"m": zero}, "deep list": ([[zero]],)}[kind]
        if kind == "list in tuple":
            self.kept = ([0],)
        if kind == "Counter":
            self.kept = Counter()
        if kind in ("dataclass", "namespace"):
            self.kept = State() if kind == "dataclass" else SimpleNamespace(count=0)
        if kind == "hidden module":
            self.kept = [nn.BatchNorm1d(WIDTH)]
        if kind == "set by object":
            object.__setattr__(self, "kept", nn.BatchNorm1d(WIDTH))
        if kind == "closure":
            norm = nn.BatchNorm1d(WIDTH)
            self.kept, self.seen = (lambda x: norm(x)), (lambda: norm)
        if kind == "partial":
            self.kept = functools.partial(_moved, zero)

    def bump(self, x):
        """Takes x in, and gives what it has come to."""
        if self.kind in ("None buffer", "new buffer"):
            if getattr(self, "mean", None) is None:
                self.register_buffer("mean", torch.zeros(()))
            self.mean = 0.9 * self.mean + x.detach().mean()
            return self.mean
        if self.kind in ("list", "dict", "deep list"):
            return _moved(_leaf(self.kept), x)
        if self.kind == "list in tuple":
            self.kept[0].append(1)
            return len(self.kept[0])
        if self.kind == "Counter":
            self.kept["n"] += 1
            return self.kept["n"]
        if self.kind in ("dataclass", "namespace"):
            self.kept.count += 1
            return self.kept.count
        if self.kind in ("hidden module", "set by object", "closure"):
            return (self.kept[0] if self.kind == "hidden module" else self.kept)(x).detach()
        return self.kept(x)

    def state(self):
        """What is kept, as tensors."""
        if self.kind == "closure":
            return {key: t.clone() for key, t in self.seen().state_dict().items()}
        if self.kind in ("None buffer", "new buffer"):
            return {"mean": self.mean.clone()}
        kept = self.kept.args[0] if self.kind == "partial" else _leaf(self.kept) if self.kind != "Counter" else self.kept["n"]
        if isinstance(kept, nn.Module):
            return {key: t.clone() for key, t in kept.state_dict().items()}
        return {"kept": torch.as_tensor(getattr(kept, "count", kept)).clone()}

    def forward(self, x):
        kept = self.bump(x)
        return x + self.b(torch.tanh(self.a(x))) * (1 + (0.01 * kept if self.used else 0))


def _moved(mean, x):
    return mean.mul_(0.9).add_(x.detach().mean()).clone()


def _leaf(kept):
    while isinstance(kept, (list, tuple, dict)):
        kept = (
            len(kept)
            if isinstance(kept, list) and kept and isinstance(kept[0], int)
            else next(iter(kept.values() if isinstance(kept, dict) else kept))
        )
    return kept


KINDS = ["None buffer", "new buffer", "list", "dict", "deep list", "list in tuple", "Counter", "dataclass", "namespace", "hidden module"]
KINDS += ["set by object", "closure", "partial"]


class Loop(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def made(cls, *args):
    torch.manual_seed(0)
    return Loop([cls(*args) for _ in range(DEPTH)])


def run(net, calls=2):
    found = {}
    for i in range(calls):
        x = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH).add(0.1 * i).requires_grad_()
        y = net(x)
        y.square().sum().backward()
        found |= {f"{i}.y": y.detach(), f"{i}.x": x.grad}
    found |= {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {f"{i}.{key}": t for i, block in enumerate(net.blocks) for key, t in block.state().items()}


BUFFERS = ["None buffer", "new buffer"]
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in BUFFERS]
CASES += [pytest.param(kind, True, marks=pytest.mark.long) for kind in KINDS if kind not in BUFFERS]


@pytest.mark.parametrize(("kind", "used"), CASES)
def test_a_rerun_moves_nothing_again(kind, used):
    """Whether the output depends on it, which would be an error, or does not, which would go unnoticed."""
    stored, reversible = (run(named(made(Block, kind, used), backward=b)) for b in ("stored", "reversible"))
    zoo.assert_identical(reversible, stored)
    assert any(float(t.abs().max()) > 0 for key, t in stored.items() if key.count(".") == 1 and key[0].isdigit() and key[2:] not in "xy")


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_late_rerun_leaves_what_later_calls_came_to(kind):
    found = []
    for backward in ("stored", "reversible"):
        net = named(made(Block, kind, False), backward=backward)
        first, second = (net(torch.full((3, WIDTH), value, requires_grad=True)) for value in (1.0, 5.0))
        (first.sum() + second.sum()).backward()
        found.append({f"{i}.{key}": t for i, block in enumerate(net.blocks) for key, t in block.state().items()})
    zoo.assert_identical(found[1], found[0])


def named(model, gamma=0.5, **options):
    return mnet_fx.momentumize(model, regions=["blocks"], gamma=gamma, **options)


class Taught(nn.Module):
    """A block with a module in a list, whose result a layer with weight 0 hides."""

    def __init__(self, counts=False):
        super().__init__()
        self.fc, self.out, self.hidden, self.counts, self.n = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), [nn.Module()], counts, 0
        self.hidden[0].fc = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        if self.counts:
            self.n += 1
        return x + self.out(torch.tanh(self.hidden[0].fc(x)) + torch.sin(self.fc(x)))


WAYS = {"captured": {}, "named": {"regions": ["blocks"]}}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("which", ["hidden", "fc"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_change_in_between_are_an_error_wherever_they_are(way, which, counts):
    net = mnet_fx.momentumize(made(Taught, counts), gamma=0.5, **WAYS[way])
    y = net(torch.randn(3, WIDTH, requires_grad=True))
    for block in net.blocks:
        layer = block.hidden[0].fc if which == "hidden" else block.fc
        layer.weight.data = 1.5 * layer.weight.data
    with pytest.raises(mnet_fx.InversionError, match=r"parameter .* differs between the forward pass and its recomputation"):
        y.sum().backward()


class Counting(nn.Module):
    """Dynamo finds the weights of what has Python's state by another way."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.n += 1
        return x + self.b(torch.tanh(self.a(x)))


def test_the_error_names_the_weight():
    net = mnet_fx.momentumize(made(Counting), gamma=0.5)
    y = net(torch.randn(3, WIDTH, requires_grad=True))
    net.blocks[5].a.weight.data = 1.5 * net.blocks[5].a.weight.data
    with pytest.raises(mnet_fx.InversionError, match=r"parameter 'blocks\.5\.a\.weight' differs"):
        y.sum().backward()


@pytest.mark.parametrize("now", [True, False])
@pytest.mark.parametrize("which", ["hidden", "fc"])
@pytest.mark.parametrize("way", WAYS)
def test_flags_that_flip_in_between_are_those_of_the_first_run(way, which, now):
    found = []
    for backward in ("stored", "reversible"):
        net = mnet_fx.momentumize(made(Taught, True), gamma=0.5, backward=backward, **WAYS[way])
        layers = [block.hidden[0].fc if which == "hidden" else block.fc for block in net.blocks]
        for layer in layers:
            layer.requires_grad_(now)
        torch.manual_seed(1)
        for block in net.blocks:
            nn.init.normal_(block.out.weight)
        x = torch.randn(3, WIDTH, requires_grad=True)
        y = net(x)
        for layer in layers:
            layer.requires_grad_(not now)
        y.square().sum().backward()
        grads = {f"{i}.{name}": p.grad for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
        found.append({"x": x.grad} | {name: p.grad for name, p in net.named_parameters()} | grads)
    known = [{key: t for key, t in f.items() if t is not None} for f in found]
    zoo.assert_identical(known[1], known[0])  # none of the layers, as autograd looks at the flag when a gradient arrives
    assert "x" in known[0]
    assert not grads.keys() & known[0].keys()


@pytest.mark.parametrize("way", WAYS)
def test_hidden_modules_share_their_weights(way):
    """The net computes with the weights of the model it was made from, wherever these are."""
    model = made(Taught)
    for block in model.blocks:
        nn.init.normal_(block.out.weight)
    net = mnet_fx.momentumize(model, gamma=0.0, **WAYS[way])
    x = torch.randn(3, WIDTH)
    before = net(x).detach()
    with torch.no_grad():
        for block in model.blocks:
            block.hidden[0].fc.weight.mul_(3)
    zoo.assert_near({"y": net(x)}, {"y": model(x)}, 1e-5)
    assert (net(x) - before).abs().max() > 1e-2


def test_a_reference_to_a_parent_is_not_gone_into():
    model = made(Taught)
    for block in model.blocks:
        block.parent = [model]
    layer = model.blocks[0]
    found = reached([layer, *layer.children()])
    assert [type(module) for module in found.hidden] == [nn.Module, nn.Linear]
    zoo.assert_identical(run_plain(named(copy.deepcopy(model))), run_plain(named(model, backward="stored")))


def run_plain(net):
    x = torch.linspace(-1, 1, WIDTH).reshape(1, WIDTH).requires_grad_()
    y = net(x)
    y.sum().backward()
    return {"y": y.detach(), "x": x.grad}


class Noisy(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.a, self.generator, self.kept = nn.Linear(WIDTH, WIDTH), None, {"generators": [generator]}

    def forward(self, x, generator=None):
        noise = torch.rand(x.shape, generator=generator or self.kept["generators"][0])
        return x + torch.tanh(self.a(x)) * noise


class Noise(nn.Module):
    def __init__(self, given):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.given = torch.Generator().manual_seed(3), given
        self.blocks = nn.ModuleList([Noisy(self.generator) for _ in range(DEPTH)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, self.generator if self.given else None)
        return x


@pytest.mark.parametrize("given", [True, False])
def test_generators_in_containers_and_as_arguments_draw_again_what_they_drew(given):
    zoo.assert_identical(run_plain(named(Noise(given))), run_plain(named(Noise(given), backward="stored")))


class Forgetful(nn.Module):
    """A block whose residual function is another each time, where `draws`."""

    def __init__(self, draws):
        super().__init__()
        self.a, self.draws = nn.Linear(WIDTH, WIDTH), draws

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return x + (y * torch.rand(y.shape, generator=_GENERATOR, dtype=y.dtype) if self.draws else y)


_GENERATOR = torch.Generator()


GAMMAS = {
    "0": 0.0,
    "0 at first": lambda t, n: 0.0 if t < n // 2 else 0.99,
    "tiny once": lambda t, n: 1e-30 if t == 3 else 0.9,
    "0.02": 0.02,
    "0.5": 0.5,
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(t, marks=pytest.mark.long) for t in (torch.float64, torch.bfloat16))], ids=str
)
@pytest.mark.parametrize("gamma", GAMMAS.values(), ids=GAMMAS)
@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_step_that_does_not_repeat_is_an_error_at_every_momentum(which, gamma, dtype):
    """With momentum 0 the state before a step does not depend on what the step gives, so that is looked at itself."""
    torch.manual_seed(0)
    net = mnet_fx.momentumize(Loop([Forgetful(i == which) for i in range(8)]).to(dtype), regions=["blocks"], gamma=gamma)
    y = net(torch.randn(3, WIDTH, dtype=dtype, requires_grad=True))
    with pytest.raises(mnet_fx.InversionError, match=f"step {which}"):
        y.sum().backward()


class Asking(nn.Module):
    """Attention that asks, as many do, whether query and key are one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, q, k, *, v):
        scale = (1.0 if q is k else 0.5) * (1.0 if q is v else 0.7)
        return q + torch.tanh(self.a(torch.softmax(scale * (q @ k.mT), -1) @ v))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Asking() for _ in range(DEPTH)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, x, v=x)
        return x


def test_a_stream_that_is_given_twice_is_one():
    model, x = Attention(), torch.randn(3, WIDTH)
    zoo.assert_near({"y": named(model, 0.0)(x)}, {"y": model(x)}, 1e-6)
    zoo.assert_identical(run_plain(named(model)), run_plain(named(Attention(), backward="stored")))
