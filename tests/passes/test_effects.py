"""What a model does to memory is seen, by whatever operation: at gamma = 0 the momentum network computes what the model computes."""

import warnings

import pytest
import torch
from torch import nn

import mnet_fx
from mnet_fx.arithmetic import fingerprints
from mnet_fx.budget.measured import measure

# A name for the same memory, by operations that no table lists, or that only some shapes or modes make share it.
SHARING = {
    "view": lambda x: x.view(3, 4),
    "plus": lambda x: +x,
    "einsum": lambda x: torch.einsum("ij->ji", x).T,
    "atleast_2d": lambda x: torch.atleast_2d(x),
    "sum_to_size": lambda x: x.sum_to_size(3, 4),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(torch.ones(3, 4), x)[1],
    "meshgrid": lambda x: torch.meshgrid(x[0], indexing="ij")[0],
    "as_tensor": lambda x: torch.as_tensor(x),
    "conj": lambda x: x.conj(),
    "real": lambda x: x.real,
    "hsplit": lambda x: x.hsplit(1)[0],
    "split": lambda x: x.split(2, 1)[1],
    "chunk": lambda x: torch.chunk(x, 2, -1)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "expand": lambda x: x[None].expand(1, 3, 4),
    "as_strided": lambda x: x.as_strided((2, 2), (4, 1)),
    "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "positive": lambda x: torch.positive(x),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "resolve_conj": lambda x: x.resolve_conj(),
    "view_as_complex": lambda x: torch.view_as_complex(x.view(3, 2, 2)),
    "detach": lambda x: x.detach(),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "nan_to_num": lambda x: x.nan_to_num(),  # is a copy
    "own": lambda x: x,
}
# Each overwrites what it is given.
WRITING = {
    "mul_": lambda y: y.mul_(2),
    "item": lambda y: y.__setitem__(Ellipsis, y * 2),
    "masked_fill_": lambda y: y.masked_fill_(y.detach() > 0, 0.5) if not y.is_complex() else y.fill_(1),
    "index_put_": lambda y: y.index_put_((torch.tensor([0]),), torch.ones((), dtype=y.dtype)),
    "scatter_": lambda y: y.scatter_(0, torch.zeros_like(y, dtype=torch.long), 0.5) if not y.is_complex() else y.zero_(),
    "copy_": lambda y: y.copy_(torch.ones_like(y)),
    "out": lambda y: torch.add(y.detach().clone(), 1, out=y.detach()),
    "foreach": lambda y: torch._foreach_mul_([y], 2),
    "custom": lambda y: torch.ops.mnet_fx_tests.doubled_(y),
    "index": lambda y: y.index_fill_(0, torch.tensor([0]), 3),
}


@torch.library.custom_op("mnet_fx_tests::doubled_", mutates_args={"x"})
def doubled_(x: torch.Tensor) -> None:
    x.mul_(2)


class Shared(nn.Module):
    """Gives the stream another name before its first step, and writes by it after that step."""

    def __init__(self, sharing, writing):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.f, self.g, self.h = (nn.Linear(4, 4) for _ in range(4))
        self.sharing, self.writing = SHARING[sharing], WRITING[writing]

    def forward(self, x):
        x = self.stem(x)
        y = self.sharing(x)
        a = x + self.f(2 * x)
        self.writing(y)
        b = a + self.g(torch.sin(a))
        c = b + self.h(torch.sin(b))
        return c + x.sum()


def ways_in(model, x):
    """The model through each door that takes it: by name, a function that gives its momentum network."""
    yield "captured", lambda: mnet_fx.momentumize(model, gamma=0)
    yield "traced", lambda: mnet_fx.momentumize(torch.fx.symbolic_trace(model), gamma=0)
    yield "exported", lambda: mnet_fx.momentumize(torch.export.export(model, (x,)).module(), gamma=0)


def result(net, x, grad):
    """Output, and gradients if these are asked for; the error where autograd forbids what the model does."""
    net.zero_grad(set_to_none=True)
    if not grad:
        with torch.no_grad():
            return [net(x)]
    y = net(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in net.parameters())]


def assert_same(model, net, x, grad):
    """The momentum network computes what the model does, or refuses with an error of its own."""
    wants = result(model, x, grad)
    try:
        gots = result(net, x, grad)
    except mnet_fx.MnetError:
        return
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def made_or_none(made, way):
    """The network; None where a tracer or torch.export does not take the model."""
    if way == "captured":
        return made()
    try:
        return made()
    except Exception:
        return None


@pytest.mark.filterwarnings("ignore::mnet_fx.MnetWarning", "ignore:The CUDA Graph", "ignore:An output with one or more elements")
@pytest.mark.parametrize(("sharing", "writing"), [(name, "mul_") for name in SHARING] + [("narrow", name) for name in WRITING])
def test_a_write_to_shared_memory_keeps_its_place(sharing, writing):
    model, x = Shared(sharing, writing), torch.randn(3, 4)
    for way, made in ways_in(model, x):
        if (net := made_or_none(made, way)) is None:
            continue
        assert_same(model, net, x, grad=False)
        if sharing not in ("detach", "unbind", "split", "chunk", "hsplit") and writing in ("mul_", "item"):
            assert_same(model, net, x, grad=True)


class WrittenAfter(nn.Module):
    """Writes to a side input and to a buffer after the chain that reads them."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layers, self.what = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), what
        self.register_buffer("mean", torch.full((4,), 0.5))

    def forward(self, x):
        side = self.stem(x)
        part = side[:, 1:]
        for layer in self.layers:
            x = x + torch.tanh(layer(x) + side + self.mean) * part.sum()
        if self.what == "side":
            side.mul_(2)
        if self.what == "view":
            part.zero_()
        if self.what == "buffer":
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        if self.what == "buffer copied":
            self.mean.copy_(x.detach().mean(0))
        if self.what == "buffer by index":
            self.mean[1:] = x.detach()[0, 1:]
        return x, side


def both(model, net, x):
    """Outputs, gradients and buffers of a model and of its momentum network."""
    found = []
    for each in (model, net):
        own = x.clone().requires_grad_()
        each.zero_grad(set_to_none=True)
        stream, side = each(own)
        (stream.square().sum() + side.cos().sum()).backward()
        found.append([stream, side, own.grad, *(p.grad for p in each.parameters()), *(b.clone() for b in each.buffers())])
    return zip(*found, strict=True)


@pytest.mark.parametrize("what", ["", "buffer", "buffer copied", "buffer by index"])
@pytest.mark.parametrize("way", ["captured", "aot_eager", "traced", "exported"])
def test_what_is_overwritten_after_the_chain_is_copied(what, way):
    x = torch.randn(3, 4)
    model, twin = WrittenAfter(what), WrittenAfter(what)
    if way == "traced":
        model, twin = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(twin)
    if way == "exported":
        twin = torch.export.export(twin, (x,)).module()
    net = mnet_fx.momentumize(twin, gamma=0, **({"inner": way} if way == "aot_eager" else {}))
    for _ in range(2):  # the buffer has moved in between
        for want, got in both(model, net, x):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (region,) = net.report.regions
    assert region.steps >= 3
    assert bool(region.copied) == (what != "")
    if what and way in ("captured", "aot_eager"):
        assert (region.copied, region.copied_bytes) == (("mean",), 16)
        assert "momentum_region_0 keeps copies of what is overwritten after the chain has read it (16 bytes): mean" in str(net.report)


@pytest.mark.parametrize("what", ["side", "view"])
@pytest.mark.parametrize("way", ["captured", "traced"])
def test_a_side_input_overwritten_after_the_chain_is_copied(what, way):
    """In the original autograd would refuse these, as tanh(...) * part.sum() saves nothing of the side but its sum."""
    model, x = WrittenAfter(what), torch.randn(3, 4)
    net = mnet_fx.momentumize(WrittenAfter(what) if way == "captured" else torch.fx.symbolic_trace(WrittenAfter(what)), gamma=0)
    for want, got in both(model, net, x):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert net.report.regions[0].copied


def test_a_write_before_the_chain_makes_no_copy():
    class Before(WrittenAfter):
        def forward(self, x):
            self.mean.add_(1)
            return super().forward(x)

    model, net, x = Before(""), mnet_fx.momentumize(Before(""), gamma=0), torch.randn(3, 4)
    for want, got in both(model, net, x):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert net.report.regions[0].copied == ()


def test_a_graph_that_cannot_be_run_leaves_no_transform():
    """An exported vmap begins and ends in nodes of their own; between them are tensors without a storage."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(torch.vmap(torch.tanh)(x))
            return x

    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mnet_fx.MnetWarning)  # nothing is rewritten
        net = mnet_fx.momentumize(torch.export.export(Net(), (x,)).module())
    torch.rand(3)  # raises within a vmap
    assert not torch._C._functorch.get_interpreter_stack()
    assert net(x).shape == x.shape


class SideLayer(nn.Module):
    """Adds a side input and a buffer within its tanh, which saves neither of them; may write to the side input itself."""

    def __init__(self, writes):
        super().__init__()
        self.f, self.writes = nn.Linear(4, 4), writes
        self.register_buffer("shift", torch.full((4,), 0.5))

    def forward(self, x, side):
        y = torch.tanh(self.f(x) + side + self.shift)
        if self.writes:
            side.add_(0.25)
        return x + y


class SideLayers(nn.Module):
    """Named layers, and a write to what they have read: by the model after the chain, or by each layer."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.layers = nn.ModuleList(SideLayer(what == "layer").requires_grad_(what != "graded") for _ in range(4))
        self.stem = nn.Parameter(torch.rand(4))

    def forward(self, x, side):
        part = side.expand(len(x), 4)
        if self.what == "graded":  # all that needs gradients is the side input
            x, side = x.detach(), side * self.stem
        for layer in self.layers:
            x = layer(x, part if self.what == "expanded" else side)
        if self.what in ("side", "expanded", "graded"):
            side.mul_(0.5)
        if self.what == "unseen":
            side.data.zero_()
        if self.what == "buffer":
            for layer in self.layers:
                layer.shift.mul_(0.9)
        return x


def steps_of(net, what, calls=3):
    """Outputs, gradients and what is left of the side input, of some training steps; "caller" overwrites it between the two passes."""
    found = []
    for i in range(calls):
        x, side = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_(), torch.full((4,), 0.1 * (i + 1))
        net.zero_grad()
        out = net(x, side)
        if what == "caller":
            side.zero_()
        out.square().sum().backward()
        found += [out.detach(), x.grad, side, *(p.grad for p in net.parameters())]
    return [t for t in found if t is not None]


@pytest.mark.parametrize("what", ["side", "expanded", "unseen", "buffer", "layer", "caller", "graded"])
def test_named_layers_keep_copies_of_what_is_overwritten(what):
    net, stored = (mnet_fx.momentumize(SideLayers(what), regions=["layers"], backward=kind) for kind in ("reversible", "stored"))
    for got, want in zip(steps_of(net, what), steps_of(stored, what), strict=True):
        assert torch.equal(got, want)
    line = next(line for line in str(net.report).splitlines() if "keeps copies" in line)
    assert f"({ {'buffer': 64, 'layer': 64}.get(what, 16) } bytes)" in line
    assert ("buffer 'layers.3.shift'" if what == "buffer" else "side input 1 of layers.3") in line


def test_what_is_never_overwritten_is_copied_in_the_first_call_alone():
    net = mnet_fx.momentumize(SideLayers(""), regions=["layers"])
    x, side, kept = torch.randn(4000, 4), torch.ones(4000, 4), []
    for _ in range(3):
        found = measure(lambda: net(x.requires_grad_(), side).sum(), lambda out: out.backward())
        kept.append(found.kept)
    assert kept[0] - kept[1] >= 4000 * 4 * 4  # one copy for all layers
    assert kept[0] - kept[1] < 2 * 4000 * 4 * 4
    assert kept[1] == kept[2]
    assert "copies" not in str(net.report)


def test_what_is_overwritten_for_the_first_time_later_is_an_error_once():
    net = mnet_fx.momentumize(SideLayers(""), regions=["layers"])
    steps_of(net, "")
    with pytest.raises(mnet_fx.InversionError, match=r"side input 1 .* give the layers a clone"):
        steps_of(net, "caller", 1)
    stored = mnet_fx.momentumize(SideLayers(""), regions=["layers"], backward="stored")
    for got, want in zip(steps_of(net, "caller"), steps_of(stored, "caller"), strict=True):
        assert torch.equal(got, want)


def test_what_is_overwritten_now_and_then_is_copied_always():
    nets = [mnet_fx.momentumize(SideLayers(""), regions=["layers"], backward=kind) for kind in ("reversible", "stored")]
    for what in ("caller", "", "caller"):
        got, want = (steps_of(net, what, 1) for net in nets)
        assert all(map(torch.equal, got, want))


def test_what_was_an_error_once_is_copied_from_then_on(monkeypatch):
    """Also after a call that left it alone; of all layers where fingerprints are compared as the pass ends, as on a device."""
    monkeypatch.setattr(fingerprints, "ON_HOST", set())
    net = mnet_fx.momentumize(SideLayers(""), regions=["layers"])
    steps_of(net, "")
    with pytest.raises(mnet_fx.InversionError, match="side input 1"):
        steps_of(net, "caller", 1)
    stored = mnet_fx.momentumize(SideLayers(""), regions=["layers"], backward="stored")
    for what in ("", "caller"):
        assert all(map(torch.equal, steps_of(net, what, 1), steps_of(stored, what, 1)))


def test_a_parameter_that_is_a_side_input_is_not_copied():
    class Net(SideLayers):
        def forward(self, x, side):
            return super().forward(x, self.stem)

    net, x = mnet_fx.momentumize(Net(""), regions=["layers"]), torch.randn(3, 4)
    out = net(x, None)
    with torch.no_grad():
        net.stem.mul_(2)
    with pytest.raises(mnet_fx.InversionError, match="side input 1"):
        out.sum().backward()


@pytest.mark.parametrize("how", ["data", "inference", "numpy"])
def test_writes_between_layers_that_autograd_does_not_see(how):
    """Each layer has a copy of what it read, though the version is the same; what it adds is too small to show in the state."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.a = nn.Linear(4, 4), nn.Parameter(torch.zeros(()))

        def forward(self, x, side):
            return x + self.a * (self.f(x).tanh() * side.clone())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Small() for _ in range(3))

        def forward(self, x):
            side = torch.ones(4)
            if how == "inference":
                with torch.inference_mode():
                    side = torch.ones(4)
            memory = side.numpy() if how == "numpy" else None
            for layer in self.layers:
                x = layer(x, side)
                if how == "data":
                    side.data.mul_(3)
                elif how == "numpy":
                    memory *= 3
                else:
                    with torch.inference_mode():
                        side.mul_(3)
            return x

    nets = [mnet_fx.momentumize(Net(), regions=["layers"], backward=kind) for kind in ("reversible", "stored")]
    x = torch.randn(3, 4)
    for _ in range(2):
        for net in nets:
            net.zero_grad()
            net(x).square().sum().backward()
        for got, want in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(got.grad, want.grad)


def test_momentum_net_keeps_copies_of_what_is_overwritten():
    class Net(nn.Module):
        def __init__(self, **options):
            super().__init__()
            torch.manual_seed(0)
            self.net = mnet_fx.MomentumNet([Scaled() for _ in range(4)], **options)

        def forward(self, x, side):
            x = self.net(x, side)
            side.mul_(2)
            return x

    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)

        def forward(self, x, side):
            return torch.tanh(super().forward(x) + side)

    for got, want in zip(steps_of(Net(), ""), steps_of(Net(use_backprop=True), ""), strict=True):
        assert torch.equal(got, want)


class Escaping(nn.Module):
    """Gives x[2] of four steps, overwritten after the chain; no step saves its stream."""

    def __init__(self, writes, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.writes = nn.Linear(4, 4), writes
        self.layers = nn.ModuleList(Shifted() for _ in range(depth))

    def forward(self, x):
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1:
                middle = x
        if self.writes == "view":
            middle.view(-1)[:4].zero_()
        if self.writes == "whole":
            middle.mul_(2)
        return x, middle


class Shifted(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return x + super().forward(torch.tanh(x))


@pytest.mark.parametrize("writes", ["whole", "view"])
@pytest.mark.parametrize("way", ["captured", "traced", "exported", "named"])
@pytest.mark.parametrize("depth", [4, 12])  # x[t] are stored, or worked out
def test_a_stream_that_escapes_may_be_overwritten(writes, way, depth):
    model, twin, x = Escaping(writes, depth), Escaping(writes, depth), torch.randn(3, 4)
    if way == "traced":
        twin = torch.fx.symbolic_trace(twin)
    if way == "exported":
        twin = torch.export.export(twin, (x,)).module()
    net = mnet_fx.momentumize(twin, gamma=0 if depth == 4 else 0.5, **({"regions": ["layers"]} if way == "named" else {}))
    stored = Escaping(writes, depth)
    stored = mnet_fx.momentumize(stored, gamma=0.5, backward="stored", **({"regions": ["layers"]} if way == "named" else {}))
    for _ in range(2):
        for want, got in both(model if depth == 4 else stored, net, x):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if way == "named":
        assert ("x[2]" in str(net.report)) == (depth == 4)
    else:
        assert net.report.regions[0].copied_bytes in (48, None)
        assert len(net.report.regions[0].copied) == 1


class WritesWithoutGradients(nn.Module):
    """Writes to its weights, a buffer or the stream under no_grad, at one place."""

    def __init__(self, what, place):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.what, self.place = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), what, place
        self.register_buffer("mean", torch.full((4,), 0.5))

    def write(self, x, place):
        if place != self.place:
            return
        with torch.no_grad():
            if self.what == "weight":
                self.layers[3].weight.mul_(0.9)
            if self.what == "mean":
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            if self.what == "stream":
                x.mul_(0.5)

    def forward(self, x):
        x = x * 1
        self.write(x, "before")
        for i, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x))
            if i == 1:
                self.write(x, "between")
        self.write(x, "after")
        return x + self.mean


@pytest.mark.parametrize("what", ["weight", "mean", "stream"])
@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_writes_under_no_grad_keep_their_place_and_the_chain(what, place, inner):
    """As RWKV rescales its weights, and others keep averages."""
    forbidden = (what, place) == ("weight", "after")  # by plain autograd
    ways = {"original": None, "gamma 0": {"gamma": 0.0}, "reversible": {}, "stored": {"backward": "stored"}}
    results, x = {}, torch.randn(3, 4)
    for name, options in ways.items():
        net = WritesWithoutGradients(what, place)
        if options is not None:
            net = mnet_fx.momentumize(net, inner=inner, **options)
        if name == "original" and forbidden:
            continue
        runs = [result(net, x, grad=True) for _ in range(2)]
        results[name] = [*(t for run in runs for t in run if t is not None), *net.parameters(), net.mean]
    for a, b in zip(results.get("original", []), results["gamma 0"], strict=not forbidden):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, results["reversible"], results["stored"]))
    assert net.report.rewritten_adds == {"before": 3, "between": 2}.get(place, 4) if what == "stream" else 4
