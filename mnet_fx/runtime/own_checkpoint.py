"""torch's own `torch.utils.checkpoint.checkpoint`, also where another library has put a function of its own in that place before.

Some trainers do, to offload what a checkpoint keeps. Such a function may know nothing of a tape that is sought in the backward pass.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch.utils.checkpoint
from torch.utils.checkpoint import CheckpointError

__all__ = ["CheckpointError", "checkpoint"]


def _own(module: ModuleType) -> Any:
    """The function that the file of the module defines; out of a second module made from that file, if the name holds another one."""
    if module.checkpoint.__module__ == module.__name__:
        return module.checkpoint
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    again.CheckpointError = CheckpointError  # which users catch
    return again.checkpoint


checkpoint = _own(torch.utils.checkpoint)
