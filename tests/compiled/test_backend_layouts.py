"""Blocks that view the stream differently, in graphs of Dynamo, where layouts change by methods and functions of every kind."""

import copy

import pytest
import torch
import transformers as hf
import zoo
from test_layouts import Windows, images
from torch import nn
from torchvision.models.maxvit import MaxVit
from zoo import one_thread  # noqa: F401  (a fixture)

import mnet_fx
import passes

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    mnet_fx.reset_reports()


class Turns(nn.Module):
    """Blocks that take turns in two layouts, `there` being the change from the first one and `back` that to it."""

    def __init__(self, there, back, widths=(8, 8), depth=2):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = (nn.ModuleList(nn.Linear(width, width) for _ in range(depth)) for width in widths)
        self.there, self.back = there, back

    def forward(self, x):
        for f, g in zip(self.first, self.second, strict=True):
            x = x + torch.tanh(f(x))
            y = self.there(x)
            y = torch.add(input=torch.tanh(g(y)), other=y)
            x = self.back(y, x)
        return x


def step(function, model, *inputs):
    """All that one training step gives and leaves."""
    torch.manual_seed(7)
    out = function(*inputs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return {"output": out.detach()} | zoo.leftovers(model)


def compiled(model, dynamic=None, **options):
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    return torch.compile(model, dynamic=dynamic, backend=mnet_fx.backend(**{"inner": "eager"} | options)), model


def is_right(model, x, chains, dynamic=None, inner="eager"):
    """The chains are found, gamma=0 is the original, and gradients are those of stored activations, for each of some inputs."""
    xs = x if isinstance(x, list) else [x]
    double = copy.deepcopy(model).double()
    function, net = compiled(double, dynamic, gamma=0, inner=inner)
    for x in xs:
        x = x.double() if x.is_floating_point() else x
        double.zero_grad(), net.zero_grad()
        zoo.assert_near(step(function, net, x), step(double, double, x), 1e-4)
    reports = mnet_fx.reports()
    assert [[region.steps for region in report.regions] for report in reports] == [chains] * len(reports)
    pair = [compiled(model, dynamic, backward=kind, inner=inner) for kind in ("reversible", "stored")]
    for x in xs:
        zoo.assert_identical(*(step(function, net, x) for function, net in pair))


WAYS = {
    "transpose": (lambda x: x.transpose(1, 2), lambda y, x: torch.transpose(y, dim0=-1, dim1=1)),
    "permute": (lambda x: x.permute(0, 2, 1), lambda y, x: torch.permute(y, (0, -1, 1))),
    "permute by name": (lambda x: x.permute(dims=(0, 2, 1)), lambda y, x: y.permute([0, 2, 1])),
    "swaps": (lambda x: torch.swapaxes(x, 1, 2), lambda y, x: y.swapdims(dim0=2, dim1=1)),
    "moves": (lambda x: torch.movedim(x, 1, -1), lambda y, x: y.moveaxis(source=(2,), destination=(1,))),
    "mT": (lambda x: x.mT, lambda y, x: y.mT.contiguous()),
    "view": (lambda x: x.view(-1, 8), lambda y, x: y.view((x.shape[0], 8, 8))),
    "view by name": (lambda x: x.view(size=(-1, 8)), lambda y, x: y.view(size=(-1, 8, 8))),
    "view of a size": (lambda x: x.view((*x.size()[:1], 2, 4, 8)), lambda y, x: y.view_as(x)),
    "reshape": (lambda x: x.reshape(-1, x.size(-1)), lambda y, x: torch.reshape(y, x.shape)),
    "reshape as": (lambda x: x.clone().reshape(shape=(-1, 8)), lambda y, x: y.reshape_as(x)),
    "flatten": (lambda x: x.flatten(0, 1), lambda y, x: y.unflatten(0, (-1, 8))),
    "flatten a function": (lambda x: torch.flatten(x, end_dim=1), lambda y, x: torch.unflatten(y, dim=0, sizes=(-1, 8))),
    "unsqueeze": (lambda x: x.unsqueeze(1), lambda y, x: torch.squeeze(y, dim=1)),
    "squeeze": (lambda x: torch.unsqueeze(x, dim=-2), lambda y, x: y.squeeze()),
    "roll": (lambda x: x.roll(1, 2), lambda y, x: torch.roll(y, shifts=(-1,), dims=(2,))),
    "roll of everything": (lambda x: torch.roll(x, 3), lambda y, x: y.roll(shifts=-3)),
    "several": (
        lambda x: x.transpose(1, 2).flatten(1).unflatten(1, (16, 4)).transpose(1, 2).roll((1, 2), (1, -1)),
        lambda y, x: torch.roll(y, (-2, -1), (2, 1)).mT.reshape(-1, 8, 8).mT,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ways_to_change_a_layout(way, dynamic):
    there, back = WAYS[way]
    model = Turns(there, back, (8, 16 if way == "several" else 8))
    batches = [torch.randn(batch, 8, 8, generator=torch.Generator().manual_seed(batch)) for batch in (3, 5)]
    is_right(model, batches, [4], dynamic)


def test_a_matrix_and_its_transpose():
    is_right(Turns(lambda x: x.T, lambda y, x: y.t(), (8, 3)), torch.randn(3, 8), [4])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_blocks_in_three_layouts_are_one_chain(inner):
    """First for one batch, then for any; were all sizes free, Dynamo itself would take a minute."""
    is_right(Windows(), [images(batch) for batch in (2, 3, 5)], [6], inner=inner)


def test_a_view_as_another_dtype_is_no_change_of_layout():
    def flat(x):
        return x.view(torch.int32).flatten(0, 1).view(torch.float32)

    model = Turns(flat, lambda y, x: y.view(x.shape))
    function, _ = compiled(model, gamma=0)
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        zoo.assert_agree(function(x), model(x))
    assert [region.steps for region in mnet_fx.reports()[0].regions] == [3]  # all but the first


@pytest.mark.parametrize("late", [False, True])
def test_memory_that_is_written_to_is_left_alone(late):
    """A sum in place into a view of the stream, which is read again in the other layout."""

    class Writes(Turns):
        def forward(self, x):
            for f, g in zip(self.first, self.second, strict=True):
                x = x + torch.tanh(f(x))
                y = x.view(-1, 8)
                y += torch.tanh(g(y * 1.0))
                x = x + y.view(x.shape) if late else y.view(x.shape)
            return x

    model, x = Writes(None, None).double(), torch.randn(3, 8, 8, dtype=torch.float64)
    function, net = compiled(model, gamma=0)
    zoo.assert_near(step(function, net, x), step(model, model, x), 1e-8)
    assert mnet_fx.reports()[0].rewritten_adds == 0


def test_the_graph_of_a_large_stream_does_not_grow_faster_than_the_model():
    """Too many elements to number them: what comes back to its layout is known from strides."""

    def changes(depth):
        found = []

        def look(gm, inputs):
            unlifted = passes.unlift(gm).graph_module
            passes.level_layouts(unlifted)
            assert [len(region.steps) for region in passes.plan(unlifted).regions] == [2 * depth]
            found.extend(node for node in unlifted.graph.nodes if node.target in ("reshape", "permute"))
            return gm.forward

        torch._dynamo.reset()

        def there(x):
            return x.view(4096, 8, 7, 8, 7, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, 8)

        def back(y, x):
            return y.view(-1, 8, 8, 7, 7, 8).permute(0, 1, 3, 2, 4, 5).reshape(4096, 56, 56, 8)

        torch.compile(Turns(there, back, depth=depth).to("meta"), backend=look)(torch.empty(4096, 56, 56, 8, device="meta"))
        return len(found)

    assert changes(6) - changes(4) == changes(4) - changes(2)


def maxvit():
    return MaxVit((32, 32), 8, 4, [16, 16], [2, 2], 8, 0.1, num_classes=5)


def opt():
    config = hf.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=60, word_embed_proj_dim=32)
    return hf.OPTModel(config)


def swin():
    return hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4))


@pytest.mark.parametrize(
    ("build", "x", "chains"),
    [
        pytest.param(maxvit, torch.randn(2, 3, 32, 32), [9, 9], marks=pytest.mark.slow),
        (opt, torch.randint(2, 60, (2, 12)), [6]),
        (swin, torch.randn(2, 3, 32, 32), [4, 4]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_models(build, x, chains):
    torch.manual_seed(0)
    is_right(build(), x, chains)
