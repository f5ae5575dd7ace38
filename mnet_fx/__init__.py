"""mnet_fx: residual networks rewritten into exactly reversible momentum networks (Sander et al., ICML 2021)."""

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
]
