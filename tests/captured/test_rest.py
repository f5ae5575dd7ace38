"""`rest="checkpoint"`: what lies outside of chains runs again in the backward pass, and nothing else changes."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn
from zoo import ConvolutionalBlock as Block

import mnet_fx
from mnet_fx import InversionError, MnetError, SettingsError, momentumize

N = 6


class Wider(nn.Module):
    """A projection, in place operations, dropout, statistics: nothing of it is in a chain."""

    def __init__(self, a, b):
        super().__init__()
        self.conv, self.norm, self.skip = nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.Conv2d(a, b, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.3)

    def forward(self, x):
        return self.relu(self.drop(self.norm(self.conv(x))) + self.skip(x))


class Net(nn.Module):
    def __init__(self, wide=8):
        super().__init__()
        self.stem = nn.Sequential(Wider(3, 4), Wider(4, 4), Wider(4, 4))
        self.first, self.between, self.second = nn.Sequential(Block(4), Block(4)), Wider(4, wide), nn.Sequential(Block(wide), Block(wide))
        self.tail = nn.Sequential(*(Wider(wide, wide) for _ in range(4)))
        self.head = nn.Linear(wide, 5)

    def forward(self, x):
        x = self.second(self.between(self.first(self.stem(x))))
        return self.head(self.tail(x).mean((2, 3)))


def made(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return momentumize(copy.deepcopy(model), gamma=0.5, **options)


def trained(net, x, steps=2):
    """Everything that some steps give and leave."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    found = []
    for _ in range(steps):
        out = net(x)
        out.square().mean().backward()
        found.append(out.detach())
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [*found, x.grad, *grads, *net.buffers(), torch.get_rng_state()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(N, 3, 10, 10)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("backward", ["reversible", "stored"])
def test_gradients_statistics_and_random_numbers_are_those_of_store(model, x, inner, backward):
    stored, again = (made(model, rest=rest, inner=inner, backward=backward) for rest in ("store", "checkpoint"))
    assert same(trained(stored, x), trained(again, x))


def test_it_keeps_less(model, x):
    kept, peak = {}, {}
    for rest in ("store", "checkpoint"):
        net = made(model, rest=rest)
        trained(net, x)
        taken = mnet_fx.measure(lambda net=net: net(x).square().mean(), lambda loss: loss.backward())
        kept[rest], peak[rest] = taken.kept, taken.peak
    assert kept["checkpoint"] < 0.5 * kept["store"]
    assert peak["checkpoint"] < 0.8 * peak["store"]


def test_torchvisions_count_of_calls_is_no_obstacle(model, x):
    class Counted(Net):
        def forward(self, x):
            return super().forward(torchvision.ops.stochastic_depth(x, 0.0, "row", self.training))

    kept = {}
    for name, counted in (("plain", Net()), ("counted", Counted())):
        net = made(counted, rest="checkpoint")
        trained(net, x)
        kept[name] = mnet_fx.measure(lambda net=net: net(x).square().mean(), lambda loss: loss.backward()).kept
    assert kept["counted"] < 1.2 * kept["plain"]


def test_the_estimate_knows(model, x):
    net = made(model, rest="checkpoint")
    trained(net, x)
    taken = mnet_fx.measure(lambda: net(x).square().mean(), lambda loss: loss.backward())
    way = mnet_fx.estimate(model, x, gamma=0.5, rest="checkpoint", loss=lambda out: out.square().mean()).momentum
    assert way.kept_bytes == pytest.approx(taken.kept, rel=0.01)
    assert way.peak_bytes == pytest.approx(taken.peak, rel=0.05)


def test_an_optimizer_step_between_forward_and_backward_is_an_error(model, x):
    net = made(model, rest="checkpoint")
    out = net(x)
    with torch.no_grad():
        net.tail[1].skip.weight.mul_(2)
    with pytest.raises(InversionError, match=r"segment.*tail.*rest='store'") as raised:
        out.sum().backward()
    assert "tail.1.skip.weight" in raised.value.what
    assert raised.value.step is None
    assert pickle.loads(pickle.dumps(raised.value)).what == raised.value.what


def test_what_does_not_repeat_is_an_error(model, x):
    drawn = torch.Generator().manual_seed(0)

    @torch.library.custom_op("mnet_fx_tests::rest_noise", mutates_args=())
    def noise(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=drawn)

    noise.register_fake(torch.empty_like)
    noise.register_autograd(lambda ctx, grad: grad)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.after = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))

        def forward(self, x):
            return self.after(noise(torch.tanh(self.net(x))).exp().sin().exp().sin())

    torch.manual_seed(0)
    net = made(Noisy(), rest="checkpoint")
    out = net(x)
    with pytest.raises(InversionError, match="segment"):
        out.sum().backward()


class Writing(nn.Module):
    """A buffer that one part reads and a later one overwrites; a value of one part that another overwrites."""

    def __init__(self):
        super().__init__()
        self.net, self.tail = Net(), nn.Sequential(*(Wider(8, 8) for _ in range(2)))
        self.register_buffer("scale", torch.ones(8, 1, 1))

    def forward(self, x):
        net = self.net
        x = net.second(net.between(net.first(net.stem(x))))
        y = self.tail[0](torch.tanh(x + self.scale).sin().exp())
        with torch.no_grad():
            self.scale.mul_(0.5)
        y = self.tail[1](y)
        z = torch.cat([y, y.exp()], 1)
        z.add_(1)
        return net.head(z[:, :8].sin().mean((2, 3))) + self.scale.sum()


def test_writes_across_segments(x):
    torch.manual_seed(0)
    model = Writing()
    stored, again = (made(model, rest=rest) for rest in ("store", "checkpoint"))
    assert same(trained(stored, x), trained(again, x))


def test_partial_and_second_derivatives(model, x):
    def found(net):
        torch.manual_seed(1)
        a = x.clone().requires_grad_()
        out = net(a)
        (first,) = torch.autograd.grad(out.square().sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), net.stem[0].conv.weight, retain_graph=True)
        (partly,) = torch.autograd.grad(out.sum(), net.tail[0].conv.weight, retain_graph=True)
        (again,) = torch.autograd.grad(out.sum(), net.tail[0].conv.weight)
        return [first.detach(), second, partly, again]

    stored, again = (made(model.double(), rest=rest) for rest in ("store", "checkpoint"))
    x = x.double()
    assert same(found(stored), found(again))


def test_copies_and_eval(model, x):
    net = made(model, rest="checkpoint")
    trained(net, x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for p in (*net.parameters(), *twin.parameters()):
            p.grad = None
        assert same(trained(copy.deepcopy(net), x), trained(twin, x))
    with torch.no_grad():
        expected = made(model, rest="store").eval()
        expected.load_state_dict(net.state_dict())
        assert torch.equal(net.eval()(x), expected(x))


def test_frozen_parts_and_accumulation(model, x):
    def found(rest):
        net = made(model, rest=rest)
        net.stem.requires_grad_(False)
        torch.manual_seed(2)
        for part in x.chunk(2):
            net(part).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    assert same(found("store"), found("checkpoint"))


def test_where_there_is_no_capture(model):
    with pytest.raises(SettingsError, match="needs a capture"):
        momentumize(torch.fx.symbolic_trace(model), rest="checkpoint")
    with pytest.raises(SettingsError, match="rest must be one of"):
        momentumize(model, rest="keep")


@pytest.mark.parametrize(("seen", "error"), [(True, RuntimeError), (False, MnetError)])
def test_an_overwritten_save_is_an_error(x, seen, error):
    class Overwriting(Net):
        def forward(self, x):
            y = super().forward(x)
            with contextlib.nullcontext() if seen else torch.autocast("cpu", enabled=False):  # within which nobody looks
                y = (y * 3).sin().exp()
                y.mul_(2)
            return y.sin().exp().sin().exp()

    net = made(Overwriting(), rest="checkpoint")
    with pytest.raises(error, match=r"in.?place"):
        net(x).sum().backward()


def test_a_segment_that_reads_parameters_alone(x):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.table = Net(), nn.Parameter(torch.randn(40, 5))

        def forward(self, x):
            out = self.net(x)
            table = (self.table.sin().exp().sin() * 2).exp().sin()
            return out + table.sum(0)

    torch.manual_seed(0)
    model = Normed()
    stored, again = (made(model, rest=rest) for rest in ("store", "checkpoint"))
    assert same(trained(stored, x), trained(again, x))


class Stateful(nn.Module):
    """State that the rest writes, in ways of which each is right without a rerun."""

    def __init__(self, forward):
        super().__init__()
        self.chain = nn.Sequential(*(Residual() for _ in range(3)))
        self.again = nn.Sequential(*(Residual() for _ in range(3)))
        self.f, self.norm, self.words = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Embedding(9, 8, max_norm=0.5)
        self.register_buffer("state", torch.zeros(8))
        self.register_buffer("part", self.state[:4])
        self.register_buffer("codes", torch.randn(5, 8))
        self.way = forward

    def __deepcopy__(self, _):
        twin = Stateful(self.way)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        return self.way(self, self.chain(wave(self.f(x))))


class Residual(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x):
        return x + torch.tanh(super().forward(x))


def wave(x):
    return x.sin().exp().tanh().sin().exp().tanh()


def by_a_view_made_before_a_chain(self, x):
    view = self.state[:4]
    x = self.again(wave(x))
    view.add_(1)
    return wave(wave(self.f(x) + self.state))


def by_another_name(self, x):
    self.state.add_(1)
    return wave(self.f(x)[:, :4] + self.part) * self.state.clone().sum()


def a_parameter(self, x):
    return wave(wave(self.f(x)) + wave(self.words(torch.arange(6) % 9)))


def a_save_of_which_no_gradient_is_asked(self, x):
    h = wave(self.f(x))
    nearest = torch.cdist(h, self.codes).argmin(-1)
    code = self.codes[nearest]
    with torch.no_grad():
        self.codes.mul_(0.9).add_(torch.nn.functional.one_hot(nearest, 5).to(h.dtype).t() @ h, alpha=0.1)
    return wave(h + (code - h).detach())


def with_what_it_was(self, x):
    x = wave(self.f(x))
    self.state.mul_(0.9)
    x = self.again(wave(self.f(x) + self.state))
    self.state.add_(1)
    return wave(self.f(x) + self.state)


def what_was_read_before(self, x):
    y = self.norm(wave(wave(self.f(x) + self.norm.running_mean)))
    return wave(y + self.norm.running_var)


WAYS = [by_a_view_made_before_a_chain, by_another_name, a_parameter, a_save_of_which_no_gradient_is_asked, with_what_it_was]


@pytest.mark.parametrize(("way", "inner"), [*((way, "eager") for way in WAYS), (what_was_read_before, "aot_eager")])
def test_state_that_the_rest_writes(way, inner):
    torch.manual_seed(0)
    model, x = Stateful(way), torch.randn(6, 8)
    stored, again = (made(model, rest=rest, inner=inner) for rest in ("store", "checkpoint"))
    assert same(trained(stored, x), trained(again, x))


def test_a_float_that_is_read_from_a_tensor():
    def scaled(self, x):
        size = x.detach().abs().max().item()
        return wave(wave(wave(self.f(x)) * size) * size)

    torch.manual_seed(0)
    model, x = Stateful(scaled), torch.randn(6, 8)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        stored, again = (made(model, rest=rest, inner="aot_eager") for rest in ("store", "checkpoint"))
        assert same(trained(stored, x), trained(again, x))


class Skips(nn.Module):
    """Each block of the way up gets the value of one of the way down beside its own."""

    def __init__(self, n=4):
        super().__init__()
        self.down = nn.ModuleList(Block(4) for _ in range(n))
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.Tanh()) for _ in range(n))

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], 1))
        return x


@pytest.mark.parametrize("predicted", [True, False])
def test_a_gradient_of_a_skip_does_not_keep_that_of_all_that_it_was_joined_with(predicted):
    torch.manual_seed(0)
    x, peak = torch.randn(2, 4, 32, 32), {}
    for n in (4, 12):
        net = made(Skips(n), rest="checkpoint")
        net(x).sum().backward()
        measured = mnet_fx.measure(lambda net=net: net(x).sum().backward()).peak
        peak[n] = mnet_fx.estimate(net, (x,)).momentum.peak_bytes if predicted else measured
    assert (peak[12] - peak[4]) / 8 <= 2 * x.nbytes  # of each skip: its value, later its gradient, and less than one more


class Gated(nn.Module):
    """Reads a skip several times in one segment, and joins a tensor with itself."""

    def __init__(self):
        super().__init__()
        self.down, self.a, self.b = nn.ModuleList(Block(4) for _ in range(3)), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.up = nn.ModuleList(nn.Conv2d(16, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(x)
        for up in self.up:
            k = skips.pop()
            gate = torch.tanh(self.a(torch.cat([k, k * torch.sigmoid(self.b(x))], 1))) * torch.sigmoid(self.b(k))
            x = up(torch.cat((x, gate, k, k), dim=-3))
        return x


class Pooled(nn.Module):
    """Joins what kernels give that add up otherwise where a gradient has other strides."""

    def __init__(self):
        super().__init__()
        self.body, self.up = nn.ModuleList(Block(4) for _ in range(3)), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        for block in self.body:
            x = block(x)
        pooled = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2)
        return self.up(torch.cat([x, pooled, nn.functional.max_pool2d(x, 3, 1, 1)], 1))


class Unread(nn.Module):
    """A skip that others read without a gradient: `cat`'s goes on alone, to kernels to which gaps in it matter."""

    def __init__(self):
        super().__init__()
        self.make, self.body = nn.Conv2d(4, 4, 3, padding=1), nn.ModuleList(Block(4) for _ in range(2))
        self.norm, self.up = nn.GroupNorm(1, 4), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        k = torch.nn.functional.avg_pool2d(self.norm(self.make(x)), 3, 1, 1)
        y = k.detach()
        for block in self.body:
            y = block(y)
        return self.up(torch.cat([y * y, k], 1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [Gated, Skips, Pooled, Unread])
def test_segments_leave_the_order_in_which_gradients_are_added(make, layout, batch):
    torch.manual_seed(0)
    model, x, found = make().to(memory_format=layout), torch.randn(batch, 4, 16, 16).to(memory_format=layout), []
    for options in ({"backward": "stored"}, {}, {"rest": "checkpoint"}, {"rest": "checkpoint", "backward": "stored"}):
        found.append(trained(made(model, **options), x, steps=1))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_many_gradients_at_once_go_through_segments():
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(2, 4, 8, 8, requires_grad=True)
    many = []
    for net in (made(model, rest="checkpoint"), made(model, backward="stored")):
        y = net(x)
        many += torch.autograd.grad(y, x, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)
    assert torch.equal(*many)
