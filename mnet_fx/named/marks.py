"""regions="auto": the lists of layers that a model's own library marks as such, found by structure, without running or tracing anything.

    transformers   lists of GradientCheckpointingLayer         model.layers, encoder.layer, transformer.h, ...
    torch.nn       the layers of a TransformerEncoder, TransformerDecoder
    timm           `blocks` and `stages` of a model with set_grad_checkpointing
    other          only where there is none of these: a ModuleList of one class of modules with children, all of the same parameters

Layers of transformers' lists may be of several classes (attention and state-space layers in turn), those of the others are of one.
Whether one layer takes what the one before it gave is only seen in a call: a region found here is an error where it does not (`layers`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

__all__ = ["left_containers", "marked_containers"]

_LISTS = (nn.ModuleList, nn.Sequential)
_UNFIT = (*_LISTS, nn.ModuleDict, OptimizedModule, torch.jit.ScriptModule)


def marked_containers(net: nn.Module, least: int = 2) -> list[str]:
    """Paths of the containers of a model that are lists of layers, outermost ones, in the order of the model's modules.

    Args:
        net: the model.
        least: how many layers a list has at least.

    Parameters of one name have one shape in all layers of a list. Lists with another first block (the stages of a ResNet) are none. Where
    the library marks some lists, others are none, be it that all that are marked change the width.
    """
    lists = _lists(net, least)
    if marked := {path: module for path, module in lists.items() if _is_marked(net, path, module)}:
        return _outermost([path for path, module in marked.items() if _one_width(module)])
    return _outermost([path for path, module in lists.items() if isinstance(module, nn.ModuleList) and _is_plain(module)])


def left_containers(net: nn.Module, found: list[str], least: int = 2) -> dict[str, str]:
    """Why other lists that look like layers of a chain are not among those that were found, by their paths.

    Args:
        net: the model.
        found: paths of the lists that were.
        least: as above.
    """
    reasons = {}
    for path, module in _lists(net, least).items():
        if any(f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.") for other in found):
            continue
        if not _one_width(module) and _is_marked(net, path, module):
            reasons[path] = "its layers have parameters of one name and of several shapes"
        elif isinstance(module, nn.ModuleList) and _is_plain(module):
            reasons[path] = "the model's library marks other lists as layers, and not this one"
    return {path: reasons[path] for path in _outermost(list(reasons))}


def _outermost(paths: list[str]) -> list[str]:
    return [path for path in paths if not any(path.startswith(f"{other}.") or (not other and path) for other in paths)]


def _lists(net: nn.Module, least: int) -> dict[str, nn.Module]:
    return {path: module for path, module in net.named_modules() if isinstance(module, _LISTS) and _is_list_of_modules(module, least)}


def _is_list_of_modules(container: nn.Module, least: int) -> bool:
    layers = list(container._modules.values())
    unfit = any(layer is None or isinstance(layer, _UNFIT) or "forward" in vars(layer) for layer in layers)
    return len(layers) >= max(1, least) and not unfit


def _is_marked(net: nn.Module, path: str, container: nn.Module) -> bool:
    return _by_transformers(container) or (_one_class(container) and (_by_torch(net, path) or _by_timm(net, path, container)))


def _one_class(container: nn.Module) -> bool:
    return len({type(layer) for layer in container.children()}) == 1


def _one_width(container: nn.Module) -> bool:
    known: dict[str, torch.Size] = {}
    return all(known.setdefault(name, p.shape) == p.shape for layer in container.children() for name, p in layer.named_parameters())


def _same_parameters(container: nn.Module) -> bool:
    return len({tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in container.children()}) == 1


def _all_layers(container: nn.Module, test: Callable[[nn.Module], bool]) -> bool:
    return all(test(layer) for layer in container.children())


def _by_transformers(container: nn.Module) -> bool:
    """Also of a class that a remote model copied: by name, so that transformers is not imported."""
    return _all_layers(container, lambda layer: any(base.__name__ == "GradientCheckpointingLayer" for base in type(layer).__mro__))


def _by_torch(net: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name == "layers" and isinstance(net.get_submodule(parent), (nn.TransformerEncoder, nn.TransformerDecoder))


def _by_timm(net: nn.Module, path: str, container: nn.Module) -> bool:
    *parents, name = path.split(".")
    if name not in ("blocks", "stages") or not _same_parameters(container):
        return False
    above = (net.get_submodule(".".join(parents[:i])) for i in range(len(parents) + 1))
    return any(callable(getattr(module, "set_grad_checkpointing", None)) for module in above)


def _is_plain(container: nn.Module) -> bool:
    return (
        _one_class(container)
        and _same_parameters(container)
        and _all_layers(container, lambda layer: any(True for _ in layer.children()) and not type(layer).__module__.startswith("torch.nn."))
    )
