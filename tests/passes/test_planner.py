"""Steps, extras, escapes, cuts, and one program for each refusal code."""

from __future__ import annotations

import copy
import time

import pytest
import torch
import torch.nn.functional as F
import torchvision
import zoo
from passes_models import PlainRegion, check_same, codes, lengths, linears, planned, program, rewritten, traced
from torch import nn

from passes import CODES, InvariantError, Plan, Refusal, plan, preview, rewrite


def test_escapes_become_outputs():
    def forward(self, x):
        features = []
        for f in self.f:
            x = x + f(x)
            features.append(x)
        return features

    found = check_same(program(forward, f=linears(4)), torch.randn(2, 4))
    assert found.regions[0].escapes == (1, 2, 3)


def test_values_inside_a_branch_become_extras():
    def forward(self, x):
        hidden = []
        for f, g in zip(self.f, self.g, strict=True):
            hidden.append(f(x))
            x = x + g(hidden[-1].relu())
        return x, hidden

    found = check_same(program(forward, f=linears(3), g=linears(3)), torch.randn(2, 4))
    assert [len(step.extras) for step in found.regions[0].steps] == [1, 1, 1]


def test_assertions_do_not_keep_the_stream_alive():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            torch._assert(x.dim() == 2, f"got {x.shape}")
            return x + self.f(x)

    model = nn.Sequential(*(Block() for _ in range(3)))
    found = check_same(model, torch.randn(2, 4))
    assert found.regions[0].escapes == ()
    with pytest.raises(AssertionError, match="got "):
        rewritten(model, traced(model), found)(torch.randn(2, 2, 4))


def test_a_side_input_computed_for_one_step_moves_into_it():
    def forward(self, x, memory):
        for f, key in zip(self.f, self.key, strict=True):
            x = x + f(x) * key(memory).relu_()
        return x

    found = check_same(program(forward, f=linears(3), key=linears(3)), torch.randn(2, 4), torch.randn(2, 4))
    assert found.regions[0].sides == ("memory",)


def add_into(x: torch.Tensor, y: torch.Tensor) -> None:
    x.add_(y)


torch.fx.wrap("add_into")


def test_an_unknown_function_without_a_reader_has_an_effect():
    def forward(self, x):
        for f, g in zip(self.f, self.g, strict=True):
            h = f(x)
            add_into(h, x * 2)
            x = x + g(h)
        return x

    assert lengths(check_same(program(forward, f=linears(3), g=linears(3)), torch.randn(2, 4))) == [3]


def test_in_place_results_that_nobody_names():
    def forward(self, x):
        for f, g in zip(self.f, self.g, strict=True):
            h = f(x)
            h.relu_()
            h[:, 0] = 1.0
            x = x + g(h)
        return x

    assert lengths(check_same(program(forward, f=linears(3), g=linears(3)), torch.randn(2, 4), gradients=False)) == [3]


def test_a_parameter_free_constant_is_made_anew_in_each_call():
    def forward(self, x):
        for f in self.f:
            mask = torch.ones(4, dtype=x.dtype).tril()
            mask[0] = 0
            x = x + f(x) * mask
        return x

    model = program(lambda self, x: forward(self, x.unsqueeze(1)), f=linears(3))
    for f in model.f:
        f.register_parameter("bias", None)

    def one_dimensional(self, x):
        for f in self.f:
            mask = torch.ones(4)
            mask[0] = 0
            x = x + f(x) * mask
        return x

    assert lengths(check_same(program(one_dimensional, f=linears(3)), torch.randn(2, 4))) == [3]


def test_granularity_module_groups_by_block():
    def two(self, x):
        x = x + self.f(x)
        return x + self.g(x)

    model = nn.Sequential(*(program(two, f=nn.Linear(4, 4), g=nn.Linear(4, 4)) for _ in range(3)))
    assert lengths(check_same(model, torch.randn(2, 4))) == [6]
    found = check_same(model, torch.randn(2, 4), granularity="module")
    (region,) = found.regions
    assert [(step.path, step.form, len(step.adds)) for step in region.steps] == [(str(t), "block", 2) for t in range(3)]
    assert region.kind == "block"


def test_granularity_module_falls_back_to_adds():
    def four(self, x):
        for f in self.f:
            x = x + f(x)
        return x

    assert lengths(check_same(program(four, f=linears(4)), torch.randn(2, 4), granularity="module")) == [4]
    shared = program(lambda self, x: four(self, x), f=linears(2))
    found = check_same(nn.Sequential(shared, shared, shared), torch.randn(2, 4), granularity="module")
    assert lengths(found) == [3]  # three calls of one block are three steps

    def two(self, x):
        x = x + self.f(x)
        return x + self.g(x)

    blocks = nn.Sequential(*(program(two, f=nn.Linear(4, 4), g=nn.Linear(4, 4)) for _ in range(2)))
    assert [lengths(planned(blocks, "module", min_steps)) for min_steps in (2, 3)] == [[2], [4]]


@pytest.mark.parametrize(
    ("blocks", "granularity", "expected"),
    [(7, 3, [6, 6, 2]), (6, 2, [4, 4, 4]), (6, 1, [2] * 6), (4, 4, [6, 2]), (2, 9, [2, 2]), (1, 2, [1, 1])],
)
def test_a_number_makes_a_step_of_so_many_blocks_or_of_fewer_where_that_is_too_short(blocks, granularity, expected):
    def two(self, x):
        x = x + self.f(x)
        return x + self.g(x)

    model = nn.Sequential(*(program(two, f=nn.Linear(4, 4), g=nn.Linear(4, 4)) for _ in range(blocks)))
    (region,) = check_same(model, torch.randn(2, 4), granularity=granularity).regions
    assert [len(step.adds) for step in region.steps] == expected


def test_an_inner_value_as_side_input_cuts_the_chain():
    def forward(self, x):
        states = [x, x + self.f[0](x)]
        for f in self.f[1:]:
            states.append(states[-1] + f(states[-1] * states[-2]))
        return states[-1]

    found = check_same(program(forward, f=linears(6)), torch.randn(2, 4))
    assert lengths(found) == [2, 2, 2]


def test_two_streams_that_read_each_other_are_not_both_rewritten():
    def forward(self, x, y):
        for f, g in zip(self.f, self.g, strict=True):
            x, y = x + f(x) * y, y + g(y) * x
        return x, y

    found = check_same(program(forward, f=linears(4), g=linears(4)), torch.randn(2, 4), torch.randn(2, 4))
    assert set(codes(found)) <= {"interleaved", "side_from_inside", "too_short"}
    assert sum(lengths(found)) + len(found.refusals) == 8


def relu_first(self, x):
    x = self.stem(x)
    for f in self.f:
        x = x + f(F.relu_(x))
    return x


def caller_owned(self, x):
    for f in self.f:
        x += f(x)
    return x


def writes_side(self, x, y):
    state = y * 1
    for f, g in zip(self.f, self.g, strict=True):
        state.add_(g(x))
        x = x + f(state)
    return x


def around(self, x):
    y = self.g[0](x)
    for f in self.f:
        y = y + f(y)
    return x + y


def projects(self, x):
    for f, g in zip(self.f, self.g, strict=True):
        x = self.short(x) + g(f(x).relu())
    return x


def depends_on_inside(self, x):
    x1 = x + self.f[0](x)
    h = self.f[1](x1)
    x2 = x1 + h
    return x2 + self.f[2](x2 * h)


def write_between(self, x):
    x = self.stem(x)
    x1 = x + self.f[0](x)
    y = self.stem(x1)
    x2 = x1 + self.f[1](x1)
    y.mul_(x2)
    x3 = x2 + self.f[2](x2)
    return x3, y


REFUSED = {
    "inplace_stream": (relu_first, 1),
    "inplace_stream of the caller": (caller_owned, 1),
    "mutated_side": (writes_side, 2),
    "projection_shortcut": (projects, 1),
    "side_from_inside": (depends_on_inside, 1),
    "too_short": (lambda self, x: x + self.f[0](x), 1),
    "nested": (lambda self, x: around(self, around(self, x)), 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_code_of_the_plan_has_a_program(name):
    forward, inputs = REFUSED[name]
    model = program(forward, stem=nn.Linear(4, 4), short=nn.Linear(4, 4), f=linears(3), g=linears(3))
    found = planned(model)
    refused = {refusal.code: refusal for refusal in found.refusals}
    code = name.split()[0]
    assert code in refused
    assert refused[code].hint == CODES[code].hint
    assert f"%{refused[code].node}" in refused[code].explanation or "%" in refused[code].explanation or code == "too_short"
    check_same(model, *(torch.randn(2, 4) for _ in range(inputs)), gradients=False)


def test_interleaved():
    """The write between reads one state and changes what a later step reads."""

    def forward(self, x, y):
        y = y * 1
        x1 = x + self.f[0](x) * y
        y.mul_(2)
        return x1 + self.f[1](x1) * y

    model = program(forward, f=linears(2))
    found = check_same(model, torch.randn(2, 4), torch.randn(2, 4), gradients=False)
    assert set(codes(found)) == {"interleaved"}


def test_writes_outside_that_fit_are_moved():
    model = program(write_between, stem=nn.Linear(4, 4), f=linears(3))
    assert lengths(check_same(model, torch.randn(2, 4), gradients=False)) == [3]


def test_facts_of_shape_and_dtype():
    model = program(lambda self, x: (lambda y: y + self.f[1](y))(x + self.f[0](x)), f=linears(2))

    def found(first, rest):
        """Codes and lengths of the plan, where what the first add reads is of another shape and dtype than what comes later."""
        gm = traced(model)
        for node in gm.graph.nodes:
            shape, dtype = first if node.name in ("x", "f_0") else rest
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        result = plan(gm, min_steps=1)
        return codes(result), lengths(result), result.regions[-1].shape, result.regions[-1].dtype

    whole, half, other = ((2, 4), torch.float32), ((2, 4), torch.float16), ((2, 4), torch.bfloat16)
    assert found(((1, 4), torch.float32), whole) == (["broadcast"], [1], (2, 4), "float32")
    assert found(whole, half) == (["dtype_changed"], [1], (2, 4), "float16")
    assert found(half, other) == (["dtype_changed"], [1], (2, 4), "bfloat16")  # neither holds the other
    assert found(half, whole)[:2] == ([], [2])
    assert found(((2, 4), torch.int64), whole)[:2] == (["not_real"], [1])
    assert found(whole, ((2, 4), torch.complex64))[0] == ["not_real"]
    with torch.autocast("cpu"):
        assert found(whole, half)[:2] == ([], [2])


def test_options_are_checked():
    gm = traced(program(caller_owned, f=linears(2)))
    with pytest.raises(ValueError, match='granularity must be "add", "module" or how many blocks make a step, got \'block\''):
        plan(gm, granularity="block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_steps must be at least 1, got 0"):
        plan(gm, min_steps=0)


def test_min_steps():
    model = program(lambda self, x: x + self.f[0](x), f=linears(1))
    assert lengths(planned(model, min_steps=1)) == [1]
    assert planned(model).refusals[0].explanation == "the chain is 1 of at least 2 steps long"


def test_a_plan_of_another_graph_is_a_broken_invariant():
    model = program(relu_first, stem=nn.Linear(4, 4), f=linears(3))
    other = planned(program(lambda self, y: y + self.h[0](y), h=linears(1)), min_steps=1)
    with pytest.raises(InvariantError, match="names nodes that the graph does not have"):
        rewrite(traced(model), other, lambda code: PlainRegion(model, code))
    refusal = Refusal("too_short", "nothing", "", "", "")
    assert not refusal
    with pytest.raises(InvariantError, match="exactly once"):
        rewrite(traced(model), Plan((), (), (refusal,)), lambda code: PlainRegion(model, code))


def test_two_thousand_steps():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.f = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x, mask):
            return x + self.f(self.norm(x)) * mask + self.f(x)

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return x

    model = program(forward, blocks=[Block() for _ in range(2000)])
    bodies = set()

    def build(code):
        bodies.update(id(step.body) for step in code.steps)
        return nn.Identity()

    start = time.process_time()
    gm = preview(model).parts[""]
    found = plan(gm)
    rewrite(gm, found, build)
    assert lengths(found) == [2000]
    assert len(bodies) == 1
    assert time.process_time() - start < 10


@pytest.mark.slow
def test_five_thousand_steps_of_twelve_nodes_are_matched_and_rewritten_in_thirty_seconds():
    block = nn.ModuleDict({"norm": nn.LayerNorm(4), "f": nn.Linear(4, 4), "g": nn.Linear(4, 4)})
    model = nn.Module()
    model.blocks = nn.ModuleList([block] * 5000)
    graph = torch.fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    for t in range(5000):
        h = graph.call_module(f"blocks.{t}.f", (graph.call_module(f"blocks.{t}.norm", (x,)),))
        h = graph.call_function(torch.mul, (graph.call_method("relu", (h,)), mask))
        size = graph.call_method("size", (x, 0))
        h = graph.call_method("flatten", (graph.call_method("transpose", (graph.call_method("view", (h, size, 2, 2)), 1, 2)), 1))
        h = graph.call_function(torch.mul, (graph.call_module(f"blocks.{t}.g", (h,)), 0.5))
        x = graph.call_function(torch.add, (x, graph.call_method("tanh", (h,))))
    graph.output(x)
    gm = torch.fx.GraphModule(model, graph)
    bodies = set()

    def build(code):
        bodies.update(id(step.body) for step in code.steps)
        return nn.Identity()

    start = time.process_time()
    found = plan(gm)
    rewrite(gm, found, build)
    assert time.process_time() - start < 30
    assert len(graph.nodes) > 60_000
    assert (lengths(found), len(bodies)) == ([5000], 1)


def test_resnet_152_takes_less_than_a_second_after_capture():
    """The best of three: a whole collection of what other tests have left takes longer than that."""
    model, seconds = torchvision.models.resnet152(), []
    for _ in range(3):
        gm = traced(model)
        start = time.process_time()
        found = plan(gm)
        rewrite(gm, found, lambda code: nn.Identity())
        seconds.append(time.process_time() - start)
        assert lengths(found) == [2, 7, 35, 2]
    assert min(seconds) < 1


def test_only_what_lies_on_the_cycle_is_dropped():
    """A shorter chain behind it merely waits."""

    def forward(self, x, y):
        y = y * 1
        x = x + self.f[0](x) * y
        y.mul_(2)
        x = x + self.f[1](x) * y
        x = self.stem(x + self.f[2](x))
        for g in self.g:
            x = x + g(x)
        return x

    model = program(forward, stem=nn.Linear(4, 4), f=linears(3), g=linears(2))
    found = check_same(model, torch.randn(2, 4), torch.randn(2, 4), gradients=False)
    assert (lengths(found), codes(found)) == ([2, 2], ["interleaved"])


def test_of_chains_that_read_each_other_late_the_beginnings_stay():
    """As in LXMERT: each stream has layers of its own, then each layer reads both."""

    def forward(self, x, y):
        for f in self.f[:5]:
            x = x + f(x).tanh()
        for g in self.g[:3]:
            y = y + g(y).tanh()
        for f, g in zip(self.f[5:], self.g[3:], strict=True):
            x, y = x + (f(x) * y).tanh(), y + (g(y) * x).tanh()
        return x, y

    model = program(forward, f=linears(8), g=linears(6))
    found = check_same(model, torch.randn(2, 4), torch.randn(2, 4))
    assert lengths(found) == [6, 3, 2]
    assert codes(found) == ["interleaved"] * 3


def test_a_side_input_that_descends_from_inside_cuts_the_chain():
    def forward(self, x):
        x = x + self.f[0](x)
        h = self.f[1](x)
        x = x + h
        k = self.stem(h)
        x = x + self.f[2](x) * k
        return x + self.g[0](x), k

    found = check_same(program(forward, stem=nn.Linear(4, 4), f=linears(3), g=linears(1)), torch.randn(2, 4))
    assert lengths(found) == [2, 2]


def test_the_outer_chain_wins_unless_those_inside_rewrite_more():
    def inner(self, x):
        x = self.f[0](x)
        for f in self.f[1:]:
            x = x + f(x)
        return self.f[0](x)

    def outer(self, x):
        for f in self.f:
            x = x + f(x)
        return x

    model = program(outer, f=[program(inner, f=linears(3)), *linears(3)])
    found = check_same(model, torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([4], ["nested"] * 2)


def test_of_two_chains_that_need_each_other_the_longer_stays():
    def forward(self, x, y):
        x, y = x + self.f[0](x), y + self.g[0](y)
        x, y = x + self.f[1](x) * y, y + self.g[1](y) * x
        return x + self.f[2](x), y

    found = check_same(program(forward, f=linears(3), g=linears(2)), torch.randn(2, 4), torch.randn(2, 4))
    assert (lengths(found), codes(found)) == ([3], ["interleaved"] * 2)


@pytest.mark.parametrize("functional", [False, True])
def test_batch_statistics_move_in_the_order_of_the_model(functional):
    """A BatchNorm of the chain that is called between its steps as well."""

    def norm(self, x):
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True) if functional else self.norm(x)

    def between(self, x, y):
        total = 0
        for f in self.f:
            x = x + f(norm(self, x))
            total = total * 2 - norm(self, y)
        return x, total

    def shared(self, x):
        for f in self.f:
            x = x + f(norm(self, x))
        return x, norm(self, x * x)

    x = torch.randn(5, 4)
    found = plan(traced(program(between, f=linears(3), norm=nn.BatchNorm1d(4)).train()))
    assert (lengths(found), codes(found)) == ([], ["interleaved"] * 3)
    model = program(shared, f=linears(3), norm=nn.BatchNorm1d(4)).train()
    net = copy.deepcopy(model)
    gm = traced(net)
    assert lengths(plan(gm)) == [3]
    new = rewritten(net, gm, plan(gm))
    for a, b in zip((*new(x), *net.buffers()), (*model(x), *model.buffers()), strict=True):
        zoo.assert_agree(a, b)


class Half(nn.Module):
    """A view in eval mode; what it reads keeps it a leaf."""

    def forward(self, x):
        return x if self.training else x[:, :2]


def test_what_an_unknown_module_returns_may_be_memory_that_is_written_to_later():
    def forward(self, x, m):
        m = m * 2
        half = self.lender(m)
        x = x + self.f[0](x)
        x = x + self.f[1](x) * half.sum()
        if self.early:
            m.mul_(3)
        x = x + self.f[2](x) * half.sum()
        m.mul_(5)
        return x + m

    inputs = torch.randn(2, 4), torch.randn(2, 4)
    for early, expected in ((True, ([2], ["interleaved"])), (False, ([3], []))):
        found = check_same(program(forward, f=linears(3), lender=Half(), early=early), *inputs)
        assert (lengths(found), codes(found)) == expected
