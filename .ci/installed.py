"""What must hold of an installed wheel, asked in its environment: python .ci/installed.py SDIST SOURCES"""

import json
import sys
import tarfile
from importlib.metadata import distribution, entry_points, version
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

import mnet_fx
import passes

NEEDED = [
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "mkdocs.yml",
    "docs/tutorial.md",
    "docs/dial.svg",
    "docs/hooks.py",
]
NEEDED += [
    "tests/conftest.py",
    "tests/zoo.py",
    "tests/test_documentation.py",
    "tests/golden/encoder.json",
    "benchmarks/results/memory.json",
    "examples/train_digits.py",
]


class Residual(nn.Linear):
    def forward(self, x):
        return x + super().forward(x).tanh()


def main() -> None:
    sdist, project = Path(sys.argv[1]), Path(sys.argv[2])
    for package in (mnet_fx, passes):
        assert Path(package.__file__).is_relative_to(sys.prefix), f"{package.__name__} is that of {package.__file__}, not of the wheel"
        assert files(package).joinpath("py.typed").is_file(), f"{package.__name__} has no py.typed"
    json.loads(files("mnet_fx.reporting").joinpath("report.schema.json").read_text())
    assert not [str(f) for f in distribution("mnet-fx").files if str(f).startswith(("tests", "benchmarks", "docs"))]

    said = f'version = "{version("mnet-fx")}"'
    assert said in (project / "pyproject.toml").read_text(), f"the wheel is of {said}"
    assert f"\nversion: {version('mnet-fx')}\n" in (project / "CITATION.cff").read_text(), "CITATION.cff is of another version"
    assert mnet_fx.__version__ == version("mnet-fx")

    backends = [entry.value for entry in entry_points(group="torch_dynamo_backends", name="mnet_fx")]
    assert backends == ["mnet_fx.compiled.backend:mnet_fx"], f"the entry point of the backend is {backends}"
    assert "mnet_fx" in torch._dynamo.list_backends()
    net = mnet_fx.momentumize(nn.Sequential(*[Residual(8, 8) for _ in range(3)]), (torch.ones(2, 8),))
    net(torch.ones(2, 8)).sum().backward()
    assert net.report.regions

    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert not (missing := [name for name in NEEDED if name not in inside]), f"the sdist lacks {missing}"
    print(f"mnet-fx {version('mnet-fx')}: the wheel works, and the sdist holds {len(inside)} files")


main()
