"""The state on a device, in Triton's interpreter and as compiled for GPUs that are not here; each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
GROUPS = [
    "float32,bfloat16,float16,float64",
    "held,promoted,magnitudes,again,skipped,unseen,forward_only,ahead,layouts,lost,refusals,words,fingerprints",
    "drawn",
]


def output(script, *arguments):
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / script, *arguments], capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("groups", GROUPS)
def test_bits_are_those_of_the_state_on_the_cpu(groups):
    lines = output("device_cases.py", "--only", groups).splitlines()
    assert len(lines) == len(groups.split(","))
    assert all(": ok" in line for line in lines)


def test_a_state_whose_memory_was_elsewhere():
    assert ": ok" in output("device_cases.py", "--only", "away")


@pytest.mark.slow
def test_bits_of_many_more_chains():
    assert ": ok" in output("device_cases.py", "--only", "drawn", "--examples", "300")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability):
    """No product is fused with a sum, nothing below normal is cut off, wide loads, and few registers."""
    from triton.backends import nvidia

    if not (Path(nvidia.__file__).parent / "bin" / "nvdisasm").exists():
        pytest.skip("no nvdisasm")
    assert f"sm_{capability}:" in output("device_compiling.py", capability)
