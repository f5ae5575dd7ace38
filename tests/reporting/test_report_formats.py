"""Reports in every format: golden files of three models, the JSON schema, and that each residual-looking add is there once, in order.

`MNET_FX_GOLDEN=write pytest tests/reporting/test_report_formats.py` writes the golden files anew.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import matplotlib.image
import pytest
import torch
from torch import nn

import mnet_fx
from mnet_fx.reporting import data
from mnet_fx.reporting.report import Report

GOLDEN = Path(__file__).parent.parent / "golden"


class Bottleneck(nn.Module):
    def __init__(self, given, width):
        super().__init__()
        self.narrow, self.conv, self.norm = nn.Conv2d(given, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.project = nn.Conv2d(given, width, 1) if given != width else None

    def forward(self, x):
        return torch.relu((x if self.project is None else self.project(x)) + self.norm(self.conv(self.narrow(x))))


class Stages(nn.Module):
    """Chains between projections, as in a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Bottleneck(8, 8), Bottleneck(8, 8), Bottleneck(8, 8))
        self.stage2 = nn.Sequential(Bottleneck(8, 16), *(Bottleneck(16, 16) for _ in range(6)))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


class Mixed(nn.Module):
    """Registered in another order than it runs, with adds under autocast, too short a chain, and a name that HTML must escape."""

    def __init__(self):
        super().__init__()
        self.third, self.first = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.second = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.add_module("a<b", nn.Linear(4, 6))
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        for layer in self.first:
            x = x + torch.tanh(layer(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.second:
                x = x + torch.tanh(layer(x))
        x = x.float()
        for layer in self.third:
            x = x + torch.tanh(layer(x))
        x = torch.relu(self.get_submodule("a<b")(x))
        return x + self.last(x)


def encoder(dropout=0.1):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def near(t, steps):
    return 0.9 if t > steps // 2 else 0.5


MODELS = {
    "stages": lambda: mnet_fx.report(Stages(), (torch.randn(2, 3, 8, 8),)),
    "encoder": lambda: mnet_fx.report(encoder(), (torch.randn(2, 5, 16),), gamma=near, initial_velocity="first"),
    "mixed": lambda: mnet_fx.report(Mixed(), (torch.randn(2, 4),), gamma=0.1),
}
FORMATS = {
    "txt": str,
    "table.txt": lambda report: report.table(),
    "md": lambda report: report.table("github"),
    "csv": lambda report: report.to_csv(),
    "json": lambda report: report.to_json() + "\n",
    "html": lambda report: report.to_html("golden"),
}
KNOWN = {}


def report_of(name):
    if name not in KNOWN:
        KNOWN[name] = MODELS[name]()
    return KNOWN[name]


def steady(report):
    """The report without names of nodes, which torch's versions choose as they like."""
    text = lambda words: re.sub(r"%\w+", "%node", words)  # noqa: E731
    return replace(
        report,
        adds=tuple(replace(add, node=f"node_{i}", explanation=text(add.explanation)) for i, add in enumerate(report.adds)),
        refusals=tuple(replace(r, node="node" if r.node else "", explanation=text(r.explanation)) for r in report.refusals if r.path),
        stretches=tuple(replace(s, adds=("node",) * len(s.adds)) for s in report.stretches),
    )


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_every_format_is_as_it_was(name, suffix):
    path, found = GOLDEN / f"{name}.{suffix}", FORMATS[suffix](steady(report_of(name)))
    if os.environ.get("MNET_FX_GOLDEN") == "write":
        path.write_bytes(found.encode())
    assert found.encode().decode() == path.read_bytes().decode()


@pytest.mark.parametrize("name", MODELS)
def test_json_is_what_its_schema_says(name):
    jsonschema.Draft202012Validator.check_schema(data.schema())
    found = json.loads(report_of(name).to_json())
    jsonschema.validate(found, data.schema())
    assert found == report_of(name).to_dict()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "version": 2}, data.schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({key: value for key, value in found.items() if key != "adds"}, data.schema())


def described(schema):
    """Every property of a schema that has no description."""
    for name, one in schema.get("properties", {}).items():
        if "description" not in one and "const" not in one:
            yield name
        yield from described(one)
        yield from described(one.get("items", {}))


def test_the_schema_says_what_every_field_means_and_every_field_is_in_it():
    assert not list(described(data.schema()))
    found = report_of("mixed").to_dict()
    assert set(found) == set(data.schema()["properties"])
    for key in ("regions", "adds", "refusals", "captured", "parts", "stretches"):
        assert set(found[key][0]) == set(data.schema()["properties"][key]["items"]["properties"])


def test_adds_come_in_the_order_in_which_the_model_runs():
    adds = report_of("mixed").adds
    assert [add.region for add in adds] == ["momentum_region_0"] * 3 + [""] * 2 + ["momentum_region_1"] * 3 + [""]
    assert [add.step for add in adds] == [0, 1, 2, None, None, 0, 1, 2, None]
    assert [add.code for add in adds] == [""] * 3 + ["lost_context"] * 2 + [""] * 3 + ["too_short"]
    assert [add.stretch for add in adds] == sorted(add.stretch for add in adds)
    assert report_of("mixed").residual_adds == len(adds) == 9


class Breaks(nn.Module):
    """Two graphs, with nodes of the same names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        for layer in self.layers[:3]:
            x = x + torch.tanh(layer(x))
        torch._dynamo.graph_break()
        for layer in self.layers[3:]:
            x = x + torch.tanh(layer(x))
        return x


class Inner(nn.Module):
    """A chain within the branch of each step of another."""

    def __init__(self):
        super().__init__()
        self.outer = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(3))

    def forward(self, x):
        for layers in self.outer:
            y = torch.tanh(x)
            for layer in layers:
                y = y + torch.tanh(layer(y))
            x = x + y.sin() @ torch.eye(4)
        return x


def complete(report):
    """Every residual-looking add is there once, and all counts agree."""
    found = report.to_dict()
    jsonschema.validate(found, data.schema())
    assert len(report.adds) == report.residual_adds
    assert sum(add.rewritten for add in report.adds) == report.rewritten_adds
    for region in report.regions:
        assert sum(add.region == region.name for add in report.adds) == region.adds
        assert {add.step for add in report.adds if add.region == region.name} == set(range(region.steps))
    assert sum(part["adds"] for part in found["parts"]) == report.residual_adds
    assert sum(part["rewritten"] for part in found["parts"]) == report.rewritten_adds
    assert all(max(stretch.reads, default=-1) < i for i, stretch in enumerate(report.stretches))
    if report.kept_outside is not None and report.stretches:
        assert sum(stretch.kept for stretch in report.stretches if stretch.step is None) == report.kept_outside
    lines = list(csv.reader(io.StringIO(report.to_csv())))
    assert len(lines) == report.residual_adds + 1
    return report


def broken():
    net = mnet_fx.momentumize(Breaks())
    with pytest.warns(mnet_fx.MnetWarning):
        net(torch.randn(2, 4))
    return net.report


CASES = {
    **{name: lambda name=name: report_of(name) for name in MODELS},
    "preview": lambda: mnet_fx.report(Stages()),
    "named": lambda: mnet_fx.report(encoder(), regions=["layers"]),
    "nested": lambda: mnet_fx.report(Inner(), (torch.randn(2, 4),)),
    "modules": lambda: mnet_fx.report(encoder(), (torch.randn(2, 5, 16),), granularity="module"),
    "stored": lambda: mnet_fx.report(Stages(), (torch.randn(2, 3, 8, 8),), backward="stored"),
    "two graphs": broken,
    "GraphModule": lambda: mnet_fx.report(torch.fx.symbolic_trace(Stages())),
    "exported": lambda: mnet_fx.report(torch.export.export(Inner(), (torch.randn(2, 4),)).module()),
    "nothing": lambda: mnet_fx.report(nn.Linear(3, 3), (torch.randn(2, 3),)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_add_is_there_once(name):
    report = complete(CASES[name]())
    assert report._repr_html_().count("<table>") == report.to_html().count("<table>")


def test_two_graphs_come_one_after_the_other():
    report = broken()
    assert [(add.path, add.step) for add in report.adds] == [("", 0), ("", 1), ("", 2), ("", 0), ("", 1)]
    assert [add.stretch for add in report.adds] == sorted(add.stretch for add in report.adds)


def saved(model, *inputs):
    """Bytes of the storages that autograd saves in a real run, parameters, buffers and inputs apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(*inputs)
    return sum(size for address, (size, _) in found.items() if address not in own)


@pytest.mark.parametrize("name", ["stages", "encoder"])
def test_saved_bytes_are_those_of_a_run(name):
    model, inputs = {"stages": (Stages(), torch.randn(2, 3, 8, 8)), "encoder": (encoder(), torch.randn(2, 5, 16))}[name]
    assert report_of(name).saved == saved(model, inputs)


def test_a_report_without_rewriting_is_that_of_the_rewrite():
    model, inputs = Stages(), (torch.randn(2, 3, 8, 8),)
    net = mnet_fx.momentumize(model, inputs, gamma=0.5)
    assert mnet_fx.report(model, inputs, gamma=0.5) == net.report
    assert type(mnet_fx.report(model)) is Report
    assert mnet_fx.report(net) is net.report


def test_what_is_stored_is_kept_as_it_was():
    report = mnet_fx.report(Stages(), (torch.randn(2, 3, 8, 8),), backward="stored")
    assert all(stretch.kept == stretch.saved for stretch in report.stretches if stretch.region)
    assert report.kept >= report.saved > 0


@pytest.mark.parametrize(("name", "gamma"), [("stages", 0.9), ("stages", 0.1), ("encoder", 0.9)])
def test_kept_bytes_are_about_those_of_a_run(name, gamma):
    """By theory: without a few numbers for each step (grids, fingerprints), and without the random states that dropout needs."""
    model, x = {"stages": (Stages(), torch.randn(8, 3, 32, 32)), "encoder": (encoder(0.0), torch.randn(8, 64, 16))}[name]
    net = mnet_fx.momentumize(model, (x,), gamma=gamma)
    net(x).sum().backward()
    measured = mnet_fx.measure(lambda: net(x).sum(), torch.Tensor.backward).kept
    assert abs(net.report.kept - measured) < 0.1 * measured


def test_a_report_leaves_the_model_as_it_was():
    model = Stages().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = mnet_fx.report(model, (torch.randn(2, 3, 8, 8),))
    assert report.saved > 0  # read in train mode
    assert not model.training
    assert "forward" not in vars(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: mnet_fx.report(torch.relu), mnet_fx.SettingsError, "report takes an nn.Module, got builtin"),
        (lambda: mnet_fx.report(Stages(), gama=0.5), mnet_fx.SettingsError, r"unknown option\(s\) gama"),
        (lambda: mnet_fx.report(Stages(), gamma=1), mnet_fx.SettingsError, "gamma must be a number"),
        (lambda: mnet_fx.report(Stages(), (1, 2, 3)), mnet_fx.SettingsError, "example_inputs do not fit Stages.forward"),
        (lambda: mnet_fx.report(mnet_fx.momentumize(Stages()), gamma=0.5), mnet_fx.SettingsError, "this Stages is rewritten"),
        (lambda: report_of("stages").table("fancy"), mnet_fx.SettingsError, "fmt must be a format of tabulate"),
    ],
)
def test_errors_say_what_is_wrong(ask, error, words):
    with pytest.raises(error, match=words):
        ask()


class Outside(HTMLParser):
    """What a page would load from elsewhere, and whether its tags close."""

    VOID = frozenset({"meta"})

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        self.loads += [tag] * (tag in ("script", "link", "iframe", "object", "img"))
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", MODELS)
def test_the_page_is_one_file_and_well_formed(name):
    page, text = Outside(), report_of(name).to_html()
    page.feed(text)
    assert page.open == page.loads == []
    assert "url(" not in text
    assert "@import" not in text
    assert "a<b" not in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_the_page(tmp_path):
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(report_of("mixed").to_html(), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1160,1600"]
    command += [f"--user-data-dir={tmp_path}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    shown = torch.from_numpy(matplotlib.image.imread(picture)).mul(255).round().to(torch.uint8)[..., :3].permute(2, 0, 1)
    assert tuple(shown.shape) == (3, 1600, 1160)
    for colour in (0x0072B2, 0x009E73):  # bands and marks of the two regions
        wanted = torch.tensor([colour >> 16, colour >> 8 & 255, colour & 255], dtype=torch.uint8).view(3, 1, 1)
        assert (shown == wanted).all(0).sum() > 1000
    assert (shown[:, -60:] == 255).all()  # the page ends within the window


@pytest.mark.slow
def test_the_report_of_a_deep_model_takes_under_ten_seconds():
    import time

    import torchvision

    model = torchvision.models.resnet152()
    begin = time.process_time()  # others may share the machine
    report = mnet_fx.report(model, (torch.empty(2, 3, 224, 224, device="meta"),))
    for say in FORMATS.values():
        say(report)
    assert time.process_time() - begin < 10
    assert (report.rewritten_adds, report.residual_adds) == (46, 50)
