"""Pictures: what they show, in which colours, and that they need matplotlib only when they are drawn."""

import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import pytest
import torch
from test_report_formats import Bottleneck, Inner, Stages, encoder, report_of
from torch import nn

import mnet_fx
from mnet_fx.budget.estimates import PARTS, Estimate, Way
from mnet_fx.reporting import drawing, estimates, plots
from mnet_fx.reporting.road import Road
from mnet_fx.reporting.steps import timeline
from mnet_fx.reporting.svg import COLOURS

STARTS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("suffix", STARTS)
def test_a_report_is_drawn_in_every_format(tmp_path, suffix):
    report_of("stages").plot(tmp_path / f"map{suffix}")
    assert (tmp_path / f"map{suffix}").read_bytes().startswith(STARTS[suffix])


def test_a_report_shows_bytes_regions_and_what_was_left():
    report = report_of("stages")
    (axes,) = report.plot().axes
    curves = {line.get_label().split(":")[0]: line for line in axes.lines if ":" in line.get_label()}
    assert curves["original"].get_ydata()[-1] == report.saved
    assert curves["after the rewrite"].get_ydata()[-1] == report.kept
    assert curves["original"].get_linestyle() != curves["after the rewrite"].get_linestyle()
    assert "1 add(s) left as they are" in labels(axes)
    assert {text.get_text() for text in axes.texts} == {"3 steps", "6 steps"}


def test_the_road_goes_through_every_stretch_once():
    report = report_of("mixed")
    road = Road.of(report)
    assert road.length == sum(stretch.operations for stretch in report.stretches)
    assert list(road.ends) == sorted(road.ends)
    assert [name for name, _, _ in road.spans] == [region.name for region in report.regions]
    assert [code for _, code in road.left] == ["lost_context", "lost_context", "too_short"]
    assert all(end <= start for (_, _, end), (_, start, _) in itertools.pairwise(road.spans))


def test_a_preview_is_drawn_without_bytes(tmp_path):
    (axes,) = mnet_fx.report(Stages()).plot(tmp_path / "map.png").axes
    assert not [line for line in axes.lines if line.get_label().startswith("original")]


def way(name, outside, state):
    parts = dict.fromkeys(PARTS, 1 << 20) | {"outside of chains": outside << 20, "stream state": state << 20}
    return Way(name, outside << 20, outside << 20, sum(parts.values()), parts, {}, 1.0)


ESTIMATE = Estimate("Net", way("plain", 90, 0), way("checkpoint", 4, 20), way("momentum", 4, 3), 8, 12, "0.9", memory=64 << 20)


def test_an_estimate_is_bars_that_add_up():
    drawn = ESTIMATE.plot()
    (axes,) = drawn.axes
    for row, one in enumerate(ESTIMATE.ways):
        widths = [patch.get_width() for patch in axes.patches if abs(patch.get_y() + patch.get_height() / 2 - row) < 0.01]
        assert sum(widths) == one.total_bytes
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [p for p in PARTS if any(w.parts[p] for w in ESTIMATE.ways)]
    assert "64.0 MiB" in [text.get_text() for text in axes.texts]


def test_every_part_of_an_estimate_has_a_look_of_its_own():
    assert set(estimates._KINDS) == set(PARTS)
    assert len(set(estimates._KINDS.values())) == len(PARTS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(Bottleneck(4, 4) for _ in range(4)))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(("against", "values"), [("batch", [1, 2]), ("depth", None), ("gamma", [0.5, 0.9])])
def test_an_estimate_against(against, values):
    found = mnet_fx.estimate(Net(), (torch.randn(2, 4, 8, 8),))
    (axes,) = found.plot(against=against, values=values).axes
    curves = {line.get_label().split(":")[0]: line for line in axes.lines}
    assert set(curves) == {way.name for way in found.ways}
    assert len({(line.get_linestyle(), line.get_marker()) for line in curves.values()}) == len(curves)
    if against == "depth":
        assert dict(zip(curves["plain"].get_xdata(), curves["plain"].get_ydata(), strict=True))[1] == found.plain.total_bytes


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: ESTIMATE.plot(against="width"), mnet_fx.SettingsError, "against must be None or one of 'batch', 'depth', 'gamma'"),
        (lambda: ESTIMATE.plot(against="depth"), mnet_fx.MnetError, "no residual chain whose depth could vary"),
        (lambda: ESTIMATE.plot(against="gamma"), mnet_fx.MnetError, "gamma of its own"),
        (lambda: ESTIMATE.plot("bars.docx"), mnet_fx.SettingsError, r"path must end in one of .*\.png.*got 'bars.docx'"),
        (lambda: ESTIMATE.plot("nowhere/bars.png"), mnet_fx.SettingsError, "the folder of 'nowhere/bars.png' is not there"),
        (lambda: mnet_fx.plot_step("step"), mnet_fx.SettingsError, "step must be a callable"),
        (lambda: mnet_fx.plot_step({}), mnet_fx.SettingsError, "step must be a callable"),
        (lambda: mnet_fx.draw(nn.Linear(2, 2)), mnet_fx.MnetError, "Linear has no report"),
        (lambda: mnet_fx.reporting.Report(0, 0, (), ()).plot(), mnet_fx.MnetError, "knows no order of operations"),
    ],
)
def test_errors_say_what_is_wrong(ask, error, words):
    with pytest.raises(error, match=words):
        ask()


def test_a_step_is_drawn_with_its_peak(tmp_path):
    model, x = nn.Sequential(*(Bottleneck(8, 8) for _ in range(12))), torch.randn(4, 8, 16, 16)
    net = mnet_fx.momentumize(model, (x,))
    steps = {"plain": lambda: model(x).sum().backward(), "momentum": lambda: net(x).sum().backward()}
    (axes,) = mnet_fx.plot_step(steps, tmp_path / "step.png").axes
    assert [text.split(":")[0] for text in labels(axes)] == ["plain", "momentum"]
    assert max(axes.lines[0].get_ydata()) > max(axes.lines[1].get_ydata())
    measured = mnet_fx.measure(lambda: model(x).sum(), torch.Tensor.backward)
    assert abs(max(axes.lines[0].get_ydata()) - measured.peak) <= 0.02 * measured.peak
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_timeline_goes_up_and_comes_down_again():
    line = timeline(lambda: torch.ones(1000).exp().sum())
    assert [size > 0 for _, size in line].count(True) >= 2
    assert max(size for _, size in line) >= 8000
    assert line[-1][1] == 0
    assert [at for at, _ in line] == sorted(at for at, _ in line)


def test_a_drawing_has_a_cluster_for_each_region_and_an_arrow_for_each_flow(tmp_path):
    net = mnet_fx.momentumize(Stages(), (torch.randn(2, 3, 8, 8),))
    (axes,) = mnet_fx.draw(net, tmp_path / "graph.svg").axes
    written = [text.get_text() for text in axes.texts]
    assert sum(text.startswith("momentum_region_") for text in written) == len(net.report.regions)
    assert "1 left: projection_shortcut" in written
    assert (tmp_path / "graph.svg").read_bytes().startswith(b"<?xml")
    boxes = drawing.boxes(net.report)
    assert [box.reads for box in boxes] == [[], *([i] for i in range(len(boxes) - 1))]  # nothing but a line


def test_a_drawing_shows_who_reads_what():
    net = mnet_fx.momentumize(nn.Transformer(16, 2, 2, 2, 32, batch_first=True), (torch.randn(2, 5, 16), torch.randn(2, 6, 16)))
    boxes = drawing.boxes(net.report)
    memory = next(i for i, box in enumerate(boxes) if box.text.startswith("encoder.norm"))
    readers = [box.text for box in boxes if memory in box.reads]
    assert readers == ["step 1  decoder.layers.0", "step 4  decoder.layers.1"]
    assert 0 in next(box for box in boxes if "step 0  decoder" in box.text).reads
    mnet_fx.draw(net)


def test_long_regions_are_drawn_short(tmp_path):
    net = mnet_fx.momentumize(nn.Sequential(*(Bottleneck(4, 4) for _ in range(14))), (torch.randn(2, 4, 4, 4),))
    boxes = drawing.boxes(net.report)
    assert len(boxes) < 9
    assert any(box.text.startswith("steps 3 to 11") for box in boxes)
    assert sum(len(box.numbers) for box in boxes) == 1 + len(net.report.stretches)


def test_what_is_drawn_of_named_and_nested_regions(tmp_path):
    mnet_fx.draw(mnet_fx.momentumize(encoder(), regions=["layers"]), tmp_path / "named.pdf")
    mnet_fx.draw(mnet_fx.momentumize(Inner(), (torch.randn(2, 4),)), tmp_path / "nested.pdf")


def seen(colour, kind):
    """A colour as somebody with a kind of colour blindness, or a grey print, shows it (Machado, Oliveira, Fernandes 2009, severity 1)."""
    matrix = {
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }[kind]
    rgb = torch.tensor(matplotlib.colors.to_rgb(colour))
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return (torch.tensor(matrix) @ linear).clamp(0, 1)


@pytest.mark.parametrize("kind", ["protanopia", "deuteranopia", "tritanopia"])
def test_colours_can_be_told_apart_by_the_colour_blind(kind):
    lines = [colour for colour, _, _ in plots.LINES.values()]
    for colours in (COLOURS[:4], lines):  # beyond four regions, colours repeat in the end, and labels tell
        for one, other in itertools.combinations(colours, 2):
            assert (seen(one, kind) - seen(other, kind)).norm() > 0.07, (one, other)


def test_matplotlib_is_needed_only_for_pictures():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, mnet_fx\n"
        "report = mnet_fx.report(torch.nn.Linear(2, 2), (torch.ones(1, 2),)); report.to_html()\n"
        "try: report.plot()\n"
        "except mnet_fx.MnetError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent, timeout=120
    )
    assert "pip install 'mnet-fx[plot]'" in done.stdout, done.stderr
