"""Settings that all tests share: hypothesis profiles, threads, seed."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from mnet_fx.arithmetic import fingerprints

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=40, **common)
settings.register_profile("deep", max_examples=1000, **common)
settings.register_profile("mutants", max_examples=40, phases=[Phase.explicit, Phase.generate], **common)  # nobody reads the example
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


DEVICE = os.environ.get("MNET_FX_DEVICE")  # such as cuda: where tests make their tensors; the processor, if not set


class _Generator(torch.Generator):
    """One on the device of the tests, where none is named: generators take no notice of the default device."""

    def __new__(cls, device=DEVICE):
        return super().__new__(cls, device)


@pytest.fixture(autouse=True)
def _repeatable(request, monkeypatch):
    torch.set_num_threads(1)  # on a busy machine, two threads make small operations a hundred times slower
    if DEVICE is not None:
        in_c = request.path.stem in ("test_fused", "test_native") or "[c-" in request.node.name  # loops for the processor
        torch.set_default_device("cpu" if in_c else DEVICE)
        if not in_c:
            monkeypatch.setattr(torch, "Generator", _Generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=os.environ.get("MNET_FX_LATER") == "1")
def _later(monkeypatch):
    """As on a device, fingerprints are compared when a backward pass ends; for a run of the whole suite that way, on a CPU."""
    monkeypatch.setattr(fingerprints, "ON_HOST", set())


QUICK = [
    "architecture",
    "mutants",
    "rules",
    "matching",
    "nesting",
    "hoisting",
    "leftovers",
    "effects",
    "fills",
    "fixed_point",
    "dtypes",
    "fingerprints",
    "native",
    "cost",
    "tape",
    "replay",
    "surroundings",
    "attributes",
    "streams",
    "graph",
]


SLOW = (  # single cases of tests that are else run always: what they show, others show too
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[spilling]",
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[compiled inside]",
    "test_sizes_that_depend_on_values[inductor-Routes-3]",
    "test_two_thousand_steps",
    "test_the_trainer_of_hugging_face[gradient_checkpointing]",
    "test_a_region_within_it_keeps_it_inside",
    "test_families[resnet101]",
    "test_models[opt--]",
    "test_reversible_gradients_and_buffers_are_those_of_stored[swin_t]",
    "test_every_chain_is_rewritten_and_reversible_is_stored[bert]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of one thing at a time are marked quick; see CONTRIBUTING.md."""
    for item in items:
        if item.name in SLOW:
            item.add_marker(pytest.mark.slow)
        if item.path.stem.removeprefix("test_") in QUICK and "slow" not in item.keywords:
            item.add_marker(pytest.mark.quick)
