"""Copies of a model that share its parameters and buffers, without what an earlier rewrite made of it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import MnetError, SettingsError
from ..reporting.build import REPORT
from ..runtime.reach import reached
from .restoring import release

__all__ = ["check_model", "copied"]


def copied(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules that shares every parameter and buffer, also those of modules that are no children.

    Raises:
        SettingsError: `model` is no module.
        MnetError: it cannot be copied, is a ScriptModule, or has lazy parameters.
    """
    check_model(model)
    own = [*model.modules()]
    modules = [*own, *reached(own).hidden]
    tensors = [t for module in modules for t in chain(module._parameters.values(), module._buffers.values()) if t is not None]
    computed = [t for module in own for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
    shared: dict[int, Any] = {id(t): t for t in (*tensors, *computed)}  # computed: by a hook, as pruning does; deepcopy refuses them
    try:
        net = copy.deepcopy(model, shared)
    except Exception as error:
        raise MnetError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); momentumize works on a copy"
        ) from error
    for given, twin in zip(model.modules(), net.modules(), strict=True):
        if isinstance(given, torch.jit.ScriptModule):  # copies its tensors whatever deepcopy is told to share
            for name, tensor in chain(given.named_parameters(recurse=False), given.named_buffers(recurse=False)):
                twin._c.setattr(name, tensor)  # type: ignore[union-attr, operator]
        if isinstance(given, fx.GraphModule):
            _constants_again(given, twin)
    if REPORT in net.__dict__:  # a second rewrite starts over
        release(net)
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
