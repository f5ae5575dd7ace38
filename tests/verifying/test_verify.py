"""`verify` passes what is right, and says of what is planted what is wrong, and in which step."""

import time

import numpy as np
import pytest
import torch
import torch.fx as fx
from models import Encoder
from torch import nn

import mnet_fx
from mnet_fx.verifying.subject import Subject, _weighted

COUNT = [0]


@torch.library.custom_op("mnet_fx_verify::drifting", mutates_args=())
def drifting(x: torch.Tensor) -> torch.Tensor:
    """A kernel that does not repeat."""
    COUNT[0] += 1
    return x * (1 + 1e-3 * COUNT[0])


drifting.register_fake(torch.empty_like)
drifting.register_autograd(lambda ctx, grad: grad)


OWN = np.random.default_rng(0)  # which no rerun puts back


class Block(nn.Module):
    def __init__(self, kind: str = ""):
        super().__init__()
        self.linear, self.scale, self.kind = nn.Linear(8, 8), nn.Parameter(torch.zeros(())), kind

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        if self.kind == "noise":
            y = y + torch.from_numpy(OWN.random(8, "float32"))
        if self.kind == "hidden noise":
            y = y + self.scale * torch.from_numpy(OWN.random(8, "float32"))
        if self.kind == "clock":
            y = y * (1 + time.perf_counter() % 1)
        if self.kind == "kernel":
            y = drifting(y)
        return x + y


class Net(nn.Module):
    def __init__(self, kind: str = "", at: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(Block(kind if i == at else "") for i in range(6))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def net_of(kind: str = "", **options):
    torch.manual_seed(0)
    return mnet_fx.momentumize(Net(kind), **(options or {"regions": ["layers"]}))


def points():
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def test_a_captured_net_is_verified_and_left_as_it_was():
    net = net_of(gamma=0.9)
    state, random_state = {name: t.clone() for name, t in net.state_dict().items()}, torch.get_rng_state()
    found = mnet_fx.verify(net, points())
    assert found.ok, str(found)
    assert [check.ok for check in found.checks] == [True] * 5
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.1}, {"weights": "matched"}, {"gamma": lambda t, n: t / n}, {"initial_velocity": "first"}]
)
def test_named_nets_are_verified(options):
    found = mnet_fx.verify(net_of(regions=["layers"], **options), points())
    assert found.ok, str(found)
    assert "all checks passed" in str(found)
    assert found.to_dict()["ok"] is True


@pytest.mark.parametrize("options", [{}, {"regions": ["layers"]}])
def test_a_net_in_float64_is_verified(options):
    torch.manual_seed(0)
    found = mnet_fx.verify(mnet_fx.momentumize(Net().double(), gamma=0.5, **options), points().double())
    assert found.ok, str(found)


def test_a_graph_module_is_verified():
    torch.manual_seed(0)
    net = mnet_fx.momentumize(fx.symbolic_trace(Net()))
    found = mnet_fx.verify(net, points())
    assert found.ok, str(found)


@pytest.mark.parametrize(("kind", "check"), [("noise", "exact"), ("clock", "exact"), ("kernel", "exact"), ("hidden noise", "gradients")])
def test_what_does_not_repeat_is_found_with_its_step(kind, check):
    found = mnet_fx.verify(net_of(kind), points())
    assert not found.ok
    assert found.check(check).ok is False
    assert found.check(check).where == "layers, step 3 (layers.3)"
    assert "NOT verified" in str(found)
    assert "layers.3" in str(found)


@pytest.mark.filterwarnings("ignore")
def test_a_clock_in_a_captured_net_is_not_verified():
    found = mnet_fx.verify(net_of("clock", gamma=0.9), points())  # Dynamo breaks the graph there, and no chain is left
    assert not found.ok


def test_a_kernel_that_does_not_repeat_in_a_captured_net():
    found = mnet_fx.verify(net_of("kernel", gamma=0.9), points())
    assert found.check("exact").ok is False
    assert "step 3 (layers.3" in found.check("exact").where


def test_a_wrong_form_at_gamma_0_is_found_with_its_step():
    torch.manual_seed(0)
    net = mnet_fx.momentumize(fx.symbolic_trace(Net()))
    right = net.momentum_region_0._programs[2]
    net.momentum_region_0._programs[2] = lambda owner, x, *sides: [1.01 * right(owner, x, *sides)[0]]
    found = mnet_fx.verify(net, points())
    assert found.check("sound").ok is False
    assert "step 2 (layers.2" in found.check("sound").where


def test_a_wrong_gradient_is_found_with_its_step():
    net = net_of()
    original = net.layers[3].forward.original

    class Scaled(torch.autograd.Function):
        """Its gradient is right in a rerun alone."""

        runs = 0

        @staticmethod
        def forward(ctx, w):
            Scaled.runs += 1
            ctx.save_for_backward(w if Scaled.runs % 2 else 2 * w)
            return w * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + ctx.saved_tensors[0].mean())

    def forward(x):
        return original(x) + 1e-3 * Scaled.apply(net.layers[3].scale + 1.0) * x

    net.layers[3].forward.__class__ = type("Planted", (type(net.layers[3].forward),), {"original": property(lambda self: forward)})
    found = mnet_fx.verify(net, points())
    assert found.check("gradients").ok is False


def test_other_things_are_refused_in_words():
    with pytest.raises(mnet_fx.SettingsError, match="momentumize returned, got Linear"):
        mnet_fx.verify(nn.Linear(2, 2), torch.randn(2, 2))


def test_where_nothing_was_rewritten_nothing_is_verified():
    with pytest.warns(mnet_fx.MnetWarning):
        net = mnet_fx.momentumize(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    found = mnet_fx.verify(net, points())
    assert not found.ok
    assert found.checks[0].ok is None


def test_a_subject_leaves_its_regions_as_they_were():
    net = net_of(gamma=0.5, regions=["layers"])
    subject = Subject(net, (points(),), {}, None)
    (region,) = subject.regions
    before = dict(region.__dict__)
    with subject.set(gamma=0.0, backward="stored", on_drift="ignore"):
        assert region.factors[1] == (0.0, 1.0)
        assert region.backward == "stored"
    assert region.__dict__ == before


class OfItsOwn(Net):
    """It makes a tensor by itself, of a dtype that it names or not."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return super().forward(x + torch.zeros(x.shape[-1:], dtype=self.dtype) @ torch.zeros(x.shape[-1:], dtype=x.dtype))


def test_a_model_that_names_no_dtype_is_compared_in_float64_and_one_that_names_float32_is_not():
    x = torch.randn(3, 8)
    found = mnet_fx.verify(mnet_fx.momentumize(OfItsOwn(None)), x)
    assert (found.ok, [check.ok for check in found.checks]) == (True, [True] * 5)
    assert str(found).startswith("OfItsOwn: all checks passed\n")
    found = mnet_fx.verify(mnet_fx.momentumize(OfItsOwn(torch.float32)), x)
    assert (found.ok, found.check("recurrence").ok) == (True, None)
    assert "does not run in float64 (" in found.check("recurrence").detail
    assert "same dtype" in found.check("recurrence").detail
    assert str(found).startswith("OfItsOwn: all checks passed; not decided: recurrence\n")
    assert torch.get_default_dtype() == torch.float32


def test_a_net_with_stored_activations_has_no_step_that_runs_again():
    found = mnet_fx.verify(net_of(regions=["layers"], backward="stored"), points())
    assert [check.ok for check in found.checks] == [True, None, True, True, False]  # and saves nothing


class Outer(nn.Module):
    """A step with a chain of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        y = self.out(x)
        for block in self.inner:
            y = block(y)
        return x + y


def test_chains_within_steps_stay_stored():
    torch.manual_seed(0)
    net = mnet_fx.momentumize(nn.Sequential(*(Outer() for _ in range(3))), gamma=0.5)
    found = mnet_fx.verify(net, points())
    assert found.ok, str(found)


def test_where_nothing_is_finite_nothing_is_verified():
    net = mnet_fx.momentumize(nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))), torch.randn(3, 2, 8))
    found = mnet_fx.verify(net, torch.full((3, 2, 8), float("nan")))
    assert not found.ok
    assert "finite" in found.check("sound").detail


def test_the_weights_of_a_loss_do_not_depend_on_the_default_device():
    x = torch.randn(3, 4, requires_grad=True)
    with torch.device("meta"):
        found = _weighted(x)
    assert torch.equal(found, _weighted(x))


@pytest.mark.parametrize("options", [{}, {"regions": ["layers"]}], ids=["captured", "named"])
def test_arguments_that_come_as_one_tuple_are_an_error_that_says_so(options):
    net = mnet_fx.momentumize(Encoder(3, 16, 2), **options)
    with pytest.raises(mnet_fx.SettingsError, match=r"one by one: verify\(net, \*args"):
        mnet_fx.verify(net, (torch.randn(2, 4, 16),))
