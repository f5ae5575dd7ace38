"""mnet_fx: residual networks rewritten into exactly reversible momentum networks (Sander et al., ICML 2021)."""

from . import toy_datasets
from .compile_backend import backend, reports, reset_reports
from .cost import state_bits, state_bytes, step_bits
from .errors import InversionError, MnetError, MnetWarning, SettingsError, StreamError
from .momentum_net import FinalVelocity, MomentumNet, convert_momentumnet_state_dict, transform_to_momentumnet
from .momentumize import momentumize
from .report import CapturedPart, RegionReport, Report, report

__all__ = [
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
