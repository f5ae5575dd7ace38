"""Rotated velocities, by `calibrate(rotate=True)` and by `weights="signed"`: closer at the same bits, exact, in every way in."""

import copy
import io
import pickle

import pytest
import torch
from test_calibration import WAYS, WIDTH, Net, ResNet, batches, gradients

import mnet_fx
from mnet_fx.closeness import evaluated
from mnet_fx.map_fits import frame
from mnet_fx.runtime.reads import _signs
from mnet_fx.settings import Settings, matched_weights
from mnet_fx.step_streams import sensitivities


def made(way="named", dropout=0.0, gamma=0.5, weights="matched", **options):
    torch.manual_seed(0)
    return WAYS[way](Net(dropout), gamma=gamma, weights=weights, **options)


def rotated(way="named", **options):
    net = made(way, **options)
    return net, mnet_fx.calibrate(net, batches(), rotate=True)


@pytest.mark.parametrize("way", WAYS)
def test_closer_than_calibrated_and_exact(way):
    plain = mnet_fx.calibrate(made(way, 0.2), batches())
    (net, found), (stored, _) = rotated(way, dropout=0.2), rotated(way, dropout=0.2, backward="stored")
    assert found.error_after < 0.8 * plain.error_after
    assert [(r.mapped, r.rotated, r.kind) for r in found.regions] == [(3, 3, "full")]
    assert "3 of 4 steps, full, 3 rotated" in str(found)
    x = batches(1, 9)[0]
    assert all(map(torch.equal, gradients(net, x), gradients(stored, x)))


def test_all_ways_in_find_the_same_frames():
    x, outputs = batches(1, 9)[0], [rotated(way)[0](batches(1, 9)[0]).detach() for way in WAYS]
    assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)
    assert not torch.allclose(outputs[0], made()(x), atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gamma", [0.9, 0.05, 0.0, lambda t, steps: (0.5, 0.9, 0.0, 0.7)[t]], ids=["0.9", "0.05", "0", "schedule"])
def test_signs_need_no_data_and_are_exact(way, gamma):
    nets = [made(way, 0.2, gamma, "signed", backward=backward) for backward in ("reversible", "stored")]
    x = batches(1, 9)[0]
    ours, theirs = (gradients(net, x) for net in nets)
    assert all(map(torch.equal, ours, theirs))
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, gradients(made(way, 0.2, gamma), x), strict=True))
    assert same == (gamma == 0.0)


def oracle(net, maps, x, gamma, drawn):
    """The recurrence in the terms of the original's stream z, with deviations d = z - x that are turned: d' = a (d + f) O."""
    steps = len(net.layers)
    reach = [gamma / weight for weight in matched_weights([gamma] * steps)] + [0.0]
    z, d, before = x, torch.zeros_like(x), torch.eye(WIDTH).to(x)
    for t, layer in enumerate(net.layers):
        read, known = x, maps[t] or {}
        if t and "weight" in known:
            read = x + known["shift"].to(x) + x @ known["weight"].to(x)
        f = layer(read) - read
        after = known["frame"].to(x) if "frame" in known else drawn[t].diag().to(x) if drawn and t + 1 < steps else before
        c = reach[t + 1] if t + 1 < steps else 0.0
        z, d = z + f, c / (1 + c) * ((d + f) @ before.T @ after)
        x, before = z - d, after
    return net.head(x)


@pytest.mark.parametrize("kind", ["rotated", "signed", "signed, calibrated"])
def test_gradients_are_those_of_the_recurrence(kind):
    gamma, weights = 0.6, "matched" if kind == "rotated" else "signed"
    net = made("named", 0.0, gamma, weights).double()
    maps = [None] * 4
    if kind != "signed":
        maps = mnet_fx.calibrate(net, [b.double() for b in batches()], rotate=kind == "rotated").maps[0]["maps"]
    torch.manual_seed(0)
    plain = Net().double()
    drawn = [_signs(t, WIDTH) for t in range(4)] if weights == "signed" else None
    x = batches(1, 9)[0].double().requires_grad_()
    expected = oracle(plain, maps, x, gamma, drawn)
    found = gradients(net, x.detach())
    wanted = [expected, *torch.autograd.grad(expected.square().sum(), [x, *plain.parameters()])]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_rotations_travel(way, tmp_path):
    net, _ = rotated(way)
    net.eval()
    x = batches(1, 9)[0]
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(net)))(x), expected)
    if way != "graph":
        mnet_fx.save(net, tmp_path / "net.safetensors")
        assert torch.equal(mnet_fx.load(Net(), tmp_path / "net.safetensors").eval()(x), expected)
    with pytest.warns(mnet_fx.MnetWarning, match="calibration"):
        made(way).load_state_dict(net.state_dict())
    signed = made(way, weights="signed").eval()
    with pytest.warns(mnet_fx.MnetWarning, match="signed"):
        made(way).load_state_dict(signed.state_dict())


@pytest.mark.parametrize("kind", ["rotated", "signed"])
def test_what_cannot_follow_integers_runs_the_same_recurrence(kind):
    net = (rotated("captured")[0] if kind == "rotated" else made("captured", weights="signed")).eval()
    x = batches(1, 9)[0]
    exported = torch.export.export(net, (x,)).module()
    assert torch.allclose(exported(x), net(x), atol=1e-5)
    stored = (
        rotated("captured", backward="stored")[0] if kind == "rotated" else made("captured", weights="signed", backward="stored")
    ).eval()
    whole = torch.func.vmap(lambda one: stored(one[None])[0])(x)
    assert torch.allclose(whole, net(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["rotated", "signed"])
def test_verify_estimate_second_derivatives_and_a_half_precision_stream(kind):
    net = rotated("named")[0] if kind == "rotated" else made("named", weights="signed")
    x = batches(1, 9)[0].requires_grad_()
    assert mnet_fx.verify(net, x.detach())
    estimated = mnet_fx.estimate(net, x.detach()).momentum

    def step():
        net(x).square().mean().backward()

    step()
    kept = mnet_fx.measure(step).kept
    assert kept == pytest.approx(estimated.kept_bytes, rel=0.1, abs=4096)
    double = copy.deepcopy(net).double()
    wide = x.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: double(t).square().mean(), (wide[:1, :2],), atol=1e-4)
    half = copy.deepcopy(net).bfloat16()
    found = gradients(half, x.detach().bfloat16())
    assert torch.allclose(found[0].float(), net(x), atol=0.1)


def test_images_have_their_channels_in_dimension_1():
    torch.manual_seed(0)
    model, data = ResNet().eval(), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    results = [mnet_fx.calibrate(mnet_fx.momentumize(model, gamma=0.5, weights="matched"), data, rotate=r) for r in (False, True)]
    assert results[1].error_after < results[0].error_after
    assert results[1].regions[0].rotated == 3
    net = mnet_fx.momentumize(model, gamma=0.5, weights="signed")
    layouts = [d.requires_grad_() for d in (data[0].clone(), data[0].to(memory_format=torch.channels_last))]
    one, other = (torch.autograd.grad(net(d).square().sum(), d)[0] for d in layouts)
    assert torch.allclose(one, other, atol=1e-5)


def test_layers_that_are_left_out_leave_gradients_exact():
    class Skipping(Net):
        skipped = ()

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                if i not in self.skipped:
                    x = layer(x)
            return self.head(x)

    found = []
    for backward in ("reversible", "stored"):
        torch.manual_seed(0)
        net = mnet_fx.momentumize(Skipping(0.1), gamma=0.5, weights="matched", regions=["layers"], backward=backward)
        mnet_fx.calibrate(net, batches(), rotate=True)
        net.skipped = (1, 3)
        torch.manual_seed(3)
        y = net(batches(1, 9)[0])
        found.append([y, *torch.autograd.grad(y.square().sum(), [*net.layers[0].parameters(), *net.layers[2].parameters()])])
    assert all(map(torch.equal, *found))


def test_what_cannot_be_rotated_is_a_clear_error():
    class Cut(Net):
        def forward(self, x):
            return super().forward(x).detach()

    torch.manual_seed(0)
    net = mnet_fx.momentumize(Cut(), gamma=0.5, weights="matched", regions=["layers"])
    expected = net(batches()[0])
    with pytest.raises(mnet_fx.SettingsError, match="rotate=True needs gradients"):
        mnet_fx.calibrate(net, batches(), rotate=True)
    assert torch.equal(net(batches()[0]), expected)
    with pytest.raises(mnet_fx.SettingsError, match="weights='signed' needs v"):
        Settings(weights="signed", initial_velocity=torch.nn.Linear(2, 2))
    other, _ = rotated()
    wide = mnet_fx.momentumize(
        Net(),
        gamma=0.5,
        weights="matched",
        regions=["layers"],
        calibration=[
            {"place": chain["place"], "maps": [m and {"frame": torch.eye(8)} for m in chain["maps"]]}
            for chain in mnet_fx.calibrate(other, batches(), rotate=True).maps
        ],
    )
    with pytest.raises(mnet_fx.StreamError, match="and 8 channels"):
        wide(batches()[0])
    wrong = [{"frame": 3 * torch.eye(8)}, {"frame": torch.eye(8).long()}, {"frame": torch.full((8, 8), float("nan"))}]
    for bad in (
        *wrong,
        {"frame": torch.eye(8)[:3]},
        {"frame": torch.eye(8), "shift": torch.zeros(4)},
        {"frame": torch.eye(8), "up": torch.eye(8)},
    ):
        with pytest.raises(mnet_fx.SettingsError, match="calibration must be"):
            mnet_fx.momentumize(Net(), weights="matched", calibration=[{"place": ["a"], "maps": [bad]}])


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


@pytest.mark.parametrize("kind", ["signed", "rotated", "calibrated"])
def test_another_number_of_dimensions_is_an_error_and_not_another_network(kind, tmp_path):
    """Channels are told by it; here height, width and channels are 8 each."""
    torch.manual_seed(0)
    weights = "signed" if kind == "signed" else "matched"
    net = mnet_fx.momentumize(Stack(), gamma=0.5, weights=weights, regions=["layers"], backward="stored").eval()
    x = torch.randn(3, 8, 8, 8)
    if kind != "signed":
        mnet_fx.calibrate(net, [torch.randn(3, 8, 8, 8) for _ in range(4)], rotate=kind == "rotated")
        mnet_fx.save(net, tmp_path / "net.pt")
        net = mnet_fx.load(Stack(), tmp_path / "net.pt").eval()
    else:
        net(x)
    with pytest.raises(mnet_fx.StreamError, match="for a stream of 4 dimensions"):
        net(x[0])
    with pytest.raises(mnet_fx.StreamError, match="for a stream of 4 dimensions"):
        torch.func.vmap(net)(x)
    if kind == "signed":
        assert torch.allclose(torch.func.vmap(lambda one: net(one[None])[0])(x), net(x), atol=1e-5)


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Conv() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("backward", ["stored", "reversible"])
def test_a_frame_that_changes_before_the_backward_is_an_error(backward):
    net, found = rotated("named", backward=backward)
    y = net(batches(1)[0])
    found.maps[0]["maps"][1]["frame"].copy_(torch.eye(WIDTH).flip(0))
    with pytest.raises(mnet_fx.MnetError, match=r"frame of the calibration was changed|does not repeat"):
        y.sum().backward()


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_net_that_was_trained_over_a_compiler_with_calls_of_two_sizes_is_rotated(inner):
    net = made("captured", inner=inner)
    for _ in range(2):
        net(batches(1)[0]).sum().backward()
        net.eval()
    net.train()
    found = mnet_fx.calibrate(net, batches(4) + [b[:3] for b in batches(4, 2)], rotate=True)
    assert found.regions[0].rotated == 3
    assert found.error_after < 0.2 * found.error_before


def test_what_outputs_are_sensitive_to_is_the_originals():
    found = []
    for gamma in (0.9, 0.1):
        net = made(gamma=gamma)
        with evaluated(net):
            found.append(sensitivities(net, [((b,), {}) for b in batches(3)]))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-4, atol=1e-9) for key in found[0])


@pytest.mark.parametrize("way", ["named", "captured"])
def test_a_frozen_network_is_rotated_and_stays_frozen(way):
    net = made(way)
    for parameter in list(net.parameters())[:9]:
        parameter.requires_grad_(False)
    frozen = [p.requires_grad for p in net.parameters()]
    found = mnet_fx.calibrate(net, batches(), rotate=True)
    assert [p.requires_grad for p in net.parameters()] == frozen
    assert found.error_after == pytest.approx(rotated(way)[1].error_after, rel=1e-3)


def test_signs_are_not_those_of_another_width():
    """As those of (batch, channels, time), where the last dimension counts as channels, would be with every length."""
    net = mnet_fx.momentumize(torch.nn.Sequential(*(Wave() for _ in range(4))), gamma=0.5, weights="signed", regions=[""])
    net(torch.randn(2, 8, 30))
    with pytest.raises(mnet_fx.StreamError, match="and 30 channels"):
        net(torch.randn(2, 8, 20))


class Wave(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def test_a_frame_turns_what_no_map_tells_to_where_it_does_least_harm():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    told = 5 * z @ torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)  # large, in the last direction
    rest = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.1, 0.01])
    turn = frame(z, told + rest, "full", None, torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64).diag())
    assert torch.allclose(turn.abs(), torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64), atol=0.02)
    assert torch.allclose(turn @ turn.T, torch.eye(3, dtype=torch.float64), atol=1e-9)


def test_batches_that_cannot_be_fitted_are_named():
    bad = batches()
    bad[1] = bad[1].clone()
    bad[1][0, 0, 0] = float("nan")
    for rotate in (False, True):
        with pytest.raises(mnet_fx.SettingsError, match="hold inf or NaN"):
            mnet_fx.calibrate(made(), bad, rotate=rotate)
    net, data = made(), batches()
    with torch.inference_mode():
        mnet_fx.calibrate(net, data, rotate=True)
    net(data[0]).sum().backward()


def test_signs_are_drawn_whatever_the_default_device_is():
    net = made(weights="signed").eval()
    x = batches(1)[0]
    expected = net(x)
    with torch.device("meta"):
        assert torch.equal(net(x), expected)


def test_signs_are_the_same_everywhere_and_fair():
    assert _signs(1, 8).tolist() == [-1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    found = torch.stack([_signs(t, 512) for t in range(64)])
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    assert found.mean().abs() < 0.02
    assert (found @ found.T / 512 - torch.eye(64)).abs().max() < 0.25
