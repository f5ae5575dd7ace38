"""What streams on CUDA and on other devices need, tried on a CPU: with stand-ins for CUDA's generators and streams, and the meta device.

What only a GPU shows is in `tests/test_cuda.py`.
"""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from test_tape import TAPES, D, chain, factors, functions
from torch import nn

import mnet_fx
from mnet_fx import InversionError, MnetError, MnetWarning, StreamError, errors
from mnet_fx.arithmetic import fixed_point, formats
from mnet_fx.runtime import cuda_streams
from mnet_fx.runtime.cuda_streams import Handover
from mnet_fx.runtime.generators import generators, moved
from mnet_fx.runtime.replay import Conditions
from mnet_fx.runtime.start import Recurrence
from mnet_fx.runtime.tape import ReversingTape

CUDA0, CUDA1 = torch.device("cuda", 0), torch.device("cuda", 1)


class Philox:
    """Counts as a generator on CUDA does: what it draws follows from its seed and its offset."""

    def __init__(self, device):
        self.device, self.seed, self.offset = device, 1, 0

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0

    def set_offset(self, offset):
        self.offset = offset

    def draw(self):
        self.offset += 4
        return 0.01 * self.seed + 0.001 * self.offset


@pytest.fixture
def cuda(monkeypatch):
    """The default generators of two devices, of which 0 is the current one."""
    found = tuple(map(Philox, (CUDA0, CUDA1)))
    monkeypatch.setattr(torch.cuda, "default_generators", found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(errors, "_TOLD", set())
    return found


class Calling(nn.Module):
    """(x) -> (function(x),)"""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return (self.function(x),)


def test_a_rerun_draws_from_the_generator_of_the_streams_device(cuda):
    conditions = Conditions(Calling(lambda x: x + cuda[1].draw() + cuda[1].draw()), (), CUDA1)
    cuda[1].manual_seed(7)
    cuda[1].draw()
    (first,) = conditions.first_run(torch.ones(3))
    cuda[1].manual_seed(9)
    cuda[1].draw()
    (again,) = conditions.run(torch.ones(3))
    assert torch.equal(first, again)
    assert (cuda[1].seed, cuda[1].offset) == (9, 4)
    assert (cuda[0].seed, cuda[0].offset) == (1, 0)


def test_what_was_not_drawn_from_is_not_kept(cuda):
    conditions = Conditions(Calling(lambda x: x + 1), (), CUDA1)
    conditions.first_run(torch.ones(3))
    assert not conditions.random
    assert [type(state) for state in (source.get_state() for source in generators(CUDA0, ()))] == [torch.Tensor, tuple]


def test_states_are_read_without_a_tensor_on_cuda_also_of_a_modules_own_generator(cuda):
    default, own = Philox(CUDA1), torch.Generator()
    sources = generators(CUDA0, (default, own))
    before = [source.get_state() for source in sources]
    default.draw()
    torch.rand(1, generator=own)
    torch.rand(1)
    assert [moved(a, source.get_state()) for a, source in zip(before, sources, strict=True)] == [True, False, True, True]
    assert before[2] == (1, 0)


def test_a_capture_of_a_cuda_graph_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(MnetError, match=r"cannot be captured in a CUDA graph.*reduce-overhead"):
        Conditions(Calling(torch.tanh), (), CUDA0).first_run(torch.ones(3))


def runs(device, forward, backward):
    """cudnn.benchmark as a step sees it in its first run and in a rerun, each with or without threads for the backward pass."""
    seen, x = [], torch.ones(3)

    def noting(x):
        seen.append(torch.backends.cudnn.benchmark)
        return x + 1

    with torch.autograd.set_multithreading_enabled(forward):
        conditions = Conditions(Calling(noting), (), device)
        conditions.first_run(x)
    with torch.autograd.set_multithreading_enabled(backward):
        conditions.run(x)
    return seen


@pytest.fixture
def _tuning(cuda):
    torch.backends.cudnn.benchmark = True
    yield
    assert torch.backends.cudnn.benchmark  # what a step turns off comes on again
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("_tuning")
def test_cudnn_tunes_no_step_that_another_thread_may_run_again():
    with pytest.warns(MnetWarning, match=r"set_multithreading_enabled\(False\)"):
        assert runs(CUDA0, True, True) == [False, False]
    assert runs(CUDA0, True, False) == [False, False]  # the two must agree; and it is told once, as warnings are errors here


@pytest.mark.usefixtures("_tuning")
def test_cudnn_tunes_where_one_thread_does_all_and_on_a_cpu():
    assert runs(CUDA0, False, False) == [True, True]
    assert runs(torch.device("cpu"), True, True) == [True, True]


class Failing(nn.Module):
    """Raises an error in a backward pass."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if torch._C._current_graph_task_id() != -1:
            raise self.error
        return torch.tanh(x)


@pytest.mark.parametrize("kind", TAPES)
@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_errors_of_a_device_keep_their_names(kind, error):
    out, _ = chain(kind, [Failing(error) for _ in range(3)], factors([0.5] * 3), torch.randn(5, D, requires_grad=True))
    with pytest.raises(type(error)) as raised:
        out.sum().backward()
    assert raised.value is error


def test_other_errors_of_a_rerun_are_given_our_words():
    fs = [Failing(RuntimeError("no CUDA error")) for _ in range(3)]
    out, _ = chain(TAPES[0], fs, factors([0.5] * 3), torch.randn(5, D, requires_grad=True))
    with pytest.raises(InversionError, match="the course of the step"):
        out.sum().backward()


def test_a_step_that_adds_what_is_on_another_device():
    fs = [*functions(3), lambda x: x.to("meta")]
    with pytest.raises(StreamError, match=r"step 3: the stream is on cpu, and what the step adds to it on meta: one region per device"):
        chain(TAPES[0], fs, factors([0.5] * 4), torch.randn(5, D))


class Moving(nn.Module):
    """A block that goes over to another device."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D, device="meta")

    def forward(self, x):
        x = x.to("meta")
        return x + self.linear(x)


def test_a_layer_that_takes_the_stream_to_another_device_is_named():
    net = mnet_fx.momentumize(nn.Sequential(nn.Sequential(nn.Tanh(), nn.Tanh(), Moving())), regions=["0"])
    with pytest.raises(StreamError, match=r"layer 0\.2 takes a stream on cpu to meta.*one region per device"):
        net(torch.randn(5, D))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Tanh(), nn.Tanh())

    def forward(self, x):
        return self.layers(x)


class Elsewhere(nn.Module):
    def forward(self, x):
        return x.to("meta")


def test_a_velocity_on_another_device():
    net = mnet_fx.momentumize(Holder(), regions=["layers"], initial_velocity=Elsewhere())
    with pytest.raises(StreamError, match=r"velocity is on meta and the stream on cpu: one region per device"):
        net(torch.randn(5, D))


def test_a_device_without_float64_is_refused(monkeypatch):
    stream = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)
    with pytest.raises(StreamError, match=r"on mps, which has no float64"):
        fixed_point._check_stream(stream)
    for has in (True, False):
        formats.has_float64.cache_clear()
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, has=has: SimpleNamespace(has_fp64=has))
        assert formats.has_float64(torch.device("xpu", 0)) is has
    formats.has_float64.cache_clear()
    assert formats.has_float64(torch.device("cpu"))
    assert formats.has_float64(CUDA0)


class Recorded:
    """A CUDA stream, or a tensor, that notes what is asked of it."""

    def __init__(self, name):
        self.name, self.asked = name, []

    def wait_stream(self, other):
        self.asked.append(other.name)

    record_stream = wait_stream


def test_a_state_that_goes_over_to_another_stream(monkeypatch):
    main, side, state = Recorded("main"), Recorded("side"), Recorded("state")
    now = [main]
    monkeypatch.setattr(cuda_streams, "present", lambda device: now[0] if device.type == "cuda" else None)
    handover = Handover(CUDA0)
    for now[0] in (main, main, side, side, main):
        handover(lambda: [state])
    assert (main.asked, side.asked, state.asked) == (["side"], ["main"], ["side", "main"])
    handover = Handover(torch.device("cpu"))
    handover(None)


@pytest.mark.parametrize("stored", [0, 2])
def test_a_stream_that_goes_over_to_another_cuda_stream_is_kept_for_it(stored, monkeypatch):
    """x[t] is freed as soon as its step is done, on the stream that made it; autograd, without chains, would keep it."""
    held = []
    monkeypatch.setattr(Handover, "__call__", lambda self, tensors: held.append({t.data_ptr() for t in tensors()}))
    given = []
    step = Calling(lambda x: given.append(x.data_ptr()) or torch.sin(x))
    chain = Recurrence("r", ((0.9, 0.1),) * 4, stored=stored).start(torch.randn(5, requires_grad=True))
    for _ in range(4):
        chain.step(step, ())
    for x, tensors in zip(given, held, strict=True):
        assert x in tensors
    assert isinstance(chain.tape, ReversingTape)


def test_a_build_of_torch_without_cuda():
    """As for macOS, or of the index of CPU wheels: nothing of torch._C is there whose name begins with _cuda."""
    code = """
        import torch
        for name in dir(torch._C):
            if name.startswith("_cuda"):
                delattr(torch._C, name)
        import mnet_fx
        from torch import nn

        class Block(nn.Linear):
            def forward(self, x):
                return x + torch.tanh(super().forward(x))

        for regions in (None, [""]):
            net = mnet_fx.momentumize(nn.Sequential(*(Block(4, 4) for _ in range(4))), regions=regions)
            net(torch.randn(3, 4)).sum().backward()
            print(net.report.rewritten_adds or net.report.regions[0].steps)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["4", "4"], run.stderr
