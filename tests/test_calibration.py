"""`mnet_fx.calibrate`: closer to the original, exact as before, in every way in."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.fx as fx
from torch import nn

import mnet_fx
from mnet_fx import map_fits

WIDTH = 16


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


WAYS = {
    "named": lambda model, **o: mnet_fx.momentumize(model, regions=["layers"], **o),
    "captured": lambda model, **o: mnet_fx.momentumize(model, **o),
    "inductor-like": lambda model, **o: mnet_fx.momentumize(model, inner="aot_eager", **o),
    "graph": lambda model, **o: mnet_fx.momentumize(fx.symbolic_trace(model), **o),
}


def batches(count=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    return [torch.randn(4, 8, WIDTH, generator=generator) @ mixing * 0.5 for _ in range(count)]


def made(way="named", dropout=0.0, gamma=0.5, **options):
    torch.manual_seed(0)
    return WAYS[way](Net(dropout), gamma=gamma, weights="matched", **options)


def gradients(net, x, seed=3):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("way", WAYS)
def test_closer_to_the_original_and_exact(way):
    net, stored = made(way, 0.2), made(way, 0.2, backward="stored")
    keys = list(net.state_dict())
    found = mnet_fx.calibrate(net, batches())
    mnet_fx.calibrate(stored, batches())
    assert found.error_after < 0.6 * found.error_before
    assert found.cosine_after > found.cosine_before
    assert [(r.steps, r.mapped, r.kind, r.tokens, r.width) for r in found.regions] == [(4, 3, "full", 192, WIDTH)]
    assert "calibrated" in str(found)
    assert "3 of 4 steps, full" in str(found)
    assert list(net.state_dict()) == keys
    assert net.training
    assert len(list(net.parameters())) == len(keys)
    x = batches(1, 9)[0]
    plain = gradients(made(way, 0.2), x)
    ours = gradients(net, x)
    assert not torch.equal(ours[0], plain[0])
    assert all(map(torch.equal, ours, gradients(stored, x)))


def test_all_ways_in_fit_the_same_maps():
    x, outputs = batches(1, 9)[0], []
    for way in WAYS:
        net = made(way)
        mnet_fx.calibrate(net, batches())
        outputs.append(net(x).detach())
    assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)


def test_images_have_their_channels_in_dimension_1():
    torch.manual_seed(0)
    net = mnet_fx.momentumize(ResNet().eval(), gamma=0.5, weights="matched")
    found = mnet_fx.calibrate(net, [torch.randn(4, 3, 8, 8) for _ in range(4)])
    assert found.error_after < 0.7 * found.error_before
    assert (found.regions[0].tokens, found.regions[0].width) == (3 * 4 * 64, 8)


@pytest.mark.parametrize("way", WAYS)
def test_a_map_that_changes_before_the_backward_is_an_error(way):
    net = made(way)
    mnet_fx.calibrate(net, batches())
    y = net(batches(1)[0])
    maps = next(iter(mnet_fx.calibration._maps(net).values()))
    with torch.no_grad():
        maps[2].data()["weight"].add_(0.01)
    with pytest.raises(mnet_fx.InversionError, match="read map"):
        y.sum().backward()


@pytest.mark.parametrize("way", WAYS)
def test_copies_pickles_and_dtypes_have_the_maps(way):
    net = made(way)
    mnet_fx.calibrate(net, batches())
    x = batches(1, 9)[0]
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(net)))(x), expected)
    twin = copy.deepcopy(net).double()
    assert torch.allclose(twin(x.double()).float(), expected, atol=1e-5)
    assert not torch.allclose(made(way).double()(x.double()).float(), expected, atol=1e-3)
    mnet_fx.calibrate(twin, [b.double() * 3 for b in batches()])
    assert torch.equal(net(x), expected)  # a copy has maps of its own


@pytest.mark.parametrize("way", WAYS)
def test_what_is_exported_reads_where_the_maps_say(way):
    net = made(way).eval()
    mnet_fx.calibrate(net, batches())
    x = batches(1, 9)[0]
    expected = net(x)
    assert torch.allclose(torch.export.export(net, (x,)).module()(x), expected, atol=1e-5)
    assert not torch.allclose(made(way).eval()(x), expected, atol=1e-3)


def test_too_few_tokens_give_maps_of_low_rank_and_a_warning():
    with pytest.warns(mnet_fx.MnetWarning, match="on 64 tokens of width 16.*low-rank"):
        found = mnet_fx.calibrate(made(), batches(3))
    assert (found.regions[0].kind, found.regions[0].rank) == ("low-rank", 4)
    assert found.error_after < found.error_before
    with pytest.warns(mnet_fx.MnetWarning, match="on 32 tokens"):
        assert mnet_fx.calibrate(made(), batches(2), kind="full").regions[0].kind == "full"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnet_fx.calibrate(made(), batches(2), kind="diagonal")
        mnet_fx.calibrate(made(), batches(2), kind="low-rank", rank=1)


@pytest.mark.parametrize("way", WAYS)
def test_maps_of_low_rank_are_as_exact_and_travel(way, tmp_path):
    net, stored = made(way, 0.2), made(way, 0.2, backward="stored")
    found = mnet_fx.calibrate(net, batches(), kind="low-rank", rank=3)
    mnet_fx.calibrate(stored, batches(), kind="low-rank", rank=3)
    assert [(r.mapped, r.kind, r.rank) for r in found.regions] == [(3, "low-rank", 3)]
    assert "3 of 4 steps, of rank 3, 192 tokens" in str(found)
    assert [tuple(t.shape) for t in found.maps[0]["maps"][2].values()] == [(16,), (16, 3), (3, 16)]
    x = batches(1, 9)[0]
    assert all(map(torch.equal, gradients(net, x), gradients(stored, x)))
    net.eval()
    mnet_fx.save(net, tmp_path / "net.safetensors")
    again = mnet_fx.load(Net(0.2), tmp_path / "net.safetensors").eval()
    assert torch.equal(again(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_a_rank_is_the_best_of_its_size_and_the_width_is_all():
    """By Eckart and Young: of all W of a rank, none predicts closer where x is white; of the full rank, it is the full map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(400, WIDTH, generator=generator, dtype=torch.float64)).Q
    x = torch.linalg.qr(x - x.mean(0)).Q
    e = x @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 1
    full = map_fits.affine(x, e, "full", None)
    values = torch.linalg.svdvals(full["weight"])
    for rank in (1, 5, WIDTH):
        low = map_fits.affine(x, e, "low-rank", rank)
        off = torch.linalg.norm(low["down"] @ low["up"] - full["weight"])
        assert torch.allclose(off, values[rank:].square().sum().sqrt(), atol=1e-9)
        assert torch.allclose(x @ low["down"] @ low["up"] + low["shift"] - 1, (x @ low["down"] @ low["up"]), atol=1e-9)


def test_masked_tokens_do_not_count():
    class Masked(Net):
        def forward(self, x, attention_mask):
            return super().forward(x)

    mask = torch.ones(4, 8)
    mask[:, 6:] = 0
    torch.manual_seed(0)
    nets = [mnet_fx.momentumize(Masked(), gamma=0.5, weights="matched", regions=["layers"]) for _ in range(2)]
    junk = [torch.where(mask[..., None] > 0, b, 1e3 * (i + 1)) for i, b in enumerate(batches())]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, data in zip(nets, (batches(), junk), strict=True):
        assert mnet_fx.calibrate(net, [{"x": b, "attention_mask": mask} for b in data]).regions[0].tokens == 6 * 24
    assert torch.allclose(nets[0](batches()[0], mask), nets[1](batches()[0], mask), atol=1e-5)


def test_what_cannot_be_calibrated_is_a_clear_error():
    momentum = mnet_fx.momentumize(Net(), regions=["layers"])
    for net, data, match in [
        (Net(), batches(), "momentumize returned"),
        (momentum, batches(), "weights='matched'"),
        (made(gamma=0.0), batches(), "nothing to calibrate"),
        (made(), batches(1), "at least two"),
        (made(), batches()[0], "at least two"),
    ]:
        with pytest.raises(mnet_fx.SettingsError, match=match):
            mnet_fx.calibrate(net, data)
    with pytest.raises(mnet_fx.SettingsError, match="kind must be"):
        mnet_fx.calibrate(made(), batches(), kind="dense")
    for kind, rank in [("low-rank", 0), ("low-rank", 2.5), ("low-rank", True), ("full", 3), ("auto", 3)]:
        with pytest.raises(mnet_fx.SettingsError, match="rank must be a positive int"):
            mnet_fx.calibrate(made(), batches(), kind=kind, rank=rank)


def test_a_chain_that_runs_twice_is_a_clear_error_and_leaves_the_maps():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) + super().forward(x + 1) if self.twice else super().forward(x)

    torch.manual_seed(0)
    net = mnet_fx.momentumize(Twice(), gamma=0.5, weights="matched", regions=["layers"])
    net.twice = False
    mnet_fx.calibrate(net, batches())
    expected = net(batches()[0])
    net.twice = True
    with pytest.raises(mnet_fx.SettingsError, match="more than once"):
        mnet_fx.calibrate(net, batches())
    net.twice = False
    assert torch.equal(net(batches()[0]), expected)


def test_verify_passes():
    net = made("named", 0.1)
    mnet_fx.calibrate(net, batches())
    assert mnet_fx.verify(net, batches()[0])


def test_a_step_that_writes_to_what_it_reads_is_a_clear_error():
    class Writing(Layer):
        def forward(self, x):
            return super().forward(x.relu_() if self.training and self.writes else x)

    net = Net()
    net.layers[2] = Writing(0.0)
    net.layers[2].writes = True
    net = mnet_fx.momentumize(net, gamma=0.5, weights="matched", regions=["layers"])
    mnet_fx.calibrate(net, batches())  # in eval mode
    with pytest.raises(mnet_fx.StreamError, match="in place"):
        net(batches()[0])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("way", ["captured", "named"])
def test_checkpoints_carry_the_maps(way, suffix, tmp_path):
    net = made(way)
    calibration = mnet_fx.calibrate(net, batches())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    mnet_fx.save(net, tmp_path / "net.safetensors")
    path = tmp_path / f"net.{suffix}"
    expected = net(batches()[0])
    assert torch.equal(mnet_fx.load(Net(), path)(batches()[0]), expected)
    for again in (
        made(way, calibration=calibration),
        made(way, calibration=calibration.maps),
        made(way, calibration=net.mnet_fx_options["calibration"]),
    ):
        with warnings.catch_warnings(action="error"):
            again.load_state_dict(torch.load(tmp_path / "net.pt"))
        assert torch.equal(again(batches()[0]), expected)
    with pytest.warns(mnet_fx.MnetWarning, match="calibration=the maps of SHA-256 .*; this net has calibration=None"):
        made(way).load_state_dict(torch.load(tmp_path / "net.pt"))
    options = mnet_fx.saved_options(path)
    assert torch.equal(options["calibration"][0]["maps"][2]["weight"], calibration.maps[0]["maps"][2]["weight"])


def test_a_config_has_the_fingerprint_and_asks_for_the_maps(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0, use_cache=False)
    options = {"gamma": 0.5, "weights": "matched", "regions": ["h"]}
    net = mnet_fx.momentumize(transformers.GPT2Model(config), **options)
    calibration = mnet_fx.calibrate(net, [torch.randint(20, (8, 16)) for _ in range(4)])
    net.save_pretrained(tmp_path)
    assert list(net.config.mnet_fx["calibration"]) == ["fingerprint"]
    again = transformers.GPT2Model.from_pretrained(tmp_path)
    with pytest.raises(mnet_fx.SettingsError, match="give calibration="):
        mnet_fx.saved_options(tmp_path)
    with pytest.warns(mnet_fx.MnetWarning, match="the config says .*calibration=the maps of"):
        mnet_fx.momentumize(again, **options)
    ids = torch.randint(20, (2, 8))
    with warnings.catch_warnings(action="error"):
        again = mnet_fx.momentumize(again, **mnet_fx.saved_options(tmp_path, calibration=calibration))
    assert torch.equal(again(ids).last_hidden_state, net.eval()(ids).last_hidden_state)


def test_maps_that_do_not_belong_are_said():
    calibration = mnet_fx.calibrate(made("captured"), batches())
    shorter = Net()
    shorter.layers = shorter.layers[:3]
    net = mnet_fx.momentumize(shorter, gamma=0.5, weights="matched", calibration=calibration)
    with pytest.warns(mnet_fx.MnetWarning, match="reads uncalibrated: the network was calibrated for those from layers.0"):
        net(batches()[0])
    down, up = torch.ones(2, 1), torch.ones(2, 2)
    misfits = [
        {"weight": torch.ones(3)},
        {"down": down},
        {"down": down, "up": up},
        {"scale": down},
        {"weight": up, "down": down, "up": down.T},
    ]
    for wrong in (3, [{"place": ["layers"]}], *([{"place": ["layers"], "maps": [{"shift": torch.ones(2), **m}]}] for m in misfits)):
        with pytest.raises(mnet_fx.SettingsError, match="calibration must be what"):
            made(calibration=wrong)
    with pytest.raises(mnet_fx.SettingsError, match="weights='matched'"):
        mnet_fx.momentumize(Net(), regions=["layers"], calibration=calibration)


@pytest.mark.parametrize("way", [{}, {"regions": ["layers"]}], ids=["captured", "named"])
def test_what_a_calibrated_step_reads_must_be_what_it_was(way):
    net = mnet_fx.momentumize(Net(), gamma=0.5, weights="matched", **way)
    mnet_fx.calibrate(net, batches())
    bias = net.layers[2].mlp[3].bias
    loss = net(torch.randn(4, 6, WIDTH)).square().sum()
    with torch.no_grad():
        bias += 0.01
    with pytest.raises(mnet_fx.InversionError, match=r"step 2: parameter 'layers\.2\.mlp\.3\.bias'"):
        loss.backward()
