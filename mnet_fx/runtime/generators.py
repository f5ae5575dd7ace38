"""The random generators that a step may draw from, by their states: a step drew if its generator's state moved, and a rerun starts from
the same one.

The state of a generator on a CPU is a tensor. On CUDA it is two numbers that the host knows, the seed and how far the generator has come:
reading and setting them waits for nothing, and makes no tensor. The default generator is that of the stream's device, which need not be
the current one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import MnetError

__all__ = ["Generator", "generators", "moved"]


class Generator:
    """A generator that gives its state as a tensor."""

    def __init__(self, get_state: Any, set_state: Any) -> None:
        self.get_state, self.set_state = get_state, set_state


class _OnCuda:
    """A generator on CUDA, whose state is its seed and its offset."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def get_state(self) -> tuple[int, int]:
        """
        Raises:
            MnetError: a CUDA graph is being captured, of which the offset is no part.
        """
        if torch.cuda.is_current_stream_capturing():
            raise MnetError(
                "a reversible chain cannot be captured in a CUDA graph: how far its random numbers have come is not known before the graph "
                "runs. Leave torch.cuda.graph and make_graphed_callables out, and mode='reduce-overhead' of torch.compile; or capture the "
                "parts outside of the chains"
            )
        return self.generator.initial_seed(), self.generator.get_offset()

    def set_state(self, state: tuple[int, int]) -> None:
        seed, offset = state
        self.generator.manual_seed(seed)
        self.generator.set_offset(offset)


def generators(device: torch.device, own: Iterable[torch.Generator]) -> list[Any]:
    """What a step may draw from: the default generators of the CPU and of the stream's device, and its own, on any device."""
    return [Generator(torch.get_rng_state, torch.set_rng_state), *_default(device), *map(_source, own)]


def _default(device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return []
    if device.type == "cuda":
        return [_OnCuda(torch.cuda.default_generators[device.index])]
    module: Any = torch.get_device_module(device)
    return [Generator(lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device))]


def _source(generator: Any) -> Any:
    return _OnCuda(generator) if generator.device.type == "cuda" else generator


def moved(before: Any, after: Any) -> bool:
    """Whether two states of one generator differ."""
    return not torch.equal(before, after) if isinstance(before, Tensor) else before != after
