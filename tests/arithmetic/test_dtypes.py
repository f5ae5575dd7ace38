"""Streams and branches of every floating dtype, autocast, and loss scaling: reversible gradients equal stored ones, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from mnet_fx import StreamError, momentumize
from mnet_fx.arithmetic import device_state, formats
from mnet_fx.arithmetic.kernels import c
from mnet_fx.cli import inputs
from mnet_fx.runtime.tape import ReversingTape


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down, self.dropout = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, d=8, depth=16):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, d), nn.Sequential(*(Block(d) for _ in range(depth))), nn.Linear(d, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def step(net, x, context):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with context():
        loss = net(x).float().square().mean()
    loss.backward()  # outside the autocast context, as users do
    return loss.detach(), [x.grad, *(p.grad for p in net.parameters())]


def both(model, x, context=torch.enable_grad, **options):
    runs = [step(momentumize(copy.deepcopy(model), backward=backward, **options), x, context) for backward in ("reversible", "stored")]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    return runs[0]


@pytest.fixture
def reversing(monkeypatch):
    """Counts the tapes that work their inputs out again."""
    made = []
    original = ReversingTape.__init__
    monkeypatch.setattr(ReversingTape, "__init__", lambda self, *a, **k: made.append(1) or original(self, *a, **k))
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_models_of_every_floating_dtype(dtype, gamma, reversing):
    loss, gradients = both(Net().to(dtype), torch.randn(5, 4).to(dtype), gamma=gamma)
    assert reversing
    assert gradients[0].dtype is dtype
    assert torch.isfinite(loss)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_around_the_forward_only(reversing):
    _, gradients = both(Net(), torch.randn(5, 4), autocast)
    assert reversing
    assert all(g.dtype is torch.float32 for g in gradients)
    float32 = both(Net(), torch.randn(5, 4))[1]
    assert not torch.equal(gradients[1], float32[1])  # the branches did run in bfloat16


class Promoting(nn.Module):
    """A bfloat16 stream that its first float32 residual turns into a float32 one."""

    def __init__(self, depth=16):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(4) / 8) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        x = x.bfloat16()
        for scale, block in zip(self.scales, self.blocks, strict=True):
            x = x + scale * block(x.to(block.weight.dtype))
        return x


def test_a_float32_residual_turns_a_bfloat16_stream_into_float32_as_it_does_in_the_plain_model():
    model, x = Promoting(), torch.randn(5, 4)
    plain, net = model(x), momentumize(model, gamma=0.0)(x)
    assert plain.dtype is net.dtype is torch.float32
    assert (plain - net).abs().max() <= 1e-6 * plain.abs().max()
    both(model, x)


def test_a_loss_scaler_sees_an_overflow_and_the_next_step_is_clean():
    model, x = Net(), torch.randn(5, 4)
    net = momentumize(model, gamma=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in net.parameters()]
    for value, skipped in ((float("inf"), True), (1.0, False)):
        optimizer.zero_grad()
        scaler.scale((net(x * value)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, net.parameters())) == skipped
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("block", [0, 7, 15])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_inf_in_any_activation_comes_out(block, bad):
    net = momentumize(Net().eval(), gamma=0.9)
    x = torch.randn(5, 4)
    clean = net(x).detach()
    handle = net.blocks[block].down.register_forward_hook(lambda m, i, out: out * bad)
    assert torch.isnan(net(x)).all()
    handle.remove()
    assert torch.equal(net(x), clean)


class Sum(nn.Module):
    """Residual adds in bfloat16 with float32 residuals, written in one of several ways."""

    def __init__(self, how, depth):
        super().__init__()
        self.how, self.blocks = how, nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        x = 1 * x.bfloat16()
        for block in self.blocks:
            y = block(x.float())
            if self.how == "in place on the stream":
                x += y
            elif self.how == "in place on the branch":
                y += x
                x = y
            elif self.how == "0-d residual":
                x = x + y.mean()
            else:
                x = torch.tanh(x + y).to(torch.bfloat16)
        return x


@pytest.mark.parametrize("how", ["in place on the stream", "in place on the branch", "0-d residual", "cast"])
def test_the_stream_has_the_dtype_that_it_has_in_the_original(how):
    both(Sum(how, 24), torch.randn(5, 4), gamma=0.5)
    model, x = Sum(how, 4), torch.randn(5, 4)
    net = momentumize(model, gamma=0.0)
    assert net.report.rewritten_adds == 4
    plain, ours = model(x), net(x)
    assert ours.dtype is plain.dtype
    assert (ours - plain).abs().max() <= 2 * torch.finfo(plain.dtype).eps * plain.abs().max()


class Narrowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = (x + block(x.float())).to(torch.bfloat16)
        return x


def test_a_stream_that_a_step_narrows_is_an_error_that_says_so():
    """Where a capture records dtypes, that step is left alone; a graph without them finds out when it runs."""
    with pytest.raises(StreamError, match=r"torch\.float32 into one of torch\.bfloat16"):
        momentumize(torch.fx.symbolic_trace(Narrowing()))(torch.randn(5, 4))
    model, x = Narrowing(), torch.randn(5, 4)
    net = momentumize(model, gamma=0.0)
    torch.testing.assert_close(net(x), model(x), rtol=2e-2, atol=2e-2)
    assert [refusal.code for refusal in net.report.refusals] == ["dtype_changed"]
    assert momentumize(Narrowing(), gamma=0.0)(torch.randn(5, 4).bfloat16()).dtype is torch.bfloat16


class KeptInFloat32(nn.Module):
    """The stream goes around each branch in float32, as in Mamba with `residual_in_fp32`."""

    def __init__(self, cast):
        super().__init__()
        self.cast = cast
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = self.cast(x) + block(x.to(block[1].weight.dtype))
        return x


@pytest.mark.parametrize("cast", [lambda x: x.to(torch.float32), torch.Tensor.float, lambda x: x.to(x.device).type(torch.float32)])
def test_a_cast_to_what_the_stream_is_already_is_the_stream(cast):
    model, x = KeptInFloat32(cast), torch.randn(5, 4)
    net = momentumize(model, (x,), gamma=0.0)
    assert [region.steps for region in net.report.regions] == [4]
    torch.testing.assert_close(net(x), model(x))
    half = momentumize(model.bfloat16(), (x.bfloat16(),), gamma=0.0)
    assert [region.steps for region in half.report.regions] == [3]
    (refusal,) = half.report.refusals  # the first block, which makes float32 of it
    assert refusal.code == "dtype_changed"
    assert refusal.explanation.endswith("of bfloat16, cast to float32")
    torch.testing.assert_close(half(x.bfloat16()), model(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_what_the_dtype_cannot_hold_comes_out_as_nan_also_when_it_would_come_back():

    class Residual(nn.Module):
        def __init__(self, amount):
            super().__init__()
            self.amount, self.linear = amount, nn.Linear(1, 1)

        def forward(self, x):
            return x + (0 * self.linear(x.clamp(-1, 1)) + self.amount)

    model = nn.Sequential(*(Residual(a) for a in (2e38, 2e38, -2e38, -2e38)))
    x = torch.tensor([[2e38], [-2e38]])
    plain, ours = model(x), momentumize(model, gamma=0.0)(x)
    assert torch.isinf(plain[0]).all()
    assert torch.isnan(ours[0]).all()
    assert torch.isfinite(ours[1]).all()


def test_all_tables_have_the_same_dtypes():
    """Those of formats, of the loops in C, of the kernels for GPUs; and the command line can name them."""
    dtypes = set(formats._FORMATS)
    assert dtypes == set(device_state._FLOATS) == {dtype for dtype in c._TYPES if dtype.is_floating_point}
    assert {str(dtype).removeprefix("torch.") for dtype in dtypes} <= set(inputs._DTYPES)
