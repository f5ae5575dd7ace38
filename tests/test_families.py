"""torchvision's residual families, end to end: what is found in them, gamma=0 as the oracle, exact gradients, and nothing else changed."""

import collections
import copy

import pytest
import torch
import zoo
from torch import nn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx
from mnet_fx.regions.region import MomentumRegion


@pytest.fixture(
    scope="module",
    params=[f if f.name in zoo.QUICK else pytest.param(f, marks=pytest.mark.slow) for f in zoo.FAMILIES],
    ids=lambda f: f.name,
)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    torch.manual_seed(0)
    return family.build()


@pytest.fixture(scope="module")
def double(model):
    return copy.deepcopy(model).double()


@pytest.fixture
def images(family):
    return family.images()


def training_step(net, images):
    """Output, gradient of the input, and all that a forward and backward pass leaves in the model."""
    net.zero_grad(set_to_none=True)
    x = images.clone().requires_grad_()
    out = net(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    result = {"out": out.detach(), "grad of input": x.grad} | zoo.leftovers(net, copied=False)
    net.zero_grad(set_to_none=True)
    return result


def step_and_back(net, images):
    """A training step, after which the buffers are as they were before."""
    before = [b.clone() for b in net.buffers()]
    result = zoo.seeded(training_step, net, images)
    with torch.no_grad():
        for b, old in zip(net.buffers(), before, strict=True):
            b.copy_(old)
    return result


def blank(module):
    """Gives the parameters and buffers of one module values that no model has."""
    with torch.no_grad():
        for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            t.fill_(-3)


def snapshot(module):
    """Everything that could be changed in a tree of modules."""
    tree = {name: (id(m), m.training, sorted(vars(m)), list(m._modules)) for name, m in module.named_modules()}
    tensors = {name: (id(t), t._version, t.requires_grad, t.sum().item()) for name, t in module.state_dict(keep_vars=True).items()}
    return tree, tensors


def assert_unchanged(module, before):
    tree, tensors = snapshot(module)
    assert tree == before[0]
    assert list(tensors.items()) == list(before[1].items())


def test_finds_every_residual_add(family, model):
    report = mnet_fx.momentumize(model, (family.images(),)).report
    assert tuple(region.steps for region in report.regions) == family.steps
    assert tuple(region.adds for region in report.regions) == family.steps
    assert report.residual_adds == family.adds
    assert report.rewritten_adds == sum(family.steps)
    expected = {"projection_shortcut": family.projections, "too_short": family.short}
    assert collections.Counter(refusal.code for refusal in report.refusals) == +collections.Counter(expected)


def test_a_step_for_each_block(family, model):
    report = mnet_fx.momentumize(model, granularity="module").report
    assert tuple(region.steps for region in report.regions) == tuple(steps // family.adds_per_block for steps in family.steps)
    assert report.rewritten_adds == sum(family.steps)


def test_counts_of_the_best_known():
    """The same numbers once more, as the literature has them, so that a slip in the table of the zoo does not go by."""
    by_name = {family.name: family for family in zoo.FAMILIES}
    resnet, vit = by_name["resnet101"], by_name["vit_b_16"]
    assert (resnet.adds, sum(resnet.steps), resnet.steps, resnet.projections) == (33, 29, (2, 3, 22, 2), 4)
    assert (vit.adds, vit.steps, vit.adds_per_block) == (24, (24,), 2)
    assert [by_name[name].adds for name in ["convnext_tiny", "swin_t", "efficientnet_b0", "mobilenet_v2"]] == [18, 24, 9, 10]


def test_gamma_zero_gives_the_logits_of_the_original(family, double, images):
    expected = double.eval()(images.double())
    for granularity in ["add", "module"] if family.adds_per_block > 1 else ["add"]:
        found = mnet_fx.momentumize(double, gamma=0, granularity=granularity).eval()(images.double())
        zoo.assert_near({"out": found}, {"out": expected}, 1e-9)


@pytest.mark.parametrize(("training", "tolerance"), [(False, 1e-9), (True, 1e-6)], ids=["eval", "train"])
def test_gamma_zero_is_the_original(double, images, training, tolerance):
    """Gradients and batch statistics, with dropout and stochastic depth. In float64, where no rounding is enough to open or close a ReLU;
    two images make BatchNorm ill-conditioned."""
    net = mnet_fx.momentumize(double, gamma=0).train(training)
    expected = step_and_back(double.train(training), images.double())
    found = step_and_back(net, images.double())
    zoo.assert_near(found, expected, tolerance)


def test_reversible_gradients_and_buffers_are_those_of_stored(family, model, images):
    """At gamma = 0.5 the chains of 22 and 24 steps spill bits, and short ones keep their inputs instead."""
    reversible = mnet_fx.momentumize(model, gamma=0.5).train()
    stored = mnet_fx.momentumize(model, gamma=0.5, backward="stored").train()
    assert {region.storage for region in reversible.report.regions if region.steps > 3} <= {"reverse"}
    expected = step_and_back(stored, images)
    zoo.assert_identical(step_and_back(reversible, images), expected)
    original = step_and_back(model.train(), images)["out"]
    assert not torch.equal(original, expected["out"]), "gamma has no effect, so nothing was tested"


def test_the_state_dict_is_that_of_the_original(model):
    net = mnet_fx.momentumize(model)
    ours, theirs = net.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = copy.deepcopy(model)
    for other, given in [(plain, ours), (mnet_fx.momentumize(plain), theirs)]:
        other.apply(blank)
        assert not any(torch.equal(t, theirs[name]) for name, t in other.state_dict().items() if t.is_floating_point())
        other.load_state_dict(given)
        assert all(torch.equal(t, theirs[name]) for name, t in other.state_dict().items())


def test_the_given_model_is_left_as_it_was(model, images):
    model.train()
    next(model.children()).eval()  # a mixture of modes is kept too
    before, buffers = snapshot(model), [b.clone() for b in model.buffers()]
    net = mnet_fx.momentumize(model)
    assert_unchanged(model, before)
    assert not any("forward" in vars(m) or isinstance(m, MomentumRegion) for m in model.modules())
    assert type(net) is type(model)
    for get in (nn.Module.named_parameters, nn.Module.named_buffers):
        pairs = list(zip(get(net), get(model), strict=True))
        assert all(ours == theirs and a is b for (ours, a), (theirs, b) in pairs)
    flags = dict(net.named_modules())
    assert all(flags[name].training == m.training for name, m in model.named_modules())
    assert not {id(m) for m in net.modules()} & {id(m) for m in model.modules()}
    net.train()(images)  # a forward of the result moves the shared batch statistics, but no module of the original
    assert snapshot(model)[0] == before[0]
    with torch.no_grad():
        for b, old in zip(model.buffers(), buffers, strict=True):
            b.copy_(old)
