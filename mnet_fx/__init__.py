"""mnet_fx: residual networks rewritten into exactly reversible momentum networks (Sander et al., ICML 2021).

Names are imported when they are first asked for (PEP 562): `mnet-fx --help` and shell completion need no torch, and `import mnet_fx` takes
no longer than `import torch`. A public name is never that of a module of ours, which would take its place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import toy_datasets
    from .api import momentumize
    from .compile_backend import backend, reports, reset_reports
    from .cost import state_bits, state_bytes, step_bits
    from .errors import InversionError, MnetError, MnetWarning, SettingsError, StreamError
    from .momentum_net import FinalVelocity, MomentumNet, convert_momentumnet_state_dict, transform_to_momentumnet
    from .reporting.ask import report
    from .reporting.report import AddReport, CapturedPart, RegionReport, Report, Stretch

_HOME = {
    "api": ["momentumize"],
    "compile_backend": ["backend", "reports", "reset_reports"],
    "cost": ["state_bits", "state_bytes", "step_bits"],
    "errors": ["InversionError", "MnetError", "MnetWarning", "SettingsError", "StreamError"],
    "momentum_net": ["FinalVelocity", "MomentumNet", "convert_momentumnet_state_dict", "transform_to_momentumnet"],
    "reporting.ask": ["report"],
    "reporting.report": ["AddReport", "CapturedPart", "RegionReport", "Report", "Stretch"],
    "toy_datasets": ["toy_datasets"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AddReport",
    "CapturedPart",
    "FinalVelocity",
    "InversionError",
    "MnetError",
    "MnetWarning",
    "MomentumNet",
    "RegionReport",
    "Report",
    "SettingsError",
    "StreamError",
    "Stretch",
    "backend",
    "convert_momentumnet_state_dict",
    "momentumize",
    "report",
    "reports",
    "reset_reports",
    "state_bits",
    "state_bytes",
    "step_bits",
    "toy_datasets",
    "transform_to_momentumnet",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_MODULE_OF[name]}", __name__)
    found = module if name == _MODULE_OF[name] else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
