"""mnet_fx.integrations.torchtitan, in torchtitan: a process of its own, as torchtitan changes torch when it is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo

import mnet_fx

pytest.importorskip("torchtitan")
HERE = Path(__file__).parent


@pytest.mark.long
def test_the_policy_in_torchtitan(tmp_path):
    """The original for gamma = 0; as stored to the bit, compiled by blocks too; something else is trained at gamma = 0.5."""
    path = tmp_path / "found.pt"
    done = subprocess.run([sys.executable, HERE / "torchtitan_script.py", path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(path)
    zoo.assert_near(found["zero"], found["none"], 1e-5)
    zoo.assert_identical(found["reversible"], found["stored"])
    zoo.assert_identical(found["reversible compiled"], found["stored compiled"])
    zoo.assert_near(found["stored compiled"], found["stored"], 1e-5)
    assert max((a - found["none"][key]).abs().max() for key, a in found["reversible"].items()) > 1e-3


@pytest.mark.parametrize("option", [{"preserve_rng_state": False}, {"determinism_check": "none"}, {"debug": True}], ids=str)
def test_options_of_checkpointing_are_refused(option):
    script = f"from mnet_fx.integrations.torchtitan import MomentumAC; MomentumAC.Config(**{option!r}).build().apply(None)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "SettingsError: preserve_rng_state, determinism_check and debug belong to checkpointing" in done.stderr


def test_momentumize_has_the_options_that_the_policy_has():
    """By name and default; without importing torchtitan here."""
    names = ("gamma", "weights", "backward", "on_drift", "precision", "rest")
    script = f"from mnet_fx.integrations.torchtitan import MomentumAC; c = MomentumAC.Config(); print([getattr(c, n) for n in {names!r}])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str([mnet_fx.momentumize.__kwdefaults__[name] for name in names]), done.stderr[-2000:]
