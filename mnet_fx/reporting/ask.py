"""`mnet_fx.report`: what a rewrite did to a model, or what it would do."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

from torch import nn

from ..api import momentumize
from ..captured.forward import CapturedForward
from ..errors import SettingsError
from ..rewrite import capture_now
from .build import REPORT, TRANSFORMED, report_of
from .report import Report

__all__ = ["report"]


def report(model: nn.Module, example_inputs: Any = None, **options: Any) -> Report:
    """What was rewritten of a model, or would be: every residual-looking add once, in the order in which the model runs, and bytes kept.

    Nothing is computed, and the model stays as it is.

    Args:
        model: one that `momentumize` or `transform_to_momentumnet` returned, whose report this gives, the same object as `net.report`;
            or any other, for the report that `momentumize(model, example_inputs, **options)` would have.
        example_inputs: as for `momentumize`. Without, the report is a preview, without bytes. Not for a rewritten model.
        options: those of `momentumize`; likewise.

    Returns:
        The report: `print` it, `.table()`, `.to_dict()`, `.to_json()`, `.to_csv()`, `.to_html()`, `.plot("map.png")`. Bytes are those of
        a training step: the model is read in train mode.

    Raises:
        SettingsError: `model` is no module; an option cannot work; example_inputs do not fit; or options are given for a rewritten model.
        MnetError: the model cannot be captured; see `momentumize`.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"report takes an nn.Module, got {type(model).__name__}")
    if REPORT in model.__dict__ or TRANSFORMED in model.__dict__:
        if example_inputs is not None or options:
            raise SettingsError(
                f"this {type(model).__name__} is rewritten: report(net) says what was done, and takes no inputs or options; to ask what "
                "others would do, give the original model"
            )
        return report_of(model)
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise SettingsError(f"unknown option(s) {', '.join(unknown)} of report; known are those of momentumize: {', '.join(_OPTIONS)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no residual chain was rewritten")  # the report says it
        return _read(model, example_inputs, options)


_OPTIONS = tuple(inspect.signature(momentumize).parameters)[2:]


def _read(model: nn.Module, example_inputs: Any, options: dict[str, Any]) -> Report:
    net = momentumize(model, **options)
    forward = net.__dict__.get("forward")
    if example_inputs is not None and isinstance(forward, CapturedForward):
        capture_now(forward, example_inputs, (True,))
    found = report_of(net)
    return Report(**{field.name: getattr(found, field.name) for field in dataclasses.fields(Report)})
