"""What a step leaves beside what it returns: tensors with a history in attributes, in what a hook keeps, in a global.

    self.aux = (h - MEAN).square().mean()          a loss that the model collects afterwards

Gradients come into the step that way too, and go through what a rerun saves. Where that depends on what no rerun restores (a global, what a
hook closes over), neither the state nor any output tells that it differs. So the saved tensors themselves have fingerprints: in the first
calls of each layer and in fewer and fewer later ones, and in all calls of layers that have been seen to leave something. Whether one does
shows in a rerun: when its outputs have been given up, what is still held of its graph leads elsewhere, and that is what is compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks

from ..arithmetic.fingerprints import prints
from .guise import is_ordinary, plain
from .replay import Conditions
from .sides import leaves, rebuilt

__all__ = ["LEFT", "Leaving", "Unreturned"]

LEFT = "what it leaves in an attribute or with a hook, and does not return,"


@dataclass
class Leaving:
    """What a region knows of its layers.

    Attributes:
        calls: how often each was called, by what may decide over what it leaves.
        layers: those that have left something.
    """

    calls: dict[Hashable, int] = field(default_factory=dict)
    layers: set[str] = field(default_factory=set)

    def watched(self, conditions: Conditions) -> Unreturned | None:
        """What looks at a step that is about to run; None where it is not its turn."""
        layer = conditions.path_of("")
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in conditions.tree) + len(
            _global_forward_hooks
        )
        kind = layer, hooks, tuple([module.training for _, module in conditions.tree])
        self.calls[kind] = calls = self.calls.get(kind, 0) + 1
        return Unreturned(self, layer, conditions) if layer in self.layers or calls & (calls - 1) == 0 else None


class Unreturned:
    """The saved tensors of one step.

    Args:
        leaving: of the region, which learns from this step too.
        layer: the step's name there.
        conditions: of the step, whose function this takes the place of while it looks.
    """

    def __init__(self, leaving: Leaving, layer: str, conditions: Conditions) -> None:
        self.leaving, self.layer, self.conditions = leaving, layer, conditions
        self.noted: list[Any] = []
        self.buffers: set[int] = set()  # where they are
        self.found: dict[int, Any] = {}

    @contextmanager
    def first_run(self) -> Iterator[None]:
        """Meanwhile the step, which runs for the first time, has the fingerprints noted of what it saves."""
        with self._in_place(self._first):
            yield

    @contextmanager
    def rerun(self) -> Iterator[None]:
        """Meanwhile the step, which runs again, gives up its outputs, and what is held of its graph all the same is found."""
        self.found = {}
        with self._in_place(self._again):
            yield

    def prints(self) -> tuple[list[Any], list[Any]]:
        """Those of what the last rerun found, and of the same tensors in the first run; of none if it saved more or fewer."""
        places = [i for i in self.found if i < len(self.noted) and self.noted[i] is not None]
        return [self.found[i] for i in places], [self.noted[i] for i in places]

    @contextmanager
    def _in_place(self, function: Callable[..., Any]) -> Iterator[None]:
        self.conditions.forward = function
        try:
            yield
        finally:
            self.conditions.forward = self.conditions.module.forward

    def _first(self, x: Tensor, *sides: Any) -> Any:
        self.conditions.forward = self.conditions.module.forward  # for reruns meanwhile, of a step that differentiates within itself
        self.noted = []
        self.buffers = {_address(b) for _, module in self.conditions.tree for b in module._buffers.values()} - {0}
        with _packed(self._note):
            return self.conditions.module.forward(x, *sides)

    def _note(self, t: Tensor, packed: Any) -> Any:
        with torch.no_grad():  # a buffer has its value from before only later, and is proved apart; bytes are a kernel's workspace
            self.noted.append(None if t.dtype is torch.uint8 or _address(t) in self.buffers else _print(t))
        return packed

    def _again(self, x: Tensor, *sides: Any) -> Any:
        saved: list[tuple[weakref.ref[_Held], Tensor]] = []

        def hold(t: Tensor, packed: Any) -> _Held:
            held = _Held(packed)
            saved.append((weakref.ref(held), t.detach()))  # an output has the graph as its history
            return held

        torch._dynamo.eval_frame.skip_code(hold.__code__)
        with _packed(hold):
            result = self.conditions.module.forward(x, *sides)
        result = rebuilt(
            result, {id(t): t.detach().requires_grad_() for t in leaves(result) if isinstance(t, Tensor) and t.grad_fn is not None}
        )
        with torch.no_grad():
            self.found = {i: _print(t) for i, (held, t) in enumerate(saved) if held() is not None}
        if self.found:
            self.leaving.layers.add(self.layer)
        return result


class _Held:
    """What a graph holds of a saved tensor, and nothing else does."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def _packed(wrap: Callable[[Tensor, Any], Any]) -> Iterator[None]:
    """Has each saved tensor, and what the hooks around pack it as, given to `wrap`, whose result is packed."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        yield
        return
    pack, unpack = hooks

    def pack_(t: Tensor) -> Any:
        return wrap(t, pack(t))

    def unpack_(held: Any) -> Any:
        return unpack(held.value if isinstance(held, _Held) else held)

    for function in (pack_, unpack_):  # autograd may call them where Dynamo looks at every frame
        torch._dynamo.eval_frame.skip_code(function.__code__)
    with torch.autograd.graph.saved_tensors_hooks(pack_, unpack_):
        yield


def _address(t: Tensor | None) -> int:
    return t.data_ptr() if t is not None and is_ordinary(t) else 0


def _print(t: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        own = plain(t.detach())
        return prints([own])[0] if is_ordinary(own) else 0


for _function in (Unreturned._note, _print, _Held.__init__):
    torch._dynamo.eval_frame.skip_code(_function.__code__)
