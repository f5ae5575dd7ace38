"""Sizes that depend on values: one row, where Dynamo supposed several, broadcasts as in the original, or is an error that says so."""

import itertools

import pytest
import torch
import torchvision
from torch import nn

import mnet_fx

WIDTH = 4
INNERS = ("eager", "aot_eager", "inductor")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, table, rows):
        return x + torch.tanh(self.linear(x))


class Picking(Block):
    """Reads rows of a table that a mask picks; one row is read by all."""

    def forward(self, x, table, rows):
        return x + torch.tanh(self.linear(x)) * torch.gather(table, 0, rows[0][rows[1]])


class Net(nn.Module):
    def __init__(self, behind=None, block=Block, broken=False):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.table = nn.Parameter(torch.randn(5, WIDTH))
        self.behind, self.broken = behind, broken

    def forward(self, x, index, mask):
        if self.broken:
            x = x * 2
            torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x, self.table, (index, mask))
        return x if self.behind is None else self.behind(self.table, x, index, mask)


BEHIND = {
    "gather": lambda table, x, index, mask: x * torch.gather(table, 0, index[mask]),
    "nonzero": lambda table, x, index, mask: x * torch.gather(table, 0, index[mask.nonzero()[:, 0]]),
    "where": lambda table, x, index, mask: torch.where(x > 0, torch.gather(table, 0, index[mask]), x),
    "expand": lambda table, x, index, mask: torch.gather(table, 0, index[mask]).expand(3, WIDTH) * x,
    "masked_select": lambda table, x, index, mask: x[:, :1] * table.flatten()[:3].masked_select(mask)[:, None],
    "nms": lambda table, x, index, mask: (
        table[:3][torchvision.ops.nms(torch.arange(3.0)[:, None] * mask[-1] * 99 + torch.tensor([[0.0, 0, 2, 2]]), x[:, 0].float(), 0.5)]
        * x
    ),
}

OFTEN = {("nms", "aot_eager", False), *(("gather", inner, True) for inner in INNERS), *((behind, "eager", False) for behind in BEHIND)}
CASES = [
    pytest.param(
        *case, marks=[] if case in OFTEN else pytest.mark.slow, id=f"{case[0]}-{case[1]}-{'broken before' if case[2] else 'whole'}"
    )
    for case in itertools.product(BEHIND, INNERS, (False, True))
]


def calls():
    generator = torch.Generator().manual_seed(1)
    x, index = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64), torch.randint(5, (3, WIDTH), generator=generator)
    return [(x, index, torch.tensor(mask)) for mask in ([True] * 3, [False, True, False])]


def results(net, call):
    x = call[0].clone().requires_grad_()
    y = net(x, *call[1:])
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *net.parameters()], allow_unused=True)]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")  # torchvision calls it
@pytest.mark.parametrize(("behind", "inner", "broken"), CASES)
def test_one_row_behind_the_chain_broadcasts(behind, inner, broken):
    torch.manual_seed(0)
    model = Net(BEHIND[behind], broken=broken).double()
    zero, *nets = (
        mnet_fx.momentumize(model, inner=inner, **options) for options in ({"gamma": 0}, {"backward": "reversible"}, {"backward": "stored"})
    )
    for call in calls():
        assert_close(results(zero, call), results(model, call))
        one, other = (results(net, call) for net in nets)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)
    assert [len(chain) for chain in zero.forward.network.chains] == [4]


@pytest.mark.parametrize("inner", INNERS)
def test_one_row_within_a_step_is_an_error(inner):
    """It is too late to end the graph there, which would cut the chain."""
    torch.manual_seed(0)
    model = Net(block=Picking).double()
    net = mnet_fx.momentumize(model, gamma=0, inner=inner)
    several, one = calls()
    assert_close(results(net, several), results(model, several))
    assert [len(chain) for chain in net.forward.network.chains] == [4]
    with pytest.raises(mnet_fx.MnetError, match=r"a size that depends on values.*regions=\[...\]"):
        results(net, one)
    assert_close(results(net, several), results(model, several))
    named = mnet_fx.momentumize(model, gamma=0, regions=["blocks"])
    assert_close(results(named, one), results(model, one))


@pytest.mark.parametrize("before", [False, True])
def test_the_users_setting_stays(before):
    net, config = mnet_fx.momentumize(Net(BEHIND["gather"]).double()), torch._dynamo.config
    with config.patch(capture_dynamic_output_shape_ops=before):
        for call in calls():
            results(net, call)
        assert config.capture_dynamic_output_shape_ops == before


@pytest.mark.parametrize("inner", INNERS)
def test_numbers_that_the_user_has_in_graphs_stay_there(inner):
    torch.manual_seed(0)
    model = Net(lambda table, x, index, mask: x * x.detach().abs().max().item() + table[: mask.sum().item()].sum()).double()
    net = mnet_fx.momentumize(model, gamma=0, inner=inner)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for call in calls():
            assert_close(results(net, call), results(model, call))
    assert len(net.report.captured) == 1


class Raising(Net):
    def forward(self, x, index, mask):
        x = super().forward(x, index, mask)
        try:
            return {}["key"]
        except KeyError:
            raise RuntimeError("own")  # noqa: B904  # its context is the point


def test_an_error_of_the_models_own_is_as_it_was_raised():
    net = mnet_fx.momentumize(Raising().double())
    with pytest.raises(RuntimeError, match="own") as caught:
        net(*calls()[0])
    assert isinstance(caught.value.__context__, KeyError)
    assert not caught.value.__suppress_context__


def test_a_whole_program_has_them():
    torch.manual_seed(0)
    model = Net(lambda table, x, index, mask: (x * 2)[mask]).double().eval()
    net = mnet_fx.momentumize(model, gamma=0)
    several, one = calls()
    program = torch.export.export(net, several).module()
    assert_close([program(*one)], [model(*one)])
    assert_close(results(net, one), results(model, one))


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_faster_r_cnn(training):
    torch.manual_seed(7)
    options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 48, "max_size": 64}
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(**options).double().train(training)
    net = mnet_fx.momentumize(model, gamma=0)
    images = [torch.rand(3, 40, 48).double(), torch.rand(3, 48, 40).double()]
    boxes = torch.tensor([[2.0, 3.0, 20.0, 25.0], [5.0, 5.0, 30.0, 30.0]]).double()
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    for seed in range(2):
        found = []
        for each in (model, net):
            torch.manual_seed(seed)
            output = each(images, targets if training else None)
            if training:
                parameters = [p for p in each.parameters() if p.requires_grad]
                found.append([*output.values(), *torch.autograd.grad(sum(output.values()), parameters)])
            else:
                found.append([t for one in output for t in one.values()])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert net.report.rewritten_adds > 10
