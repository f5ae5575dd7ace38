"""The usual way to save memory, to compare with: `torch.utils.checkpoint` around each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import passes

from ..arithmetic.valueless import Drawn, valueless
from ..captured.capturing import list_of
from ..captured.copies import copied

__all__ = ["Block", "block_paths", "checkpointed", "shared_by"]


class Block:
    """The forward of a module under a checkpoint.

    Args:
        forward: what it was.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        state = Drawn("cpu").get_state() if valueless() else None  # the checkpoint keeps one, which a count of fake tensors does not see
        return checkpoint(partial(self.run, state), *args, use_reentrant=False, **kwargs)

    def run(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own code, the first time and again."""
        return self.forward(*args, **kwargs)


def checkpointed(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A copy of a model, sharing its tensors, with a checkpoint around each of some modules.

    Args:
        model: the original, or a rewritten model, whose original is meant.
        paths: of the modules, as from `block_paths`.
    """
    net = copied(model)
    for path in paths:
        module = net.get_submodule(path)
        module.__dict__["forward"] = Block(module.forward)
    return net


def block_paths(model: nn.Module, owners: Iterable[str]) -> tuple[str, ...]:
    """The blocks that people put checkpoints around: elements of the lists of like layers that the steps of chains lie in.

    Args:
        model: the model.
        owners: paths of the modules that own steps.

    Returns:
        Paths: for each owner that lies in a ModuleList or Sequential of several modules of one class, all of these (also such as change
        the shape and are in no chain); for any other, its own, where it is not the root; and all other modules of these classes, as in the
        half of a U-Net that goes up. None lies in another.
    """
    found: dict[str, None] = {}
    for owner in owners:
        listed = list_of(model, owner) if owner else None
        elements = (
            [owner] if listed is None else [f"{listed}.{name}".lstrip(".") for name, _ in model.get_submodule(listed).named_children()]
        )
        found |= dict.fromkeys(path for path in elements if path)
    own = {type(model.get_submodule(path)) for path in found}
    alike = [path for path, module in model.named_modules() if type(module) in own and not type(module).__module__.startswith("torch.nn.")]
    around = [path for path in alike if any(other.startswith(f"{path}.") for other in found)]  # as a U-Net that holds smaller ones
    paths = [*found, *(path for path in alike if path and path not in around)]
    return tuple(path for path in dict.fromkeys(paths) if not any(path.startswith(f"{outer}.") for outer in paths))


def shared_by(names: Sequence[str]) -> str:
    """Path of the innermost module that parameters lie in; "" for the root, and where there are none."""
    return passes.common_path(name.rpartition(".")[0] for name in names)
