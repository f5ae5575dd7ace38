"""Tensors without values: fake ones (torch's FakeTensorMode), with which everything is allocated and nothing computed.

A chain on them keeps what it keeps on real ones, so that whoever counts (MemTracker, `mnet_fx.estimate`) sees true figures. What is read
from values otherwise is observed here or supposed (`fake_state`), and what is proved by values is not proved.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Drawn", "Effects", "valueless"]

_CPU_GENERATOR, _DEVICE_GENERATOR = 5056, 16  # bytes of a generator's state


def valueless(*tensors: Any) -> bool:
    """Whether FakeTensorMode is on, or a tensor is fake."""
    if any(isinstance(t, FakeTensor) for t in tensors):
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class Effects(TorchDispatchMode):
    """Notes what a step does that its values would show: whether it draws random numbers, and to which storages it writes.

    Attributes:
        drew: types of the devices on which it drew.
        foreign: whether it made an operation that is not torch's own, which may do anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drew: set[str] = set()
        self.foreign = False
        self._written: dict[int, Any] = {}  # held, as a number is only one storage's while that lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.foreign |= func.namespace not in ("aten", "prim", "prims")
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and self._given(func, args, kwargs, "dropout_p") != 0.0:
            first = next((t for t in (result, *args) if isinstance(t, Tensor)), None)
            self.drew.add("cpu" if first is None else first.device.type)
        for place in _written(func):
            self._note(self._given(func, args, kwargs, func._schema.arguments[place].name))
        if "batch_norm" in func._schema.name and "backward" not in func._schema.name and len(args) > 5 and args[5] is True:
            self._note(list(args[3:5]))  # running statistics, of which the schema says nothing
        return result

    @staticmethod
    def _given(func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """An argument of an operation by its name; its default where it was not given, None where there is none."""
        arguments = [a.name for a in func._schema.arguments]
        if name not in arguments:
            return None
        place = arguments.index(name)
        return args[place] if place < len(args) else kwargs.get(name, func._schema.arguments[place].default_value)

    def _note(self, value: Any) -> None:
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(t, Tensor):
                self._written[t.untyped_storage()._cdata] = t.untyped_storage()

    @property
    def none(self) -> bool:
        """Whether it surely did none of this."""
        return not (self.drew or self._written or self.foreign)

    def wrote(self, t: Tensor) -> bool:
        """Whether the step wrote to the memory of a tensor."""
        return self.wrote_to(t.untyped_storage()._cdata)

    def wrote_to(self, storage: int) -> bool:
        """Whether it wrote to a storage, given as its `_cdata`."""
        return storage in self._written


@cache
def _written(func: Any) -> tuple[int, ...]:
    """Positions of the arguments that an operation overwrites."""
    return tuple(i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


class Drawn:
    """In place of a generator that a step draws from: its state has a size and no values."""

    def __init__(self, device: str) -> None:
        self.size = _CPU_GENERATOR if device == "cpu" else _DEVICE_GENERATOR

    def get_state(self) -> Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device="cpu")

    def set_state(self, state: Tensor) -> None:
        """Nothing: there are no values."""
