"""Ways to train a model, each as something to call in the model's place. All share its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import mnet_fx

from .session import Session
from .subjects import Subject

__all__ = ["COMPILED", "EAGER", "GAMMA", "checkpointed", "compiled", "momentum", "momentum_compiled", "rest_again"]

GAMMA = 0.9
Way = Callable[[Session, Subject], Callable[..., Any]]


def plain(session: Session, subject: Subject) -> nn.Module:
    return subject.model


def checkpointed(session: Session, subject: Subject, offload: bool = False) -> nn.Module:
    """`torch.utils.checkpoint` around each layer; with `offload`, what it keeps goes to pinned memory of the host."""
    model = subject.model
    shared = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for path in subject.layers:
        layer = twin.get_submodule(path)
        layer.forward = partial(_again, layer.forward, offload)
    return twin


def _again(forward: Callable[..., Any], offload: bool, *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu(pin_memory=True) if offload else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def momentum(session: Session, subject: Subject, **options: Any) -> nn.Module:
    """`momentumize` with the subject's own regions, if it has any, unless `options` name others."""
    return mnet_fx.momentumize(subject.model, **{"gamma": GAMMA, "regions": subject.regions} | options)


def rest_again(session: Session, subject: Subject, **options: Any) -> nn.Module:
    """What lies outside of chains runs again too."""
    return momentum(session, subject, rest="checkpoint", **options)


def by_layer(session: Session, subject: Subject, **options: Any) -> nn.Module:
    """Layers named, not captured: one step for each, as a checkpoint has them."""
    return momentum(session, subject, regions=subject.regions or sorted({path.rpartition(".")[0] for path in subject.layers}), **options)


def compiled(session: Session, subject: Subject) -> Callable[..., Any]:
    return torch.compile(subject.model, backend=session.compiler)


def momentum_compiled(session: Session, subject: Subject, **options: Any) -> Callable[..., Any]:
    return torch.compile(subject.model, backend=mnet_fx.backend(gamma=GAMMA, inner=session.compiler, **options))


EAGER: dict[str, Way] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "momentum": momentum,
    "momentum, unproved": partial(momentum, on_drift="ignore"),
    "checkpoint, CPU offload": partial(checkpointed, offload=True),
    "momentum, CPU offload": partial(momentum, offload=True),
}
COMPILED: dict[str, Way] = {"plain": plain, "momentum, inductor": momentum_compiled, "inductor": compiled}
