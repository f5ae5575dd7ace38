"""Chains whose first steps need each other's values."""

from __future__ import annotations

import pytest
import torch
from passes_models import check_same, codes, lengths, linears, program
from torch import nn


def coupled(self, a, b):
    """Two streams; the branches of the first steps read a value computed from the other stream."""
    p, q = self.p(a), self.q(b)
    a, b = a + self.f[0](p) * q, b + self.g[0](q) * p
    return a + self.f[1](a), b + self.g[1](b)


def model(forward=coupled, **parts):
    parts = {"f": linears(3), "g": linears(3), "p": nn.Linear(4, 4), "q": nn.Linear(4, 4)} | parts
    return program(forward, **parts)


def pair():
    return torch.randn(2, 4), torch.randn(2, 4)


def test_what_both_chains_need_is_computed_before_them():
    found = check_same(model(), *pair())
    assert (lengths(found), codes(found)) == ([2, 2], [])
    assert [(step.sides, step.extras) for region in found.regions for step in region.steps] == [
        (("p", "q"), ()),
        ((), ()),
        (("q", "p"), ()),
        ((), ()),
    ]


def test_all_that_it_is_computed_from_goes_with_it():
    def forward(self, a, b):
        p, q = self.p(a.relu()), self.q(b.relu()).tanh()
        a, b = a + self.f[0](p) * q, b + self.g[0](q) * p
        return a + self.f[1](a), b + self.g[1](b)

    found = check_same(model(forward), *pair())
    assert lengths(found) == [2, 2]
    assert all(set(step.nodes).isdisjoint({"p", "relu", "q", "relu_1", "tanh"}) for region in found.regions for step in region.steps)


def test_three_streams_as_in_coat():
    def forward(self, a, b, c):
        for _ in range(2):
            p, q, r = self.p(a), self.q(b), self.h(c)
            a, b, c = a + self.f[0](q + r) * p, b + self.f[1](p + r) * q, c + self.f[2](p + q) * r
            a, b, c = a + self.g[0](a), b + self.g[1](b), c + self.g[2](c)
            a, b, c = self.p(a), self.q(b), self.h(c)
        return a, b, c

    found = check_same(model(forward, h=nn.Linear(4, 4)), *pair(), torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([2] * 6, [])


def test_nothing_is_computed_outside_where_the_chains_can_run_without():
    def forward(self, a, b):
        p = self.p(a)
        a = a + self.f[0](p)
        a = a + self.f[1](a)
        return a, b + self.g[0](b) * p

    found = check_same(model(forward), *pair())
    assert [step.extras for step in found.regions[0].steps] == [("p",), ()]


def later(self, a, b):
    """The second steps need each other's values, which depend on the first."""
    a, b = a + self.f[0](a), b + self.g[0](b)
    p, q = self.p(a), self.q(b)
    return a + self.f[1](p) * q, b + self.g[1](q) * p


def in_place(self, a, b):
    """What the other chain reads is written in place, so that it cannot be moved alone."""
    p, q = self.p(a), self.q(b)
    p += 1
    q += 1
    a, b = a + self.f[0](p) * q, b + self.g[0](q) * p
    return a + self.f[1](a), b + self.g[1](b)


def whole(self, a, b):
    """The whole branch is read by others too."""
    p, q = self.p(a), self.q(b)
    s, t = self.f[0](p) * q, self.g[0](q) * p
    a, b = a + s, b + t
    return a + self.f[1](a), b + self.g[1](b), s, t


def link(self, a, b):
    """The sum before the link is read by others too."""
    p, q = self.p(a), self.q(b)
    s, t = a + self.f[0](p) * q, b + self.g[0](q) * p
    a, b = s.relu(), t.relu()
    return (a + self.f[1](a)).relu(), (b + self.g[1](b)).relu(), s, t


@pytest.mark.parametrize("forward", [later, in_place, whole, link])
def test_else_the_longest_chain_stays_alone(forward):
    found = check_same(model(forward), *pair(), gradients=False)
    assert (lengths(found), codes(found)) == ([2], ["interleaved"] * 2)


def test_nothing_is_computed_outside_where_that_does_not_help():
    """It is the second steps that need each other's values: one chain goes, and the other keeps its first step."""

    def forward(self, a, b):
        p, q = self.p(a), self.q(b)
        a, b = a + self.f[0](p), b + self.g[0](q)
        r, s = self.p(a), self.q(b)
        return a + self.f[1](r) * s, b + self.g[1](s) * r, p, q

    found = check_same(model(forward), *pair())
    assert (lengths(found), codes(found)) == ([2], ["interleaved"] * 2)
    assert len(found.regions[0].steps[0].extras) == 1


def test_a_residual_add_in_it_is_refused():
    def forward(self, a, b):
        p, q = self.p(a), self.q(b)
        p = self.p(p + self.h(p))
        a, b = a + self.f[0](p) * q, b + self.g[0](q) * p
        return a + self.f[1](a), b + self.g[1](b)

    found = check_same(model(forward, h=nn.Linear(4, 4)), *pair())
    assert (lengths(found), codes(found)) == ([2, 2], ["interleaved"])
    assert "is computed before a chain" in found.refusals[0].explanation


def test_a_region_within_it_keeps_it_inside():
    """The nodes of a region within the step cannot leave it one by one; the longer chain stays, and the region moves out of the other."""

    def forward(self, a, b):
        p, q = self.p(a), self.q(b)
        for h in self.h:
            p, q = p + h(p), q + h(q)
        p, q = self.p(p), self.q(q)
        a, b = a + self.f[0](p) * q, b + self.g[0](q) * p
        a, b = a + self.f[1](a), b + self.g[1](b)
        return a + self.f[2](a), b

    found = check_same(model(forward, h=linears(2)), *pair(), nested=True)
    assert codes(found) == ["interleaved"] * 2
    assert [(len(region.steps), region.within) for region in found.regions] == [(3, ""), (2, "momentum_region_0"), (2, "")]


def test_the_sum_of_the_first_step_stays_inside():
    """The other chain reads the sums before their activation, of which only the whole is known."""

    def forward(self, a, b):
        s, t = 0.5 * a + self.f[0](a), 0.5 * b + self.g[0](b)
        a, b = s.relu(), t.relu()
        return (0.5 * a + self.f[1](a) * t).relu(), (0.5 * b + self.g[1](b) * s).relu()

    found = check_same(model(forward), *pair())
    assert (lengths(found), codes(found)) == ([2], ["interleaved"] * 2)
