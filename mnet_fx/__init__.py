"""mnet_fx: residual networks rewritten into exactly reversible momentum networks (Sander et al., ICML 2021)."""

from .cost import state_bits, state_bytes, step_bits
from .errors import InversionError, MnetError, MnetWarning, SettingsError, StreamError
from .momentumize import momentumize
from .report import RegionReport, Report, report

__all__ = [
    "InversionError",
    "MnetError",
    "MnetWarning",
    "RegionReport",
    "Report",
    "SettingsError",
    "StreamError",
    "momentumize",
    "report",
    "state_bits",
    "state_bytes",
    "step_bits",
]
