"""One program for each refusal code, and the table of codes in `docs/not-rewritten.md`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from passes_models import by_dynamo, linears, program
from torch import nn

import mnet_fx
from passes import CODES, plan, preview


def traced(forward, **parts):
    """The refusals of a program that is read without inputs."""
    found = preview(program(forward, **({"f": linears(3), "g": linears(3)} | parts)))
    return [refusal for gm in found.parts.values() for refusal in plan(gm).refusals]


def captured(forward, *inputs, f=None):
    """The same of one that Dynamo captures, which records shapes and dtypes."""
    return plan(by_dynamo(program(forward, f=f or linears(3)), *inputs)).refusals


def projection_shortcut(self, x):
    for f, g in zip(self.f, self.g, strict=True):
        x = f(x) + g(g(x).relu())
    return x


def widened(self, x, y):
    for f in self.f:
        x = x + f(x) * y
    return x


def widened_before_a_link(self, x, y):
    for f in self.f:
        x = F.relu(x + f(x) * y)
    return x


def narrowed(self, x):
    for f in self.f:
        x = (x + f(x.float())).bfloat16()
    return x


def residual(self, x):
    for f in self.f:
        x = x + f(x)
    return x


def complex_stream():
    return captured(residual, torch.ones(2, 4, dtype=torch.complex64), f=[nn.Linear(4, 4, dtype=torch.complex64) for _ in range(3)])


def activation_in_place(self, x):
    x = self.f[0](x)
    for g in self.g:
        x = x + g(F.relu_(x))
    return x


def writes_to_a_side_input(self, x, y):
    state = y * 1
    for f in self.f:
        x = x + f(state.add_(x))
    return x


def reads_inside(self, x):
    x1 = x + self.f[0](x)
    h = self.f[1](x1)
    x2 = x1 + h
    return x2 + self.f[2](x2 * h)


def written_between(self, x, y):
    y = y * 1
    x = x + self.f[0](x) * y
    y.mul_(2)
    return x + self.f[1](x) * y


def nodes_and_edges(self, x, y):
    y = y + self.f[0](x * y)
    x = x + self.g[0](x * y)
    return y + self.f[1](x * y), x


def single(self, x):
    return x + self.f[0](x)


def within(self, x):
    def inner(x):
        y = self.g[0](x)
        for f in self.f:
            y = y + f(y)
        return x + y

    return inner(inner(x))


def mixed_between(self, x):
    for f in self.f:
        x = torch.cumsum(x + f(x), -1)
    return x


def branches(self, x):
    return residual(self, x) if x.sum() > 0 else x


def in_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return residual(self, x)


def before_a_graph_break():
    """The one code that only the backend of torch.compile gives."""

    def forward(self, x):
        x = residual(self, x)
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    mnet_fx.reset_reports()
    with torch.no_grad():
        torch.compile(program(forward, f=linears(3)), backend=mnet_fx.backend(inner="eager"))(torch.randn(2, 4))
    return [refusal for report in mnet_fx.reports() for refusal in report.refusals]


def in_a_report(forward):
    with pytest.warns(mnet_fx.MnetWarning, match="no residual chain"):
        return mnet_fx.momentumize(program(forward, f=linears(3)), (torch.randn(2, 4),)).report.refusals


def left_by_the_first_call():
    """The other code that a plan alone does not give."""

    def forward(self, x):
        x = residual(self, x)
        return x.cumsum(-1) + x

    gm = by_dynamo(program(forward, f=linears(4)), torch.randn(2, 4))
    return plan(gm, divided=lambda paths: (range(1, len(paths)),)).refusals


def beside_a_marked_list():
    """One that only `regions="auto"` gives: of two lists the library marks one."""

    class GradientCheckpointingLayer(nn.TransformerEncoderLayer):
        pass

    model = program(residual, f=linears(2))
    model.layers = nn.ModuleList(GradientCheckpointingLayer(4, 1, 4) for _ in range(2))
    model.more = nn.ModuleList(copy.deepcopy(part) for part in [program(residual, f=linears(2))] * 2)
    return mnet_fx.report(model, regions="auto").refusals


def behind_a_disabled_door():
    """One that only a call gives: a module that Dynamo leaves to Python."""
    model = program(lambda self, x: self.head(residual(self, x) * 2), f=linears(2), head=program(residual, f=linears(2)))
    type(model.head).forward = torch.compiler.disable(type(model.head).forward)
    net = mnet_fx.momentumize(model)
    with pytest.warns(mnet_fx.MnetWarning, match="left their code to Python"):
        net(torch.randn(2, 4))
    return [refusal for refusal in net.report.refusals if refusal.code != "graph_break"]


TRIGGERS = {
    "projection_shortcut": lambda: traced(projection_shortcut),
    "two_streams": lambda: traced(nodes_and_edges),
    "shape_changed": lambda: captured(widened_before_a_link, torch.randn(1, 4), torch.randn(2, 4)),
    "broadcast": lambda: captured(widened, torch.randn(1, 4), torch.randn(2, 4)),
    "dtype_changed": lambda: captured(narrowed, torch.randn(2, 4)),
    "not_real": complex_stream,
    "inplace_stream": lambda: traced(activation_in_place),
    "mutated_side": lambda: traced(writes_to_a_side_input),
    "side_from_inside": lambda: traced(reads_inside),
    "interleaved": lambda: traced(written_between),
    "too_short": lambda: traced(single),
    "interrupted": lambda: captured(mixed_between, torch.randn(2, 4)),
    "left_before": left_by_the_first_call,
    "nested": lambda: traced(within),
    "untraceable": lambda: mnet_fx.momentumize(program(branches, f=linears(3))).report.refusals,
    "lost_context": lambda: in_a_report(in_autocast),
    "list_left": beside_a_marked_list,
    "left_to_python": behind_a_disabled_door,
    "graph_break": before_a_graph_break,
}


def test_every_code_has_a_trigger():
    assert set(TRIGGERS) == set(CODES)


@pytest.mark.parametrize("code", TRIGGERS)
def test_the_program_of_each_code(code):
    """It meets its code, and no other but that of what is left over next to it."""
    refusals = TRIGGERS[code]()
    assert code in {refusal.code for refusal in refusals}
    assert {refusal.code for refusal in refusals} <= {code, "too_short"}
    for refusal in refusals:
        assert refusal.explanation
        assert refusal.hint == CODES[refusal.code].hint


def test_the_table_of_codes():
    text = (Path(__file__).parent.parent.parent / "docs" / "not-rewritten.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 4 and "." not in line.split("`")[1]]
    assert rows == [f"| `{code}` | {entry.meaning} | {entry.hint} |" for code, entry in CODES.items()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "batch_by_keyword", "instance", "torch", "aten"])
def test_running_statistics_that_are_no_buffers_are_written_to(norm, training):
    def forward(self, x, mean, var):
        for f in self.f:
            y = f(x)
            if norm == "batch":
                y = F.batch_norm(y, mean, var, None, None, training)
            elif norm == "batch_by_keyword":
                y = F.batch_norm(y, running_mean=mean, running_var=var, training=training)
            elif norm == "instance":
                y = F.instance_norm(y, mean, var, use_input_stats=training)
            elif norm == "torch":
                y = torch.batch_norm(y, None, None, mean, var, training, 0.1, 1e-5, True)
            else:
                y = torch.ops.aten.instance_norm.default(y, None, None, mean, var, training, 0.1, 1e-5, True)
            x = x + y
        return x

    assert {refusal.code for refusal in traced(forward)} == ({"mutated_side"} if training else set())


def test_running_statistics_that_are_buffers_are_not_refused():
    def forward(self, x):
        for norm in self.f:
            x = x + F.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        return x

    assert not traced(forward, f=nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3)))


def test_what_stands_between_two_sums_is_named():
    """Once for both of them; not where the shape changes in between, where there is nothing to be done."""

    def forward(self, x):
        x = x + self.f[0](x).tanh()
        x = (x + self.f[1](x).tanh()).cumsum(-1) * 2
        x = x + self.f[2](x).tanh()
        x = x.repeat(1, 2)[:, :3].cumsum(-1)
        return x + x.sort(-1).values

    model = program(forward, f=linears(3))
    found = {refusal.node: refusal for refusal in plan(by_dynamo(model, torch.randn(2, 4)), min_steps=3).refusals}
    assert [refusal.code for refusal in found.values()] == ["interrupted"] * 3 + ["too_short"]
    text = {refusal.explanation for refusal in found.values() if refusal.code == "interrupted"}
    assert text == {"%cumsum stands between %add_1 and %x_1, the skip of %x_2"}
