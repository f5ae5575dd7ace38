"""`rest="checkpoint"` of named regions: modules outside of the chains run again in the backward pass, as there is no graph to cut.

    root -> modules that hold a layer of a region                   as they are: their own code, between the others, is stored
         -> lists of blocks (decoders, stages that nobody named)    each block runs again
         -> every other outermost module that saves activations     runs again, as one

What saves little but its input is stored as before: single layers of torch.nn (but recurrent ones), and what has no parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from ..errors import UNCOMPILED
from ..runtime.own_copies import Learnt
from ..runtime.segment import run_whole
from ..runtime.sides import tensors_of
from ..runtime.surroundings import exported, transformed
from ..runtime.unreturned import Leaving
from ..settings import Settings
from .layer_step import OwnForward
from .layers import NamedRegion

__all__ = ["RestModule", "run_rest_again"]

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PASSIVE = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_ALONE = (torch.jit.ScriptModule, OptimizedModule, nn.parallel.DistributedDataParallel, nn.DataParallel)  # not ours to run again


def run_rest_again(net: nn.Module, regions: list[NamedRegion], settings: Settings) -> tuple[str, ...]:
    """Has modules outside of the chains run again in the backward pass, in place.

    Args:
        net: the model, whose layers are steps already.
        regions: its chains.
        settings: what is done about a rerun that differs.

    Returns:
        The paths of these modules.
    """
    taken = {module for region in regions for layer in region.layers for module in layer.modules()}
    found = list(_outermost("", net, taken))
    for path, module in found:
        module.forward = RestModule(module, path, settings.on_drift)
    return tuple(path for path, _ in found)


class RestModule(OwnForward):
    """The `forward` of a module that is run again in the backward pass.

    Args:
        owner: the module.
        path: of the module in the model.
        on_drift: what is done about a rerun that differs.
    """

    def __init__(self, owner: nn.Module, path: str, on_drift: str) -> None:
        super().__init__(owner)
        self.path, self.on_drift, self.learnt, self.leaving = path, on_drift, Learnt(), Leaving()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @torch.compiler.disable(reason=UNCOMPILED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = list(self.owner.parameters())
        tensors = [*tensors_of((args, kwargs)), *parameters]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if not needs_grad or transformed() or exported() or len({t.device for t in parameters}) > 1:
            return self.original(*args, **kwargs)
        x = next((t for t in tensors if t.device.type != "cpu"), tensors[0]).detach()
        call = _Call(self.owner, self.original, self.path)
        return run_whole(self.path, self.on_drift, call, x, (args, kwargs), self.learnt, self.leaving)


class _Call(nn.Module):
    """A call of a module: (x, args, kwargs) -> what the module gives.

    Args:
        module: the module, whose parameters and buffers the call uses.
        function: its forward.
        path: of the module in the model.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], path: str) -> None:
        super().__init__()
        self.module, self.path = module, path
        self._function = (function,)

    def path_of(self, name: str) -> str:
        """Path in the model of a parameter or buffer of the module."""
        return f"{self.path}.{name.removeprefix('module.')}"

    def forward(self, _: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._function[0](*args, **kwargs)


def _outermost(path: str, module: nn.Module, taken: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules to be run again, none of which holds one of `taken` or of another."""
    if module in taken or _is_alone(module):
        return
    inside = set(module.modules())
    if path and inside.isdisjoint(taken) and _can_run_again(module, inside):
        if _saves(module):
            taken |= inside
            yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(f"{path}.{name}" if path else name, child, taken)


def _can_run_again(module: nn.Module, inside: set[nn.Module]) -> bool:
    """Whether one call runs the module as one, and nothing in it is better run by itself, as each of a list of blocks, or not at all."""
    calls = type(module).forward is not nn.Module.forward and "forward" not in module.__dict__
    return calls and not any(_is_alone(m) or _is_list_of_blocks(m) or _gives_logits(m) for m in inside)


def _is_alone(module: nn.Module) -> bool:
    """Whether a rerun would not see what the first run saw: code that is not Python or not of the module, and embeddings that write to
    their weight."""
    return isinstance(module, _ALONE) or getattr(module, "max_norm", None) is not None


def _is_list_of_blocks(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) and sum(map(_is_block, module.children())) > 1


def _gives_logits(module: nn.Module) -> bool:
    """Whether it gives a number for each of many classes, to work out again which would take longer than all before it."""
    return isinstance(module, nn.Linear) and module.out_features > 8 * module.in_features


def _is_block(module: nn.Module) -> bool:
    """Whether a module has several matrices or kernels."""
    return sum(p.dim() > 1 for p in module.parameters()) > 1


def _saves(module: nn.Module) -> bool:
    """Whether autograd is likely to save more for a module than its input."""
    if next(module.parameters(), None) is None:
        return False
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        return True
    working = [m for m in module.modules() if not isinstance(m, _PASSIVE) and (not m._modules or m._parameters)]
    return len(working) > 1 or (working == [module] and not any(base.__module__.startswith("torch.nn.modules.") for base in _own(module)))


def _own(module: nn.Module) -> list[type]:
    """The classes of a module but for those of all modules."""
    return [base for base in type(module).__mro__ if base not in nn.Module.__mro__]
