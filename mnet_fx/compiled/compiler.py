"""An inner compiler of `torch.compile`, called on parts of one graph of Dynamo."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.fx as fx
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._sympy.symbol import SymT, symbol_is_type

from passes import OVERWRITTEN

from ..errors import MnetError, MnetWarning
from ..inner import Compile, all_kept, mistaken

__all__ = ["Compiler"]


class Compiler:
    """An inner compiler, called on parts of one Dynamo graph.

    Args:
        inner: `inner(graph_module, example_inputs) -> callable` that returns a tuple, as `torch.compile` takes it.
        fake_mode: the fake tensor mode of the graph, None where it has no tensors.
    """

    def __init__(self, inner: Compile, fake_mode: FakeTensorMode | None) -> None:
        self.inner, self.fake_mode = inner, fake_mode
        self.traces = inner is not torch._dynamo.lookup_backend("eager")

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compiles a part, of which Dynamo's own tracing context knows nothing.

        A part that AOTAutograd cannot trace, as when two of its inputs are views of one tensor that it writes to, runs as it is, with a
        warning: of the whole graph it could have known more. So does, without one, what it could take a wrong gradient of.
        """
        if self.traces and (gm.meta.get(OVERWRITTEN) or mistaken(gm, inputs)):
            return gm
        for node in gm.graph.nodes:
            if node.op == "placeholder" and not hasattr(node, "_dynamo_source"):
                node._dynamo_source = None
        at_once = functorch_config.patch(_of_the_backward())
        with tracing(TracingContext(self.fake_mode)), at_once, all_kept(gm), _only_own_floats(inputs, self.fake_mode):
            try:
                return self.inner(gm, list(inputs))
            except Exception as error:
                if not _of_tracing(error):
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                warnings.warn(f"AOTAutograd cannot trace a part of the model ({reason}): it runs uncompiled", MnetWarning, stacklevel=2)
                return gm


def _of_tracing(error: Exception) -> bool:
    """Whether AOTAutograd itself raised an error; not the user's code, not the compiler that it calls with what it traced, and not Dynamo,
    which has exceptions of its own to begin anew.
    """
    places = [frame.f_code.co_filename.replace("\\", "/") for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = [path for path in places if "/torch/_functorch/" in path or "/torch/_inductor/" in path]
    return not isinstance(error, (MnetError, TorchDynamoException)) and bool(known) and "/torch/_functorch/" in known[-1]


def _of_the_backward() -> dict[str, Any]:
    """Settings by which the backward pass is compiled now: where the minifier runs one within a compilation, in which none can be compiled;
    and where CUDA graphs are off for no longer than this.

    Else the first backward pass compiles its own, which then knows whether retain_graph forbids it to overwrite what the forward saved.
    """
    at_once = inductor_config.triton.cudagraphs or torch._dynamo.config.repro_after is not None
    return {"force_non_lazy_backward_lowering": True} if at_once else {}


@contextlib.contextmanager
def _only_own_floats(inputs: Sequence[Any], fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """Lists the dynamic floats that a part does not read as done with, for the time of its compilation.

    Dynamo hands a dynamic float over as a 0-d tensor. AOTAutograd would bake a float that the part does not read into the part, and
    recompile for each of its values. It leaves alone what this set names.
    """
    memos = [value.item_memo for value in inputs if isinstance(value, FakeTensor)]
    own = {memo.node._expr for memo in memos if isinstance(memo, torch.SymFloat)}
    shape_env = None if fake_mode is None else fake_mode.shape_env
    known = getattr(shape_env, "backed_var_to_val", ())  # () without sizes that vary
    others = {str(symbol) for symbol in known if symbol_is_type(symbol, SymT.FLOAT) and symbol not in own}
    others -= TensorifyState.force_specializations
    TensorifyState.force_specializations |= others
    try:
        yield
    finally:
        TensorifyState.force_specializations -= others
