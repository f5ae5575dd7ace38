"""A preview: what it finds, what it says it cannot read, and that it leaves nothing behind."""

import copy
import functools
import random
import threading
import warnings
from typing import ClassVar

import numpy
import pytest
import torch
import torch.fx as fx
import torchvision
from passes_models import linears, program
from torch import nn
from zoo import FAMILIES, Everyday

from passes import Preview, plan, preview


def adds(found: Preview) -> tuple[int, int]:
    """Residual adds in all parts, and those that would be rewritten."""
    plans = [plan(part, nested=True) for part in found.parts.values()]
    return sum(len(p.residual_adds) for p in plans), sum(len(p.rewritten_adds) for p in plans)


def targets(part: fx.GraphModule) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in part.graph.nodes]


def chain(self, x):
    for block in self.blocks:
        x = x + block(x)
    return x


class Undecided(nn.Module):
    """Asks for a value, which no proxy has."""

    def __init__(self, width: int = 4, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("training", [True, False])
def test_it_counts_the_residual_adds_of_a_zoo(family, training):
    found = preview(family.build().train(training))
    assert adds(found) == (family.adds, sum(family.steps))
    assert list(found.parts) == [""]
    assert found.parts[""].training == training


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformers_of_torch_are_read_down_to_their_layers(norm_first):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first), 3, enable_nested_tensor=False)
    assert adds(preview(encoder)) == (6, 6)
    assert adds(preview(nn.Transformer(8, 2, 2, 3, 16, norm_first=norm_first))) == (13, 13)


def test_a_module_that_cannot_be_read_is_one_call_named_with_its_reason_and_its_children_are_parts():
    model = program(chain, blocks=[nn.Sequential(nn.Linear(4, 4), Undecided(inner=Everyday(width=4))) for _ in range(3)])
    found = preview(model)
    assert list(found.opaque) == [f"blocks.{i}.1" for i in range(3)]
    assert all(reason.startswith("TraceError: ") and "\n" not in reason for reason in found.opaque.values())
    assert list(found.parts) == ["", *(f"blocks.{i}.1.inner" for i in range(3))]
    assert targets(found.parts[""]).count("blocks.0.1") == 1
    assert adds(found)[0] == 3 + 3 * 6


def test_what_a_failed_call_had_recorded_is_undone():
    def forward(self, x):
        return self.inner(x + 1) if (x * 2).sum() > 0 else x

    model = program(lambda self, x: self.block(x) + 1, block=program(forward, inner=nn.Linear(4, 4)))
    assert targets(preview(model).parts[""]) == ["x", "block", "add", "output"]


def test_a_layer_without_children_that_cannot_be_read_is_a_call_and_nothing_to_tell():
    model = program(chain, blocks=[program(lambda self, x: x if x.sum() > 0 else -x) for _ in range(2)])
    found = preview(model)
    assert adds(found) == (2, 2)
    assert not found.opaque


def test_what_failed_within_a_module_that_failed_itself_is_read_anew():
    inner = program(lambda self, x, positive=True: self.body(x) if positive else x, body=Everyday(width=4))
    outer = program(lambda self, x: x if self.inner(x, x.sum() > 0).mean() else -x, inner=inner)
    found = preview(nn.Sequential(outer))
    assert list(found.opaque) == ["0"]
    assert list(found.parts) == ["", "0.inner"]


def test_where_the_root_cannot_be_read_its_children_are():
    model = program(lambda self, x: self.body(x) if x.mean() else x, body=Everyday(), layers=[Everyday()])
    found = preview(model)
    assert list(found.opaque) == [""]
    assert list(found.parts) == ["body", "layers.0"]


def test_a_forward_without_needed_arguments_is_named():
    found = preview(program(lambda self, x=None: self.body(x), body=Everyday()))
    assert "no argument that a caller must give" in found.opaque[""]
    assert list(found.parts) == ["body"]


def test_arguments_with_a_default_take_it():
    def forward(self, x, mask=None, *more, scale, twice=True, **rest):
        assert mask is None
        assert twice is True
        assert (more, rest) == ((), {})
        return x * scale

    assert targets(preview(program(forward)).parts[""]) == ["x", "scale", "mul", "output"]


def test_a_model_that_cannot_be_copied_is_named():
    model = Everyday()
    model.lock = threading.Lock()
    found = preview(model)
    assert not found.parts
    assert found.opaque[""].startswith("cannot be copied: TypeError: ")


def test_scripts_and_replaced_forwards_are_calls():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)

    replaced = Everyday(width=4)
    replaced.forward = functools.partial(type(replaced).forward, replaced)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch say that scripts are deprecated
        script = torch.jit.trace(Scripted(), torch.randn(2, 4))
    found = preview(program(chain, blocks=[script, nn.Sequential(replaced, nn.Linear(3, 4))]))
    assert "ScriptModule" in found.opaque["blocks.0"]
    assert "forward set on the instance" in found.opaque["blocks.1.0"]
    assert adds(found)[0] == 2


def test_in_place_sums_and_item_assignments_are_recorded_as_what_they_are():
    def forward(self, x):
        x += self.inner(x)
        x[0] = 1
        return x

    assert targets(preview(program(forward, inner=nn.Linear(4, 4))).parts[""]) == ["x", "inner", "iadd", "setitem", "output"]


def test_nodes_know_the_modules_they_are_from():
    part = preview(nn.Sequential(Everyday(), Everyday(width=3))).parts[""]
    (owner, *_), *_ = [node.meta["nn_module_stack"] for node in part.graph.nodes if node.name == "add"]
    assert owner == "0"


def test_parameters_and_buffers_become_attributes_and_tell_what_they_are():
    def forward(self, x):
        assert self.scale.shape[0] == 4
        assert self.scale.dtype is torch.float32
        assert len(self.scale) == 4
        assert self.flag
        return torch.cat([self.scale.expand(x.shape[0], -1), x]) * self.flag

    part = preview(program(forward, scale=nn.Parameter(torch.ones(4)), flag=torch.tensor(True))).parts[""]
    assert {node.target for node in part.graph.nodes if node.op == "get_attr"} == {"scale", "flag"}


class Writing(nn.Module):
    """Does everything that a preview must not do to the model it is given."""

    made: ClassVar = []

    def __init__(self):
        super().__init__()
        self.inner, self.calls, self.seen = nn.BatchNorm1d(4), 0, []
        self.register_buffer("count", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.count += 1
        self.count.add_(1)
        TABLE.fill_(3)
        self.scale.requires_grad = False
        self.scale.data.mul_(2)
        next(iter(self.parameters())).zero_()
        torch.nn.init.normal_(self.scale)
        CACHE["x"] = x
        self.made.append(x)
        cached(x.shape[0])
        torch.set_grad_enabled(False)
        return self.inner(x) * random.random() + numpy.random.rand() + torch.rand(4) + nn.functional.dropout(TABLE, 0.5) + seeded(x)


TABLE, CACHE = torch.ones(4), {}


def seeded(x):
    torch.manual_seed(3)
    return x


@functools.lru_cache
def cached(size):
    return size


def state_of(model: nn.Module) -> list[object]:
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return [tensors, {path: set(vars(m)) for path, m in model.named_modules()}, [p.requires_grad for p in model.parameters()]]


def test_nothing_of_the_model_is_changed():
    model = Writing()
    before = state_of(model)
    found = preview(model)
    assert list(found.parts) == [""]  # it was read to the end
    after = state_of(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], t) for name, t in before[0].items())
    assert (model.calls, model.seen, model.made) == (0, [], [])


def test_nothing_outside_the_model_is_changed():
    preview(Writing())
    assert torch.equal(TABLE, torch.ones(4))
    assert not CACHE
    assert cached.cache_info().currsize == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("seed", [3, 4])
def test_random_numbers_go_on_as_if_nothing_had_been(seed):
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.rand(3)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    preview(Writing())
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_torch_draws_nothing():
    def forward(self, x):
        return x + torch.rand(4) + nn.functional.dropout(TABLE, 0.5) + torch.normal(TABLE, 1.0)

    before = torch.get_rng_state()
    assert len(targets(preview(program(forward)).parts[""])) == 10
    assert torch.equal(torch.get_rng_state(), before)


def test_what_sets_an_attribute_of_a_tensor_is_no_node():
    def forward(self, x):
        TABLE.requires_grad = True
        return x + TABLE

    assert targets(preview(program(forward)).parts[""]) == ["x", "_constant_0", "add", "output"]
    assert not TABLE.requires_grad


def test_hooks_are_not_called():
    called = []
    model = Everyday()
    for module in model.modules():
        module.register_forward_hook(lambda *args: called.append(args))
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda *args: called.append(args))
    try:
        preview(model)
    finally:
        everywhere.remove()
    assert not called


def test_the_copy_that_was_read_is_whole_again_and_shares_the_tensors():
    model = Everyday()
    part = preview(model).parts[""]
    for path, module in part.named_modules():
        if isinstance(module, (nn.Linear, nn.LSTM)):
            assert set(vars(module)) == set(vars(model.get_submodule(path)))
            assert all(a is b for a, b in zip(module.parameters(), model.get_submodule(path).parameters(), strict=True))


def test_a_model_that_another_thread_runs_meanwhile_is_undisturbed():
    """The preview stops in the middle; while it stands there, this thread runs, and draws."""
    inside, go_on = threading.Event(), threading.Event()
    model, x = torchvision.models.resnet18(num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)

    class Waiting(nn.Module):
        def forward(self, x):
            inside.set()
            assert go_on.wait(60)
            return x

        def __deepcopy__(self, memo):
            return Waiting()

    found = []
    thread = threading.Thread(target=lambda: found.append(preview(nn.Sequential(Everyday(), Waiting(), model))))
    torch.manual_seed(5)
    drawn = torch.rand(3), torch.rand(3)
    torch.manual_seed(5)
    thread.start()
    try:
        assert inside.wait(60)
        assert torch.equal(model(x), expected)
        assert type(nn.Module.__call__(nn.Linear(2, 2), torch.ones(2))) is torch.Tensor
        torch.manual_seed(5)
        assert torch.equal(torch.rand(3), drawn[0])
    finally:
        go_on.set()
        thread.join()
    assert torch.equal(torch.rand(3), drawn[1])
    assert list(found[0].parts) == [""]


def test_values_kept_from_the_reading_of_another_part_are_refused_by_name():
    """`inner` is read twice, within the root, which then fails, and by itself."""

    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.kept = nn.Linear(4, 4), []

        def forward(self, x):
            self.kept.append(x)
            return self.inner(x) + self.kept[0]

    found = preview(program(lambda self, x: x if self.body(x).sum() > 0 else -x, body=Keeping()))
    assert "keeps a value" in found.opaque["body"]


def test_a_shared_module_is_read_once():
    block = Undecided(inner=Everyday(width=4))
    found = preview(program(lambda self, x: x if x.sum() else -x, a=nn.Sequential(block), b=nn.Sequential(block)))
    assert list(found.parts) == ["a", "a.0.inner", "b"]


def test_the_given_model_may_be_a_single_layer():
    assert targets(preview(nn.Linear(2, 2)).parts[""]) == ["input", "weight", "bias", "linear", "output"]
    assert preview(nn.ModuleList(linears(2))).opaque.keys() == {""}


def test_a_graph_module_is_read_as_any_module():
    gm = fx.symbolic_trace(program(chain, blocks=linears(3)))
    before = copy.deepcopy(gm).code
    assert adds(preview(gm)) == (3, 3)
    assert gm.code == before
