"""examples/axolotl_plugin.py, found and called by axolotl's own manager of plugins."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import zoo
from captures import tiny
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx

base = pytest.importorskip("axolotl.integrations.base")
NAME = "axolotl_plugin.MomentumPlugin"


@pytest.fixture
def manager(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    manager = base.PluginManager.get_instance()
    manager.register(NAME)
    yield manager
    manager.plugins.clear()
    sys.modules.pop("axolotl_plugin", None)


def config(**values):
    return importlib.import_module("axolotl.utils.dict").DictDefault(values)


def made():
    torch.manual_seed(0)
    return tiny("gpt2")


def run(model, inputs):
    torch.manual_seed(0)
    logits = model(**inputs).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_plugin_rewrites_what_axolotl_loaded(manager):
    found = []
    for momentum in ({"gamma": 0.0}, {"gamma": 0.5, "backward": "stored"}, {"gamma": 0.5}):
        model, inputs = made()
        manager.post_model_load(config(momentum=momentum), model)
        found.append(run(model, inputs))
    zoo.assert_near(found[0], run(*made()), 1e-4)
    zoo.assert_identical(found[2], found[1])
    assert mnet_fx.report(model).regions[0].steps == 3
    assert not model.config.use_cache


def test_its_options_are_part_of_the_config(manager):
    module, _, name = manager.plugins[NAME].get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(momentum={"gamma": 0.1}).momentum == {"gamma": 0.1}


@pytest.mark.parametrize("other", [{"gradient_checkpointing": True}, {"activation_offloading": True}], ids=str)
def test_checkpointing_beside_it_is_refused(manager, other):
    model, _ = made()
    with pytest.raises(mnet_fx.SettingsError, match="set gradient_checkpointing: false"):
        manager.post_model_load(config(**other), model)
