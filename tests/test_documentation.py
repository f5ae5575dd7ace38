"""The pages: every link leads somewhere, every path of a file is there, every block of Python runs and prints what the page says."""

import ast
import contextlib
import doctest
import importlib
import io
import json
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import mnet_fx
import passes

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+) -->\n)?```python\n(?P<code>.*?)^```$(?:\n\n```text\n(?P<prints>.*?)^```$)?", re.DOTALL | re.MULTILINE
)
SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# What the reader of a page has at hand, where it does not say so itself.
VIT = """
import mnet_fx, torch, torchvision
model = torchvision.models.VisionTransformer(image_size=64, patch_size=32, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32)
images = torch.randn(2, 3, 64, 64)
"""
GPT2 = """
import mnet_fx, torch
from transformers import AutoModel, GPT2Config, GPT2Model
model = GPT2Model(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)).eval()
"""
LAYERS = """
import mnet_fx, torch
from torch import nn
class Layer(nn.Linear):
    def forward(self, x):
        return x + super().forward(x).tanh()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.Sequential(*[Layer(8, 8) for _ in range(3)])})
    def forward(self, x):
        return self.encoder["layer"](x)
model, calls = Net(), [torch.randn(64, 8) for _ in range(4)]
batches = calls
"""
BEFORE = {
    "docs/any-model.md": VIT,
    "docs/decide.md": VIT,
    "docs/fine-tuning.md": LAYERS,
    "docs/from-momentumnet.md": "import mnet_fx, torch\nf, x0 = torch.nn.Linear(8, 8), torch.randn(4, 8)",
    "docs/not-rewritten.md": VIT,
    "docs/torch-compile.md": VIT,
    "docs/training-stacks.md": GPT2 + "net = mnet_fx.momentumize(model, regions=['h'])",
    "passes/README.md": "import torchvision\nmodel = torchvision.models.resnet101()\nbuild_region = lambda code: torch.nn.Identity()",
}
WARNS = {"docs/training-stacks.md"}  # of weights of another network, as it says


def small_resnet():
    """Stands in for a ResNet-101."""
    stem, head = nn.Conv2d(3, 16, 7, stride=4), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(stem, *[BasicBlock(16, 16) for _ in range(3)], *head)


def prose(page):
    """The text without blocks of code and code in lines."""
    return re.sub(r"```.*?```|`[^`\n]*`|^    .*$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)", prose(page)):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:mnet_fx|passes|tests|benchmarks|docs)/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_blocks_run(page, monkeypatch, tmp_path):
    """From top to bottom, as one module; a line of an error is that of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "resnet101", small_resnet)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where Dynamo looks for the globals of its functions
    text = page.read_text()
    assert text.count("```python\n") == len(FENCE.findall(text)), "a fence is not closed"
    with warnings.catch_warnings():
        if name_of(page) in WARNS:
            warnings.simplefilter("ignore", mnet_fx.MnetWarning)
        exec(BEFORE.get(name_of(page), ""), vars(module))
        for block in FENCE.finditer(text):
            run(block, text, page, vars(module))


def run(block, text, page, names):
    code = "\n" * text[: block.start("code")].count("\n") + block["code"]
    if block["why"]:
        ast.parse(code)
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), names)
    if block["prints"]:
        assert doctest.OutputChecker().check_output(block["prints"], printed.getvalue(), SHOWN), printed.getvalue()


@pytest.mark.parametrize("name", ["tutorial", "tutorial-fine-tune"])
def test_notebooks(name, monkeypatch):
    """They hold the code that the page does, each of its headings, and no link that leads nowhere there."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    text = (ROOT / f"docs/{name}.md").read_text()
    cells = json.loads(importlib.import_module("notebooks").notebook(text))["cells"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == [
        b["code"].strip("\n") for b in FENCE.finditer(text)
    ]
    written = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert [line for line in text.splitlines() if line.startswith("#") and line not in written] == []
    assert ".md" not in written  # pages that are not beside a notebook


def test_bytes_by_gamma():
    """The table of theory is what `state_bytes` says."""
    table = re.search(r"<!-- gamma_bytes -->\n(.*?)<!-- /", (ROOT / "docs/which-gamma.md").read_text(), re.DOTALL)[1]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    steps = [int(cell.split()[0]) for cell in head[1:]]
    assert rows == [[g, *(f"{min(mnet_fx.state_bytes([float(g)] * n), 4.0 * n):.0f}" for n in steps)] for g in (row[0] for row in rows)]


def test_every_error_has_a_remedy():
    """Each public error and warning is on the page of errors, and each text that it quotes is one of ours."""
    text = (ROOT / "docs/errors.md").read_text()
    names = [n for n in mnet_fx.__all__ if n.endswith(("Error", "Warning"))] + [
        f"passes.{n}" for n in passes.__all__ if n.endswith("Error")
    ]
    assert [name for name in names if f"\n| `{name}`" not in text] == []
    strings = [
        node.value
        for path in ROOT.glob("mnet_fx/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = [q for q in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) if " " in q]
    assert quoted
    assert [q for q in quoted if not any(q in s for s in strings)] == []
