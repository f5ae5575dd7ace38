"""A model becomes a momentum network.

model --copy--> net, whose forward is captured by Dynamo at its calls (`captured`); whose layers are steps where regions=[...] names them
                (`named`); or, for a torch.fx.GraphModule, whose graph is rewritten here and now (`graph_modules`)
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import nn

from .arguments import call_from
from .captured.configured import warn_of_old_dynamo
from .captured.copies import check_model, copied
from .captured.forward import CapturedForward
from .captured.graph_modules import rewritten
from .captured.masks import unread_masks
from .captured.restoring import check_original, release
from .captured.stand_ins import real_tensors
from .captured.unseen import check_unseen
from .checkpoints import attach
from .errors import MnetError, MnetWarning, SettingsError
from .inner import Inner, checked_inner
from .named.layers import name_region, paths_of
from .named.marks import left_containers, marked_containers
from .named.rest import run_rest_again
from .reporting.build import REPORT, graph_report, named_report, report_of
from .reporting.report import Pending, Report
from .settings import Settings

__all__ = ["capture_now", "momentum_network"]


def momentum_network(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    regions: Sequence[str] | Literal["auto"] | None = None,
    inner: Inner = "eager",
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """The momentum network of a model; see `momentumize`. `options` are those of `Settings`."""
    settings = Settings(**options)
    if isinstance(example_inputs, (bool, int, float, str)):
        raise SettingsError(
            f"example_inputs must be a tuple of positional arguments or a dict of keyword arguments, got {example_inputs!r}; "
            "options are given by name, as in gamma=0.9 or regions=['layers']"
        )
    checked_inner(inner)
    if not inplace:
        return _rewritten(copied(model), example_inputs, settings, regions, inner)
    check_model(model)
    check_original(model)
    try:
        return _rewritten(model, example_inputs, settings, regions, inner)
    except BaseException:
        release(model)
        raise


def _rewritten(net: nn.Module, example_inputs: Any, settings: Settings, regions: Any, inner: Inner) -> nn.Module:
    """The module, rewritten as it is; another one for a GraphModule."""
    paths, found = _paths(net, regions, settings.min_steps)
    _check_capture(net, settings, paths)
    if settings.velocity is not None:
        _check_velocity(net)
    if paths is not None:
        named = [name_region(net, path, settings, found=found, inner=inner) for path in paths]
        again = run_rest_again(net, named, settings) if settings.rest == "checkpoint" else ()
        left = left_containers(net, paths, settings.min_steps) if found else {}
        _show(net, named_report([region.shown for region in named], settings, _stream_dtype(net), again=again, left=left))
    elif isinstance(net, fx.GraphModule):
        net, plan = rewritten(net, settings)
        _show(net, graph_report(plan, "GraphModule", settings))
    else:
        _capture(net, settings, inner)
    if settings.velocity is not None:
        net.add_module("initial_velocity", settings.velocity)
    attach(net, settings, paths, **({} if isinstance(net, fx.GraphModule) else {"inner": inner}))
    if example_inputs is not None and isinstance(forward := net.__dict__.get("forward"), CapturedForward):
        capture_now(forward, example_inputs, (True, False))
    elif not isinstance(report_of(net), Pending) and not report_of(net).regions:
        warnings.warn(f"{type(net).__name__}: no residual chain was rewritten; print(net.report) says why", MnetWarning, stacklevel=4)
    return net


def _paths(net: nn.Module, regions: Any, least: int) -> tuple[list[str] | None, bool]:
    """Paths of the containers whose layers become steps, None for a capture; and whether they were found, and not named."""
    if not isinstance(regions, str) or regions != "auto":
        return None if regions is None else paths_of(regions), False
    return (None if isinstance(net, fx.GraphModule) else marked_containers(net, least) or None), True


def _check_capture(model: nn.Module, settings: Settings, regions: Sequence[str] | None) -> None:
    """
    Raises:
        SettingsError: what lies outside of chains cannot be run again here, or nothing is known about what could be kept.
    """
    if regions is None and not isinstance(model, fx.GraphModule):
        return
    if settings.rest == "checkpoint" and regions is None:
        raise SettingsError(
            "rest='checkpoint' needs a capture, or regions=[...], which a GraphModule goes without: give the model it was made from"
        )
    if settings.keep:
        raise SettingsError("keep needs a capture, which regions=[...] and GraphModules go without: leave regions or keep out")


def _show(net: nn.Module, found: Report) -> None:
    """Makes a report that of a model."""
    net.__dict__[REPORT] = found
    if not hasattr(net, "report") or isinstance(net.__dict__.get("report"), Report):
        net.__dict__["report"] = found


def _capture(net: nn.Module, settings: Settings, inner: Inner) -> None:
    if "forward" not in net.__dict__ and type(net).forward is nn.Module.forward:
        raise MnetError(
            f"{type(net).__name__} has no forward, so what calls its layers would compute the original network: momentumize the model that "
            "calls them, or make a Sequential of it"
        )
    warn_of_old_dynamo()
    check_unseen(net)
    unread_masks(net)
    forward = CapturedForward(net, settings, inner)
    net.__dict__["forward"] = forward
    _show(net, Pending(forward.previewed_report))


def _check_velocity(net: nn.Module) -> None:
    """
    Raises:
        SettingsError: the module for v[0] has no place in the model.
    """
    if hasattr(net, "initial_velocity"):
        raise SettingsError(f"{type(net).__name__} has an attribute initial_velocity, where the module for v[0] would go: rename it")
    if isinstance(net, nn.Sequential):
        raise SettingsError("the model is a Sequential, which would run the module for v[0] as a layer: put it in a module of its own")


def capture_now(forward: CapturedForward, example_inputs: Any, modes: Sequence[bool]) -> None:
    """Captures a model for one kind of call, without running it.

    Args:
        forward: that of the model.
        example_inputs: as for `momentumize`.
        modes: the modes to capture, in order: True for train mode with gradients, False for eval mode without.
    """
    net = forward.owner
    args, kwargs = call_from(example_inputs)
    signature = inspect.signature(net.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SettingsError(
            f"example_inputs do not fit {type(net).__name__}.forward{signature}: {error}; "
            "give a tuple of positional arguments or a dict of keyword arguments"
        ) from error
    args, kwargs = real_tensors(net, (args, kwargs))
    flags = {module: module.training for module in net.modules()}
    trained = flags if net.training else dict.fromkeys(flags, True)
    try:
        for train in modes:
            wanted = trained if train else dict.fromkeys(flags, False)
            for module, training in wanted.items():  # not net.train(): people's own may do more, or return nothing
                module.training = training
            with torch.set_grad_enabled(train):
                whole = forward.capture(args, kwargs) is not None
            if not whole:
                break  # what the first call makes of this mode decides
    finally:
        for module, training in flags.items():
            module.training = training


def _stream_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
