"""What `joined` hands on is what `torch.cat` does: bits, strides, offsets. That less waits, tests/captured/test_rest.py measures."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import Function
from zoo import ConvolutionalBlock as Block

import mnet_fx
from mnet_fx.compiled import cats
from mnet_fx.compiled.cats import joined


class Spied(Function):
    """Notes how the gradient of what it hands out lies in memory."""

    @staticmethod
    def forward(ctx, x, log):
        ctx.log = log
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append((grad.clone(), grad.stride(), grad.storage_offset(), grad.untyped_storage().nbytes()))
        return grad, None


def apart(tensors, *args, **kwargs):
    return joined(tensors, *args, waiting=range(len(tensors)), **kwargs)


READERS = {
    "none": lambda x: x.detach().sum(),
    "before": lambda x: (x * x).sum(),
    "channels last": lambda x: (x.to(memory_format=torch.channels_last) ** 2).mean(),
    "all alike": lambda x: x.sum(),
    "as another shape": lambda x: x.flatten(1).sin().sum(),
    "permuted": lambda x: (x.permute(0, 3, 1, 2) * torch.randn(x.shape[1], x.shape[2])).sum(),
    "a part": lambda x: x[:, :1].tanh().sum(),
}


def run(cat, draws, seed):
    torch.manual_seed(seed)
    batch, height, width, layout, before, after, dim, repeated, reduced = draws
    x, log = torch.randn(batch, 3, height, width).to(memory_format=layout).requires_grad_(), []
    skip = Spied.apply(x, log)
    terms = [READERS[reader](skip) for reader in before]
    wide = torch.randn(batch, 17 if dim == 1 else 3, height, width)  # so wide that a part has gaps even where one value stands for a row
    other = Spied.apply(wide.to(memory_format=layout).requires_grad_(), log)
    y = cat([other, skip, *[skip] * repeated], dim)
    z = cat((y, other), dim=dim)
    terms += [READERS[reader](skip) for reader in after]
    alike = (y.sum(-1) * torch.randn(y.shape[:-1])).sum()
    loss = alike if reduced else (y.sin() * torch.arange(float(y.shape[-1]))).sum() + (z * z).sum()
    for term in terms:
        loss = loss + term
    loss.backward(retain_graph=True)
    loss.backward()
    return [(x.grad, x.grad.stride(), y.stride(), z.stride()), *log]


draws = st.tuples(
    st.integers(1, 2),
    st.sampled_from([1, 4]),
    st.sampled_from([1, 5]),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.lists(st.sampled_from(sorted(READERS)), max_size=2),
    st.lists(st.sampled_from(sorted(READERS)), max_size=2),
    st.sampled_from([0, 1, -1]),
    st.integers(0, 1),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(draws, st.integers(0, 9))
@example((2, 4, 5, torch.contiguous_format, [], ["all alike"], 1, 0, False), 0)  # a sum in new memory
@example((2, 1, 1, torch.channels_last, ["as another shape"], [], 1, 0, False), 0)  # sizes of 1
@example((2, 1, 1, torch.channels_last, [], ["as another shape"], 1, 0, False), 0)
def test_gradients_and_where_they_lie_are_those_of_cat(drawn, seed):
    ours, autograds = (run(cat, drawn, seed) for cat in (apart, torch.cat))
    assert len(ours) == len(autograds)
    for (a, *where), (b, *there) in zip(ours, autograds, strict=True):
        assert torch.equal(a, b)
        assert where == there


class Joining(nn.Module):
    """Joins a skip with what a chain made of it, and that with what the model was given; of two skips, one is handed out too."""

    def __init__(self, hook=None, shows=False):
        super().__init__()
        self.make, self.body, self.up = nn.Conv2d(4, 4, 1), nn.ModuleList(Block(4) for _ in range(2)), nn.Conv2d(12, 4, 3, padding=1)
        self.hook, self.shows = hook, shows

    def forward(self, x):
        k = torch.tanh(self.make(x))
        if self.hook:
            k.register_hook(self.hook)
        y = k
        for block in self.body:
            shown = y = block(y)
        y = (y * y).detach() if self.hook else y * y
        out = self.up(torch.concatenate([y, k, x], axis=1))
        return (out, self.up(torch.cat([out, shown, x], 1)), shown) if self.shows else out


def both(backward, hook=None):
    found = []
    for rest in ("store", "checkpoint"):
        torch.manual_seed(0)
        net, x = mnet_fx.momentumize(Joining(hook), gamma=0.5, rest=rest), torch.randn(2, 4, 6, 6, requires_grad=True) * 1
        loss = net(x).square().sum()
        given = [x, *net.make.parameters(), *net.up.parameters(), *(() if hook else net.body.parameters())]
        found.append([g.clone() for g in backward(loss, given)])
        assert not x._backward_hooks  # it is the user's, who keeps it
    assert all(map(torch.equal, *found))


def test_a_net_with_skips():
    both(torch.autograd.grad)


def test_reruns_leave_nothing_on_the_skip(monkeypatch):
    made, apart = [], cats._apart
    monkeypatch.setattr(cats, "_apart", lambda t: made.append(t.shape) or apart(t))
    loss = mnet_fx.momentumize(Joining(), gamma=0.5, rest="checkpoint")(torch.randn(2, 4, 6, 6)).sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert len(made) == 1


def test_what_the_model_hands_out_has_no_hooks_of_ours():
    out, more, shown = mnet_fx.momentumize(Joining(shows=True), gamma=0.5, rest="checkpoint")(torch.randn(2, 4, 6, 6))
    assert shown.requires_grad
    assert not shown._backward_hooks
    (out + more).sum().backward()
    assert not shown._backward_hooks


def test_a_backward_pass_in_inference_mode():
    both(torch.inference_mode()(torch.autograd.grad))


def test_a_hook_of_the_users_sees_how_the_gradient_lies():
    seen = []
    both(torch.autograd.grad, lambda g: seen.append((g.stride(), g.storage_offset())))
    assert seen == [((432, 36, 6, 1), 144)] * 2


def test_second_derivatives():
    found = []
    for cat in (apart, torch.cat):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, requires_grad=True)
        k = x.sin()
        y = cat([k, k.detach() * 2], 1)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert torch.equal(*found)
