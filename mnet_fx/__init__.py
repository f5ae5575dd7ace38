"""mnet_fx: residual networks rewritten into exactly reversible momentum networks (Sander et al., ICML 2021).

Names are imported when they are first asked for (PEP 562): `mnet-fx --help` and shell completion need no torch, and `import mnet_fx` takes
no longer than `import torch`. A public name is never that of a module of ours, which would take its place.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import toy_datasets
    from .api import momentumize
    from .arithmetic.cost import state_bits, state_bytes, step_bits
    from .budget.estimates import Estimate, Limits, Way
    from .budget.estimating import estimate
    from .budget.measured import Memory, measure
    from .budget.planning import Plan, plan
    from .calibration import Calibration, RegionCalibration, calibrate
    from .captured.restoring import restore
    from .compiled.backend import backend, reports, reset_reports
    from .errors import InversionError, MnetError, MnetWarning, SettingsError, StreamError
    from .loading import load, save, saved_options
    from .named.momentum_net import FinalVelocity, MomentumNet, convert_momentumnet_state_dict, transform_to_momentumnet
    from .reporting.ask import report
    from .reporting.drawing import draw
    from .reporting.report import AddReport, CapturedPart, RegionReport, Report, Stretch
    from .reporting.steps import plot_step
    from .tuned import Candidate, Tuning
    from .tuning import tune
    from .verifying.verification import Check, Verification, verify

_HOME = {
    "api": ["momentumize"],
    "budget.estimates": ["Estimate", "Limits", "Way"],
    "budget.estimating": ["estimate"],
    "captured.restoring": ["restore"],
    "compiled.backend": ["backend", "reports", "reset_reports"],
    "calibration": ["Calibration", "RegionCalibration", "calibrate"],
    "arithmetic.cost": ["state_bits", "state_bytes", "step_bits"],
    "errors": ["InversionError", "MnetError", "MnetWarning", "SettingsError", "StreamError"],
    "budget.measured": ["Memory", "measure"],
    "budget.planning": ["Plan", "plan"],
    "loading": ["load", "save", "saved_options"],
    "named.momentum_net": ["FinalVelocity", "MomentumNet", "convert_momentumnet_state_dict", "transform_to_momentumnet"],
    "reporting.ask": ["report"],
    "reporting.drawing": ["draw"],
    "reporting.report": ["AddReport", "CapturedPart", "RegionReport", "Report", "Stretch"],
    "reporting.steps": ["plot_step"],
    "toy_datasets": ["toy_datasets"],
    "tuned": ["Candidate", "Tuning"],
    "tuning": ["tune"],
    "verifying.verification": ["Check", "Verification", "verify"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AddReport",
    "Calibration",
    "Candidate",
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
    "Plan",
    "RegionCalibration",
    "RegionReport",
    "Report",
    "SettingsError",
    "StreamError",
    "Stretch",
    "Tuning",
    "Verification",
    "Way",
    "backend",
    "calibrate",
    "convert_momentumnet_state_dict",
    "draw",
    "estimate",
    "load",
    "measure",
    "momentumize",
    "plan",
    "plot_step",
    "report",
    "reports",
    "reset_reports",
    "restore",
    "save",
    "saved_options",
    "state_bits",
    "state_bytes",
    "step_bits",
    "toy_datasets",
    "transform_to_momentumnet",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("mnet-fx")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULE_OF[name]}", __name__)
    found = module if name == _MODULE_OF[name] else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
