"""A call of a whole layer as a step of a chain: what named regions and `MomentumNet` share.

layer(x, mask, cache=c) -> (x', weights)    becomes    f(x) = x' - x  (or x' itself, for a residual function),  extras (weights,)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import StreamError

__all__ = ["LayerCall", "LayerStep", "OwnForward"]


class OwnForward:
    """What stands in the place of a module's `forward`.

    Args:
        owner: the module.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    @property
    def original(self) -> Any:
        return type(self.owner).forward.__get__(self.owner)

    def release(self) -> nn.Module | None:
        """Makes the module what it was before; returns the module for v[0], if the model had none before."""
        del self.owner.forward
        return None


class LayerCall:
    """The arguments of a layer call with the stream (its first tensor, positional or by keyword) taken out, wherever it stands: it is not
    stored, so that the tape can free it, and a layer that asks whether two of them are one gets the answer it always gets.

    Args:
        name: of the layer, for messages.
        args, kwargs: the call.

    Raises:
        StreamError: no argument is a tensor.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        place = next((key for key, value in items if isinstance(value, Tensor)), None)
        if place is None:
            raise StreamError(
                f"{name} was called without a tensor among its arguments, so there is no stream to carry: give it one by itself, and not "
                "in a dictionary or list; or leave regions out, so that the model is captured, which looks inside of them"
            )
        self.place: int | str = place
        x = self.stream(args, kwargs)
        self.places = [key for key, value in items if value is x]
        # As they are: a layer may add to a list of its caller's.
        self.sides = (tuple(None if a is x else a for a in args), {k: v for k, v in kwargs.items() if v is not x})

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The stream among the arguments."""
        return args[self.place] if isinstance(self.place, int) else kwargs[self.place]

    def arguments(self, x: Tensor, sides: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
        """The call again, with other tensors."""
        args, kwargs = list(sides[0]), dict(sides[1])
        for place in self.places:
            if isinstance(place, int):
                args[place] = x
            else:
                kwargs[place] = x
        return args, kwargs


class LayerStep(nn.Module):
    """One call of a layer as a step of a chain: (x, *sides) -> (y, *extras) with y in the shape of x.

    Args:
        layer: the layer, whose parameters and buffers the step uses.
        function: runs the layer on its arguments.
        call: the arguments of this call.
        path: of the layer in the model.
        residual: whether the layer is f itself, and not a block x + f(x).
    """

    def __init__(self, layer: nn.Module, function: Callable[..., Any], call: LayerCall, path: str, residual: bool = False) -> None:
        super().__init__()
        self.layer, self.path, self.residual = layer, path, residual
        self._call = (function, call)
        self.out_spec: pytree.TreeSpec | None = None

    def path_of(self, name: str) -> str:
        """Path in the model of a parameter or buffer of this step."""
        return f"{self.path}.{name.removeprefix('layer.')}"

    def forward(self, x: Tensor, *sides: Any) -> tuple[Any, ...]:
        function, call = self._call
        args, kwargs = call.arguments(x, sides)
        y, extras = self._split(function(*args, **kwargs))
        if y.shape != x.shape:
            raise StreamError(
                f"layer {self.path} turns a stream of shape {tuple(x.shape)} into one of shape {tuple(y.shape)}, and a momentum "
                "chain keeps one shape: leave that layer out of the container, or rewrite another one"
            )
        if y.device != x.device:
            raise StreamError(
                f"layer {self.path} takes a stream on {x.device} to {y.device}, and a momentum chain runs on one device: one region per "
                "device (a container for the layers of each), and move the stream between the two"
            )
        if not self.residual:
            y = y - x
        if torch.promote_types(x.dtype, y.dtype) != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise StreamError(
                f"layer {self.path} turns a stream of {x.dtype} into one of {y.dtype}: cast the input of the chain to {y.dtype}"
            )
        return y.to(x.dtype), *extras

    def _split(self, result: Any) -> tuple[Tensor, list[Any]]:
        """The stream, and the leaves of the rest of what the layer returned."""
        if isinstance(result, Tensor):
            return result, []
        if not isinstance(result, (tuple, list)) or not result or not isinstance(result[0], Tensor):
            raise StreamError(
                f"layer {self.path} returned a {type(result).__name__}: a layer of a momentum chain returns its stream as a "
                "tensor, or as the first element of a tuple or list"
            )
        extras, spec = pytree.tree_flatten(list(result[1:]))
        self.out_spec = spec
        self.out_type = type(result)
        return result[0], extras

    def joined(self, x: Tensor, extras: list[Any]) -> Any:
        """What the layer returned in its first run, with x in place of its stream."""
        if self.out_spec is None:
            return x
        rest = pytree.tree_unflatten(extras, self.out_spec)
        return [x, *rest] if self.out_type is list else (x, *rest)
