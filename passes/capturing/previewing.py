"""Model -> graphs, without inputs and without running anything: what a capture by Dynamo will probably find.

    model --copy that shares its tensors--> its calls and operations recorded on proxies --> preview
                                                |-- a module that fails there is one call; its children are read on their own

Nothing is run from these graphs, so they need not be sound: what a context, a hook or a branch on values would do is not asked. But
reading leaves no trace. The model itself is never called, and `torch.fx`'s way to record calls, which replaces `nn.Module.__call__` for
all threads, is not used: the modules of the copy record theirs, and a torch function mode, which is local to the thread, the operations.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.fx as fx
from torch import Tensor, nn

from passes.capturing.leftovers import Outside
from passes.capturing.recorder import Recorder, first_line, is_leaf
from passes.graphs.facts import joined

__all__ = ["Preview", "preview"]


@dataclass(frozen=True)
class Preview:
    """What was read of a model.

    Attributes:
        parts: path of each module that could be read as a whole -> its graph, whose targets are relative to that path; outermost first.
            A part inside another part is one call there.
        opaque: path of each module that could not be read although it has children of its own -> why, in one line.
    """

    parts: dict[str, fx.GraphModule] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)


def preview(model: nn.Module) -> Preview:
    """Read a model in its current mode; it never fails, and changes nothing.

    Args:
        model: any module.

    Returns:
        The graphs, over a copy of the modules that shares the model's parameters and buffers. A model that cannot be copied has none.
    """
    found = Preview()
    try:
        twin, outside = _copied(model), Outside(model)
    except Exception as error:
        found.opaque[""] = f"cannot be copied: {first_line(error)}"
        return found
    try:
        with _keeping_random(), torch.set_grad_enabled(torch.is_grad_enabled()):
            _read(twin, "", found, set())
    finally:
        outside.clean()
    return found


def _copied(model: nn.Module) -> nn.Module:
    tensors = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers(), tensors)})


def _read(module: nn.Module, path: str, found: Preview, seen: set[nn.Module]) -> None:
    """Add the graph of a module to what was found, and then those of the modules inside that it holds as calls."""
    if module in seen:  # a module that several parts share is read once
        return
    seen.add(module)
    tracer = Recorder(module)
    try:
        found.parts[path] = tracer.graph_module()
        failed = tracer.opaque
    except Exception as error:
        failed = {"": first_line(error)}
    for inner, reason in failed.items():
        found.opaque[joined(path, inner)] = reason
        for name, child in _forward_children(module.get_submodule(inner)):
            _read(child, joined(path, inner, name), found, seen)


def _forward_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children worth reading on their own; lists and dictionaries of modules have no forward, so their children stand for them."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", grandchild) for inner, grandchild in _forward_children(child))
        elif not is_leaf(child):
            yield name, child


@contextlib.contextmanager
def _keeping_random() -> Iterator[None]:
    """Puts back the state of Python's and NumPy's generators, from which a forward may draw, and of torch's, which it may seed: draws from
    that one are recorded, so a state that has only moved on is that of another thread."""
    numpy, seed, state = getattr(sys.modules.get("numpy"), "random", None), torch.initial_seed(), torch.get_rng_state()
    python, numpys = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numpys)
        if torch.initial_seed() != seed or torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state()):
            torch.set_rng_state(state)
