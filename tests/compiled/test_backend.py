"""The backend of `torch.compile`: exact under a compiler, whatever the graph looks like; and rewritten models that are compiled."""

import copy
import logging
import os
import subprocess
import sys
import warnings

import onnxruntime
import pytest
import torch
import zoo
from torch import nn
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx
from mnet_fx import InversionError, SettingsError
from mnet_fx.budget.measured import measure

# Dynamo looks at .grad of what flows into a graph after a break, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    mnet_fx.reset_reports()


class Block(nn.Module):
    """Two residual adds: one behind dropout, one behind a BatchNorm; or, `post`, a norm after the add."""

    def __init__(self, width: int, post: bool = False) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.batch, self.drop, self.post = nn.BatchNorm1d(width), nn.Dropout(0.2), post

    def forward(self, x, scale=None):
        y = self.drop(torch.tanh(self.first(self.norm(x))))
        x = x + (y if scale is None else y * scale)
        x = x + self.batch(self.second(x))
        return self.norm(x) if self.post else x


class Net(nn.Module):
    """Stem, blocks and head; a side input, blocks under other contexts, an early exit, a shared block, a graph break, as asked for."""

    def __init__(self, depth: int = 3, width: int = 6, **features) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.features = features
        self.stem, self.head = nn.Linear(4, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList([Block(width, "post" in features) for _ in range(1 if "shared" in features else depth)])
        self.depth = depth

    def forward(self, x, scale=None):
        x = early = self.blocks[0](self.stem(x), scale)
        x = self.blocks[1 % len(self.blocks)](x, scale)
        if "broken" in self.features:
            torch._dynamo.graph_break()
        for t in range(2, self.depth):
            x = self.blocks[t % len(self.blocks)](x, scale)
        if "contexts" in self.features:
            with torch.no_grad():
                offset = self.head(x.abs())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.head(x)
            return y.float() + offset
        return (self.head(x), early) if "early" in self.features else self.head(x)


FEATURES = [{}, {"post": 1}, {"contexts": 1}, {"early": 1}, {"shared": 1}, {"broken": 1}]


def images(batch: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def compiled(model, **options):
    """A compiled copy of the model, and the copy."""
    model = copy.deepcopy(model)
    return torch.compile(model, backend=mnet_fx.backend(**{"inner": "aot_eager"} | options)), model


def step(function, model, *args, **kwargs):
    """All that one training step gives and leaves."""
    torch.manual_seed(7)
    out = function(*args, **kwargs)
    first, *more = out if isinstance(out, tuple) else (out,)
    (first.float().square().sum() + sum(o.sum() for o in more)).backward()
    return {"output": first.detach()} | zoo.leftovers(model)


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "".join(f) or "simple")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_reversible_is_stored_bit_for_bit(features, training):
    model = Net(**features).train(training)
    scale = torch.linspace(0.5, 1.5, 6)
    pair = [step(*compiled(model, backward=kind), images(), scale=scale) for kind in ("reversible", "stored")]
    zoo.assert_identical(*pair)
    assert sum(report.rewritten_adds for report in mnet_fx.reports()) == 2 * 6


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: "".join(f) or "simple")
def test_gamma_zero_is_the_inner_backend_alone(features):
    model = Net(**features).double()
    found = step(*compiled(model, gamma=0), images(dtype=torch.float64))
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    expected = step(torch.compile(plain, backend="aot_eager"), plain, images(dtype=torch.float64))
    zoo.assert_near(found, expected, 1e-8)


def test_it_is_the_network_that_momentumize_makes():
    model = Net().double().eval()
    found = step(*compiled(model, gamma=0.9, inner="eager"), images(dtype=torch.float64))
    net = zoo.rewritten(copy.deepcopy(model), gamma=0.9)
    zoo.assert_near(found, step(net, net, images(dtype=torch.float64)), 1e-9)


def test_batch_statistics_move_once():
    function, model = compiled(Net())
    step(function, model, images())
    assert {int(block.batch.num_batches_tracked) for block in model.blocks} == {1}


def test_inductor_train_and_eval_with_dropout():
    model = Net(depth=2)
    double = copy.deepcopy(model).double().eval()
    for training in (True, False):
        torch._dynamo.reset()
        model.train(training)
        pair = [step(*compiled(model, inner="inductor", backward=kind), images()) for kind in ("reversible", "stored")]
        zoo.assert_identical(*pair)
    torch._dynamo.reset()
    doubles = images(dtype=torch.float64)
    zoo.assert_near(step(*compiled(double, inner="inductor", gamma=0), doubles), step(double, double, doubles), 1e-8)


def test_autocast_around_the_forward_alone():
    results = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        function, model = compiled(Net(), backward=kind)
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(images())
        out.float().square().sum().backward()
        results.append({"output": out.detach()} | zoo.leftovers(model))
    zoo.assert_identical(*results)
    assert mnet_fx.reports()[0].rewritten_adds == 6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_has_the_bits_of_training(context):
    function, _ = compiled(Net().eval())
    trained = function(images())
    with context():
        assert torch.equal(function(images()), trained)


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_shapes_and_modes_are_compiled_again(dynamic):
    """Windows of the stream make sizes such as batch * 4, of which a compiler must be told what they are made of."""

    class Windows(Net):
        def forward(self, x):
            x = self.stem(x)
            batch = x.shape[0]
            x = x.view(batch * 2, 4, -1)
            for block in self.blocks:
                x = x + block.drop(block.first(block.norm(x)))
            return self.head(x.view(batch, -1, x.shape[-1]))

    results = {}
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        model = copy.deepcopy(Windows())
        function = torch.compile(model, backend=mnet_fx.backend(inner="aot_eager", backward=kind), dynamic=dynamic)
        results[kind] = {}
        for batch, training in [(2, True), (3, True), (5, True), (5, False)]:
            model.train(training)
            x = torch.randn(batch, 8, 4, generator=torch.Generator().manual_seed(batch))
            results[kind] |= {f"{batch} {training} {name}": t for name, t in step(function, model, x).items()}
    zoo.assert_identical(results["reversible"], results["stored"])
    assert {report.rewritten_adds for report in mnet_fx.reports()} == {3}


class Odd(nn.Module):
    """A chain of three steps `x + tanh(linear(x))` with something odd around or in it: `forward(self, x, more)` is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers, self.odd = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), forward

    def chain(self, x, factor=1.0):
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * factor
        return x

    def forward(self, x, *more):
        return self.odd(self, x, *more)


def odd_is_right(forward, *more, adds=3):
    """Gamma 0 equals the inner backend, and reversible equals stored."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    doubles = [x.double(), *(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in more)]
    zoo.assert_identical(*(step(*compiled(Odd(forward), backward=kind), x, *more) for kind in ("reversible", "stored")))
    assert [report.rewritten_adds for report in mnet_fx.reports()] == [adds, adds]
    model = Odd(forward).double()
    torch._dynamo.reset()
    expected = step(torch.compile(plain := copy.deepcopy(model), backend="aot_eager"), plain, *doubles)
    torch._dynamo.reset()
    zoo.assert_near(step(*compiled(model, gamma=0), *doubles), expected, 1e-8)


def test_what_follows_a_chain_may_write_to_its_end():
    odd_is_right(lambda self, x: self.chain(self.chain(x).relu_().sin()).view(-1).mul_(2), adds=6)


def test_views_of_what_each_step_leaves_are_of_that_step():
    def forward(self, x):
        maps = []
        for layer in self.layers:
            maps.append(torch.softmax(layer(x), -1).sin())
            x = x + maps[-1] * x
        return x.tanh(), maps[1].view(-1), maps[2].t(), maps[0][1]

    odd_is_right(forward)


def scaled_by_a_sum(self, x):
    k = x.abs().sum().item()
    return self.chain(x, k * 2 + 1) / k


def of_chosen_rows(self, x):
    return self.chain(x[x[:, 0] > 0])


def repeated(self, x, times):
    k = times.max().item()
    for layer in self.layers:
        x = x + torch.tanh(layer(x)).unsqueeze(0).expand(k, -1, -1).sum(0)
    return x


@pytest.mark.parametrize(
    ("forward", "more", "adds"),
    [(scaled_by_a_sum, (), 3), (of_chosen_rows, (), 3), (repeated, (torch.tensor([2, 3]),), 3)],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_numbers_and_sizes_that_depend_on_values(forward, more, adds):
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        odd_is_right(forward, *more, adds=adds)


def test_a_float_of_a_tensor_that_is_written_to_is_refused():
    def forward(self, x, scale):
        k = scale.item()
        scale.add_(1)
        return self.chain(x, k)

    function, model = compiled(Odd(forward))
    x = torch.ones(5, 6)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad():
        assert torch.equal(function(x, torch.tensor(2.0)), model(x, torch.tensor(2.0)))
    assert [refusal.code for refusal in mnet_fx.reports()[0].refusals] == ["lost_context"]


def test_a_graph_that_is_kept_gives_its_gradients_again():
    grads = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        function, model = compiled(Net(), backward=kind)
        torch.manual_seed(7)
        loss = function(images()).square().sum()
        grads += [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2)]
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def hooked(self, x):
    """Hooks on the stream, on a tensor that pieces on both sides of a chain read, and inside of a branch."""
    scale = (x * self.layers[0].bias).sigmoid()
    before = scale.cos()
    x = self.chain(x * before)
    x.register_hook(lambda grad: grad.sin())
    scale.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    for layer in self.layers:
        y = layer(x)
        y.register_hook(torch.tanh)
        x = x + torch.tanh(y) * scale
    return x * before


def test_a_hook_sees_the_whole_gradient_of_its_tensor():
    odd_is_right(hooked, adds=6)


def test_a_hook_on_the_input_of_a_step_is_refused():
    def forward(self, x, scale):
        for layer in self.layers:
            y = torch.tanh(layer(x)) * scale
            scale.register_hook(lambda grad: grad * 2)
            x = x + y
        return x

    function, model = compiled(Odd(lambda self, x: forward(self, x, self.layers[0].weight[0] * 2)))
    step(function, model, torch.ones(5, 6))
    (report,) = mnet_fx.reports()
    assert (report.rewritten_adds, {refusal.code for refusal in report.refusals} & {"mutated_side", "interleaved"} != set()) == (0, True)


def test_what_a_step_leaves_needs_a_gradient_only_if_it_did():
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            for layer in self.layers:
                layer.register_buffer("mean", torch.ones(6))

        def forward(self, x):
            for layer in self.layers:
                layer.mean = layer.mean * 0.9 + x.detach().mean(0) * 0.1
                x = x + torch.tanh(layer(x) * layer.mean)
            return x

    function, model = compiled(Averaged())
    for _ in range(2):  # a mean with a history would have the second backward pass go through the first one's
        step(function, model, torch.ones(5, 6))
    assert mnet_fx.reports()[0].rewritten_adds == 3
    assert not any(layer.mean.requires_grad for layer in model.layers)


def test_an_operation_that_writes_to_a_side_input():
    """Called without naming the overload, as people do, and for nothing but its effect."""
    with torch.library._scoped_library("mnet_fx_tests", "DEF") as library:
        library.define("count(Tensor x, Tensor(a!) n) -> ()")
        library.impl("count", lambda x, n: n.add_(1) and None, "CompositeExplicitAutograd")

        def forward(self, x):
            n = torch.zeros((), dtype=x.dtype)
            for layer in self.layers:
                x = x + torch.tanh(layer(x) + n)
                torch.ops.mnet_fx_tests.count(x.detach(), n)
            return x

        odd_is_right(forward, adds=0)


def test_a_float_that_varies_is_compiled_once_for_all_values():
    def forward(self, x, k):
        return self.chain(self.layers[0](x), k)  # what comes before the chain has no use for it

    function, model = compiled(Odd(forward))
    for k in (0.5, 0.6, 0.7, 0.8):
        step(function, model, torch.ones(5, 6), k)
    assert [report.rewritten_adds for report in mnet_fx.reports()] == [3, 3]  # for 0.5, and for any float


def test_a_compilation_that_dynamo_calls_off_has_no_report():
    def forward(self, x, k):
        return nn.functional.dropout(self.chain(x), k)  # dropout takes no number that varies, so this is found out while compiling

    function, model = compiled(Odd(forward))
    for k in (0.5, 0.6):
        step(function, model, torch.ones(5, 6), k)
    assert len(mnet_fx.reports()) == 2


def under_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.chain(x)


def test_chains_hidden_in_a_context_are_reported():
    function, model = compiled(Odd(under_autocast), inner="eager")
    step(function, model, torch.ones(5, 6))
    (report,) = mnet_fx.reports()
    assert (report.rewritten_adds, report.residual_adds) == (0, 3)
    (refusal,) = report.refusals
    assert (refusal.code, refusal.explanation[:15]) == ("lost_context", "3 residual adds")


@pytest.mark.parametrize("cut", ["chunk", "split", "unbind"])
def test_lists_of_tensors_that_steps_read_are_taken_apart_before(cut):
    """A compiled part returns tensors, not lists of them."""

    def forward(self, x, y):
        wide = torch.cat([torch.sin(y), torch.cos(y), y], -1)
        cuts = {
            "unbind": lambda: wide.unflatten(-1, (3, 6)).unbind(-2),
            "chunk": lambda: wide.chunk(3, -1),
            "split": lambda: wide.split(6, -1),
        }
        parts = cuts[cut]()
        for layer, part in zip(self.layers, parts, strict=True):
            x = x + torch.tanh(layer(x) + part)
        return x

    odd_is_right(forward, torch.randn(5, 6))


def around(self, x):
    return torch.utils.checkpoint.checkpoint(self.chain, x, use_reentrant=False)


def each(self, x):
    for layer in self.layers:
        x = torch.utils.checkpoint.checkpoint(lambda x, layer=layer: x + torch.tanh(layer(x)), x, use_reentrant=False)
    return x


def branches(self, x):
    for layer in self.layers:
        x = x + torch.utils.checkpoint.checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=False)
    return x


def elsewhere(self, x):
    return torch.utils.checkpoint.checkpoint(torch.sin, self.chain(x).relu(), use_reentrant=False)


@pytest.mark.parametrize("forward", [around, each, branches, elsewhere])
def test_checkpoints_around_and_in_steps_are_written_out(forward):
    odd_is_right(forward)


def test_a_checkpoint_that_holds_no_step_stays():
    found = []
    function, model = compiled(Odd(elsewhere), inner=lambda gm, inputs: found.append(gm.code) or gm.forward)
    step(function, model, torch.ones(5, 6))
    assert sum("tag_activation_checkpoint" in code for code in found) == 1


def test_a_compiler_is_told_what_sizes_are_made_of():
    """Inductor must find every symbol among the inputs, by itself or as a whole size: batch * 2 alone does not tell it batch."""
    seen = []

    def inner(gm, inputs):
        sizes = [size.node.expr for t in inputs if isinstance(t, torch.Tensor) for size in t.shape if isinstance(size, torch.SymInt)]
        told = {expr for expr in [*sizes, *(i.node.expr for i in inputs if isinstance(i, torch.SymInt))] if expr.is_symbol}
        seen.append({symbol for expr in sizes for symbol in expr.free_symbols} - told)
        return gm

    def forward(x, f):
        y = x.view(x.shape[0] * 2, -1, 4)
        for layer in f:
            y = y + layer(y)
        return y.sum(1)

    layers = [nn.Linear(4, 4) for _ in range(3)]
    torch.compile(forward, backend=mnet_fx.backend(inner=inner), dynamic=True)(torch.randn(3, 8, 4), layers)
    assert mnet_fx.reports()[0].rewritten_adds == 3
    assert seen
    assert not any(seen)


def test_a_checkpoint_inside_of_a_context():
    class Inside(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.utils.checkpoint.checkpoint(self.head, x, use_reentrant=False).float()

    pair = [step(*compiled(Inside(), backward=kind), images()) for kind in ("reversible", "stored")]
    zoo.assert_identical(*pair)
    assert mnet_fx.reports()[0].rewritten_adds == 6


def counting(calls):
    def inner(gm, inputs):
        calls.append(gm)
        return gm

    return inner


def test_each_distinct_step_is_compiled_once():
    numbers = []
    for depth in (2, 8):
        calls = []
        step(*compiled(Net(depth=depth), inner=counting(calls)), images())
        numbers.append(len(calls))
    assert numbers[0] == numbers[1] == 4  # two kinds of steps, the stem with the counters, and the head


def test_kept_bytes_do_not_grow_with_depth():
    kept = []
    for depth in (4, 12):
        torch._dynamo.reset()
        function, model = compiled(Net(depth=depth, width=64))
        x = images(2048)
        step(function, model, x)
        kept.append(measure(lambda: function(x).sum(), torch.Tensor.backward).kept)  # noqa: B023
    assert kept[1] < 1.1 * kept[0]  # more by the generator's states, and by one byte of the state that grew


def test_a_parameter_that_changed_is_an_error():
    function, model = compiled(Net())
    out = function(images()).sum()
    with torch.no_grad():
        model.blocks[1].first.weight.mul_(1.01)
    with pytest.raises(InversionError, match=r"blocks\.1\.first\.weight"):
        out.backward()


def test_frozen_parameters_and_gradient_of_the_input():
    results = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        model = Net()
        model.blocks[0].requires_grad_(False)
        model.stem.requires_grad_(False)
        function, model = compiled(model, backward=kind)
        results.append(step(function, model, images()))
    zoo.assert_identical(*results)
    assert results[0]["grad of blocks.0.first.weight"] is None
    assert results[0]["grad of blocks.1.first.weight"] is not None


def test_a_velocity_module_gets_its_gradient():
    grads = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        model = Net()
        velocity = nn.Linear(6, 6)
        model.stem.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        function, _ = compiled(model, backward=kind, initial_velocity=velocity)
        torch.manual_seed(7)
        function(images()).sum().backward()
        grads.append(velocity.weight.grad)
    assert grads[0] is not None
    assert torch.equal(*grads)


def test_a_model_without_chains_goes_to_the_inner_backend():
    calls = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    function = torch.compile(model, backend=mnet_fx.backend(inner=counting(calls)))
    assert torch.equal(function(images()), model(images()))
    assert len(calls) == 1
    (report,) = mnet_fx.reports()
    assert (report.residual_adds, report.captured[0].front_end) == (0, "torch.compile")


def test_a_graph_break_is_reported_where_it_cuts_a_chain():
    function, model = compiled(Net(broken=1))
    step(function, model, images())
    first, second = mnet_fx.reports()
    assert [refusal.code for refusal in first.refusals] == ["graph_break"]
    assert "graph break" in first.refusals[0].explanation
    assert (first.rewritten_adds, second.rewritten_adds) == (4, 2)
    assert not second.refusals


def test_nested_tensors_go_to_the_inner_backend():
    def forward(x):
        for layer in layers:
            x = x + torch.tanh(layer(x))
        return x

    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    x = torch.nested.nested_tensor([images(2), images(3)], layout=torch.jagged)
    found = torch.compile(forward, backend=mnet_fx.backend(inner="eager"))(x)
    assert torch.equal(found.values(), forward(x).values())
    (refusal,) = mnet_fx.reports()[0].refusals
    assert "NestedTensor" in refusal.explanation


def test_compiled_within_a_checkpoint():
    """The checkpoint counts what is saved: what a compilation saves on its way must be none of it."""
    results = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        function, model = compiled(Net(depth=2).eval(), backward=kind, inner="eager")
        results.append(step(lambda x: torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False), model, images()))  # noqa: B023
    zoo.assert_identical(*results)


def test_buckets_of_ddp_must_not_cut_chains(monkeypatch):
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 200)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        results = []
        for kind in ("reversible", "stored"):
            torch._dynamo.reset()
            model = Net(depth=2)
            wrapped = nn.parallel.DistributedDataParallel(model)
            wrapped.bucket_bytes_cap = 300
            function = torch.compile(wrapped, backend=mnet_fx.backend(inner="eager", backward=kind))
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="optimize_ddp = False"):
                function(images())
            with torch._dynamo.config.patch(optimize_ddp=False):
                results.append(step(function, model, images()))
        zoo.assert_identical(*results)
        assert [report.rewritten_adds for report in mnet_fx.reports()] == [4, 4]
    finally:
        torch.distributed.destroy_process_group()


def test_an_input_at_a_fixed_address_is_an_input():
    function, _ = compiled(Net(), inner="eager")
    x = images()
    torch._dynamo.mark_static_address(x)
    function(x)
    assert mnet_fx.reports()[0].rewritten_adds == 6


def test_a_context_that_is_left_open_is_refused():
    def forward(x):
        x = torch.nn.functional.linear(x, torch.eye(4))
        torch.set_grad_enabled(False)
        return x * 2

    try:
        torch.compile(forward, backend=mnet_fx.backend(inner="eager"))(images())
    finally:
        torch.set_grad_enabled(True)
    assert [refusal.code for refusal in mnet_fx.reports()[0].refusals] == ["lost_context"]


def test_reports_are_logged_and_forgotten(caplog):
    with caplog.at_level(logging.INFO, logger="mnet_fx"):
        step(*compiled(Net()), images())
    assert "6 of 6 residual adds rewritten" in caplog.text
    assert "blocks" in str(mnet_fx.reports()[0])
    mnet_fx.reset_reports()
    assert mnet_fx.reports() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gama": 0.9}, "unknown option.*gama.*known are inner, gamma"),
        ({"example_inputs": ()}, "unknown option"),
        ({"gamma": 1}, "gamma must be a number"),
        ({"inner": "mnet_fx"}, "cannot be mnet_fx itself"),
        ({"inner": 3}, "name of a backend or a callable"),
        ({"inner": "nope"}, "inner='nope' is no backend of torch.compile; there are 'aot_eager'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(SettingsError, match=message):
        mnet_fx.backend(**options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(Net(), backend="mnet_fx", options=options)(images())


def test_a_mode_belongs_to_the_inner_compiler():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="option of inductor"):
        torch.compile(Net(), backend="mnet_fx", mode="max-autotune")(images())


def test_registered_by_name_without_an_import(tmp_path):
    code = (
        "import torch; f = torch.compile(lambda x: x * 2, backend='mnet_fx', options={'inner': 'eager'});"
        "print(f(torch.ones(2)).sum().item())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.stdout.strip() == "4.0", found.stderr


def test_a_warning_comes_before_dynamo_gives_up_on_a_function():
    torch._dynamo.reset()
    model = Net(depth=2).eval()
    function = torch.compile(model, backend=mnet_fx.backend(inner="eager"), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        function(images(1))
        with pytest.warns(mnet_fx.MnetWarning, match="2 graphs were compiled for one function, and 2 is Dynamo's limit"):
            second = function(images(2))
        assert torch.equal(function(images(3)), model(images(3)))  # which is why
        assert not torch.equal(second, model(images(2)))


def test_a_whole_training_step_is_compiled():
    """Dynamo then reads whatever Python the backward pass calls."""
    results = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        model = Net(depth=2)
        results.append(step(torch.compile(whole(model), backend=mnet_fx.backend(inner="eager", backward=kind)), model))
    assert sum(report.rewritten_adds for report in mnet_fx.reports()) == 2 * 4
    zoo.assert_identical(*results)
    net = zoo.rewritten(Net(depth=2))
    step(torch.compile(whole(net), backend="eager"), net)


def whole(model):
    x = images()

    def function():
        out = model(x)
        out.square().sum().backward()
        return out.detach().requires_grad_()

    return function


class Indexed(nn.Module):
    """Writes to a slice of the stream between two chains; the first gives its stream alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.between = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers[:2]:
            x = x + layer(x.tanh())
        x[:, :2] += self.between(x.tanh())[:, :2]
        for layer in self.layers[2:]:
            x = x + layer(x.tanh())
        return x


def test_the_stream_of_a_chain_is_indexed_within_a_piece():
    """A slice that the outer graph takes, and a piece writes to along with the whole, is more than AOTAutograd can follow."""
    plain, model, x = Indexed(), Indexed(), torch.randn(3, 4)
    net = torch.compile(model, backend="mnet_fx", options={"inner": "aot_eager", "gamma": 0})
    torch.testing.assert_close(step(net, model, x), step(plain, plain, x))
    assert mnet_fx.reports()[-1].regions


class LeadsNowhere(nn.Module):
    """Computes something between two chains of which nothing comes, or only a buffer."""

    def __init__(self, writes):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.writes = nn.ModuleList(nn.Linear(4, 4) for _ in range(8)), writes
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        for layer in self.layers[:4]:
            x = x + layer(x.tanh())
        found = self.first(x)
        x = nn.functional.normalize(x)
        for layer in self.layers[4:]:
            x = x + layer(x.tanh())
        found = self.second(found)
        if self.writes:
            self.mean.add_(found.detach().mean(0))
        return x


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_what_leads_nowhere_gives_no_gradients(writes, inner):
    plain, model, x = LeadsNowhere(writes), LeadsNowhere(writes), torch.randn(3, 4)
    net = torch.compile(model, backend="mnet_fx", options={"inner": inner, "gamma": 0})
    plain(x).sum().backward()
    net(x).sum().backward()
    assert plain.first.weight.grad is None
    assert model.first.weight.grad is None
    assert model.second.weight.grad is None
    torch.testing.assert_close(model.mean, plain.mean)


def test_under_the_minifier():
    model = Net()
    function = torch.compile(model, backend="mnet_fx", options={"inner": "aot_eager"})
    with torch._dynamo.config.patch(repro_after="dynamo"):
        step(function, model, images())
    assert mnet_fx.reports()[0].rewritten_adds == 6


@pytest.mark.parametrize("regions", [None, ["blocks"]], ids=["captured", "named"])
def test_a_rewritten_model_compiles(regions):
    results = []
    for kind in ("reversible", "stored"):
        torch._dynamo.reset()
        net = zoo.rewritten(Net(), regions=regions, backward=kind)
        results.append(step(torch.compile(net, backend="aot_eager"), net, images()))
    zoo.assert_identical(*results)
    torch._dynamo.reset()
    again = zoo.rewritten(Net(), regions=regions)
    if regions is None:  # the graph is this package's own, and has no break
        expected = again.eval()(images())
        assert torch.equal(torch.compile(again, backend="aot_eager", fullgraph=True)(images()), expected)
        return
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compile\(model, backend='mnet_fx'\)"):
        torch.compile(again, backend="aot_eager", fullgraph=True)(images())


def test_a_momentum_net_compiles():
    results = []
    for stored in (False, True):
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(4, 6), mnet_fx.MomentumNet([Block(6) for _ in range(3)], 0.9, use_backprop=stored), nn.Linear(6, 2))
        torch.manual_seed(3)
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        results.append(step(torch.compile(net, backend="aot_eager"), net, images()))
    zoo.assert_identical(*results)


@pytest.mark.parametrize("regions", [None, ["blocks"]], ids=["traced", "named"])
def test_a_rewritten_model_runs_in_onnxruntime(regions, tmp_path):
    net = zoo.rewritten(Net(), regions=regions).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnxscript's own
        torch.onnx.export(net, (images(),), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    expected = net(images()).detach()
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
