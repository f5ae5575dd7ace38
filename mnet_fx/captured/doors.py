"""Other ways into a rewritten model than its forward: `net.features(x)`, `net.encoder(x)`, a loop over `net.layers` in a user's code.

Run by plain Python, these would compute the original network. So each module inside the model has a door: what runs when Python, and
not Dynamo, calls it (torch's own slot for a compiled call, of which Dynamo takes no notice). A module that owns a step of a chain opens
its door only to calls that come from the captured forward; what lies in it, also to calls that do not come from its own forward; what it
lies in, not where a torch.compile of somebody else's would capture it.

Doors do not see blocks without modules inside whose `forward` is called by name, nor blocks that a function under torch.compile calls.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import MnetError

__all__ = ["Door", "check_caller", "close", "install", "passed_by"]

_MODULES = nn.Module._call_impl.__code__.co_filename  # the file of the frames between who calls a module and its forward

_SLOT = "_compiled_call_impl"


class Keeper(Protocol):
    """What knows which modules own steps, and which calls are its own."""

    def running(self) -> Any:
        """The call of the model that this thread is in, with the graphs that it ran and the modules that Python entered; None outside."""

    def closed(self, probably: bool = False) -> Collection[str]:
        """Paths of the modules that plain Python must not run; before the first capture none, or those of a preview."""


class Door:
    """What plain Python calls in place of a module inside a rewritten model.

    Args:
        module: the module.
        path: of it in the model.
        keeper: of the model.
    """

    def __init__(self, module: nn.Module, path: str, keeper: Keeper) -> None:
        self.module, self.path, self.keeper = module, path, keeper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # a module with hooks, where Dynamo goes the way that Python does
            return self.module._call_impl(*args, **kwargs)
        call = self.keeper.running()
        if call is None and (path := self._closed(sys._getframe(1), callable(_callback()))) is not None:
            raise MnetError(
                f"{path} is part of a momentum chain and was called from outside of the rewritten model's forward, where it would "
                "compute the original network: call the rewritten model itself; the model that was given to momentumize shares its "
                "weights and computes the original; or rewrite what you call, as in momentumize(model.encoder)"
            )
        if call is None:
            return self.module._call_impl(*args, **kwargs)
        call.entered.add(self.path)
        call.within.append(self.path)
        before = len(call.graphs)
        try:
            result = self.module._call_impl(*args, **kwargs)
        finally:
            call.within.pop()
        if len(call.graphs) == before and self.path in self.keeper.closed():
            raise MnetError(
                f"{self.path} is part of a momentum chain, but Dynamo left it to Python in this call, where it computed the original "
                "network (TORCH_LOGS=graph_breaks says why): name its list of layers with regions=[...], which needs no capture"
            )
        return result

    @torch.compiler.disable
    def _closed(self, frame: types.FrameType | None, compiling: bool) -> str | None:
        """Path of the module that would run a step of the original network if this one were called from outside; None if none would."""
        closed = self.keeper.closed(probably=True)
        if self.path in closed:
            return self.path
        while frame is not None and frame.f_code.co_filename == _MODULES:
            frame = frame.f_back
        caller = None if frame is None else frame.f_locals.get(frame.f_code.co_varnames[0] if frame.f_code.co_argcount else "")
        door = caller.__dict__.get(_SLOT) if isinstance(caller, nn.Module) else None
        if isinstance(door, Door) and door.path in closed and frame.f_code is _code(caller.forward):  # type: ignore[union-attr]
            return door.path
        if compiling:
            return next((path for path in closed if path.startswith(f"{self.path}.")), None)
        return None


_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback


def _code(function: Any) -> types.CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None)


torch._dynamo.eval_frame.skip_code(Door.__call__.__code__)  # Dynamo is to capture the module, not the door


def check_caller(owner: nn.Module) -> None:
    """An error if a module that merely shares the attributes of the model was called."""
    frame = sys._getframe(3)  # over this function, __call__ and what torch.compiler.disable makes of it
    caller = frame.f_locals.get("self") if frame.f_code.co_filename == _MODULES else None
    if isinstance(caller, nn.Module) and caller is not owner:
        raise MnetError(
            f"this {type(caller).__name__} is a shallow copy of a rewritten model, whose forward would run the model it was copied from: "
            "use copy.deepcopy, or copy the original and momentumize the copy"
        )


def install(modules: dict[str, nn.Module], keeper: Keeper) -> None:
    """Gives each module, by its path, a door."""
    for path, module in modules.items():
        module.__dict__[_SLOT] = Door(module, path, keeper)


def passed_by(modules: dict[str, nn.Module], entered: Collection[str]) -> set[str]:
    """Of modules by path, those without modules inside that lie in one that Python entered: called by the name of `forward`, they would run
    unseen.
    """
    single = (path for path, module in modules.items() if next(module.children(), None) is None)
    return {path for path in single if any(not outer or path.startswith(f"{outer}.") for outer in entered)}


def close(net: nn.Module) -> None:
    """Takes the doors out of a model and of what is inside."""
    for module in net.modules():
        if isinstance(module.__dict__.get(_SLOT), Door):
            del module.__dict__[_SLOT]
