"""momentumize(model, inplace=True), for code that cannot put another model in its place; and `restore`."""

import copy
import pickle

import pytest
import torch
import zoo
from captures import run
from torch import nn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.fc(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
FORMS = {
    "captured": (Model, {}),
    "inputs": (Model, {"example_inputs": X}),
    "named": (Model, {"regions": ["layers"]}),
    "auto": (Model, {"regions": "auto"}),
    "velocity": (Model, {"regions": "auto", "initial_velocity": nn.Linear(8, 8)}),
    "captured velocity": (Model, {"initial_velocity": nn.Linear(8, 8)}),
    "torch": (Encoder, {}),
}


def state_of(model):
    """Everything of its modules but tensors, and which tensors it has."""
    held = {path: {k: v for k, v in vars(m).items() if not k.startswith("_") or "mnet" in k} for path, m in model.named_modules()}
    return held, {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}


@pytest.fixture(params=FORMS)
def case(request):
    torch.manual_seed(0)
    kind, options = FORMS[request.param]
    return kind(), options


def results(model):
    _, tensors, grads = run(model, X)
    return dict(enumerate([*tensors, *grads]))


def test_the_same_object_computes_what_a_copy_would_and_then_the_original(case):
    model, options = case
    before, expected, other = state_of(model), results(model), results(mnet_fx.momentumize(model, **options))
    assert mnet_fx.momentumize(model, inplace=True, **options) is model
    assert mnet_fx.report(model).rewritten_adds
    zoo.assert_identical(results(model), other)
    assert not torch.equal(other[0], expected[0])
    assert mnet_fx.restore(model) is model
    assert state_of(model) == before
    zoo.assert_identical(results(model), expected)
    again = mnet_fx.momentumize(model, inplace=True, **options)
    zoo.assert_identical(results(again), other)


def test_restoring_what_is_not_in_place(case):
    model, options = case
    net = mnet_fx.momentumize(model, **options)
    results(net)  # captured, if it is
    expected = results(model)
    zoo.assert_identical(results(mnet_fx.restore(net)), expected)
    assert net.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))
    with pytest.raises(mnet_fx.MnetError, match="no model that momentumize rewrote"):
        mnet_fx.restore(net)


def test_copies_pickles_and_state_dicts(case):
    model, options = case
    keys = list(model.state_dict())
    net = mnet_fx.momentumize(model, inplace=True, **options)
    expected = results(net)
    assert list(net.state_dict())[: len(keys)] == keys
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        zoo.assert_identical(results(twin), expected)
        mnet_fx.restore(twin)
        assert not torch.equal(results(twin)[0], expected[0])
        zoo.assert_identical(results(net), expected)


@pytest.mark.filterwarnings("ignore:.*no residual chain")
def test_what_cannot_be_done_in_place():
    net = mnet_fx.momentumize(Model(), inplace=True, regions="auto")
    with pytest.raises(mnet_fx.SettingsError, match=r"rewritten already: mnet_fx.restore\(model\) first"):
        mnet_fx.momentumize(net, inplace=True)
    graph = torch.fx.symbolic_trace(Model())
    with pytest.raises(mnet_fx.SettingsError, match="leave inplace out"):
        mnet_fx.momentumize(graph, inplace=True)
    with pytest.raises(mnet_fx.SettingsError, match="cannot be restored in place"):
        mnet_fx.restore(mnet_fx.momentumize(graph))
    changed = mnet_fx.transform_to_momentumnet(Model(), ["layers"])
    with pytest.raises(mnet_fx.SettingsError, match="rewritten already"):
        mnet_fx.momentumize(changed, inplace=True)
    with pytest.raises(mnet_fx.MnetError, match="transform_to_momentumnet changed this model before"):
        mnet_fx.restore(mnet_fx.momentumize(changed, regions=[]))
    with pytest.raises(mnet_fx.MnetError, match="no model that momentumize rewrote"):
        mnet_fx.restore(nn.Sequential(net))
    with pytest.raises(mnet_fx.SettingsError, match=r"takes an nn\.Module"):
        mnet_fx.momentumize(3, inplace=True)


ERRORS = {
    "a layer": {"regions": ["layers", "layers"]},
    "a container": {"regions": ["layers", "none"]},
    "inputs": {"example_inputs": (X, X)},
    "a velocity": {"initial_velocity": nn.Linear(8, 8)},
}


@pytest.mark.parametrize("name", ERRORS)
def test_after_an_error_the_model_is_as_it_was(name):
    model = Model()
    if name == "a velocity":
        model.initial_velocity = nn.Linear(8, 8)
    before, expected = state_of(model), results(model)
    with pytest.raises(mnet_fx.SettingsError):
        mnet_fx.momentumize(model, inplace=True, **ERRORS[name])
    assert state_of(model) == before
    zoo.assert_identical(results(model), expected)
