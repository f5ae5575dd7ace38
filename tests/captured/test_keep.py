"""`keep`: the last steps of chains, and segments of the rest, keep what they save; nothing else changes."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize(("gamma", "dtype"), [(0.5, torch.float32), (0.9, torch.bfloat16), (0.02, torch.float32), (0.0, torch.float64)])
def test_whatever_is_kept_nothing_else_changes(gamma, dtype):
    torch.manual_seed(0)
    model, x = Net().to(dtype), torch.randn(6, 8, dtype=dtype)
    for way, rest in itertools.product(("once", "twice", "parts"), ("store", "checkpoint")):
        nets = {0: momentumize(copy.deepcopy(model), gamma=gamma, rest=rest)}
        wanted = everything(nets[0], x, way)
        found = sizes(nets[0])
        assert len(found) >= STEPS - 1 + (rest == "checkpoint"), found
        for keep in (found[0], found[len(found) // 2], found[-2], found[-1], "1GiB"):
            net = momentumize(copy.deepcopy(model), gamma=gamma, rest=rest, keep=keep)
            for a, b in zip(everything(net, x, way), wanted, strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b), (way, rest, keep)


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
    ran = []

    class Counting(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.linear, self.i = nn.Linear(4, 4), i

        def forward(self, x):
            return x + self.linear(x).tanh()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(Counting(i) for i in range(4)))

        def forward(self, x):
            return self.layers(x)

    class Ran(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.linear:
                ran.append(args[1])
            return func(*args, **(kwargs or {}))

    net = momentumize(Model(), gamma=0.9)
    net(torch.randn(2, 4)).sum().backward()
    net = momentumize(Model(), gamma=0.9, keep=sizes(net)[1])
    net(torch.randn(2, 4)).sum().backward()
    assert [region.stored for region in net.forward.regions] == [2]
    loss = net(torch.randn(2, 4)).sum()
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

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


def test_errors():
    for keep, match in (("much", "keep must be"), (-1, "keep must be"), (True, "keep must be")):
        with pytest.raises(mnet_fx.SettingsError, match=match):
            momentumize(Net(), keep=keep)
    with pytest.raises(mnet_fx.SettingsError, match="keep needs a capture"):
        momentumize(Net(), keep=1, regions=["layers"])
