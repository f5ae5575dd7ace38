"""What a launch takes for the same kernel, Triton must take for the same; no GPU is asked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from mnet_fx.arithmetic.kernels import launching  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted", allow_module_level=True)


@triton.jit(do_not_specialize=["t"])
def kernel(X, y, n, t, mail, FLAG: triton.language.constexpr, BLOCK: triton.language.constexpr):
    pass


def by_triton(arguments):
    """What Triton keeps compilations apart by."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, _ = binder(*arguments)
    return str(specialization), [arguments[i] for i, p in enumerate(kernel.params) if p.is_constexpr]


ROOM = torch.zeros(64, dtype=torch.float64)
TENSORS = [ROOM.view(dtype)[i:] for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.float64) for i in range(5)]
INTEGERS = [0, 1, 2, 16, 17, 32, 48, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 40) + 1, -1, -16]


@st.composite
def lists(draw):
    tensor, integer = st.sampled_from(TENSORS), st.sampled_from(INTEGERS)
    return [draw(tensor), draw(tensor), draw(integer), draw(integer), draw(integer), draw(st.booleans()), draw(st.sampled_from([1, 256]))]


@given(lists(), lists())
def test_arguments_of_one_kind_need_one_compilation(one, other):
    kinds = launching.Launcher(kernel, {}).kinds
    of_one, of_other = ([kind(a) for kind, a in zip(kinds, arguments, strict=True)] for arguments in (one, other))
    if of_one == of_other:
        assert by_triton(one) == by_triton(other)


@given(lists(), st.integers(0, 6), lists())
def test_each_argument_by_itself(one, place, other):
    """Most lists drawn apart differ somewhere: here all but one argument are the same."""
    test_arguments_of_one_kind_need_one_compilation.hypothesis.inner_test(one, [*one[:place], other[place], *one[place + 1 :]])


def test_a_kind_is_looked_for_once_and_then_launched():
    class Compiled:
        def __init__(self, key):
            self.key, self.launched = key, []

        def __getitem__(self, grid):
            return lambda *arguments: self.launched.append((grid, arguments))

    class Kernel:
        device_caches, params, runs = {}, kernel.params, []

        def run(self, *arguments, grid, warmup):
            self.runs.append(arguments)
            return Compiled(arguments)

    launcher = launching.Launcher(Kernel(), {})
    x, here = torch.zeros(4), torch.device("cpu")
    for n in (32, 48, 33, 64):
        launcher(here, 7, x, x, n, 5, 0, True, 256)
    assert [arguments[2] for arguments in Kernel.runs] == [32, 33]
    first, second = launcher.compiled.values()
    assert [(grid, arguments[2]) for grid, arguments in first.launched] == [((7, 1, 1), 48), ((7, 1, 1), 64)]
    assert not second.launched
