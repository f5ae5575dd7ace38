"""`mnet_fx.tune`: the curve of fidelity against bytes, and what is chosen from it."""

import copy

import pytest
import torch
import torch.fx as fx
from torch import nn

import mnet_fx

WIDTH = 16


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2))

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(blocks=3):
    torch.manual_seed(0)
    return Net(blocks)


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, WIDTH, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def found():
    """Of everything that is tried by default, at two gammas."""
    return mnet_fx.tune(made(), batches(), gammas=[0.1, 0.5])


def row(found, cut, gamma, kind):
    (one,) = [row for row in found.rows if (row.cut, row.gamma, row.kind) == (cut, gamma, kind)]
    return one


def figures(net, model):
    """Mean cosine and relative error on the held-out calls."""
    with torch.no_grad():
        ours, theirs = (torch.cat([m.eval()(x) for x in batches()[-2:]]) for m in (net, model))
    return torch.cosine_similarity(ours, theirs, dim=-1).mean().item(), ((ours - theirs).norm() / theirs.norm()).item()


def test_the_curve(found):
    assert [row.cut for row in found.rows] == ["named layers"] * 6 + ["each add"] * 6
    assert {row.kind for row in found.rows} == {"momentum", "matched", "calibrated"}
    assert {(row.cut, row.steps) for row in found.rows} == {("named layers", 3), ("each add", 6)}
    for cut in ("named layers", "each add"):
        for gamma in (0.1, 0.5):
            assert row(found, cut, gamma, "momentum").error > row(found, cut, gamma, "matched").error
            assert row(found, cut, gamma, "matched").error > row(found, cut, gamma, "calibrated").error
        assert row(found, cut, 0.1, "matched").fidelity > row(found, cut, 0.5, "matched").fidelity
    assert found.best is max(found.rows, key=lambda row: row.fidelity)
    assert found.original == 1
    assert found.held_out == 2


def test_total_bits_decide(found):
    """Three steps of 3.3 bits are closer than six of 1: 6.6 bits in two that pay, against 5 in five."""
    few, many = row(found, "named layers", 0.1, "matched"), row(found, "each add", 0.5, "matched")
    assert few.bits == pytest.approx(2 * 3.3219, abs=1e-3)
    assert many.bits == pytest.approx(5)
    assert few.fidelity > many.fidelity
    assert "fewer, larger" in str(found)


@pytest.mark.parametrize("kind", ["momentum", "matched", "calibrated"])
@pytest.mark.parametrize("cut", ["named layers", "each add"])
def test_the_options_make_the_network_that_was_measured(found, cut, kind):
    model, one = made(), row(found, cut, 0.5, kind)
    net = mnet_fx.momentumize(model, **one.options)
    assert (one.fidelity, one.error) == pytest.approx(figures(net, model), abs=1e-5)
    estimated = mnet_fx.estimate(net, batches()[-1])
    maps = (one.steps - 1) * (WIDTH + 1) * WIDTH * 4 if kind == "calibrated" else 0
    assert (one.total_bytes, one.kept_bytes) == (estimated.momentum.total_bytes + maps, estimated.momentum.kept_bytes)
    assert (found.plain_bytes, found.checkpoint_bytes) == (estimated.plain.total_bytes, estimated.checkpoint.total_bytes)


def test_the_cheapest_that_is_faithful_and_the_most_faithful_that_fits(found):
    options = {"gammas": [0.1], "weights": "matched"}
    rows = [row for row in found.rows if row.gamma in options["gammas"] and row.kind != "momentum"]
    least = min(row.total_bytes for row in rows)
    cheap = mnet_fx.tune(made(), batches(), fidelity=0.9, **options)
    assert (cheap.best.cut, cheap.best.gamma, cheap.best.kind, cheap.best.total_bytes) == ("each add", 0.1, "matched", least)
    assert "* The cheapest that keeps fidelity 0.9 is each add, gamma 0.1, matched" in str(cheap)
    tight = mnet_fx.tune(made(), batches(), memory=least, **options)
    assert tight.best == row(found, "each add", 0.1, "matched")
    assert tight.best.fidelity < row(found, "each add", 0.1, "calibrated").fidelity  # which does not fit
    assert "* The most faithful within" in str(tight)
    both = mnet_fx.tune(made(), batches(), memory=least, fidelity=tight.best.fidelity, **options)
    assert both.best == tight.best


def test_rotated_velocities_are_tried_where_asked_for():
    found = mnet_fx.tune(made(), batches(), gammas=[0.5], rotate=True, regions=["blocks"])
    assert [one.kind for one in found.rows] == ["momentum", "matched", "calibrated", "rotated"]
    assert found.best.kind == "rotated"
    assert found.rows[3].error < found.rows[2].error
    assert found.rows[3].total_bytes == found.rows[2].total_bytes + (found.rows[2].steps - 1) * WIDTH * WIDTH * 4
    assert "rotated" in str(found)
    assert figures(mnet_fx.momentumize(made(), **found.options), made())[1] == pytest.approx(found.rows[3].error, abs=1e-5)
    signed = mnet_fx.tune(made(), batches(), gammas=[0.5], weights="signed", regions=["blocks"])
    assert [one.kind for one in signed.rows] == ["signed", "calibrated"]


def test_steps_of_several_blocks_are_tried_and_fewer_steps_put_aside_fewer_bits():
    found = mnet_fx.tune(made(6), batches(), gammas=[0.5], weights="momentum", blocks=(2, 3), fidelity=0.5)
    rows = [one for one in found.rows if one.cut != "named layers"]
    assert [(one.cut, one.steps) for one in rows] == [
        ("every 3 blocks", 2),
        ("every 2 blocks", 3),
        ("each add", 12),
    ]
    bits = [one.bits for one in rows]
    assert bits == sorted(bits)
    first = rows[0]
    same_bits = mnet_fx.momentumize(made(6), gamma=2.0 ** -rows[-1].bits, granularity=3)
    assert figures(same_bits, made(6))[1] < 0.1 * rows[-1].error
    assert figures(mnet_fx.momentumize(made(6), **first.options), made(6))[1] == pytest.approx(first.error, abs=1e-5)
    with pytest.raises(mnet_fx.SettingsError, match="how many blocks make a step"):
        mnet_fx.tune(made(), batches(1), blocks=(0,))


def test_small_gammas_cost_bytes_where_chains_are_long():
    found = mnet_fx.tune(made(16), batches(1), fidelity=0.0, gammas=[0.01, 0.9], weights="matched", regions=["blocks"])
    close, cheap = found.rows
    assert close.kept_bytes > cheap.kept_bytes
    assert close.fidelity > cheap.fidelity
    assert found.best is cheap


def test_of_those_that_take_about_the_same_the_most_faithful_is_chosen_and_no_saving_is_said():
    """Where parameters are most of what is there, a chain saves next to nothing."""

    class Heavy(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1_000_000))

        def forward(self, x):
            return super().forward(x) + self.table[0]

    torch.manual_seed(0)
    found = mnet_fx.tune(Heavy(), batches(), fidelity=0.5, gammas=[0.1, 0.5], regions=["blocks"])
    assert found.best is max(found.rows, key=lambda row: row.fidelity)
    assert found.best.total_bytes > min(row.total_bytes for row in found.rows)
    assert "A checkpoint around each block takes no more" in str(found)
    assert "takes no more" not in str(mnet_fx.tune(made(24), batches(1), gammas=[0.9], weights="momentum", regions=["blocks"]))


def test_what_is_asked_for_and_not_there():
    found = mnet_fx.tune(made(), batches(1), fidelity=0.9999999, memory=1000, gammas=[0.9], regions=["blocks"])
    assert found.best is None
    with pytest.raises(mnet_fx.MnetError, match=r"None keeps fidelity 1 within 1000 B: the most faithful has fidelity 0\.9"):
        _ = found.options
    assert "None keeps" in str(found)


def test_a_metric_of_the_users():
    seen = []

    def metric(net):
        seen.append((net.training, torch.is_grad_enabled()))
        with torch.no_grad():
            return -100 * net(batches()[0]).square().mean().item()

    model = made()
    found = mnet_fx.tune(model, batches(), metric=metric, gammas=[0.5], regions=["blocks"])
    assert set(seen) == {(False, False)}
    assert found.original == pytest.approx(metric(model.eval()))
    net = mnet_fx.momentumize(model, **found.options)
    assert found.best.fidelity == pytest.approx(metric(net.eval()), abs=1e-4)


def test_the_model_stays_and_one_call_calibrates_nothing():
    model = made()
    model.blocks[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    found = mnet_fx.tune(model, {"x": batches()[0]}, gammas=[0.5])
    assert {row.kind for row in found.rows} == {"momentum", "matched"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_graph_module_and_what_cannot_be_tried():
    found = mnet_fx.tune(fx.symbolic_trace(made()), (batches()[0],), gammas=[0.5], weights="matched")
    assert [(row.cut, row.steps) for row in found.rows] == [("each block", 3), ("each add", 6)]

    class Odd(Net):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    torch.manual_seed(0)
    found = mnet_fx.tune(Odd(), batches(1), gammas=[0.5], memory="1GiB")
    assert {row.cut for row in found.rows} == {"named layers"}
    assert "Not tried, each add:" in str(found)


def test_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*no residual chain:mnet_fx.MnetWarning")
def test_what_cannot_be_tuned_is_a_clear_error():
    call = batches(1)[0]
    for model, inputs, options, match in [
        (mnet_fx.momentumize(made(), regions=["blocks"]), call, {}, "takes the original model"),
        (3, call, {}, "takes the original model"),
        (made(), [], {}, "empty list"),
        (made(), call, {"gamma": 0.5}, "chooses gamma itself"),
        (made(), call, {"gammas": 0.5}, "gammas must be a list"),
        (made(), call, {"gammas": [1.0]}, "at 1 the residual branch"),
        (made(), call, {"fidelity": 2.0}, "at most 1"),
        (made(), call, {"metric": 3}, "metric must be"),
        (made(), call, {"weights": "heavy"}, "weights must be one of"),
        (nn.Sequential(made(), nn.Linear(5, 1)), call, {}, "give metric"),
        (nn.Linear(WIDTH, 4), call, {"gammas": [0.5]}, "has no residual chain"),
    ]:
        with pytest.raises(mnet_fx.SettingsError, match=match):
            mnet_fx.tune(model, inputs, **options)
