"""`restore`: what a rewrite made of a model, undone."""

from __future__ import annotations

import torch.fx as fx
from torch import nn

from ..checkpoints import detach
from ..errors import MnetError, SettingsError
from ..reporting.build import REPORT, TRANSFORMED
from .masks import read_masks

__all__ = ["check_original", "release", "restore"]


def restore(net: nn.Module) -> nn.Module:
    """Undoes `momentumize`, in place: the model computes the original network again, with the same parameters and buffers.

    Args:
        net: what `momentumize` returned, or a model that it rewrote with `inplace=True`.

    Returns:
        `net` itself. A module for v[0] that `momentumize` added is gone from it.

    Raises:
        SettingsError: `net` is a GraphModule, whose graph was rewritten: keep the one that `momentumize` was given.
        MnetError: `momentumize` has not rewritten this module. Of a wrapper (DistributedDataParallel, torch.compile), give what is wrapped.
    """
    if not isinstance(net, nn.Module) or REPORT not in net.__dict__:
        raise MnetError(
            f"this {type(net).__name__} is no model that momentumize rewrote, so there is nothing to undo: give what momentumize returned "
            "(of a wrapper, the module in it)"
        )
    if isinstance(net, fx.GraphModule):
        raise SettingsError("a GraphModule is rewritten into another, and cannot be restored in place: keep the one momentumize was given")
    if TRANSFORMED in net.__dict__:
        raise MnetError("transform_to_momentumnet changed this model before momentumize did: build it anew, and load its state_dict")
    release(net)
    return net


def release(net: nn.Module) -> None:
    """Takes a rewrite out of a model, also one that was not finished."""
    found = net.__dict__.pop(REPORT, None)
    if found is not None and found is net.__dict__.get("report"):
        del net.__dict__["report"]
    detach(net)
    velocity = net._modules.get("initial_velocity")
    for module in list(net.modules()):
        undo = getattr(module.__dict__.get("forward"), "release", None)
        if undo is not None and undo() is velocity is not None:
            net._modules.pop("initial_velocity", None)
    read_masks(net)


def check_original(model: nn.Module) -> None:
    """
    Raises:
        SettingsError: the model cannot be rewritten in place.
    """
    if isinstance(model, fx.GraphModule):
        raise SettingsError("inplace=True: a GraphModule is rewritten into another, which has a class of its own: leave inplace out")
    if REPORT in model.__dict__ or TRANSFORMED in model.__dict__:
        raise SettingsError(
            f"inplace=True: this {type(model).__name__} is rewritten already: mnet_fx.restore(model) first, or leave inplace out, which "
            "starts over in a copy"
        )
