"""How findings are shown: as text, data, a page and pictures.

findings.py   the nouns
build.py      from plans to reports
report.py     `Report`: findings that can be shown, by `text`, `data`, `html`, `plots`
ask.py        `mnet_fx.report`, which stands above all of mnet_fx; all else here, below what captures
"""

from .findings import AddReport, CapturedPart, RegionReport
from .report import Pending, Report

__all__ = ["AddReport", "CapturedPart", "Pending", "RegionReport", "Report"]
