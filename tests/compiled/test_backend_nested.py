"""Chains within the steps of chains, under `torch.compile`."""

import copy

import pytest
import torch
import zoo
from test_nested import nested, step
from torch import nn
from zoo import one_thread, tokens  # noqa: F401  (one a fixture)

import mnet_fx

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    mnet_fx.reset_reports()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def compiled(model, dynamic=None, **options):
    """A compiled copy of the model, which `step` may take in place of it."""
    torch._dynamo.reset()
    net = copy.deepcopy(model)
    net.compile(backend=mnet_fx.backend(**{"inner": "eager"} | options), dynamic=dynamic)
    return net


def rows():
    return [
        [(region.path, region.steps, region.storage, region.state_bytes_per_element) for region in report.regions]
        for report in mnet_fx.reports()
    ]


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_it_is_the_network_that_momentumize_makes(inner):
    net = mnet_fx.momentumize(nested().double().eval(), gamma=0.5)
    function = compiled(nested().double().eval(), gamma=0.5, inner=inner)
    zoo.assert_near(step(function), step(net), 1e-8)
    (report,) = mnet_fx.reports()
    assert (report.rewritten_adds, report.residual_adds) == (net.report.rewritten_adds, net.report.residual_adds) == (8, 8)
    assert [(r.path, r.steps, r.storage) for r in report.regions] == [(r.path, r.steps, r.storage) for r in net.report.regions]


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_gamma_zero_is_the_original(training, inner):
    model = nested().double().train(training)
    zoo.assert_near(zoo.seeded(step, compiled(model, gamma=0, inner=inner)), zoo.seeded(step, copy.deepcopy(model)), 1e-8)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gamma", [0.9, 0.05])
@pytest.mark.parametrize("velocity", ["zero", "first", "module"])
def test_gradients_are_those_of_stored_activations(gamma, velocity, inner):
    """Twice, so that buffers and gradients of one step are there when the next begins."""
    found = []
    for kind in ("reversible", "stored"):
        torch.manual_seed(1)
        start = nn.Linear(6, 6) if velocity == "module" else velocity
        net = compiled(nested(), gamma=gamma, initial_velocity=start, backward=kind, inner=inner)
        zoo.seeded(step, net)
        found.append(zoo.seeded(step, net))
        if isinstance(start, nn.Module):
            found[-1] |= {f"velocity {name}": p.grad for name, p in start.named_parameters()}
    assert {tuple(row[1] for row in graph) for graph in rows()} == {(4, 2, 2)}
    zoo.assert_identical(*found)
    missing = [name for name, t in found[0].items() if name.startswith(("grad", "velocity")) and (t is None or not t.any())]
    assert not missing


def test_batch_statistics_move_once():
    net = compiled(nested(), gamma=0.9)
    step(net)
    counts = {name: int(t) for name, t in net.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {1}
    assert any(name.startswith("blocks.2.b") for name in counts)


def test_a_weight_of_the_inner_chain_that_changes_before_the_backward_pass_is_named():
    net = compiled(nested(), gamma=0.9)
    out = net(tokens())
    with torch.no_grad():
        net.blocks[2].b.fc1.weight.add_(1)
    with pytest.raises(mnet_fx.InversionError, match=r"step 2.*parameter 'blocks\.2\.b\.fc1\.weight'"):
        out.sum().backward()


def test_an_initial_velocity_that_changes_before_the_backward_pass_is_named():
    start = nn.Linear(6, 6)
    out = compiled(nested(), gamma=0.9, initial_velocity=start)(tokens())
    with torch.no_grad():
        start.weight.add_(1)
    with pytest.raises(mnet_fx.InversionError, match=r"step 3.*parameter 'initial_velocity\.weight'"):
        out.sum().backward()


class Sum(nn.Module):
    """x + f(x)."""

    def __init__(self, *f):
        super().__init__()
        self.f = nn.Sequential(*f)

    def forward(self, x):
        return x + self.f(x)


class Windows(nn.Module):
    """A branch with a chain over windows, whose sizes are made of the batch; it reads what is outside of the branch."""

    def __init__(self, first=None):
        super().__init__()
        self.into, self.f, self.out = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 8)
        if first is not None:
            self.f = first.f  # shared

    def forward(self, x, scale):
        y = torch.tanh(self.into(x)).view(x.shape[0] * 2, -1, 8)
        for f in self.f:
            y = y + torch.tanh(f(y)) * scale + scale.view(-1)[: y.shape[1]].sum() * 0.1
        return self.out(y.view(x.shape))


class Odd(nn.Module):
    """Two branches with chains in them over three plain ones."""

    def __init__(self, shared=False):
        super().__init__()
        torch.manual_seed(2)
        first = Windows()
        self.head, self.windows = nn.Linear(8, 8), nn.ModuleList([first, Windows(first if shared else None)])

    def forward(self, x, scale):
        x = self.head(x)
        scale = torch.sigmoid(scale)
        for window in self.windows:
            x = x + window(x, scale)
        return x


def odd_step(net, batch):
    x = torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(batch)).to(net.head.weight.dtype).requires_grad_()
    scale = torch.linspace(0, 1, 8, dtype=x.dtype, requires_grad=True)
    net.zero_grad()
    out = net(x, scale)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return {"out": out.detach(), "grad of x": x.grad, "grad of scale": scale.grad} | zoo.leftovers(net)


@pytest.mark.parametrize(
    ("shared", "inner"), [(False, "eager"), (True, "eager"), (True, "aot_eager"), pytest.param(False, "inductor", marks=pytest.mark.slow)]
)
def test_sizes_that_vary_and_side_inputs(shared, inner):
    nets = [compiled(Odd(shared), dynamic=True, backward=kind, inner=inner) for kind in ("reversible", "stored")]
    exact = compiled(Odd(shared).double(), gamma=0, dynamic=True, inner=inner)
    for batch in (2, 3, 5):
        zoo.assert_identical(*(odd_step(net, batch) for net in nets))
        zoo.assert_near(odd_step(exact, batch), odd_step(Odd(shared).double(), batch), 1e-8)
    assert {tuple(row[1] for row in graph) for graph in rows()} == {(2, 2, 2)}
    assert len(rows()) == 3


def test_chains_three_deep():
    def layer():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))

    def build():
        torch.manual_seed(4)
        innermost = [layer(), Sum(layer()), Sum(layer()), nn.Linear(8, 8)]
        middle = [layer(), Sum(*innermost), Sum(layer()), nn.Linear(8, 8)]
        return nn.Sequential(nn.Linear(8, 8), Sum(layer()), Sum(*middle), Sum(layer()))

    def run(net):
        x = torch.linspace(-1, 1, 40, dtype=net[0].weight.dtype).view(5, 8).requires_grad_()
        out = net(x)
        out.square().sum().backward()
        return {"out": out.detach(), "grad of x": x.grad} | zoo.leftovers(net)

    zoo.assert_identical(*(zoo.seeded(run, compiled(build(), backward=kind)) for kind in ("reversible", "stored")))
    zoo.assert_near(zoo.seeded(run, compiled(build().double(), gamma=0)), zoo.seeded(run, build().double()), 1e-7)
    assert rows()[0][0][1] == 3
    assert len(rows()[0]) == 3


def test_what_is_compiled_does_not_grow_with_depth():
    def compiled_parts(depth):
        parts = []

        def inner(gm, inputs):
            parts.append(gm)
            return gm.forward

        torch.manual_seed(0)
        branches = [nn.Sequential(nn.Linear(8, 8), Sum(nn.Linear(8, 8)), Sum(nn.Linear(8, 8)), nn.Linear(8, 8)) for _ in range(depth)]
        net = compiled(nn.Sequential(nn.Linear(8, 8), *map(Sum, branches)), inner=inner)
        net(torch.ones(3, 8)).sum().backward()
        assert len(rows()[-1]) == 1 + depth
        return len(parts)

    assert compiled_parts(6) == compiled_parts(3)


def test_the_steps_of_an_inner_chain_run_twice():
    """Forward, and as part of the one rerun of the step around them, not once more to be taken back by themselves."""
    runs = []

    def inner(gm, inputs):
        return lambda *args: runs.append(gm) or gm(*args)

    branch = nn.Sequential(nn.Linear(8, 8), Sum(nn.Linear(8, 8)), Sum(nn.Linear(8, 8)), nn.Linear(8, 8))
    net = compiled(nn.Sequential(Sum(branch), Sum(nn.Linear(8, 8), nn.Tanh())), inner=inner)
    net(torch.ones(3, 8)).sum().backward()
    assert [row[1] for row in rows()[0]] == [2, 2]
    assert max(runs.count(gm) for gm in runs) == 2 * 2  # both are one artifact
