"""`keep`: the last steps of chains, and segments of the rest, keep what they save; nothing else changes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mnet_fx
from mnet_fx import momentumize

STEPS = 5


class Layer(nn.Module):
    """Gives the model more than its residual, and reads what others made."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.BatchNorm1d(8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Dropout(0.2)

    def forward(self, x, side):
        inner = torch.tanh(self.up(self.norm(x)) + side)
        return x + self.drop(self.down(inner)), inner.mean()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(STEPS)), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        side, total, middle = x.new_ones(32).requires_grad_() * x.mean(), 0.0, None
        for i, layer in enumerate(self.layers):
            x, extra = layer(x, side)
            total = total + extra
            middle = x if i == 2 else middle
        return self.head(x), middle, total


def everything(net, x, way):
    """What some steps give and leave, for a loss that is differentiated once, twice, in parts, or again."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    for _ in range(2):
        y, middle, total = net(x)
        loss = y.square().sum() + middle.exp().sum() + total
        if way == "twice":
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            grad.square().sum().backward()
        elif way == "parts":
            middle.sum().backward(retain_graph=True)
            y.sum().backward(retain_graph=True)
            y.sum().backward()
        else:
            loss.backward()
    return [x.grad, y, middle, total, torch.rand(3), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


def sizes(net):
    """The values of keep that make a difference, with all graphs of a net counted."""
    return sorted({sum(c.size for _, c in k.items[: n + 1]) for k in net.forward.keepings for n in range(len(k.items))})


@pytest.mark.parametrize("rest", ["store", "checkpoint"])
@pytest.mark.parametrize(("gamma", "dtype"), [(0.5, torch.float32), (0.9, torch.bfloat16), (0.02, torch.float32), (0.0, torch.float64)])
def test_whatever_is_kept_nothing_else_changes(gamma, dtype, rest):
    torch.manual_seed(0)
    net, x = momentumize(Net().to(dtype), gamma=gamma, rest=rest), torch.randn(6, 8, dtype=dtype)
    start = copy.deepcopy(net.state_dict())

    def found(way, keep):
        net.load_state_dict(start)
        net.zero_grad()
        for keeping in net.forward.keepings:
            keeping.spend(keep)
        return everything(net, x, way)

    found("once", 0)
    keeps = sizes(net)
    assert len(keeps) >= STEPS - 1 + (rest == "checkpoint")
    for way in ("once", "twice", "parts"):
        wanted = found(way, 0)
        for keep in (keeps[0], keeps[len(keeps) // 2], keeps[-2], keeps[-1], 2**30):
            for a, b in zip(found(way, keep), wanted, strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b), (way, keep)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_memory_grows_by_what_is_kept_and_no_more(inner):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 32)) for _ in range(6)
            )

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    torch.manual_seed(0)
    model, x = Plain(), torch.randn(512, 32)

    def kept(keep):
        net = momentumize(copy.deepcopy(model), gamma=0.9, keep=keep, inner=inner)
        net(x).sum().backward()
        return mnet_fx.measure(lambda: net(x).sum(), lambda loss: loss.backward()), net

    least, net = kept(0)
    for keep in sizes(net):
        found, _ = kept(keep)
        assert 0 < found.kept - least.kept <= keep * 1.01
    assert found.kept - least.kept > keep * 0.9, "all is kept"
    assert kept(sizes(net)[0] - 1)[0].kept == least.kept


def test_what_was_kept_is_not_run_again():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x).tanh()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(Block() for _ in range(4)))

        def forward(self, x):
            return self.layers(x)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    net = momentumize(Model(), gamma=0.9)
    net(torch.randn(2, 4)).sum().backward()
    net = momentumize(Model(), gamma=0.9, keep=sizes(net)[1])
    net(torch.randn(2, 4)).sum().backward()
    assert [region.stored for region in net.forward.regions] == [2]
    loss = net(torch.randn(2, 4)).sum()
    with Products() as products:
        loss.backward()
    assert products.count == 2, "the first two of four steps run again"


def test_it_goes_with_copies_and_checkpoints_and_makes_no_other_network():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 8)
    net = momentumize(model, gamma=0.5, keep="1MiB")
    assert net.mnet_fx_options["keep"] == 2**20
    wanted = everything(net, x, "once")
    torch.manual_seed(0)
    other = momentumize(Net(), gamma=0.5)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))  # no warning, which would be an error here
    torch.manual_seed(0)
    again = copy.deepcopy(momentumize(Net(), **net.mnet_fx_options))
    assert all(torch.equal(a, b) for a, b in zip(everything(again, x, "once")[1:], wanted[1:], strict=True) if a is not None)


def test_what_saves_bytes_that_depend_on_values_is_never_kept():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.zeros_like(x).index_add(0, (at := (x[:, 0] > 0).nonzero()[:, 0]), self.linear(x[at]).tanh())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.chosen = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), Chosen()
            self.last = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.first:
                x = x + layer(x).tanh()
            x = self.chosen(x)
            for layer in self.last:
                x = x + layer(x).tanh()
            return x

    net = momentumize(Model(), gamma=0.5, keep="1GiB")
    net(torch.randn(6, 4)).sum().backward()
    assert [len(region.factors) for region in net.forward.regions] == [5]
    assert [region.stored for region in net.forward.regions] == [2], "the two after the one whose rows depend on values"


def test_errors():
    for keep, match in (("much", "keep must be"), (-1, "keep must be"), (True, "keep must be")):
        with pytest.raises(mnet_fx.SettingsError, match=match):
            momentumize(Net(), keep=keep)
    with pytest.raises(mnet_fx.SettingsError, match="keep needs a capture"):
        momentumize(Net(), keep=1, regions=["layers"])
