"""Copies of a model that share its parameters and buffers, without what an earlier rewrite made of it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from ..errors import MnetError, SettingsError
from ..reporting.build import REPORT
from ..runtime.reach import reached
from .restoring import release

__all__ = ["check_model", "copied", "twin"]


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model as it was before a rewrite, see `twin`."""
    net = twin(model)
    if REPORT in net.__dict__:  # a second rewrite starts over
        release(net)
    return net


def twin(model: nn.Module, buffers: bool = True) -> nn.Module:
    """A copy of the tree of modules that shares every parameter and buffer, also those of modules that are no children.

    Args:
        model: the original, or a rewritten one, which the copy is too then.
        buffers: False: it has buffers of its own.

    Raises:
        SettingsError: `model` is no module.
        MnetError: it cannot be copied, is a ScriptModule, or has lazy parameters.
    """
    check_model(model)
    own = [*model.modules()]
    found = reached(own)
    modules = [*own, *found.hidden]
    kinds = ("_parameters", "_buffers") if buffers else ("_parameters",)
    tensors = [t for module in modules for kind in kinds for t in getattr(module, kind).values() if t is not None]
    held = [t for t in chain(*(vars(module).values() for module in own), found.tensors) if isinstance(t, Tensor)]
    computed = [t for t in held if not t.is_leaf or isinstance(t, FakeTensor)]
    shared: dict[int, Any] = {id(t): t for t in (*tensors, *computed)}  # computed: by a hook, as pruning does; what deepcopy refuses
    try:
        net = copy.deepcopy(model, shared)
    except Exception as error:
        raise MnetError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); momentumize works on a copy"
        ) from error
    for given, copy_ in zip(model.modules(), net.modules(), strict=True):
        if isinstance(given, torch.jit.ScriptModule):  # copies its tensors whatever deepcopy is told to share
            own_buffers = given.named_buffers(recurse=False) if buffers else ()
            for name, tensor in chain(given.named_parameters(recurse=False), own_buffers):
                copy_._c.setattr(name, tensor)  # type: ignore[union-attr, operator]
        if isinstance(given, fx.GraphModule):
            _constants_again(given, copy_)
    return net


def check_model(model: nn.Module) -> None:
    """
    Raises:
        SettingsError: `model` is no module.
        MnetError: it is a ScriptModule, or has lazy parameters.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"momentumize takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise MnetError("the model is a ScriptModule, whose code is not Python: momentumize the module that it was made from")
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        raise MnetError("the model has parameters of a lazy module, which have no shape yet: call the model once first")


def _constants_again(given: fx.GraphModule, twin: nn.Module) -> None:
    """Makes constants of a graph what they were: torch.fx copies them to buffers, which would be in the state_dict."""
    for name, value in vars(given).items():
        if isinstance(value, Tensor) and twin._buffers.pop(name, None) is not None:
            twin._non_persistent_buffers_set.discard(name)
            twin.__dict__[name] = value
