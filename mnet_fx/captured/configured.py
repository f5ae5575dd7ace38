"""Dynamo's settings while it captures and runs a model of ours."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.variables.misc import DebuggingVariable

from ..errors import warn_once

__all__ = ["CONFIG", "begin_anew_unsized", "configured", "stance", "switched_off", "warn_of_old_dynamo"]

_MANY = 10**6
CONFIG: dict[str, Any] = {
    "recompile_limit": 256,  # kinds of calls of one model
    "accumulated_recompile_limit": _MANY,  # of code that several models share
    "fail_on_recompile_limit_hit": True,  # beyond it, the original network would run
    "suppress_errors": False,  # likewise
    "skip_nnmodule_hook_guards": False,  # a hook that comes later has its effect
    "allow_rnn": True,
    "allow_empty_graphs": True,  # a call that computes nothing is captured, so that it is known from one that was left to Python
    "optimize_ddp": False,  # would cut the model, and so its chains, at DDP's buckets
    "replay_side_effects": True,  # torch.export sets it otherwise around its own capture
    "side_effect_replay_policy": "silent",  # likewise
    "capture_dynamic_output_shape_ops": True,  # as in a block that picks rows by a mask
    "use_numpy_random_stream": True,  # else what draws from numpy would draw other numbers from torch
}
CONFIG = {name: value for name, value in CONFIG.items() if hasattr(torch._dynamo.config, name)}  # some came with later versions
_SIZED = "capture_dynamic_output_shape_ops"
_UNSIZED = CONFIG | {_SIZED: False}
_LOGGING = "reorderable_logging_functions"  # run after the graph that they are in, and do not cut it, if given text, numbers and tensors
_LEVELS = {"debug", "info", "warning", "warn", "error", "critical", "fatal", "log"}


class configured:
    """Dynamo's settings for the time of a call, as `torch._dynamo.config.patch` does, which makes a class at each.

    Args:
        sized: whether sizes that depend on values go into graphs.
    """

    def __init__(self, sized: bool = True) -> None:
        self.settings = CONFIG if sized else _UNSIZED

    def __enter__(self) -> None:
        _CALLS.depth = getattr(_CALLS, "depth", 0) + 1
        config = torch._dynamo.config
        self.before = {name: known for name, value in self.settings.items() if (known := getattr(config, name)) != value or name == _SIZED}
        for name in self.before:
            setattr(config, name, self.settings[name])
        known, loggers = getattr(config, _LOGGING), _loggers(tuple(vars(logging.Logger).items()))
        if not loggers <= known:
            self.before[_LOGGING] = known
            setattr(config, _LOGGING, known | loggers)

    def __exit__(self, *error: object) -> None:
        _CALLS.depth -= 1
        for name, value in self.before.items():
            setattr(torch._dynamo.config, name, value)


def begin_anew_unsized() -> None:
    """To be called by a backend: has Dynamo capture the same code again, in which sizes that depend on values end graphs, as they do from
    then on in this call. Once: numbers that the user has Dynamo keep in graphs (`capture_scalar_outputs`) stay there.
    """
    if not getattr(torch._dynamo.config, _SIZED):
        return
    setattr(torch._dynamo.config, _SIZED, False)
    raise TensorifyScalarRestartAnalysis(restart_reason="sizes that depend on values, in no chain")  # of those, backends may raise this


def warn_of_old_dynamo() -> None:
    """Warns where Dynamo does not notice all that a forward reads (before torch 2.12); it does not in torch.compile either."""
    if torch.__version__ < "2.12":
        warn_once(
            f"torch {torch.__version__}: Dynamo, by which models are captured, notices from torch 2.12 on that an attribute of a class or "
            "of a parameter, or whether one requires a gradient, is another than in the call before. Here a forward that decides by "
            "such keeps to what it found first, as under torch.compile; and settings of threads that capture at once mix. Update torch, "
            "or name the layers: regions=[...] captures nothing"
        )


@lru_cache(maxsize=1)
def _loggers(members: tuple[tuple[str, Any], ...]) -> set[Any]:
    """The methods by which loggers log, of all that loggers have; libraries add some, such as `warning_once` of transformers."""
    return {method for name, method in members if callable(method) and name.split("_")[0] in _LEVELS}


_CALLS = threading.local()  # depth: how many calls of models of ours this thread is in
_call_function = DebuggingVariable.call_function


def _call_and_keep(self: DebuggingVariable, tx: Any, args: Any, kwargs: Any) -> Any:
    """Dynamo runs what the traced function logs after its graph, and forgets what the functions log that it calls (torch 2.14): they say
    it to the first function's.
    """
    logged = len(tx.debug_locals)
    result = _call_function(self, tx, args, kwargs)
    if getattr(_CALLS, "depth", 0) and tx is not (root := tx.output.root_tx):
        root.debug_locals += tx.debug_locals[logged:]
        del tx.debug_locals[logged:]
    return result


DebuggingVariable.call_function = _call_and_keep  # type: ignore[method-assign]


def switched_off() -> str | None:
    """Why Dynamo does nothing at all; None if it does."""
    if torch._dynamo.config.disable:
        return "Dynamo is switched off (TORCHDYNAMO_DISABLE)"
    return stance() if torch._dynamo.eval_frame._stance.stance in ("force_eager", "eager_then_compile") else None


def stance() -> str | None:
    stance = torch._dynamo.eval_frame._stance.stance
    return None if stance == "default" else f"Dynamo was told not to capture (torch.compiler.set_stance({stance!r}))"
