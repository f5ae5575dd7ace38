"""Memory that operations take while they run, beyond their results."""

from __future__ import annotations

from typing import Any

__all__ = ["workspace"]


def workspace(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    return 0
