"""How a rewritten torch.fx.GraphModule is copied: its own ways would make the original network again, from its graph."""

from __future__ import annotations

import copy
from typing import Any

import torch.fx as fx
from torch import nn

from .errors import MnetError

__all__ = ["keep_forwards", "release_forwards"]


class _DeepCopy:
    """In place of GraphModule.__deepcopy__: a copy of everything that the instance holds, its new forward included."""

    def __init__(self, owner: fx.GraphModule) -> None:
        self.owner = owner

    def __call__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = type(self.owner).__new__(type(self.owner))
        memo[id(self.owner)] = copied
        copied.__dict__.update(copy.deepcopy(self.owner.__dict__, memo))
        copied.graph = copied.__dict__["_graph"]  # gives the class, of which each GraphModule has one, its forward
        return copied


class _Pickle:
    """In place of GraphModule.__reduce_ex__, which keeps nothing but the code of the graph."""

    def __call__(self, protocol: int) -> Any:
        raise MnetError(
            "a torch.fx.GraphModule is pickled as the code of its graph, which is the original network: save the state_dict instead, "
            "and momentumize the GraphModule again before it is loaded"
        )


def keep_forwards(net: nn.Module) -> None:
    """Makes copies of the GraphModules in a rewritten model keep what was rewritten."""
    for module in net.modules():
        if isinstance(module, fx.GraphModule) and (module is net or "forward" in module.__dict__):
            module.__dict__ |= {"__deepcopy__": _DeepCopy(module), "__reduce_ex__": _Pickle()}


def release_forwards(net: nn.Module) -> None:
    """Undoes `keep_forwards`."""
    for module in net.modules():
        for name in ("__deepcopy__", "__reduce_ex__"):
            if isinstance(module.__dict__.get(name), (_DeepCopy, _Pickle)):
                del module.__dict__[name]
