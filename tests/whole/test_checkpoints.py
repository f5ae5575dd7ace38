"""Options travel with the checkpoint: nets know how they were made, warn of weights of another network, and are rebuilt from a file."""

import copy
import gc
import io
import json
import logging
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
import zoo
from captures import Checked, tiny
from torch import fx, nn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.Sequential(*(Block() for _ in range(3))), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layers(x))


class Outer(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.before, self.net = nn.Linear(4, 4), net

    def forward(self, x):
        return self.net(self.before(x))


def halving(t, steps):
    return 0.5 ** (t + 1)


def functions():
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]


def transform(gamma=0.9, is_residual=False):
    return mnet_fx.transform_to_momentumnet(Model(), ["layers"], keep_first_layer=False, gamma=gamma, is_residual=is_residual)


WAYS = {
    "captured": lambda **o: mnet_fx.momentumize(Model(), **o),
    "named": lambda **o: mnet_fx.momentumize(Model(), regions=["layers"], **o),
    "graph": lambda **o: mnet_fx.momentumize(fx.symbolic_trace(Model()), **o),
    "transform": transform,
    "MomentumNet": lambda **o: mnet_fx.MomentumNet(functions(), **o),
    "inside": lambda **o: Outer(mnet_fx.momentumize(Model(), **o)),
    "averaged": lambda **o: torch.optim.swa_utils.AveragedModel(mnet_fx.momentumize(Model(), **o)),
    "compiled": lambda **o: torch.compile(mnet_fx.momentumize(Model(), **o)),
    "copied": lambda **o: copy.deepcopy(mnet_fx.momentumize(Model(), **o)),
    "pickled": lambda **o: pickle.loads(pickle.dumps(mnet_fx.momentumize(Model(), **o))),
    "graph, copied": lambda **o: copy.deepcopy(mnet_fx.momentumize(fx.symbolic_trace(Model()), **o)),
    "graph, pickled": lambda **o: pickle.loads(pickle.dumps(mnet_fx.momentumize(fx.symbolic_trace(Model()), **o))),
}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def warned(net, state, **how):
    """What loading a state_dict warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net.load_state_dict(state, **how)
    return [str(w.message) for w in told]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_weights_of_another_network_warn_and_those_of_the_same_do_not(way, how):
    state = through_a_file(WAYS[way](gamma=0.9).state_dict())
    (said,) = warned(WAYS[way](gamma=0.5), state, **how)
    assert "gamma=0.9" in said
    assert "gamma=0.5" in said
    assert warned(WAYS[way](gamma=0.9), state, **how) == []


@pytest.mark.parametrize("way", WAYS)
def test_keys_are_those_of_before(way):
    net = WAYS[way]()
    assert set(net.state_dict()) == {*dict(net.named_parameters()), *dict(net.named_buffers())}


OTHERS = {
    "weights": {"weights": "matched"},
    "initial_velocity": {"initial_velocity": "first"},
    "granularity": {"granularity": "module"},
    "blocks of a step": {"granularity": 2},
    "min_steps": {"min_steps": 3},
    "regions": {"regions": ["layers"]},
    "schedule": {"gamma": halving},
}


@pytest.mark.parametrize("other", OTHERS)
def test_each_option_that_decides_the_network(other):
    plain, net = mnet_fx.momentumize(Model()), mnet_fx.momentumize(Model(), **OTHERS[other])
    for a, b in ((plain, net), (net, plain)):
        (said,) = warned(a, through_a_file(b.state_dict()))
        assert all(name in said for name in OTHERS[other])
    assert warned(mnet_fx.momentumize(Model(), **OTHERS[other]), net.state_dict()) == []


def test_the_kind_of_module_that_gives_the_velocity():
    def net(kind):
        return mnet_fx.momentumize(Model(), initial_velocity=kind)

    class Double(nn.Linear):
        pass

    (said,) = warned(net(Double(4, 4)), through_a_file(net(nn.Linear(4, 4)).state_dict()))
    assert "initial_velocity=a torch.nn.modules.linear.Linear" in said
    assert warned(net(nn.Linear(4, 4)), net(nn.Linear(4, 4)).state_dict()) == []


def test_how_a_network_is_computed_makes_no_other():
    state = mnet_fx.momentumize(Model()).state_dict()
    other = mnet_fx.momentumize(Model(), backward="stored", on_drift="warn", precision="high", inner="aot_eager", rest="checkpoint")
    assert warned(other, state) == []


def test_schedules_are_compared_by_their_values():
    state = through_a_file(mnet_fx.momentumize(Model(), gamma=halving).state_dict())
    assert warned(mnet_fx.momentumize(Model(), gamma=lambda t, steps: [0.5, 0.25, 0.125][t]), state) == []
    (said,) = warned(mnet_fx.momentumize(Model(), gamma=lambda t, steps: [0.5, 0.25, 0.1][t]), state)
    assert "the schedule halving ([0.5, 0.25, 0.125])" in said
    constant = mnet_fx.momentumize(Model(), gamma=lambda t, steps: 0.5).state_dict()
    assert warned(mnet_fx.momentumize(Model(), gamma=0.5), constant) == []
    assert len(warned(mnet_fx.momentumize(Model(), gamma=0.4), constant)) == 1


def test_a_schedule_that_fails_for_the_chains_of_the_checkpoint_is_another():
    def strict(t, steps):
        return [0.5][t + steps]

    with pytest.raises(mnet_fx.SettingsError, match="failed"):
        mnet_fx.momentumize(Model(), regions=["layers"], gamma=strict)
    assert len(warned(mnet_fx.momentumize(Model(), gamma=strict), mnet_fx.momentumize(Model(), gamma=halving).state_dict())) == 1


def test_a_net_within_another_or_around_it():
    """The options of one place say nothing of another, so that is said too."""
    inner, whole = Outer(mnet_fx.momentumize(Model())), mnet_fx.momentumize(Outer(Model()))
    (said,) = warned(whole, through_a_file(inner.state_dict()))
    assert "whose net alone was rewritten" in said
    (said,) = warned(inner, through_a_file(whole.state_dict()))
    assert "of which this was but a part" in said


def test_weights_of_an_original_are_the_normal_start_and_no_more_than_noted(caplog):
    net = mnet_fx.momentumize(Model())
    with caplog.at_level(logging.INFO, "mnet_fx"):
        assert warned(net, Model().state_dict()) == []
        assert warned(net, dict(net.state_dict())) == []
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"]
    assert warned(Model(), net.state_dict()) == []  # the original knows nothing of us


@pytest.mark.parametrize("way", ["captured", "named", "graph"])
def test_options_round_trip(way):
    options = {"gamma": halving, "weights": "matched", "initial_velocity": "first", "precision": "high", "on_drift": "warn"}
    net = WAYS[way](**options)
    again = mnet_fx.momentumize(Model() if way != "graph" else fx.symbolic_trace(Model()), **net.mnet_fx_options)
    assert again.mnet_fx_options == net.mnet_fx_options
    assert warned(again, net.state_dict()) == []
    assert torch.equal(again(X), net(X))
    once_more = mnet_fx.momentumize(net, gamma=0.3)
    assert once_more.mnet_fx_options["gamma"] == 0.3
    assert warned(once_more, mnet_fx.momentumize(net, gamma=0.3).state_dict()) == []
    assert len(once_more._state_dict_hooks) == len(once_more._load_state_dict_pre_hooks) == 1


# ---- files


OPTIONS = {
    "captured": {"gamma": 0.7},
    "schedule": {"gamma": lambda t, steps: 0.9 - 0.1 * t},
    "matched": {"weights": "matched", "initial_velocity": "first"},
    "named": {"regions": ["layers"], "gamma": 0.6, "backward": "stored"},
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_net_is_rebuilt_as_it_was(options, suffix, tmp_path):
    net, path = mnet_fx.momentumize(Model(), **OPTIONS[options]), tmp_path / f"net.{suffix}"
    mnet_fx.save(net, path)
    again = mnet_fx.load(Model(), path)
    assert torch.equal(again(X), net(X))
    assert not torch.equal(mnet_fx.momentumize(net, gamma=0)(X), net(X))
    assert again.mnet_fx_options["backward"] == net.mnet_fx_options["backward"]
    mnet_fx.save(again, path)
    assert torch.equal(mnet_fx.load(Model(), path)(X), net(X))  # a second generation
    with pytest.warns(mnet_fx.MnetWarning, match="another network"):
        mnet_fx.load(Model(), path, gamma=0.2)
    assert mnet_fx.load(Model(), path, on_drift="ignore").mnet_fx_options["on_drift"] == "ignore"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("is_residual", [True, False])
def test_the_interface_of_momentumnet_is_rebuilt(is_residual, suffix, tmp_path):
    net, path = transform(0.7, is_residual), tmp_path / f"net.{suffix}"
    mnet_fx.save(net, path)
    assert torch.equal(mnet_fx.load(Model(), path)(X), net(X))
    net = mnet_fx.MomentumNet(functions(), gamma=0.7)
    mnet_fx.save(net, path)
    assert torch.equal(mnet_fx.load(mnet_fx.MomentumNet(functions(), gamma=0.7), path)(X), net(X))
    with pytest.warns(mnet_fx.MnetWarning, match=r"gamma=0.7.*gamma=0.9"):
        mnet_fx.load(mnet_fx.MomentumNet(functions()), path)
    with pytest.raises(mnet_fx.SettingsError, match="give load one"):
        mnet_fx.load(Model(), path)


def test_a_model_that_was_transformed_twice(tmp_path):
    def twice(gamma):
        once = mnet_fx.transform_to_momentumnet(nn.Sequential(Model(), nn.Linear(2, 4), Model()), ["0.layers"], gamma=0.5)
        return mnet_fx.transform_to_momentumnet(once, ["2.layers"], keep_first_layer=False, gamma=gamma)

    net, path = twice(0.7), tmp_path / "net.pt"
    mnet_fx.save(net, path)
    assert torch.equal(mnet_fx.load(nn.Sequential(Model(), nn.Linear(2, 4), Model()), path)(X), net(X))
    assert warned(twice(0.7), net.state_dict()) == []
    assert len(warned(twice(0.8), net.state_dict())) == 1


@pytest.mark.parametrize("wrapped", [lambda s, m: {"model": s, "step": 3}, lambda s, m: {"state_dict": s}, lambda s, m: m.state_dict()])
def test_checkpoints_as_people_write_them(wrapped, tmp_path):
    """Under a key; and of a net in a wrapper, as DistributedDataParallel and torch.compile make them."""
    net = mnet_fx.momentumize(Model(), gamma=0.7)
    torch.save(wrapped(net.state_dict(), torch.nn.DataParallel(net)), tmp_path / "net.pt")
    assert torch.equal(mnet_fx.load(Model(), tmp_path / "net.pt")(X), net(X))
    options = mnet_fx.momentumize(Model(), gamma=0.7).mnet_fx_options
    assert {"gamma": 0.7, "weights": "momentum"}.items() <= options.items()


def test_a_module_for_the_velocity_is_to_be_given(tmp_path):
    net, path = mnet_fx.momentumize(Model(), initial_velocity=nn.Linear(4, 4)), tmp_path / "net.pt"
    mnet_fx.save(net, path)
    with pytest.raises(mnet_fx.SettingsError, match=r"modules\.linear\.Linear.*initial_velocity=module"):
        mnet_fx.load(Model(), path)
    assert torch.equal(mnet_fx.load(Model(), path, initial_velocity=nn.Linear(4, 4))(X), net(X))


def test_files_without_options_say_so(tmp_path):
    path = tmp_path / "net.pt"
    for state, match in (
        (Model().state_dict(), "no options of mnet_fx"),
        (Outer(mnet_fx.momentumize(Model())).state_dict(), "part of the model, net"),
        (torch.zeros(3), "holds a Tensor"),
    ):
        torch.save(state, path)
        with pytest.raises(mnet_fx.MnetError, match=match):
            mnet_fx.load(Model(), path)
    mnet_fx.save(Model(), tmp_path / "net.safetensors")
    with pytest.raises(mnet_fx.MnetError, match="no options of mnet_fx"):
        mnet_fx.load(Model(), tmp_path / "net.safetensors")


def test_options_for_momentumize_from_wherever_they_are(tmp_path):
    net = mnet_fx.momentumize(Model(), gamma=halving, weights="matched")
    mnet_fx.save(net, tmp_path / "net.pt")
    mnet_fx.save(net, tmp_path / "net.safetensors")
    for source in (tmp_path / "net.pt", str(tmp_path / "net.safetensors"), net.state_dict(), {"model": net.state_dict()}):
        again = mnet_fx.momentumize(Model(), **mnet_fx.saved_options(source, backward="stored"))
        assert warned(again, net.state_dict()) == []
        assert torch.equal(again(X), net(X))
        assert again.mnet_fx_options["backward"] == "stored"
    with pytest.raises(mnet_fx.MnetError, match=r"use mnet_fx\.load"):
        mnet_fx.saved_options(transform().state_dict())


def test_a_folder_of_adapters_has_no_options_and_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(mnet_fx.MnetError, match=r"has no config.json.* adapters \(LoRA\) have none"):
        mnet_fx.saved_options(tmp_path)


def test_a_schedule_of_saved_values_knows_no_other_chains(tmp_path):
    mnet_fx.save(mnet_fx.momentumize(Model(), gamma=halving), tmp_path / "net.pt")
    longer = Model()
    longer.layers.append(Block())
    with pytest.raises(mnet_fx.SettingsError, match="for chains of 3 steps"):
        mnet_fx.load(longer, tmp_path / "net.pt", regions=["layers"])


# ---- Hugging Face


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_save_pretrained_writes_the_options_into_the_config(tmp_path):
    model = tiny("gpt2")[0]
    net = mnet_fx.momentumize(model, regions=["transformer.h"], gamma=0.6)
    assert not hasattr(model.config, "mnet_fx")
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mnet_fx"]["gamma"] == 0.6
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    again = mnet_fx.momentumize(loaded, **mnet_fx.saved_options(tmp_path))
    assert again.mnet_fx_options == mnet_fx.momentumize(loaded, **mnet_fx.saved_options(loaded.config)).mnet_fx_options
    ids = torch.arange(7)[None]
    assert torch.equal(again.eval()(ids, use_cache=False).logits, net.eval()(ids, use_cache=False).logits)
    with pytest.warns(mnet_fx.MnetWarning, match=r"the config says.*gamma=0.6.*gamma=0.9"):
        mnet_fx.momentumize(loaded, regions=["transformer.h"])
    assert mnet_fx.momentumize(again, regions=["transformer.h"], gamma=0.2).config.mnet_fx["gamma"] == 0.2  # meant


# ---- nothing is left behind


@pytest.mark.parametrize("way", ["captured", "named", "graph", "transform", "MomentumNet"])
def test_hooks_keep_no_net_alive(way):
    net = WAYS[way]()
    state = net.state_dict()
    net.load_state_dict(state)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
    assert state._metadata[""]["mnet_fx"]


def test_a_shallow_copy_outlives_its_net():
    net = mnet_fx.momentumize(Model())
    twin, state = copy.copy(net), net.state_dict()
    del net
    gc.collect()
    assert warned(twin, state) == []
    zoo.assert_identical(dict(copy.deepcopy(twin).state_dict()), dict(state))


def checked(layers=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *(Checked(Block(), Block()) for _ in range(layers)))


@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
@pytest.mark.parametrize("way", ["load_state_dict", "load", "safetensors", "within", "pickle"])
def test_chains_travel_too(way, tmp_path):
    """Of three chains for training, validation alone would make one."""
    net, x = mnet_fx.momentumize(checked(), gamma=0.9), torch.randn(2, 4)
    trained = net(x)
    assert [region.steps for region in net.report.regions] == [2, 2, 2]
    path = tmp_path / ("net.safetensors" if way == "safetensors" else "net.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way in ("load", "safetensors"):
            mnet_fx.save(net, path)
            other = mnet_fx.load(checked(), path)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(net))
        else:
            torch.save((nn.Sequential(net) if way == "within" else net).state_dict(), path)
            other = mnet_fx.momentumize(checked(), gamma=0.9)
            (nn.Sequential(other) if way == "within" else other).load_state_dict(torch.load(path, weights_only=True))
        other.eval()
        with torch.no_grad():
            assert torch.equal(other(x), trained)
    assert torch.equal(other.train()(x), trained)
    assert not torch.equal(mnet_fx.momentumize(checked(), gamma=0.9).eval()(x), trained)


@pytest.mark.filterwarnings("ignore:.*Dynamo breaks")
def test_weights_of_other_chains_warn():
    """Where the net was called before they came, or cannot have them; then it is what it would be without."""
    net, x = mnet_fx.momentumize(checked(), gamma=0.9), torch.randn(2, 4)
    net(x)
    state = net.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict(state)
    called = mnet_fx.momentumize(checked(), gamma=0.9).eval()
    expected = called(x)
    with pytest.warns(mnet_fx.MnetWarning, match="trained in other chains"):
        called.load_state_dict(state)
    assert torch.equal(called(x), expected)
    with pytest.warns(mnet_fx.MnetWarning, match="trained in other chains"):
        net.load_state_dict(called.state_dict())
    deeper = mnet_fx.momentumize(checked(4), gamma=0.9)
    deeper.load_state_dict(called.state_dict(), strict=False)
    with pytest.warns(mnet_fx.MnetWarning, match="trained in other chains"):
        found = deeper(x)
    assert torch.equal(found, mnet_fx.momentumize(checked(4), gamma=0.9)(x))
    assert [region.steps for region in deeper.report.regions] == [2, 2, 2, 2]
