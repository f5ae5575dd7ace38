"""Chains within the steps of chains: which are kept, the code of a step that calls a region, and the order inside of it."""

from __future__ import annotations

import dataclasses
import operator
import time

import pytest
import torch
import torch.fx as fx
from passes_models import PlainRegion, check_same, codes, lengths, linears, planned, program, traced
from torch import nn

from passes import InvariantError, RegionCode, plan, rewrite


def residual(self, x):
    for f in self.f:
        x = x + f(x)
    return x


def chain(*branches: nn.Module) -> nn.Module:
    return program(residual, f=list(branches))


def between(*branches: nn.Module) -> nn.Module:
    """A chain with a layer before it and one after."""
    return nn.Sequential(nn.Linear(4, 4), chain(*branches), nn.Linear(4, 4))


def nesting(found) -> dict[str, str]:
    """Number of steps and name of each region, and of the one that it lies in."""
    return {f"{len(region.steps)} {region.name[-1]}": region.within[-1:] for region in found.regions}


def test_a_chain_within_a_step_is_a_region_of_that_step():
    found = check_same(chain(between(*linears(2)), *linears(2)), torch.randn(2, 4), nested=True)
    assert nesting(found) == {"3 0": "", "2 1": "0"}
    assert (len(found.rewritten_adds), found.refusals) == (5, ())


def test_it_is_left_where_nesting_is_not_asked_for():
    found = check_same(chain(between(*linears(2)), *linears(2)), torch.randn(2, 4))
    assert (nesting(found), codes(found)) == ({"3 0": ""}, ["nested"] * 2)


def test_chains_within_chains_within_chains():
    innermost = [between(*linears(2)), between(*linears(2))]
    found = check_same(chain(between(*innermost), *linears(3)), torch.randn(2, 4), nested=True)
    assert nesting(found) == {"4 0": "", "2 1": "0", "2 2": "1", "2 3": "1"}
    assert found.refusals == ()


@pytest.mark.parametrize("inner", [2, 3])
def test_each_step_may_hold_as_many_adds_as_the_outer_chain_has(inner):
    """More would need more memory for the gradients of one step than the outer chain saves."""
    found = check_same(chain(between(*linears(inner)), between(*linears(inner))), torch.randn(2, 4), nested=True)
    if inner == 2:
        assert (nesting(found), codes(found)) == ({"2 0": "", "2 1": "0", "2 2": "0"}, [])
    else:
        assert (nesting(found), codes(found)) == ({"3 0": "", "3 1": ""}, ["nested"] * 2)
        assert "around regions that rewrite 3 adds" in found.refusals[0].explanation


def test_two_chains_of_one_step_count_together():
    both = nn.Sequential(between(*linears(2)), between(*linears(2)))
    found = check_same(chain(both, *linears(2)), torch.randn(2, 4), nested=True)
    assert (nesting(found), codes(found)) == ({"2 0": "", "2 1": ""}, ["nested"] * 3)


def test_what_the_region_within_returns_and_reads():
    """Its values that the step or the caller reads, side inputs of the caller, and the state of the outer chain as a side input."""

    def inner(self, x, side):
        shown = []
        y = self.into(x)
        for f in self.f:
            hidden = f(y * side).tanh()
            y = y + self.g(hidden) * x
            shown += [hidden, y]
        return self.out(y) + shown[0], shown

    def outer(self, x, side):
        outputs = []
        for block in self.blocks:
            y, shown = block(x, side)
            x = x + y
            outputs += shown
        return x, outputs

    layers = {"into": nn.Linear(4, 4), "g": nn.Linear(4, 4), "out": nn.Linear(4, 4)}
    blocks = [program(inner, f=linears(2), **layers) for _ in range(3)]
    found = check_same(program(outer, blocks=blocks), torch.randn(2, 4), torch.randn(2, 4), nested=True)
    assert sorted(nesting(found).values()) == ["", "0", "0", "0"]
    assert [len(region.escapes) for region in found.regions] == [0, 1, 1, 1]


def test_what_stands_between_the_inner_steps_moves_before_or_behind_the_region():
    def inner(self, x):
        y = self.into(x)
        y1 = y + self.f[0](y)
        late = self.late(y1)
        early = self.early(x)
        y2 = y1 + self.f[1](y1) * early
        return self.out(y2) + late * early

    layers = {name: nn.Linear(4, 4) for name in ("into", "late", "early", "out")}
    model = chain(program(inner, f=linears(2), **layers), *linears(2))
    seen: dict[str, RegionCode] = {}

    def build(code: RegionCode) -> nn.Module:
        seen[code.region.name] = code
        return nn.Identity()

    found = check_same(model, torch.randn(2, 4), nested=True)
    rewrite(traced(model), found, build)
    outer, within = (seen[region.name] for region in found.regions)
    assert outer.steps[0].modules == ("f.0.into", "f.0.early", within.region.name, "f.0.late", "f.0.out")
    assert list(seen) == [within.region.name, outer.region.name]


def test_steps_that_hold_equal_calls_share_their_body():
    model = chain(between(*linears(2)), between(*linears(2)), *linears(1))
    bodies: dict[str, list[object]] = {}

    def build(code: RegionCode) -> nn.Module:
        bodies[code.region.name] = [step.body for step in code.steps]
        return nn.Identity()

    gm = traced(model)
    rewrite(gm, plan(gm, nested=True), build)
    outer, first, second = (bodies[name] for name in sorted(bodies))
    assert outer[0] is outer[1] is not outer[2]
    assert first == second == [first[0]] * 2


def test_steps_that_call_their_regions_on_other_values_do_not_share():
    def outer(self, x, s, t):
        for first, second in ((s, t), (t, s)):
            y = self.into(x * s)
            for f in self.f:
                y = y + f(y * first) * second
            x = x + self.out(y)
        return x

    model = program(outer, into=nn.Linear(4, 4), f=linears(2), out=nn.Linear(4, 4))
    found = check_same(model, *(torch.randn(2, 4) for _ in range(3)), nested=True)
    assert nesting(found) == {"2 0": "", "2 1": "0", "2 2": "0"}


def test_a_chain_that_runs_across_two_steps_is_not_nested():
    """It goes on, from within the first step of a longer chain, in the second."""

    def forward(self, x):
        y = self.into(x)
        y = y + self.g[0](y)
        x = x + self.f[0](y)
        y = y + self.g[1](y) * x
        x = x + self.f[1](y)
        for f in self.f[2:]:
            x = x + f(x)
        return x

    found = check_same(program(forward, into=nn.Linear(4, 4), f=linears(4), g=linears(2)), torch.randn(2, 4), nested=True)
    assert all(not region.within for region in found.regions)


def test_the_end_of_the_outer_step_is_not_within_it():
    """The outer sum is the last node of its step, which the code of the step may leave out: no region can return it."""
    inner = program(lambda self, x: self.g(x + self.f(x)), f=nn.Linear(4, 4), g=nn.Linear(4, 4))
    found = planned(chain(inner, between(*linears(2))), nested=True)
    outer = found.regions[0]
    assert nesting(found) == {"2 0": "", "2 1": "0"}
    assert all(step.target not in region.steps[-1].nodes for region in found.regions[1:] for step in outer.steps)


def test_an_inner_chain_that_cannot_run_as_one_is_refused():
    """Both chains of the first step need each other between their steps; the longer one stays."""

    def crossed(self, x):
        y, z = self.into(x), self.other(x)
        y, z = y + self.f[0](y), z + self.g[0](z)
        y, z = y + self.f[1](y) * z, z + self.g[1](z) * y
        return self.out(y + self.f[2](y)) * z

    layers = {name: nn.Linear(4, 4) for name in ("into", "other", "out")}
    inner = program(crossed, f=linears(3), g=linears(2), **layers)
    found = check_same(chain(inner, *linears(5)), torch.randn(2, 4), nested=True)
    assert (lengths(found), codes(found)) == ([6, 3], ["interleaved"] * 2)


def test_where_the_end_of_a_chain_is_given_up_a_chain_in_one_of_its_steps_stays():
    """The write stands between the last two steps of the outer chain."""

    def forward(self, x, y):
        y = y * 1
        x = x + self.f[0](x)
        x = x + self.f[1](x)
        x = x + self.f[2](x) * y
        y.mul_(2)
        z = self.into(x)
        for g in self.g:
            z = z + g(z)
        return x + self.out(z) * y

    model = program(forward, f=linears(3), g=linears(2), into=nn.Linear(4, 4), out=nn.Linear(4, 4))
    found = check_same(model, torch.randn(2, 4), torch.randn(2, 4), gradients=False, nested=True)
    assert (lengths(found), codes(found)) == ([3, 2], ["interleaved"])
    assert [region.within for region in found.regions] == ["", ""]


def test_a_plan_whose_inner_region_lies_elsewhere_is_not_rewritten():
    model = chain(between(*linears(2)), between(*linears(2)))
    gm = traced(model)
    found = plan(gm, nested=True)
    outer, first, second = found.regions
    for wrong in ("momentum_region_9", second.name):
        moved = dataclasses.replace(found, regions=(outer, dataclasses.replace(first, within=wrong), second))
        with pytest.raises(InvariantError, match=f"does not lie within one step of {wrong}"):
            rewrite(gm, moved, lambda code: PlainRegion(model, code))


@pytest.mark.parametrize("nested", [False, True])
def test_a_chain_that_went_makes_room(nested):
    """The first chain shares a node with each of the others; the second has more adds, and with the first gone the third shares none."""

    def forward(self, a, b, c):
        p = self.p(a) * self.q(b)
        a = a + self.f[0](p)
        r = self.p(a) * self.q(c)
        a = a + self.f[1](r)
        b = b + self.g[0](p).relu()
        for g in self.g[1:]:
            b = b + g(b).relu()
        c = c + self.h[0](r).relu().tanh().relu().tanh().relu().tanh()
        return a, b, c + self.h[1](c).relu().tanh().relu().tanh().relu().tanh()

    model = program(forward, p=nn.Linear(4, 4), q=nn.Linear(4, 4), f=linears(2), g=linears(3), h=linears(2))
    found = check_same(model, *(torch.randn(2, 4) for _ in range(3)), nested=nested)
    assert (sorted(lengths(found)), codes(found)) == ([2, 3], ["nested"] * 2)


@pytest.mark.slow
def test_two_thousand_chains_within_one_take_seconds():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(2000):
        y = graph.call_module("f", (x,))
        for _ in range(2):
            y = graph.call_function(operator.add, (y, graph.call_module("f", (y,))))
        x = graph.call_function(operator.add, (x, graph.call_module("f", (y,))))
    graph.output(x)
    gm, start = fx.GraphModule({"f": nn.Linear(4, 4)}, graph), time.process_time()
    found = plan(gm, nested=True)
    assert len(rewrite(gm, found, lambda code: nn.Identity()).graph_module.graph.nodes) == 3
    assert len(found.regions) == 2001
    assert time.process_time() - start < 15  # two on an idle machine; a term quadratic in the regions would take minutes
