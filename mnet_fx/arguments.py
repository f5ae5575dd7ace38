"""A call of a model, from what people give as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Call", "call_from"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def call_from(given: Any) -> Call:
    """A call from a tuple or list of positional arguments, a mapping of keyword arguments, or one argument."""
    if isinstance(given, Mapping):  # also what a tokenizer of Hugging Face returns, which is no dict
        return (), dict(given)
    return (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}
