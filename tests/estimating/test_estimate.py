"""What `estimate` says before a step runs is what torch's allocator says while it runs; and rewritten models under fake tensors."""

import warnings

import pytest
import torch
import torch.fx as fx
from budget_models import MODELS, UNet, WaveNet
from models import Encoder
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import mnet_fx
from mnet_fx.arithmetic.fake_state import SEEN
from mnet_fx.budget.blocks import block_paths, checkpointed
from mnet_fx.budget.estimates import PARTS
from mnet_fx.budget.faking import fake_model
from mnet_fx.budget.measured import measure
from mnet_fx.budget.sizes import parsed, shown
from mnet_fx.budget.workspace import workspace

CPU = torch.device("cpu")


class Block(nn.Module):
    """With dropout and batch statistics, of which a step keeps a random state and copies."""

    def __init__(self, d: int, dropout: float = 0.0):
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(d), nn.Linear(d, d), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    def __init__(self, d: int = 64, steps: int = 6, dropout: float = 0.1):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block(d, dropout) for _ in range(steps)), nn.Linear(d, 4 * d)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def points(batch: int = 512, d: int = 64) -> Tensor:
    return torch.randn(batch, d)


def measured(net, *inputs, loss=Tensor.sum):
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    loss(net(*inputs)).backward()
    return measure(lambda: loss(net(*inputs)).backward())


def blocks_of(model: nn.Module) -> nn.Module:
    return checkpointed(model, block_paths(model, [f"layers.{i}" for i in range(len(model.layers))]))


@pytest.mark.parametrize("options", [{"regions": ["layers"]}, {"regions": ["layers"], "gamma": 0.1}, {"regions": ["layers"], "gamma": 0.0}])
def test_of_a_net_with_dropout_and_batch_statistics_to_the_byte(options):
    model, x = Net(), points()
    found = mnet_fx.estimate(model, x, **options)
    real = {"plain": measured(model, x), "momentum": measured(mnet_fx.momentumize(model, **options), x)}
    for way in (found.plain, found.momentum):
        assert way.kept_bytes == pytest.approx(real[way.name].kept, rel=1e-3, abs=64)  # but for numbers of 4 bytes
        assert way.peak_bytes == pytest.approx(real[way.name].peak, rel=0.01)


@pytest.mark.parametrize("gamma", [0.9, 0.1])
def test_of_a_captured_encoder(gamma):
    model, x = Encoder(4, d=64), torch.randn(4, 64, 64)
    found = mnet_fx.estimate(model, (x,), gamma=gamma)
    real = measured(mnet_fx.momentumize(model, gamma=gamma), x)
    assert (found.momentum.kept_bytes, found.momentum.peak_bytes) == pytest.approx((real.kept, real.peak), rel=0.01)
    real = measured(blocks_of(model), x)
    assert found.checkpoint is not None
    assert (found.checkpoint.kept_bytes, found.checkpoint.peak_bytes) == pytest.approx((real.kept, real.peak), rel=0.01)


def test_of_a_graph_module_and_of_rewritten_nets():
    model, x = Net(dropout=0.0), points()
    traced = mnet_fx.estimate(mnet_fx.momentumize(fx.symbolic_trace(model), gamma=0.5), x)
    named = mnet_fx.estimate(mnet_fx.momentumize(model, gamma=0.5, regions=["layers"]), x)
    direct = mnet_fx.estimate(model, x, gamma=0.5, regions=["layers"])
    assert named.momentum == direct.momentum
    assert named.plain == direct.plain
    assert traced.plain.kept_bytes == direct.plain.kept_bytes
    assert traced.momentum.kept_bytes == pytest.approx(direct.momentum.kept_bytes, rel=0.01)
    assert (named.steps, named.gamma) == (6, "0.5")


def test_parts_are_the_whole():
    found = mnet_fx.estimate(Net(), points(), optimizer=torch.optim.AdamW, gamma=0.01, regions=["layers"])
    weights = sum(p.numel() * 4 for p in Net().parameters())
    for way in found.ways:
        assert tuple(way.parts) == PARTS
        assert sum(way.parts.values()) == way.total_bytes
        assert way.parts["parameters"] == way.parts["gradients"] == weights
        assert 2 * weights <= way.parts["optimizer state"] <= 2 * weights + 4 * 40
        assert way.parts["inputs"] == 512 * 64 * 4
        assert 0 < way.kept_bytes <= way.peak_bytes <= way.total_bytes
    state = found.momentum.parts
    assert state["stream state"] == 12 * 512 * 64
    assert state["spilled bits"] > 0
    assert state["kept for steps"] >= 6 * 5056  # random states
    assert next(iter(found.plain.outside)).startswith("layers.")
    assert found.momentum.outside == {"": 512 * 64 * 4 + 4}  # what the head reads, and the loss


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9), "instance"])
def test_optimizers(optimizer):
    model = Net()
    made = torch.optim.RMSprop(model.parameters(), 0.1) if optimizer == "instance" else optimizer
    found = mnet_fx.estimate(model, points(), optimizer=made, regions=["layers"])
    ones = {torch.optim.SGD: 0, torch.optim.Adam: 2}.get(made, 1)
    assert found.plain.parts["optimizer state"] == pytest.approx(ones * found.plain.parts["parameters"], rel=0.02)
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_allocated_and_the_model_is_left_as_it_was():
    with torch.device("meta"):
        model = Encoder(2, d=1024)
    found = mnet_fx.estimate(model, torch.empty(8, 4096, 1024, device="meta"), regions=["layers"])
    assert found.plain.kept_bytes > 2**30
    assert all(p.is_meta and p.grad is None for p in model.parameters())
    real, x = Net(), points()
    before = {name: t.clone() for name, t in real.state_dict().items()}
    taken = measure(lambda: mnet_fx.estimate(real, x, regions=["layers"]))
    assert taken.peak < 2**17
    assert all(torch.equal(t, before[name]) for name, t in real.state_dict().items())
    assert type(real.layers[0].linear.weight) is nn.Parameter


def test_the_largest_batch_is_the_largest():
    found = mnet_fx.estimate(Net(), points(), memory="6MiB", regions=["layers"], gamma=0.9)
    for way in found.ways:
        assert getattr(found.at_batch(way.largest_batch), way.name).fits("6MiB")
        assert not getattr(found.at_batch(way.largest_batch + 1), way.name).fits("6 MiB")
        assert way.fits(2**40)
    assert found.momentum.largest_batch > found.plain.largest_batch
    assert found.momentum.largest_depth_factor > 2 * found.plain.largest_depth_factor
    nothing = mnet_fx.estimate(Net(), points(), memory=100, regions=["layers"])
    assert (nothing.plain.largest_batch, nothing.plain.fits(100)) == (0, False)


def test_the_depth_factor_is_that_of_a_deeper_net():
    found = mnet_fx.estimate(Net(), points(), memory="5MiB", regions=["layers"], gamma=0.1)
    for name in ("plain", "momentum"):
        factor = getattr(found, name).largest_depth_factor
        deeper = mnet_fx.estimate(Net(steps=round(6 * factor)), points(), regions=["layers"], gamma=0.1)
        assert getattr(deeper, name).total_bytes == pytest.approx(5 * 2**20, rel=0.06)


def test_operations_are_those_of_the_flop_counter():
    model, x = Net(dropout=0.0), points()
    found = mnet_fx.estimate(model, x, regions=["layers"])
    counts = []
    for net in (model, mnet_fx.momentumize(model, regions=["layers"])):
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert found.momentum.flops_ratio == pytest.approx(counts[1] / counts[0])
    assert found.plain.flops_ratio == 1.0


def test_seconds_of_a_gpu():
    quick, slow = (mnet_fx.estimate(Net(), points(), gpu=name, regions=["layers"]) for name in ("NVIDIA H100", "NVIDIA L4"))
    assert 0 < quick.momentum.seconds < slow.momentum.seconds
    assert quick.plain.seconds < quick.checkpoint.seconds
    assert mnet_fx.estimate(Net(), points(), regions=["layers"]).plain.seconds is None


def test_the_table_and_the_dictionary():
    found = mnet_fx.estimate(Net(), points(), memory="1GiB", optimizer=torch.optim.AdamW, regions=["layers"])
    text = str(found)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "fits in 1.00 GiB" in text
    assert text.splitlines()[0].startswith("Net, batch 512, AdamW")
    plain = found.to_dict()
    assert plain["schema"] == 1
    assert set(plain["ways"]) == {"plain", "checkpoint", "momentum"}
    assert plain["ways"]["plain"]["total_mb"] == found.plain.total_bytes / 1e6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"example_inputs": 3}, "example_inputs must be a call"),
        ({"memory": "lots"}, "memory must be a number of bytes"),
        ({"gpu": "Voodoo 2"}, "gpu must be one that torch has a data sheet of"),
        ({"optimizer": 3}, "optimizer must be a class"),
        ({"loss": 3}, "loss must be a function"),
        ({"loss": lambda output: output}, "loss must be a function"),
        ({"gamma": 2.0}, "gamma"),
    ],
)
def test_errors_name_the_argument(arguments, says):
    arguments = {"example_inputs": points(8), "regions": ["layers"], **arguments}
    with pytest.raises(mnet_fx.SettingsError, match=says):
        mnet_fx.estimate(Net(), **arguments)


def test_a_model_that_asks_for_values_is_refused_in_words():
    class Asks(Net):
        def forward(self, x):
            return super().forward(x) * (2 if x.sum() > 0 else 1)

    with pytest.raises(mnet_fx.MnetError, match="asks for the values of tensors"):
        mnet_fx.estimate(Asks(), points(), regions=["layers"])


def test_sizes():
    assert [parsed(text) for text in ("16GiB", "80 GB", "1.5 mib", "512", 7)] == [2**34, 80 * 10**9, 3 * 2**19, 512, 7]
    assert [shown(size) for size in (0, 1023, 1024, 43_000_000, 1023 * 2**20)] == ["0 B", "1023 B", "1.00 KiB", "41.0 MiB", "1.00 GiB"]


def tracked(net: nn.Module, x: Tensor, mode: FakeTensorMode) -> tuple[int, int]:
    """Bytes kept and the peak, as torch's MemTracker sees them."""
    with mode:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        tracker = MemTracker()
        tracker.track_external(net, x)
        with tracker:
            before = tracker.get_tracker_snapshot("current")[CPU]["Total"]
            loss = net(x).sum()
            kept = tracker.get_tracker_snapshot("current")[CPU]["Total"] - before
            loss.backward()
            return kept, tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before


@pytest.mark.parametrize("options", [{"regions": ["layers"]}, {"gamma": 0.1}], ids=["named", "captured"])
def test_torchs_own_tracker_sees_true_figures_of_rewritten_nets(options):
    model, mode = Encoder(4, d=64), FakeTensorMode()
    real = measured(mnet_fx.momentumize(model, **options), torch.randn(4, 64, 64))
    net = mnet_fx.momentumize(fake_model(model, mode), **options)
    with mode:
        x = torch.empty(4, 64, 64)
    assert tracked(net, x, mode) == (real.kept, real.peak)


def test_fake_tensors_without_their_mode():
    mode = FakeTensorMode()
    net = mnet_fx.momentumize(fake_model(Net(), mode))
    with mode:
        x = torch.empty(16, 64)
    net(x).sum().backward()
    assert net.head.weight.grad.shape == (256, 64)


def test_a_chain_on_fake_tensors_does_not_spoil_real_ones():
    model = Net()
    mnet_fx.estimate(model, points(), gamma=0.1, regions=["layers"])
    net, stored = (mnet_fx.momentumize(model, gamma=0.1, regions=["layers"], backward=kind) for kind in ("reversible", "stored"))
    gradients = []
    for each in (net, stored):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(each(points().fill_(0.5)).sum(), model.layers[0].linear.weight)[0])
    assert torch.equal(*gradients)


def test_hugging_faces_decoders_make_no_mask_for_what_is_not_packed():
    """They ask for values, which fake tensors do not have; keys and values of grouped heads are repeated where there is a mask."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=50, use_cache=False))
    find = transformers.masking_utils.find_packed_sequence_indices
    ids = torch.randint(50, (4, 128))
    total = lambda output: output.last_hidden_state.sum()  # noqa: E731
    found = mnet_fx.estimate(model, (torch.empty_like(ids, device="meta"),), regions=["layers"], loss=total)
    assert transformers.masking_utils.find_packed_sequence_indices is find
    nets = {"plain": model, "checkpoint": blocks_of(model), "momentum": mnet_fx.momentumize(model, regions=["layers"])}
    for way, net in nets.items():
        real, said = measured(net, ids, loss=total), getattr(found, way)
        assert (way, said.kept_bytes) == (way, pytest.approx(real.kept, rel=0.01))
        assert (way, said.peak_bytes) == (way, pytest.approx(real.peak, rel=0.01))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "out", "size", "kernel", "stride", "groups"),
    [
        (8, 64, 64, 16, 3, 1, 1),
        (8, 32, 64, 16, 1, 1, 1),
        (8, 64, 128, 16, 1, 2, 1),
        (8, 3, 32, 32, 3, 1, 1),
        (8, 48, 48, 8, 3, 1, 48),
        (8, 96, 96, 16, 3, 2, 96),
        (8, 96, 96, 16, 7, 1, 96),
        (8, 96, 96, 16, 5, 2, 96),
        (8, 128, 128, 16, 3, 1, 32),
        (8, 128, 256, 16, 3, 2, 32),
        (8, 64, 64, 16, 3, 2, 8),
        (8, 80, 80, 16, 3, 1, 5),
        (8, 96, 96, 16, 3, 2, 4),
        (8, 96, 96, 16, 3, 1, 16),
    ],
)
def test_work_space_of_convolutions(threads, last, batch, channels, out, size, kernel, stride, groups):
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("blocks of 16 channels are those of AVX-512")
    if last and 1 < groups < channels and channels // groups > 16:
        pytest.skip("groups of more than a block are padded by more than is known of channels-last images")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w = torch.randn(batch, channels, size, size), torch.randn(out, channels // groups, kernel, kernel)
        x = x.to(memory_format=torch.channels_last) if last else x
        shape = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups)
        forward, backward = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
        y = forward(x, w, None, *shape)
        for func, args in ((forward, (x, w, None, *shape)), (backward, (y, x, w, None, *shape, [True, True, False]))):
            real = measure(lambda func=func, args=args: func(*args))
            result = real.kept
            assert result + workspace(func, args, {}) == pytest.approx(real.peak, rel=0.08)
    finally:
        torch.set_num_threads(before)


# Values say when one byte more for each element is spilled. From sizes alone, of these three models at gamma 0.1, kept is off by more than
# the 1 % that holds for all else, and that holds with values everywhere.
OFF_FROM_SIZES = {"GPT-2": 0.013, "ViT-S/16": 0.038, "U-Net": 0.101}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_benchmark(name):
    from estimate import rows_of
    from tqdm import tqdm

    kind = MODELS[name][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = rows_of(name, tqdm(disable=True))
    for row in rows:
        kept = OFF_FROM_SIZES.get(name, 0.01) if row["way"] == "momentum, 0.1" else 0.01
        peak = 0.01 if kind == "transformer" else 0.03
        assert row["kept_estimated"] == pytest.approx(row["kept"], rel=kept), row
        assert row["peak_estimated"] == pytest.approx(row["peak"], rel=max(peak, kept)), row
        assert abs(float(row["kept_values"].rstrip("%"))) <= 1, row
        assert abs(float(row["peak_values"].rstrip("%"))) <= 100 * peak, row


class Scaled(Block):
    """With a residual that is so many times as large."""

    def __init__(self, d: int, factor: float):
        super().__init__(d)
        self.factor = factor

    def forward(self, x):
        return x + self.factor * torch.tanh(self.linear(self.norm(x)))


class Growing(nn.Module):
    def __init__(self, factors: tuple[float, ...], d: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(Scaled(d, factor) for factor in factors)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


FACTORS = {"grows": (10.0, 100.0, 1000.0, 1e4, 1e5, 1e6), "shrinks": (1e-4,) * 8, "not finite": (1.0, 1e39, 1.0, 1.0)}


@pytest.mark.parametrize("options", [{"gamma": 0.1}, {"gamma": 0.9}, {"gamma": 0.1, "rest": "checkpoint"}], ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_with_values_the_bytes_that_they_decide_are_told(name, options):
    torch.manual_seed(0)
    model, x = Growing(FACTORS[name]), points()
    net = mnet_fx.momentumize(model, **options)
    real = measured(net, x)
    found = mnet_fx.estimate(model, x, values=True, **options)
    assert found.momentum.kept_bytes == pytest.approx(real.kept, abs=64 if name != "not finite" else 1024)
    if name != "not finite":  # where loops make masks, and torch's own operations others, on the way
        assert found.momentum.peak_bytes == pytest.approx(real.peak, abs=64)
    assert mnet_fx.estimate(net, x, values=True).momentum == found.momentum
    sizes = mnet_fx.estimate(model, x, **options)
    if name != "shrinks" or options["gamma"] == 0.1:
        assert sizes.momentum.kept_bytes != found.momentum.kept_bytes
    assert not any("values=True" in note for note in found.notes)
    assert any("values=True" in note for note in sizes.notes) == (sizes.momentum.parts["spilled bits"] > 0)


def test_with_values_what_float16_cannot_hold_is_a_mask():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh()) for _ in range(6))

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = x + (6e4 if i in (0, 5) else 1.0) * layer(x)
            return x

    torch.manual_seed(0)
    model, x = Half().half(), points().half()
    real = measured(mnet_fx.momentumize(model, gamma=0.1), x)
    assert mnet_fx.estimate(model, x, values=True, gamma=0.1).momentum.kept_bytes == pytest.approx(real.kept, abs=100)


def test_with_values_a_chain_that_runs_twice_finds_those_of_each_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block(64) for _ in range(6))

        def run(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

        def forward(self, x):
            return self.run(x) + self.run(1e-3 * x)

    torch.manual_seed(0)
    model, x = Twice(), points()
    options = {"gamma": 0.1, "regions": ["layers"]}
    real = measured(mnet_fx.momentumize(model, **options), x)
    found = mnet_fx.estimate(model, x, values=True, **options)
    assert (found.momentum.kept_bytes, found.momentum.peak_bytes) == pytest.approx((real.kept, real.peak), abs=64)


def test_with_values_another_gamma_and_another_batch_are_looked_at_too():
    torch.manual_seed(0)
    model, x = Growing(FACTORS["grows"]), points()
    found = mnet_fx.estimate(model, x, values=True, gamma=0.9, memory="8MiB")
    assert found.at_gamma(0.1) == mnet_fx.estimate(model, x, values=True, gamma=0.1).at_gamma(0.1)
    assert found.at_gamma(0.1).momentum == mnet_fx.estimate(model, x, values=True, gamma=0.1).momentum
    assert found.momentum.limits.largest_batch > 512


class Readers(nn.Module):
    """Several gradients of the stream, or of what a block computes, are added up: in place, but on fake tensors."""

    def __init__(self, kind: str):
        super().__init__()
        self.layers, self.kind = nn.ModuleList(Scaled(64, 1.0) for _ in range(6)), kind

    def forward(self, x):
        for layer in self.layers:
            h = torch.tanh(layer.linear(layer.norm(x)))
            match self.kind:
                case "a difference":
                    x = x + 0.5 * (h - x)
                case "three":
                    x = x + h * torch.sigmoid(x) + 0.1 * x.sin()
                case "of a block":
                    x = x + h * 2 * h.exp() * h.sin() + h
        return x


@pytest.mark.parametrize("kind", ["a difference", "three", "of a block"])
def test_gradients_that_autograd_adds_in_place_take_no_memory_of_their_own(kind):
    torch.manual_seed(0)
    model, x = Readers(kind), points()
    found = mnet_fx.estimate(model, x)
    for way, net in ((found.plain, model), (found.momentum, mnet_fx.momentumize(model))):
        real = measured(net, x)
        assert (way.kept_bytes, way.peak_bytes) == pytest.approx((real.kept, real.peak), abs=64)


def test_a_sum_that_a_function_or_a_hook_makes_in_the_backward_pass_takes_memory():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            h = 2 * g
            return h + g

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            y = self.linear(x)
            y.register_hook(lambda g: g + g)
            return Twice.apply(y.tanh()).exp()

    model, x = Net(), points()
    real = measured(model, x)
    found = mnet_fx.estimate(model, x, regions=[])
    assert found.plain.peak_bytes == pytest.approx(real.peak, abs=64)


class Changing(Net):
    """With all that a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("time", torch.zeros(()))
        self.calls, self.log, self.sum, self.hidden = 0, [], torch.zeros(64), [nn.BatchNorm1d(64)]

    def forward(self, x):
        self.time = self.time + 1
        self.calls += 1
        self.log.append(1)
        self.sum.add_(1)
        return super().forward(self.hidden[0](x))

    def state(self):
        own = [self.time, self.sum, *self.buffers(), *self.hidden[0].buffers()]
        return [self.calls, len(self.log), id(self.time), *(t.clone() for t in own), torch.get_rng_state()]


@pytest.mark.parametrize("rewritten", [False, True], ids=["original", "rewritten"])
@pytest.mark.parametrize("options", [{"regions": ["layers"]}, {}], ids=["named", "captured"])
def test_seeing_values_leaves_no_trace(options, rewritten):
    model, x = Changing(), points()
    net = mnet_fx.momentumize(model, gamma=0.1, **options) if rewritten else model
    options = {} if rewritten else {"gamma": 0.1, **options}
    before, report = net.state(), str(getattr(net, "report", None))
    found = mnet_fx.estimate(net, x, values=True, **options)
    assert all(torch.equal(*pair) if isinstance(pair[0], Tensor) else pair[0] == pair[1] for pair in zip(net.state(), before, strict=True))
    assert str(getattr(net, "report", None)) == report
    assert all(p.grad is None for p in (*model.parameters(), *model.hidden[0].parameters()))
    sizes = mnet_fx.estimate(net, torch.empty(512, 64, device="meta"), **options)
    assert mnet_fx.estimate(net, x, **options).momentum == sizes.momentum  # the next estimate sees nothing
    assert found.momentum.kept_bytes > 0
    assert SEEN.get() is None


def test_all_that_a_model_reaches_is_fake():
    net = fake_model(Changing(), FakeTensorMode())
    assert all(isinstance(t, FakeTensor) for t in (*net.hidden[0].parameters(), *net.hidden[0].buffers(), net.sum))


def test_inputs_with_nan_are_left_as_they_were():
    x = points()
    x[3, 3] = float("nan")
    y = nn.Linear(64, 64)(x).sum()
    for given in (x, x[:1].expand(512, 64)):
        version = given._version
        mnet_fx.estimate(Net(), given, values=True, gamma=0.1)
        assert given._version == version
    y.backward()


def test_casts_of_weights_are_not_left_in_the_callers_autocast():
    model, x = Net(), points()
    with torch.autocast("cpu", torch.bfloat16):
        before = measure(lambda: model(x), backward=lambda y: None).kept
        torch.clear_autocast_cache()
        mnet_fx.estimate(model, x, values=True, gamma=0.1, regions=["layers"])
        assert measure(lambda: model(x), backward=lambda y: None).kept == before


def test_values_are_seen_without_the_inner_compiler(monkeypatch):
    def compiler(*_):
        raise AssertionError("compiled")

    found = mnet_fx.estimate(Net(), points(), values=True, gamma=0.1, inner=compiler)
    assert found.momentum == mnet_fx.estimate(Net(), points(), values=True, gamma=0.1).momentum


def test_chains_that_run_again_in_the_backward_pass_find_their_own_numbers():
    class Outer(nn.Module):
        def __init__(self, inner, scale):
            super().__init__()
            self.inner, self.scale = inner, scale

        def forward(self, x):
            y = x * self.scale
            for layer in self.inner:
                y = layer(y)
            return x + y

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.ModuleList(Scaled(64, 1.0) for _ in range(4))
            self.blocks = nn.ModuleList(Outer(inner, 10.0 ** (3 * i)) for i in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, x = Shared(), points()
    options = {"gamma": 0.0, "regions": ["blocks", "blocks.0.inner"]}
    real = measured(mnet_fx.momentumize(model, **options), x)
    found = mnet_fx.estimate(model, x, values=True, **options).momentum
    assert (found.kept_bytes, found.peak_bytes) == pytest.approx((real.kept, real.peak), abs=4096)  # empty tensors, a few hundred bytes


def test_what_is_supposed_of_rotated_chains_is_said():
    for values in (False, True):
        found = mnet_fx.estimate(Growing((1.0,) * 8), points(), values=values, gamma=0.1, weights="signed")
        assert any("rotated" in note for note in found.notes)
        assert any("values=True" in note for note in found.notes)
    assert not any("rotated" in note for note in mnet_fx.estimate(Growing((1.0,) * 8), points(), gamma=0.1).notes)


@pytest.mark.parametrize("values", [False, True])
def test_a_module_for_the_velocity_stays_as_it_was(values):
    velocity, model, x = nn.Linear(64, 64), Net(), points()
    mnet_fx.estimate(model, x, gamma=0.1, regions=["layers"], initial_velocity=velocity, values=values)
    assert velocity.weight.grad is None
    mnet_fx.momentumize(model, gamma=0.1, regions=["layers"], initial_velocity=velocity)(x).sum().backward()
    assert type(velocity.weight.grad) is Tensor


def test_layers_that_a_loop_adds_to_the_stream_are_blocks():
    class Loop(nn.Module):
        def __init__(self, depth: int = 6):
            super().__init__()
            self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 256)
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh()) for _ in range(depth))

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    model, x = Loop(), points()
    found = mnet_fx.estimate(model, x)
    real = measured(blocks_of(model), x)
    assert found.checkpoint is not None
    assert (found.checkpoint.kept_bytes, found.checkpoint.peak_bytes) == pytest.approx((real.kept, real.peak), rel=0.01)


def test_a_model_that_counts_its_calls_has_blocks():
    """Dynamo names its modules otherwise."""

    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    found = mnet_fx.estimate(Counting(), points())
    assert found.checkpoint is not None
    net = mnet_fx.momentumize(Counting(), points())
    assert "layers" in str(net.report)
    assert "__dict__" not in str(net.report)


@pytest.mark.parametrize("where", ["input", "model"])
def test_values_are_needed_to_see_some(where):
    model, x = Net(), points()
    model, x = (model.to("meta"), x) if where == "model" else (model, x.to("meta"))
    with pytest.raises(mnet_fx.SettingsError, match="values=True"):
        mnet_fx.estimate(model, x, values=True)
    with pytest.raises(mnet_fx.SettingsError, match="values must be True or False"):
        mnet_fx.estimate(model, x, values="no")


def test_a_momentum_net_by_itself_is_refused():
    with pytest.raises(mnet_fx.SettingsError, match="MomentumNet"):
        mnet_fx.estimate(mnet_fx.MomentumNet([nn.Linear(64, 64)] * 2), points())


def test_models_whose_checkpoints_are_lists():
    """All elements of a list of which one is in a chain, and what is of the same class elsewhere; a list of torch's alone is no class."""
    unet = UNet((16, 32), 3)
    blocks = [path for path, module in unet.named_modules() if type(module) is type(unet.down[0][0])]
    assert len(blocks) > 6
    assert set(block_paths(unet, ["down.0.0", "down.0.1"])) == set(blocks)
    assert block_paths(WaveNet(16), ["layers.3"]) == tuple(f"layers.{i}" for i in range(len(WaveNet(16).layers)))


def test_skip_outputs_that_are_there_at_once_are_told():
    class Skips(torch.nn.Module):
        def __init__(self, stacked=False):
            super().__init__()
            self.blocks, self.stacked = torch.nn.ModuleList(Skip() for _ in range(8)), stacked

        def forward(self, x):
            found = []
            for block in self.blocks:
                x, skip = block(x)
                found.append(skip)
            return torch.stack(found).sum(0) if self.stacked else sum(found)

    class Skip(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_x, self.to_skip = torch.nn.Linear(16, 16), torch.nn.Linear(16, 64)

        def forward(self, x):
            return x + torch.tanh(self.to_x(x)), self.to_skip(x)

    x, skips = torch.randn(256, 16), 8 * 256 * 64 * 4 / 1024
    stacked, summed = (mnet_fx.estimate(Skips(stacked), x) for stacked in (True, False))
    assert any(line.startswith(f"{skips:.0f} KiB are what the steps of a chain give to the outside") for line in stacked.advice)
    assert not any("give to the outside" in line for line in summed.advice)
    assert stacked.momentum.peak_bytes - summed.momentum.peak_bytes > 1024 * skips / 2


def test_a_model_within_a_model_of_its_class_is_no_block():
    class Nest(torch.nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
            self.inner = Nest(depth - 1) if depth else None

    nest = Nest(2)
    assert block_paths(nest, ["inner.blocks.0"]) == ("inner.blocks.0", "inner.blocks.1")
    assert block_paths(nest, ["inner.inner"]) == ("inner.inner",)


def test_inputs_that_do_not_grow_with_the_batch_are_named():
    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, source, target):
            for layer in self.layers:
                x = x + torch.zeros_like(x).index_add(0, target, layer(x)[source])
            return x

    edges = torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)
    found = mnet_fx.estimate(Graph(), (torch.randn(7, 4), *edges), memory="1MiB")
    assert "The largest batch scales inputs whose first dimension is 7, and no others (30)." in found.notes
    assert not any("scales inputs" in note for note in mnet_fx.estimate(Graph(), (torch.randn(7, 4), *edges)).notes)


def test_what_torch_compile_has_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for backend in ("mnet_fx", mnet_fx.backend(gamma=0.5)):
        compiled = torch.nn.ModuleDict({"part": torch.compile(model, backend=backend)})
        with pytest.raises(mnet_fx.SettingsError, match=r"part is compiled by torch.compile\(backend='mnet_fx'\).*: give the original"):
            mnet_fx.estimate(compiled, (torch.randn(2, 2),))
        with pytest.raises(mnet_fx.SettingsError, match="leaves no options in it"):
            mnet_fx.save(compiled, "nowhere.pt")


def test_the_depth_factor_counts_what_steps_hand_to_the_outside():
    class Skips(torch.nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks, self.skips = (torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(depth)) for _ in range(2))

        def forward(self, x):
            found = []
            for block, skip in zip(self.blocks, self.skips, strict=True):
                y = torch.tanh(block(x))
                x = x + y
                found.append(skip(y))
            return found

    inputs = (torch.randn(1000, 16),)
    factor = mnet_fx.estimate(Skips(8), inputs, memory="4MiB").momentum.largest_depth_factor
    assert 3 < factor < 10
    assert mnet_fx.estimate(Skips(round(8 * factor)), inputs).momentum.total_bytes == pytest.approx(4 * 2**20, rel=0.06)
