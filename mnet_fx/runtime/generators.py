"""The random generators that a step may draw from, by their states: a step drew if its generator's state moved, and a rerun starts from
the same one.

The state of a generator on a CPU is a tensor. On CUDA it is two numbers that the host knows, the seed and how far the generator has come:
reading and setting them waits for nothing, and makes no tensor. The default generator is that of the stream's device, which need not be
the current one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from types import BuiltinMethodType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..errors import MnetError

__all__ = ["Generator", "generators", "moved", "named_by_code"]


class Generator:
    """A generator by two functions, of which the one gives its state, as a tensor or what can be compared."""

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


def generators(device: torch.device, own: Iterable[torch.Generator | Generator]) -> list[Any]:
    """What a step may draw from: the default generators of the CPU and of the stream's device, and its own, on any device."""
    return [Generator(torch.get_rng_state, torch.set_rng_state), *_default(device), *map(_source, own)]


def _default(device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return []
    if device.type == "cuda":
        return [_OnCuda(torch.cuda.default_generators[device.index])]
    module: Any = torch.get_device_module(device)
    return [Generator(lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device))]


def named_by_code(named: Iterable[tuple[str, Any]]) -> list[Generator]:
    """The generators of Python's module `random` and of NumPy that code may draw from: their states take too long to be read for nothing.

    Args:
        named: the names in the code, each with the global of that name, if any.
    """
    found = dict(named)
    ids = set(map(id, found.values())) | {
        id(value.__self__) for value in found.values() if isinstance(value, BuiltinMethodType | MethodType)
    }
    pythons = {id(random), id(random.random.__self__)}  # type: ignore[attr-defined]
    sources = [Generator(random.getstate, random.setstate)] if not ids.isdisjoint(pythons) else []
    if (numpy := sys.modules.get("numpy")) is not None:
        numpys = {id(numpy.random), id(numpy.random.rand.__self__)} | ({id(numpy)} if "random" in found else set())
        sources += [Generator(_state_of_numpy, _set_numpy)] if not ids.isdisjoint(numpys) else []
    return sources


def _state_of_numpy() -> tuple[Any, ...]:
    kind, key, *rest = sys.modules["numpy.random"].get_state()
    return kind, key.tobytes(), *rest


def _set_numpy(state: tuple[Any, ...]) -> None:
    kind, key, *rest = state
    sys.modules["numpy.random"].set_state((kind, sys.modules["numpy"].frombuffer(key, "uint32"), *rest))


def _source(generator: Any) -> Any:
    if isinstance(generator, Generator):
        return generator
    return _OnCuda(generator) if generator.device.type == "cuda" else generator


def moved(before: Any, after: Any) -> bool:
    """Whether two states of one generator differ."""
    return not torch.equal(before, after) if isinstance(before, Tensor) else before != after
