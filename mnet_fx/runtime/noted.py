"""What tensors were when a step ran first, as numbers: fingerprints, and how often autograd saw a write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..arithmetic.fingerprints import prints
from .guise import is_ordinary, plain

__all__ = ["Known", "fingerprints", "graphs", "noted", "version"]

Known = Mapping[int, tuple[Any, Any]]
"""Of tensors that live, by id: the version and the fingerprint."""


def graphs(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A step that is a graph, and the one within it where a read map comes before."""
    inner = module._modules.get("inner")
    return [("", module)] if inner is None else [("", module), ("inner.", inner)]


def version(t: Tensor) -> Any:
    """How often autograd saw it written to; None where it does not count."""
    return None if t.is_inference() else t._version


def noted(steps: Iterable[tuple[nn.Module, Sequence[Any]]]) -> Known:
    """The fingerprints of the parameters and side inputs of all steps that are graphs, taken at once, which is quicker than one by one."""
    found: dict[int, Tensor] = {}
    for module, sides in steps:
        if getattr(module, "stateless", False):
            own = [t for _, graph in graphs(module) for t in graph._parameters.values()]
            found.update((id(t), t) for t in (*own, *sides) if isinstance(t, Tensor) and is_ordinary(t))
    tensors = list(found.values())
    return {id(t): (version(t), number) for t, number in zip(tensors, prints(tensors), strict=True)}


def fingerprints(named: dict[str, Tensor], known: Known = MappingProxyType({})) -> dict[str, Any]:
    """A number for each tensor that changes with its values; those of a device stay there.

    For other than dense tensors (wrappers of others, sparse, quantised, nested) it is what autograd knows, the version.
    """
    named = {name: plain(t) for name, t in named.items()}
    values: dict[str, Any] = {}
    asked = []
    for name, t in named.items():
        then, number = known.get(id(t), (None, None))
        values[name] = version(t)
        if number is not None and then == values[name]:
            values[name] = number
        elif is_ordinary(t):
            asked.append(name)
    return values | dict(zip(asked, prints([named[name] for name in asked]), strict=True)) if asked else values
