"""mnet_fx: residual networks rewritten into exactly reversible momentum networks (Sander et al., ICML 2021)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import toy_datasets
from .compile_backend import backend, reports, reset_reports
from .cost import state_bits, state_bytes, step_bits
from .errors import InversionError, MnetError, MnetWarning, SettingsError, StreamError
from .momentum_net import FinalVelocity, MomentumNet, convert_momentumnet_state_dict, transform_to_momentumnet
from .momentumize import momentumize
from .report import CapturedPart, RegionReport, Report, report

if TYPE_CHECKING:
    from .budget.estimates import Estimate, Limits, Way
    from .budget.estimating import estimate
    from .memory import Memory, measure
    from .verification import Check, Verification, verify

_LATE = {  # imported when they are asked for, as most programs do not
    "Check": "verification",
    "Estimate": "budget.estimates",
    "Limits": "budget.estimates",
    "Memory": "memory",
    "Verification": "verification",
    "Way": "budget.estimates",
    "estimate": "budget.estimating",
    "measure": "memory",
    "verify": "verification",
}

__all__ = [
    "CapturedPart",
    "Check",
    "Estimate",
    "FinalVelocity",
    "InversionError",
    "Limits",
    "Memory",
    "MnetError",
    "MnetWarning",
    "MomentumNet",
    "RegionReport",
    "Report",
    "SettingsError",
    "StreamError",
    "Verification",
    "Way",
    "backend",
    "convert_momentumnet_state_dict",
    "estimate",
    "measure",
    "momentumize",
    "report",
    "reports",
    "reset_reports",
    "state_bits",
    "state_bytes",
    "step_bits",
    "toy_datasets",
    "transform_to_momentumnet",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
