"""What only a GPU shows. Skipped where there is none; `MNET_FX_DEVICE=cuda pytest` runs the rest of the suite on one."""

import copy
import math
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from models import Encoder
from torch import nn

import mnet_fx
from mnet_fx import MnetError, MnetWarning, errors, momentumize

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*was captured in:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch 2.*Dynamo, by which models:mnet_fx.MnetWarning"),  # on an older torch
]
CUDA = "cuda"


class Mixing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.conv(x)))


def widening(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.Dropout(0.2))


class WithARest(nn.Module):
    """Convolutions, statistics and dropout outside of chains."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Sequential(widening(3, 8), widening(8, 8)), nn.Sequential(Mixing(8), Mixing(8))
        self.between, self.second = widening(8, 16), nn.Sequential(Mixing(16), Mixing(16))
        self.tail, self.head = nn.Sequential(*(widening(16, 16) for _ in range(3))), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.tail(self.second(self.between(self.first(self.stem(x))))).mean((2, 3)))


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = encoder(3), nn.Linear(32, 100)

    def forward(self, x, target):
        return nn.functional.cross_entropy(self.head(self.body(x)).view(-1, 100), target.view(-1))


@pytest.fixture(autouse=True)
def _settings():
    """cuDNN's deterministic algorithms: with others, a model does not give its own gradients twice."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def twins(model, **options):
    """The reversible form and the stored one, of one model on the GPU."""
    model = model.to(CUDA)
    return momentumize(copy.deepcopy(model), **options), momentumize(model, backward="stored", **options)


def gradients(net, x, amp=None, seed=3):
    """The loss, and the gradients of the input and of all parameters."""
    torch.manual_seed(seed)
    net.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with torch.autocast(CUDA, amp, enabled=amp is not None):
        loss = net(x).float().square().mean()
    loss.backward()
    found = [loss.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()), i
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), i


def encoder(layers=6, d=32, **options):
    return Encoder(layers, d=d, heads=4, **options)


def tokens(*shape):
    return torch.randn(*(shape or (4, 16, 32)), device=CUDA)


@pytest.mark.parametrize("way", [{}, {"regions": ["layers"]}], ids=["captured", "named"])
@pytest.mark.parametrize(
    ("amp", "dropout", "options"),
    [
        (None, 0.0, {}),
        (None, 0.1, {}),
        (torch.bfloat16, 0.1, {}),
        (torch.float16, 0.0, {}),
        (None, 0.0, {"gamma": 0.05}),
        (None, 0.1, {"weights": "matched", "gamma": 0.3}),
        (None, 0.1, {"on_drift": "ignore"}),
        (None, 0.1, {"gamma": 0.05, "offload": True}),
    ],
    ids=["float32", "dropout", "bfloat16", "float16", "gamma 0.05", "matched", "unproved", "offload"],
)
def test_reversible_is_stored(way, amp, dropout, options):
    a, b = twins(encoder(dropout=dropout), **way, **options)
    x = tokens()
    for _ in range(2):
        assert_same(gradients(a, x, amp), gradients(b, x, amp))


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_resnet(tf32, layout):
    from torchvision.models import resnet50

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    a, b = twins(resnet50().to(memory_format=layout))
    images = torch.randn(2, 3, 64, 64, device=CUDA).to(memory_format=layout)
    assert_same(gradients(a, images), gradients(b, images))


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_rest_runs_again(amp):
    torch.manual_seed(0)
    model = WithARest().to(CUDA)
    stored, again = (momentumize(copy.deepcopy(model), gamma=0.5, rest=rest) for rest in ("store", "checkpoint"))
    x = torch.randn(4, 3, 12, 12, device=CUDA)
    for _ in range(2):
        assert_same(gradients(again, x, amp), gradients(stored, x, amp))
    assert_same(list(again.buffers()), list(stored.buffers()))
    out = again(x)
    with torch.no_grad():
        again.tail[1][0].weight.mul_(2)
    with pytest.raises(errors.InversionError, match="segment"):
        out.sum().backward()


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_last_steps_and_some_of_the_rest_are_kept(amp):
    torch.manual_seed(0)
    model = WithARest().to(CUDA)
    x = torch.randn(4, 3, 12, 12, device=CUDA)
    wanted = gradients(momentumize(copy.deepcopy(model), gamma=0.5), x, amp)
    net = momentumize(copy.deepcopy(model), gamma=0.5, rest="checkpoint", keep="1GiB")
    assert_same(gradients(net, x, amp), wanted)
    costs = [cost.size for keeping in net.forward.keepings for _, cost in keeping.items]
    for many in range(1, len(costs)):
        net = momentumize(copy.deepcopy(model), gamma=0.5, rest="checkpoint", keep=sum(costs[:many]))
        assert_same(gradients(net, x, amp), wanted)


def test_a_head_in_chunks():
    torch.manual_seed(0)
    model = Headed().to(CUDA)
    stored, chunked = (momentumize(copy.deepcopy(model), gamma=0.5, rest=rest) for rest in ("store", "checkpoint"))
    target = torch.randint(100, (4, 16), device=CUDA)
    target[0, :5] = -100
    found = []
    for net in (stored, chunked):
        loss = net(tokens(4, 16, 32).fill_(0.3), target)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nan_in_the_stream():
    a, b = twins(encoder())
    x = tokens()
    x[0, 0, 0] = torch.nan
    assert_same(gradients(a, x), gradients(b, x))


class Growing(nn.Module):
    """Residuals that are each a thousand times the one before: X is put on a coarser grid on the way."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, x):
        for t, layer in enumerate(self.layers):
            x = x + 1e3**t * torch.tanh(layer(x))
        return x


def test_a_stream_that_leaves_its_range():
    a, b = twins(Growing())
    x = tokens()
    assert_same(gradients(a, x), gradients(b, x))


@pytest.mark.parametrize("back", ["there", "on the main one"])
def test_a_side_stream(back):
    a, b = twins(encoder(dropout=0.1))
    x = tokens()
    expected = gradients(b, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.manual_seed(3)
    leaf = x.clone().requires_grad_()
    with torch.cuda.stream(side):
        loss = a(leaf).square().mean()
        if back == "there":
            loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    if back != "there":
        loss.backward()
    assert_same([loss.detach(), leaf.grad, *(p.grad for p in a.parameters())], expected)


def test_a_chain_that_changes_streams_on_the_way():
    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.side = nn.ModuleList(nn.Linear(256, 256) for _ in range(6)), None

        def forward(self, x):
            last = torch.cuda.default_stream()
            for t, layer in enumerate(self.layers):
                stream = self.side if t % 2 and self.side is not None else torch.cuda.default_stream()
                stream.wait_stream(last)
                with torch.cuda.stream(stream):
                    x = layer(x)
                last = stream
                if self.side is not None:
                    torch.full_like(x, math.nan)  # of the memory that the other stream has given back
            torch.cuda.default_stream().wait_stream(last)
            return x

    net = Switching().to(CUDA)
    a = momentumize(net, regions=["layers"])
    x = tokens(512, 256)
    expected = gradients(a, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    a.side = side
    for _ in range(3):
        assert_same(gradients(a, x), expected)


def test_a_gradient_scaler_skips():
    a, _ = twins(encoder())
    scaler, optimizer = torch.amp.GradScaler(CUDA, init_scale=2.0**40), torch.optim.SGD(a.parameters(), lr=0.1)
    with torch.autocast(CUDA, torch.float16):
        loss = a(tokens()).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    before = scaler.get_scale()
    scaler.update()
    assert scaler.get_scale() < before


def test_a_rerun_that_runs_out_of_memory_and_training_after_it():
    a, b = twins(encoder(dropout=0.1))
    big = momentumize(Encoder(12, d=512, heads=8).to(CUDA))
    x, expected = tokens(16, 512, 512), gradients(b, y := tokens())
    big(x).sum().backward()
    big.zero_grad(set_to_none=True)
    loss = big(x).sum()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48 * 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del loss
    assert_same(gradients(a, y), expected)


class Force(nn.Module):
    """The gradient of an energy, which is a chain itself."""

    def __init__(self, stored):
        super().__init__()
        self.net = mnet_fx.MomentumNet([nn.Linear(8, 8) for _ in range(6)], gamma=0.9, use_backprop=stored)

    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(z).square().sum(), z, create_graph=True)[0]


def test_a_backward_pass_within_a_step():
    nets = [mnet_fx.MomentumNet([Force(stored) for _ in range(3)], gamma=0.9, use_backprop=stored).to(CUDA) for stored in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = tokens(4, 8)
    assert_same(*(gradients(net, x) for net in nets))


class Drawing(nn.Module):
    """Noise from a generator of the module's own."""

    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(32, 32), torch.Generator(CUDA).manual_seed(5)

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) * torch.rand(x.shape, generator=self.generator, device=x.device)


def test_a_generator_of_a_modules_own():
    found = []
    for backward in ("reversible", "stored"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Sequential(*(Drawing() for _ in range(4)))).to(CUDA)
        found.append(gradients(momentumize(net, regions=["0"], backward=backward), torch.ones(3, 32, device=CUDA)))
    assert_same(*found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_dropout_on_a_device_that_is_not_the_current_one():
    a, b = (net.to("cuda:1") for net in twins(encoder(dropout=0.1)))
    x = tokens().to("cuda:1")
    assert_same(gradients(a, x), gradients(b, x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_gpu():
    class Over(nn.Module):
        def forward(self, x):
            return torch.tanh(x.to("cuda:1"))

    net = momentumize(nn.Sequential(nn.Sequential(nn.Tanh(), Over())), regions=["0"])
    with pytest.raises(mnet_fx.StreamError, match="one region per device"):
        net(tokens())


def test_cudnn_benchmark_is_off_within_steps(monkeypatch):
    from torchvision.models import resnet50

    monkeypatch.setattr(errors, "_TOLD", set())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    net = momentumize(resnet50().to(CUDA))
    with pytest.warns(MnetWarning, match="cudnn.benchmark is on"):
        net(torch.randn(2, 3, 64, 64, device=CUDA)).sum().backward()
    for size in (96, 128):  # each is tuned anew
        net(torch.randn(4, 3, size, size, device=CUDA)).sum().backward()
    with torch.autograd.set_multithreading_enabled(False):  # one thread, where it stays on
        net(torch.randn(4, 3, 160, 160, device=CUDA)).sum().backward()


def test_a_capture_is_refused():
    a, _ = twins(encoder(), regions=["layers"])
    x = tokens()
    gradients(a, x)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises((MnetError, RuntimeError)), torch.cuda.graph(graph):  # ours, or CUDA's own where the arithmetic reads first
        a(x)


def test_an_assertion_on_the_device_keeps_its_name():
    code = """
        import torch, mnet_fx
        from torch import nn
        class Bad(nn.Module):
            def forward(self, x):
                if torch._C._current_graph_task_id() != -1:
                    torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")].cpu()
                return x + torch.tanh(x)
        net = mnet_fx.momentumize(nn.Sequential(nn.Sequential(*(Bad() for _ in range(4)))), regions=["0"])
        try:
            net(torch.randn(3, 4, device="cuda", requires_grad=True)).sum().backward()
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[0])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert "device-side assert" in run.stdout, run.stdout + run.stderr
    assert "InversionError" not in run.stdout


def test_what_is_on_the_cpu_under_a_default_device():
    """In a process of its own: the loop in C would be made, on first use, from memory of the GPU."""
    code = """
        import torch, mnet_fx
        from torch import nn
        torch.set_default_device("cuda")
        layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).cpu()
        net = mnet_fx.MomentumNet(list(layers), gamma=0.9, use_backprop=False)
        net(torch.randn(3, 8, device="cpu")).sum().backward()
        print("fine")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "fine", run.stderr


@pytest.mark.parametrize("graphs", [False, True], ids=["", "CUDA graphs"])
@pytest.mark.filterwarnings("ignore:torch._inductor.config.triton.cudagraphs is on:mnet_fx.MnetWarning")
def test_the_backend_of_torch_compile(graphs):
    torch.set_float32_matmul_precision("highest")
    model, x = encoder(4, d=64).to(CUDA), tokens(4, 64, 64)
    repeats = {"deterministic": True} if hasattr(torch._inductor.config, "deterministic") else {}  # else it chooses kernels by their time
    with torch._inductor.config.patch({"triton.cudagraphs": graphs, **repeats}):
        found = []
        for backward in ("reversible", "reversible", "stored"):  # the first of all may choose other kernels (torch 2.11)
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=mnet_fx.backend(gamma=0.9, backward=backward))
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                compiled(x).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    assert_same(*found[1:])


def test_inference_in_a_captured_graph():
    net, x = momentumize(encoder(4, d=64).to(CUDA), regions=["layers"]).eval(), tokens(4, 64, 64)
    with torch.no_grad():
        expected = net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def test_training_in_a_captured_graph_is_an_error():
    net, x = momentumize(encoder(4, d=64).to(CUDA), regions=["layers"]), tokens(4, 64, 64)
    net(x).sum().backward()
    with pytest.raises(mnet_fx.MnetError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        net(x)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_host_reads_of_a_training_step():
    """One, as the pass ends; the first call looks after its memory step by step, and without a read of torch's."""
    net, x = momentumize(encoder(6, d=64).to(CUDA)), tokens(4, 64, 64)
    net(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = net(x).sum()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_chain_that_waits_leaves_its_state_on_the_host():
    """What is held between the passes falls by (X, U) and what was spilled, and no pass waits for a copy."""
    torch.manual_seed(0)
    model, x = encoder(6, d=64).to(CUDA), torch.randn(64, 64, 64, device=CUDA)
    held = {}
    for offload in (False, True):
        net = momentumize(model, gamma=0.3, offload=offload)
        for again in (False, True):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error" if again else "default")
            try:
                out = net(x).sum()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            held[offload] = torch.cuda.memory_allocated() - before
            out.backward()
    state = x.numel() * (4 + 8)
    assert held[True] < held[False] - state
    assert held[True] < 2 * x.nbytes  # the stream as the head has it


@pytest.fixture
def _one_process():
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["ddp", "fsdp root", "fsdp layers"])
def test_wrappers_over_nccl(how):
    from torch.distributed.fsdp import fully_shard

    x = tokens()
    net, stored = twins(encoder(dropout=0.1), regions=["layers"])
    expected = gradients(stored, x)
    if how == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    elif how == "fsdp layers":
        for layer in net.layers:
            fully_shard(layer)
    if how.startswith("fsdp"):
        fully_shard(net)
    assert_same(gradients(net, x), expected)
