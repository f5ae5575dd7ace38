"""What a call is given and gives: any structure of tensors and other things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map

__all__ = ["leaves", "rebuilt", "tensors_of"]


def rebuilt(side: Any, given: Mapping[int, Tensor] = MappingProxyType({})) -> Any:
    """A copy of a side input's lists and dictionaries, not of its tensors, so that a step's `append` does not reach the next run.

    Args:
        side: the side input.
        given: by the id of a tensor, the one that takes its place.
    """
    kind = type(side)
    if kind is tuple or kind is list:
        return kind(rebuilt(part, given) for part in side)
    if kind is dict:
        return {key: rebuilt(value, given) for key, value in side.items()}
    if kind in SUPPORTED_NODES or isinstance(side, tuple):
        return tree_map(lambda leaf: given.get(id(leaf), leaf), side)
    return given.get(id(side), side) if given else side


def leaves(side: Any) -> list[Any]:
    """As `tree_leaves`, but quick."""
    kind = type(side)
    if kind is tuple or kind is list or kind is dict:
        return [leaf for part in (side.values() if kind is dict else side) for leaf in leaves(part)]
    return tree_leaves(side) if kind in SUPPORTED_NODES or isinstance(side, tuple) else [side]


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results: also in those of Hugging Face, which torch knows under no fixed name, and in dataclasses."""
    return _tensors_of(values, [])


def _tensors_of(values: Any, around: list[Any]) -> Iterator[Tensor]:
    """The same within other values, which may come again in these."""
    around = [*around, values]
    for leaf in tree_leaves(_inside(values)):
        if isinstance(leaf, Tensor):
            yield leaf
        elif _inside(leaf) is not leaf and not any(leaf is other for other in around):
            yield from _tensors_of(leaf, around)


def _inside(value: Any) -> Any:
    """What a dictionary or dataclass holds; any other value itself."""
    if isinstance(value, dict):
        return list(value.values())
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return value
