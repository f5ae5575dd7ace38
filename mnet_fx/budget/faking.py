"""A model, its inputs and its optimizer on tensors without memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..arguments import Call, call_from
from ..errors import MnetError, SettingsError
from ..runtime.reach import reached

__all__ = ["batch_of", "call_of", "fake_model", "fake_optimizer", "resized", "unpacked"]


def call_of(example_inputs: Any) -> Call:
    """Positional and keyword arguments of a call, from what was given as example_inputs.

    Raises:
        SettingsError: it is none.
    """
    args, kwargs = call_from(example_inputs)
    if not isinstance(example_inputs, Mapping) and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args)):
        raise SettingsError(
            "example_inputs must be a call of the model: a tensor, a tuple of positional arguments or a dict of keyword arguments, "
            f"of which one is a tensor (real, fake or on the meta device); got {example_inputs!r:.80}"
        )
    return args, kwargs


def resized(call: Call, batch: int | None, mode: FakeTensorMode) -> Call:
    """A call with fake tensors, and where `batch` is given, with that in place of the first dimension of the first tensor everywhere."""
    before = batch_of(call)

    def fake(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        shape, stride = list(t.shape), list(t.stride())
        if batch is not None and before is not None and shape and shape[0] == before:
            shape[0] = batch  # strides stay, as the first dimension is mostly the outermost; else they are made anew
            if stride[0] != max(stride):
                stride = list(torch.empty(shape, device="meta").stride())
        return _empty(shape, stride, t, mode)

    return pytree.tree_map(fake, call)


def batch_of(call: Call) -> int | None:
    """The first dimension of the first tensor of a call; None for a scalar."""
    first = next(t for t in pytree.tree_leaves(call) if isinstance(t, Tensor))
    return int(first.shape[0]) if first.dim() else None


def fake_model(model: nn.Module, mode: FakeTensorMode, shared: Sequence[Any] = ()) -> nn.Module:
    """A copy of a model with fake parameters, buffers and other tensors, nothing of which takes memory.

    Args:
        model: which.
        mode: of the fake tensors.
        shared: objects that the model knows and that are not copied, as a trainer.

    Raises:
        SettingsError: it is no module.
        MnetError: it cannot be copied, or holds tensors that are more than numbers with strides.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"estimate takes an nn.Module, got {type(model).__name__}")
    memo: dict[int, Any] = {id(one): one for one in shared}
    for t in _tensors(model, shared):
        if id(t) not in memo:
            memo[id(t)] = _fake_of(t, mode)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise MnetError(f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); estimate works on a copy") from error


def fake_optimizer(optimizer: Any, model: nn.Module, net: nn.Module) -> torch.optim.Optimizer | None:
    """An optimizer of the fake parameters of `net`.

    Args:
        optimizer: a class of optimizers, another callable that makes one of parameters, an optimizer of parameters of `model`, or None.
        model, net: the model, and its fake copy.

    Raises:
        SettingsError: it is none of these.
    """
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer):
        twins = {id(p): twin for (_, p), (_, twin) in zip(model.named_parameters(), net.named_parameters(), strict=False)}
        groups = [{**group, "params": [twins[id(p)] for p in group["params"] if id(p) in twins]} for group in optimizer.param_groups]
        if sum(len(group["params"]) for group in groups) < sum(len(group["params"]) for group in optimizer.param_groups):
            raise SettingsError("optimizer has parameters that are not the model's: give one of this model, or its class")
        made = copy.copy(optimizer)
        made.__dict__ = {**optimizer.__dict__, "param_groups": groups, "state": type(optimizer.state)(dict)}
        return made
    try:
        found = optimizer([p for p in net.parameters() if p.requires_grad]) if callable(optimizer) else None
    except TypeError as error:
        raise SettingsError(f"optimizer={optimizer!r} cannot be made of parameters alone ({error}): give a function of them") from error
    if not isinstance(found, torch.optim.Optimizer):
        raise SettingsError(f"optimizer must be a class as torch.optim.AdamW, a function of parameters, or an optimizer; got {optimizer!r}")
    return found


@contextmanager
def unpacked() -> Iterator[None]:
    """Has Hugging Face's decoders take each row of their input for one sequence.

    They look at values for that, which fake tensors do not have, and else make a mask, and with it copies of keys and values.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    packed = getattr(masks, "find_packed_sequence_indices", None)
    if packed is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = packed


def _tensors(model: nn.Module, shared: Sequence[Any]) -> list[Tensor]:
    """Parameters, buffers and tensors that are attributes, also of modules that are no children, and tensors in containers."""
    own = [*model.modules()]
    members = chain(*(chain(module._parameters.values(), module._buffers.values(), vars(module).values()) for module in own))
    return [t for t in (*members, *reached(own, shared).tensors) if isinstance(t, Tensor)]


def _fake_of(t: Tensor, mode: FakeTensorMode) -> Tensor:
    if is_lazy(t):
        raise MnetError("the model has parameters of a lazy module, which have no shape yet: call the model once first")
    if t.layout is not torch.strided or t.is_nested or t.is_quantized or type(t).__torch_dispatch__ not in _ORDINARY:
        raise MnetError(f"the model holds a {type(t).__name__} of layout {t.layout}, whose memory cannot be told from its shape")
    made = _empty(list(t.shape), list(t.stride()), t, mode)
    return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made


_ORDINARY: tuple[Callable[..., Any], ...] = (Tensor.__torch_dispatch__, FakeTensor.__torch_dispatch__)


def _empty(shape: list[int], stride: list[int], t: Tensor, mode: FakeTensorMode) -> Tensor:
    device: str | torch.device = "cpu" if t.is_meta and not isinstance(t, FakeTensor) else t.device
    with mode:
        return torch.empty_strided(shape, stride, dtype=t.dtype, device=device).requires_grad_(t.requires_grad and t.is_leaf)
