"""GraphModules, whoever made them, are rewritten as the programs that they are."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.fx as fx
import torchvision
import zoo
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import assert_identical, assert_near, leftovers, seeded

import mnet_fx
from mnet_fx.captured.graph_modules import original, rewritten
from mnet_fx.regions.region import MomentumRegion
from mnet_fx.settings import Settings


class Added(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def resnet(dtype=torch.float32):
    return fx.symbolic_trace(torchvision.models.resnet18(num_classes=5).to(dtype)), {"x": torch.randn(2, 3, 32, 32, dtype=dtype)}, [2]


def perceptron(dtype=torch.float32):
    blocks = [Added(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.BatchNorm1d(6))) for _ in range(4)]
    return fx.symbolic_trace(nn.Sequential(nn.Linear(4, 6), *blocks).to(dtype)), {"input": torch.randn(8, 4, dtype=dtype)}, [4]


def exported(dtype=torch.float32):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).to(dtype).train()
    call = {"src": torch.randn(2, 5, 8, dtype=dtype)}
    return torch.export.export(encoder, (), call).module(), call, [6]


def function(dtype=torch.float32):
    weights = [nn.Parameter(torch.randn(4, 4, dtype=dtype) * 0.3) for _ in range(4)]

    def run(x):
        for weight in weights:
            x = x + torch.tanh(x @ weight)
        return x

    return make_fx(run)(torch.randn(3, 4, dtype=dtype)), {"x_1": torch.randn(3, 4, dtype=dtype)}, [4]


MADE = pytest.mark.parametrize("make", [resnet, perceptron, exported, function], ids=lambda make: make.__name__)


def forward(net, call):
    return torch.utils._pytree.tree_leaves(net(**call))[0]


def trained(net, call):
    """Output, gradients and buffers of a step, the inputs' included."""
    call = {name: value.clone().requires_grad_() for name, value in call.items()}
    y = seeded(lambda: forward(net, call))
    y.square().sum().backward()
    return {"output": y, **{f"grad of {name}": value.grad for name, value in call.items()}} | leftovers(net)


@MADE
def test_gamma_zero_is_the_original(make):
    gm, call, steps = make(torch.float64)
    net, plan = rewritten(copy.deepcopy(gm), Settings(gamma=0.0))
    assert [len(region.steps) for region in plan.regions] == steps
    assert_near(trained(net, call), trained(gm, call), 1e-5)


@MADE
def test_reversible_is_stored_bit_for_bit(make):
    gm, call, _ = make()
    found, expected = (trained(rewritten(copy.deepcopy(gm), Settings(backward=kind))[0], call) for kind in ("reversible", "stored"))
    assert_identical(found, expected)


@MADE
def test_it_is_another_network_that_shares_every_tensor_and_leaves_the_given_one(make):
    gm, call, _ = make()
    code, modules, x = gm.code, dict(gm.named_modules()), seeded(forward, gm, call)
    net, _ = rewritten(gm, Settings())
    assert gm.code == code
    assert dict(gm.named_modules()) == modules
    assert list(net.state_dict()) == list(gm.state_dict())
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], [*gm.parameters(), *gm.buffers()], strict=True))
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in gm.named_parameters()]
    assert not torch.allclose(seeded(forward, net, call), x)


@MADE
def test_it_prints_its_chains(make):
    net, plan = rewritten(make()[0], Settings())
    assert all(f"self.{region.name}(" in net.code for region in plan.regions)
    assert "steps, gamma=0.9" in str(net)


@MADE
def test_a_pickle_runs_in_another_process(make, tmp_path):
    gm, call, _ = make()
    net, _ = rewritten(gm, Settings(gamma=lambda t, steps: 0.5))
    (tmp_path / "net").write_bytes(pickle.dumps((net, call)))
    script = (
        "import pickle, sys, torch; torch.set_num_threads(1); net, call = pickle.load(open(sys.argv[1], 'rb')); torch.manual_seed(7);"
        "y = torch.utils._pytree.tree_leaves(net(**call))[0]; y.square().sum().backward();"
        "torch.save([y.detach(), [p.grad for p in net.parameters()], list(net.state_dict())], sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "net", tmp_path / "out"], check=True)
    y, grads, keys = torch.load(tmp_path / "out")
    expected = trained(net, call)
    assert torch.equal(y, expected["output"])
    assert keys == list(net.state_dict())
    assert_identical(dict(enumerate(grads)), dict(enumerate(p.grad for p in net.parameters())))


@MADE
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_whole(make, copied):
    gm, call, _ = make()
    net, plan = rewritten(gm, Settings())
    twin = copied(net)
    assert "_guards_fn" in net.code or twin.code == net.code
    expected = seeded(forward, net, call).detach()
    assert torch.equal(seeded(forward, copied(twin), call), expected)
    assert type(twin(**call)) is type(net(**call)) is type(gm(**call))
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    assert torch.equal(seeded(forward, twin, call), expected)
    assert not torch.equal(seeded(forward, net, call), expected)
    fresh = copied(rewritten(original(twin), Settings())[0])
    assert [child.name for child in fresh.children() if isinstance(child, MomentumRegion)] == [region.name for region in plan.regions]
    assert all(child._owner[0] is fresh for child in fresh.children() if isinstance(child, MomentumRegion))


@MADE
def test_the_original_comes_back_and_a_second_rewrite_starts_over(make):
    gm, call, _ = make()
    assert original(gm) is gm
    for copied in (lambda net: net, copy.deepcopy):
        net = copied(rewritten(gm, Settings())[0])
        first = original(net)
        assert first.code == gm.code
        assert torch.equal(seeded(forward, first, call), seeded(forward, copied(gm), call))
        assert not any(isinstance(module, MomentumRegion) for module in first.modules())
        again, _ = rewritten(net, Settings(gamma=0.3))
        assert torch.equal(seeded(forward, again, call), seeded(forward, copied(rewritten(copied(gm), Settings(gamma=0.3))[0]), call))


@MADE
def test_tracing_it_again_keeps_the_chains(make):
    gm, call, _ = make()
    net, plan = rewritten(gm, Settings())
    traced = fx.symbolic_trace(net)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [region.name for region in plan.regions] == [target for target in calls if target.startswith("momentum")]
    y = torch.utils._pytree.tree_leaves(seeded(lambda: traced(*call.values())))[0]
    assert torch.equal(y, seeded(forward, net, call))


@pytest.mark.parametrize("make", [resnet, function])
def test_export_and_jit_trace_hold_the_momentum_network_in_floats(make):
    gm, call, _ = make()
    net, x = rewritten(gm.eval(), Settings())[0].eval(), next(iter(call.values()))
    expected = net(x)
    zoo.assert_agree(torch.export.export(net, (x,), strict=False).module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo.assert_agree(torch.jit.trace(net, (x,), check_trace=False)(x), expected)


def test_modules_in_it_are_live_and_modes_and_dtypes_are_its_own():
    gm, call, _ = perceptron()
    net, _ = rewritten(gm, Settings(gamma=0.0))
    setattr(getattr(net, "1").inner, "0", nn.Linear(6, 6))
    assert not torch.allclose(seeded(forward, net, call), seeded(forward, gm, call))
    net.eval()
    assert gm.training
    assert torch.equal(forward(net, call), forward(net, call))
    assert forward(net.double(), {"input": call["input"].double()}).dtype is torch.float64


def test_chains_within_steps_are_reached_also_after_a_pickle():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), *(Added(nn.Linear(4, 4)) for _ in range(2)), nn.Linear(4, 4))

        def forward(self, x):
            return x + self.inner(x)

    net, plan = rewritten(fx.symbolic_trace(nn.Sequential(*(Outer() for _ in range(3)))), Settings())
    assert [bool(region.within) for region in plan.regions] == [False, True, True, True]
    call = {"input": torch.randn(2, 4)}
    assert torch.equal(forward(pickle.loads(pickle.dumps(net)), call), forward(net, call))


def test_changes_of_layout_are_moved_out_of_the_stream():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.channels = nn.Linear(6, 6), nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.channels(x)
            y = x.transpose(1, 2)
            y = y + self.tokens(y)
            return y.transpose(1, 2)

    model = nn.Sequential(Mixed(), Mixed())
    x = torch.randn(2, 6, 4)
    gm = torch.export.export(model, (x,)).module()
    net, plan = rewritten(gm, Settings(gamma=0.0))
    assert [len(region.steps) for region in plan.regions] == [4]
    zoo.assert_agree(net(x), gm(x))
    assert original(net).code == gm.code


def test_where_there_is_no_chain_it_stays_as_it_is():
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    net, plan = rewritten(gm, Settings())
    assert (net is not gm, net.code, plan.regions) == (True, gm.code, ())
    assert original(net) is net


def test_a_module_that_gives_the_velocity_goes_with_the_chains():
    gm, call, _ = function()
    net, _ = rewritten(gm, Settings(initial_velocity=nn.Linear(4, 4)))
    net.initial_velocity = net.momentum_region_0.velocity
    assert torch.equal(forward(copy.deepcopy(net), call), forward(net, call))
    assert list(original(net).state_dict()) == list(gm.state_dict())
    assert original(net).code == gm.code


class Indexed(nn.Module):
    """Whose export holds the list as a constant."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = x + torch.tanh(self.fc(x))[:, [3, 1, 0, 2]]
        return x


def test_a_constant_of_an_exported_graph_does_not_join_the_state_dict():
    gm = torch.export.export(Indexed(), (torch.randn(3, 4),)).module()
    net = mnet_fx.momentumize(gm, gamma=0)
    assert list(net.state_dict()) == list(gm.state_dict())
    assert [name for name, _ in net.named_buffers()] == [name for name, _ in gm.named_buffers()]
    x = torch.randn(3, 4)
    zoo.assert_agree(net(x), gm(x))
    zoo.assert_agree(pickle.loads(pickle.dumps(net))(x), gm(x))


class Mapped(nn.Module):
    """Whose export enters and leaves a vmap by calls in the graph, between values that a step reads."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = x[:, :2]
        z = torch.vmap(torch.tanh)(y)
        for _ in range(3):
            x = x + self.fc(x).tanh()
        return x, z, y


def test_calls_that_change_a_state_keep_their_place():
    x = torch.randn(3, 4)
    gm = torch.export.export(Mapped(), (x,), strict=False).module()
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        net = mnet_fx.momentumize(gm, gamma=0)
    assert {refusal.code for refusal in net.report.refusals} == {"lost_context"}
    assert len(net.report.refusals) == 3
    for a, b in zip(net(x), gm(x), strict=True):
        assert torch.equal(a, b)


def test_a_block_without_gradients_of_a_graph_of_make_fx_keeps_its_place():
    fc = nn.Linear(4, 4)

    def run(x):
        y = x
        for _ in range(3):
            x = x + fc(x).tanh()
        with torch.no_grad():
            z = fc(y).sin()
        return x, z

    x = torch.randn(3, 4)
    gm = make_fx(run, pre_dispatch=True)(x)
    assert any("set_grad" in str(node.target) for node in gm.graph.nodes)
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        net = mnet_fx.momentumize(gm, gamma=0)
    assert [out.requires_grad for out in net(x)] == [out.requires_grad for out in gm(x)]
