"""`momentumize`: the door.

model --copy--> net, whose forward is captured by Dynamo at its calls (`captured`); whose layers are steps where regions=[...] names them
                (`named`); or, for a torch.fx.GraphModule, whose graph is rewritten here and now (`graph_modules`)
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import nn

from .captured.copies import check_model, copied
from .captured.forward import CapturedForward
from .captured.graph_modules import rewritten
from .captured.masks import unread_masks
from .captured.restoring import check_original, release
from .captured.stand_ins import real_tensors
from .captured.unseen import check_unseen
from .checkpoints import attach
from .compiled.backend import Inner, checked_inner
from .errors import MnetError, MnetWarning, SettingsError
from .named.layers import name_region, paths_of
from .named.marks import marked_containers
from .reporting.build import REPORT, graph_report, named_report, report_of
from .reporting.report import Pending, Report
from .settings import Backward, Gamma, Granularity, OnDrift, Precision, Rest, Settings, Weights

__all__ = ["capture_now", "momentumize"]


def momentumize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    gamma: Gamma = 0.9,
    initial_velocity: str | nn.Module = "zero",
    weights: Weights = "momentum",
    granularity: Granularity = "add",
    regions: Sequence[str] | Literal["auto"] | None = None,
    backward: Backward = "reversible",
    min_steps: int = 2,
    on_drift: OnDrift = "raise",
    precision: Precision = "standard",
    rest: Rest = "store",
    inner: Inner = "eager",
    calibration: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Rewrites the residual chains of a model into reversible momentum chains, which train without stored activations.

        x[t+1] = x[t] + f[t](x[t])   becomes   v[t+1] = g[t] * v[t] + b[t] * f[t](x[t]);  x[t+1] = x[t] + v[t+1]

    The result is another network that starts from the same weights, except with gamma=0, which computes the original one. Gradients are
    exact: bit for bit those that `backward="stored"` gives.

    Args:
        model: any module; left as it was. The result shares its parameters and buffers, and has the same `state_dict` keys.
        example_inputs: a call of the model, as a tuple of positional arguments or a dict (or other mapping) of keyword arguments, of which
            only structure, shapes, dtypes and constants count: tensors may be real, fake, or on the meta device. With them, the model is
            captured now, in train and in eval mode, without computing anything, and the report is complete. Without, each kind of call
            is captured when it first comes, and the report is a preview until then.
        gamma: momentum g[t] in [0, 1): a number, or a callable `(t, steps) -> number`. Near 1 a region keeps fewest bits; near 0 the
            network stays closest to the original.
        initial_velocity: "zero": v[0] = 0; "first": v[0] = 0 and g[0] = 0, so that the chain starts at the speed of its first residual; or
            a module that gives v[0] from x[0]. That module becomes `net.initial_velocity`; its parameters come last in the state_dict.
        weights: "momentum": b[t] = 1 - g[t], as in the paper; "matched": those with which the chain stays closest to the original network
            (needs v[0] = 0).
        granularity: "add": a step for each residual add; "module": a step for each repeated block (one for a transformer layer, not two).
        regions: paths of containers (ModuleList, Sequential) whose layers the model calls one after the other, such as
            ["encoder.layers"]. Then nothing is captured: each of those layers becomes a step of a chain, f(x) = layer(x) - x, whatever
            Python is in it and around it, and the rest of the model stays as it is. A layer takes the stream as its first tensor and
            returns it, alone or first in a tuple. Layers may be skipped; elsewhere a chain starts anew. Layers that join the container
            later stay as they are. example_inputs, granularity, min_steps and inner have no meaning then. "auto": the lists of layers that
            the model's own library marks (transformers, timm, torch.nn), or else its ModuleLists of equal blocks, with at least `min_steps`
            layers; `net.report` lists them, and a call in which a layer does not take what the one before it returned is a StreamError.
            Where there are none, the model is captured, as without regions.
        backward: "reversible"; or "stored": the same forward, bit for bit, with activations stored by autograd.
        min_steps: shorter chains are left alone.
        on_drift: what to do when a step does not repeat in the backward: "raise" InversionError, "warn", or "ignore" (no check is made).
        precision: "standard": the forward pass errs no more than one in the dtype of the stream, relative to its largest value; "high":
            also where elements never mix and small ones grow, for 16 bytes per element in place of 12 (8 for 16-bit streams).
        rest: what becomes of what lies outside of chains (stems, projections, decoders, heads): "store": autograd keeps what it needs;
            "checkpoint": it runs under `torch.utils.checkpoint` in segments, cut where fewest bytes cross, proved as steps are.
        inner: what runs the steps and everything between the chains: "eager", as the model itself would; or "inductor", any backend of
            torch.compile by name, or a callable of that kind, which compiles each step once.
        calibration: read maps that `calibrate` fitted for a net of this model and these options: what it returned, or the `maps` of that.
        inplace: rewrite the model itself and return it, for code that cannot put another in its place. `mnet_fx.restore(model)` undoes
            it. After an error the model is as it was. For no GraphModule, and no model that is rewritten already.

    Returns:
        A module of the class of `model` whose `forward` is captured by Dynamo and rewritten; `net.report`, or `mnet_fx.report(net)` where
        the model has an attribute of that name, says what was done. A model without residual chains works as before, with a warning. A
        `torch.fx.GraphModule` is rewritten as it is, into one that prints, pickles and traces. `net.mnet_fx_options` has the options, by
        name; a state_dict carries them as metadata, `mnet_fx.load` rebuilds the net with them, and a net with others warns.

    Raises:
        SettingsError: an option cannot work, or example_inputs do not fit the model.
        MnetError: the model cannot be copied, is a ScriptModule, or has lazy parameters. Calls of the result raise it where they would
            compute the original network (Dynamo is switched off, or leaves the forward to Python), or another momentum network than the
            first call did.

    Source: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, eq. 2.
    """
    settings = Settings(gamma, initial_velocity, weights, granularity, backward, min_steps, on_drift, precision, rest, calibration)
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
    _check_rest(net, settings, paths)
    if settings.velocity is not None:
        _check_velocity(net)
    if paths is not None:
        named = [name_region(net, path, settings, found=found) for path in paths]
        _show(net, named_report([region.shown for region in named], settings, _stream_dtype(net)))
    elif isinstance(net, fx.GraphModule):
        net, plan = rewritten(net, settings)
        _show(net, graph_report(plan, "GraphModule", settings))
    else:
        _capture(net, settings, inner)
    if settings.velocity is not None:
        net.add_module("initial_velocity", settings.velocity)
    attach(net, settings, paths, **({"inner": inner} if isinstance(net.__dict__.get("forward"), CapturedForward) else {}))
    if example_inputs is not None and isinstance(forward := net.__dict__.get("forward"), CapturedForward):
        capture_now(forward, example_inputs, (True, False))
    elif not isinstance(report_of(net), Pending) and not report_of(net).regions:
        warnings.warn(f"{type(net).__name__}: no residual chain was rewritten; print(net.report) says why", MnetWarning, stacklevel=3)
    return net


def _paths(net: nn.Module, regions: Any, least: int) -> tuple[list[str] | None, bool]:
    """Paths of the containers whose layers become steps, None for a capture; and whether they were found, and not named."""
    if not isinstance(regions, str) or regions != "auto":
        return None if regions is None else paths_of(regions), False
    return (None if isinstance(net, fx.GraphModule) else marked_containers(net, least) or None), True


def _check_rest(model: nn.Module, settings: Settings, regions: Sequence[str] | None) -> None:
    """
    Raises:
        SettingsError: what lies outside of chains cannot be run again here.
    """
    if settings.rest == "checkpoint" and (regions is not None or isinstance(model, fx.GraphModule)):
        raise SettingsError(
            "rest='checkpoint' needs a capture, which regions=[...] and GraphModules go without: leave regions out, or put "
            "torch.utils.checkpoint around what lies outside of the chains"
        )


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
    by_name = isinstance(example_inputs, Mapping)  # also what a tokenizer of Hugging Face returns, which is no dict
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    args, kwargs = ((), dict(example_inputs)) if by_name else (args, {})
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
