"""What steps give to others is computed inside of them: memory that autograd keeps outside of a chain does not grow with its depth."""

import pytest
import torch
import torch.nn.functional as F
from captures import run, steps
from torch import nn

import mnet_fx
import passes

D = 8


class Net(nn.Module):
    """A chain whose steps make h, and give something of h or of the stream x to others."""

    def __init__(self, kind, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.f, self.r, self.k = (nn.ModuleList(nn.Linear(D, D) for _ in range(depth)) for _ in range(3))
        self.norms = nn.ModuleList((nn.BatchNorm1d if kind == "batch norm" else nn.LayerNorm)(D) for _ in range(depth))
        self.deep = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(6)))

    def forward(self, x, target):
        x, skip = self.stem(x), 0
        for f, r, k, norm in zip(self.f, self.r, self.k, self.norms, strict=True):
            h = torch.tanh(f(x))
            x, before = x + r(h), x
            skip = skip + SIDES[self.kind](self, k, norm, h, before, target)
        return self.out(x), skip


def in_lists(net, k, norm, h, x, target):
    a, b = k(h).chunk(2, -1)
    return torch.sigmoid(a) * b


def by_weights(net, k, norm, h, x, target):
    return F.linear(h, k.weight / k.weight.norm(), k.bias)


SIDES = {
    "wavenet": lambda net, k, norm, h, x, target: k(h),
    "after a norm": lambda net, k, norm, h, x, target: torch.relu(k(norm(h))),
    "of the stream": lambda net, k, norm, h, x, target: k(norm(x)),
    "of both": lambda net, k, norm, h, x, target: k(h * x),
    "loss": lambda net, k, norm, h, x, target: F.mse_loss(k(norm(x)), target),
    "batch norm": lambda net, k, norm, h, x, target: k(norm(h)),
    "dropout": lambda net, k, norm, h, x, target: F.dropout(k(h), 0.5, net.training),
    "lists": in_lists,
    "weights": by_weights,
    "shapes": lambda net, k, norm, h, x, target: k(h).view(h.size(0), 2, -1).mean(1),
}


def kept(net, *inputs):
    """Bytes that ordinary autograd saves, without parameters, buffers and inputs."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), *inputs)}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()  # alive, so that the address stays its own
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = net(*inputs)
    del result
    return sum(storage.nbytes() for at, storage in saved.items() if at not in own)


def inputs(rows=6):
    return torch.randn(rows, D), torch.randn(rows, D)


@pytest.mark.parametrize("kind", SIDES)
def test_side_outputs_are_those_of_the_model(kind):
    """Outputs and gradients at gamma = 0, and those of stored activations, bit for bit, at 0.9."""
    call, exact = inputs(), []
    model, net = Net(kind), mnet_fx.momentumize(Net(kind), gamma=0)
    (_, tensors, grads), (_, tensors_, grads_) = run(model, *call), run(net, *call)
    assert steps(net) == [4]
    if kind != "dropout":  # whose draws come in another order
        for want, got in zip([*tensors, *grads, *model.buffers()], [*tensors_, *grads_, *net.buffers()], strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for backward in ("reversible", "stored"):
        _, tensors, grads = run(mnet_fx.momentumize(Net(kind), gamma=0.9, backward=backward), *call)
        exact.append([t for t in (*tensors, *grads) if t is not None])
    assert all(map(torch.equal, *exact))


@pytest.mark.parametrize("kind", SIDES)
def test_what_is_kept_outside_does_not_grow_with_depth(kind):
    """Depth 5 to 10; the first step's stream is the chain's input, of which others' computations stay outside."""
    call, found = inputs(), {}
    for depth in (5, 10):
        net = mnet_fx.momentumize(Net(kind, depth))
        run(net, *call)
        found[depth] = kept(net, *call)
        assert net.report.kept_outside == found[depth]
        assert f"Outside of chains, autograd keeps {found[depth]:,} bytes" in str(net.report)
    assert found[5] == found[10]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_report_counts_what_grows(inner):
    """What sums up products keeps both factors, whatever the chain does."""

    class Product(Net):
        def forward(self, x, target):
            x, product = self.stem(x), 1
            for f, k in zip(self.f, self.k, strict=True):
                h = torch.tanh(f(x))
                x, product = x + h, product * k(h)
            return self.out(x), product

    shallow, deep = (mnet_fx.momentumize(Product("wavenet", depth), inputs(), inner=inner).report.kept_outside for depth in (5, 10))
    assert deep - shallow == 2 * 5 * 6 * D * 4


def test_a_whole_decoder_stays_outside():
    class Decoded(Net):
        def forward(self, x, target):
            x, skip = self.stem(x), 0
            for f, r in zip(self.f, self.r, strict=True):
                h = torch.tanh(f(x))
                x, skip = x + r(h), skip + self.deep(h)
            return self.out(x), skip

    gm = torch.fx.symbolic_trace(Decoded("wavenet"))
    for step in passes.plan(gm).regions[0].steps:
        assert sum("deep" in str(node) for node in step.nodes) <= 4  # two of the six blocks
    call = inputs()
    for want, got in zip(*(run(net, *call)[1] for net in (gm, mnet_fx.momentumize(gm, gamma=0))), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_sizes_do_not_leave_steps():
    class Sized(Net):
        def forward(self, x, target):
            x, skip = self.stem(x), 0
            for f, r, k in zip(self.f, self.r, self.k, strict=True):
                h = torch.tanh(f(x))
                x, n = x + r(h), k(h).size(0)
                skip = skip + k(h).reshape(n, 2, -1).mean(1)
            return self.out(x).reshape(n, -1), skip

    steps = passes.plan(torch.fx.symbolic_trace(Sized("wavenet"))).regions[0].steps
    assert any(step.extras for step in steps)
    assert not [name for step in steps for name in step.extras if "size" in name]


def test_a_preview_and_a_traced_graph_do_likewise():
    gm = torch.fx.symbolic_trace(Net("wavenet"))
    net = mnet_fx.momentumize(gm, gamma=0)
    call = inputs()
    for want, got in zip(*(run(each, *call)[1] for each in (gm, net)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert net.report.kept_outside is None
    assert kept(net, *call) == kept(mnet_fx.momentumize(torch.fx.symbolic_trace(Net("wavenet", 8))), *call)


def test_nothing_is_kept_without_gradients():
    net = mnet_fx.momentumize(Net("wavenet"))
    with torch.no_grad():
        net(*inputs())
    assert net.report.kept_outside == 0
    assert "Outside of chains" not in str(net.report)


def test_modules_of_side_outputs_may_be_called_from_anywhere():
    """Only those that the stream goes through would compute the original network."""
    net = mnet_fx.momentumize(Net("after a norm"))
    net(*inputs())
    for layer in (*net.k, *net.norms):
        layer(torch.randn(2, D))
    with pytest.raises(mnet_fx.MnetError, match="part of a momentum chain"):
        net.r[0](torch.randn(2, D))
