"""What `joined` hands on is what `torch.cat` does: bits, strides, offsets. That less waits, tests/captured/test_rest.py measures."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import Function

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


READERS = {
    "none": lambda x: x.detach().sum(),
    "before": lambda x: (x * x).sum(),
    "channels last": lambda x: (x.to(memory_format=torch.channels_last) ** 2).mean(),
    "all alike": lambda x: x.sum(),
    "a part": lambda x: x[:, :1].tanh().sum(),
}


def run(cat, draws, seed):
    torch.manual_seed(seed)
    batch, layout, before, after, dim, repeated, reduced = draws
    x, log = torch.randn(batch, 3, 4, 5).to(memory_format=layout).requires_grad_(), []
    skip = Spied.apply(x, log)
    terms = [READERS[reader](skip) for reader in before]
    wide = torch.randn(batch, 17 if dim == 1 else 3, 4, 5)  # so wide that a part's gradient has gaps even where one value stands for a row
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
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.lists(st.sampled_from(sorted(READERS)), max_size=2),
    st.lists(st.sampled_from(sorted(READERS)), max_size=2),
    st.sampled_from([0, 1, -1]),
    st.integers(0, 1),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(draws, st.integers(0, 9))
@example((2, torch.contiguous_format, [], ["all alike"], 1, 0, False), 0)  # a sum in new memory
def test_gradients_and_where_they_lie_are_those_of_cat(drawn, seed):
    ours, autograds = (run(cat, drawn, seed) for cat in (joined, torch.cat))
    assert len(ours) == len(autograds)
    for (a, *where), (b, *there) in zip(ours, autograds, strict=True):
        assert torch.equal(a, b)
        assert where == there


def test_second_derivatives():
    found = []
    for cat in (joined, torch.cat):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, requires_grad=True)
        k = x.sin()
        y = cat([k, k.detach() * 2], 1)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert torch.equal(*found)
