"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from ..errors import SettingsError

__all__ = ["parsed", "shown"]

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}, **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}}


def parsed(memory: str | int, name: str = "memory", least: int = 1) -> int:
    """A number of bytes from a text such as "16GiB", "80 GB", "512MiB", or a number.

    Raises:
        SettingsError: it is neither, or less than `least`; the message names the argument.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(memory)) if not isinstance(memory, bool) else None
    if match is None or match[2].upper() not in _UNITS or float(match[1]) < least:
        raise SettingsError(f"{name} must be a number of bytes, or a text such as '16GiB', '80GB' or '512MiB', got {memory!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def shown(size: int) -> str:
    """A number of bytes with three digits and a binary unit, such as "41.0 MiB"."""
    if size < 1024:
        return f"{size} B"
    unit = min(len("KMGT"), (int(size).bit_length() - 1) // 10)
    value = size / 1024**unit
    if value >= 999.5 and unit < 4:
        unit, value = unit + 1, value / 1024
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {' KMGT'[unit]}iB"
