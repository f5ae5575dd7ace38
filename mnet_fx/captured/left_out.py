"""The residual adds of modules that Dynamo left to Python in a call, as where they are disabled: no graph has them, but the report does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from passes import Refusal, joined

from ..errors import MnetError
from ..reporting.build import REPORT
from ..reporting.report import AddReport, Report
from ..settings import Settings
from .calls import Call
from .merging import with_paths
from .previewed import previewed

__all__ = ["left_out"]


def left_out(owner: nn.Module, call: Call, settings: Settings) -> tuple[Report | None, str | None]:
    """The residual adds that a preview finds in the modules whose own code Python ran in a call.

    Args:
        owner: the model.
        call: a call of it that went through.
        settings: the recurrence.

    Returns:
        Their report, None where there are none; and the warning that chains among them deserve.
    """
    left = {path for path in call.entered - call.places if not _is_rewritten(owner, path)}
    outermost = [path for path in sorted(left) if not any(path.startswith(f"{other}.") for other in left)]
    adds = [add for path in outermost if _may_add(owner.get_submodule(path)) for add in _adds(owner, path, settings) if add.path in left]
    if not adds:
        return None, None
    lost = sorted({add.path for add in adds if add.rewritten})
    where = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    text = (
        f"{type(owner).__name__}: the residual blocks of {where} stay as they are, since Dynamo left their code to Python (left_to_python "
        "in net.report; TORCH_LOGS=graph_breaks may say why): name the list of layers with regions=[...], which needs no capture, or take "
        "that out of them"
    )
    return _report(adds), text if lost else None


def _is_rewritten(owner: nn.Module, path: str) -> bool:
    """Whether a module is, or lies in, a network of `momentumize` within the model, which has a report of its own."""
    names = path.split(".")
    return any(REPORT in owner.get_submodule(".".join(names[:i])).__dict__ for i in range(1, len(names) + 1))


def _may_add(module: nn.Module) -> bool:
    """Whether it is worth a look: a single layer of torch's adds nothing to its input."""
    return next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn")


def _adds(owner: nn.Module, path: str, settings: Settings) -> tuple[AddReport, ...]:
    try:
        seen = previewed(owner.get_submodule(path), settings).report
    except MnetError:  # it cannot be copied, as under fully_shard
        return ()
    return with_paths(seen, partial(joined, path)).adds


def _report(adds: Sequence[AddReport]) -> Report:
    why = [f"Python ran the code of {add.path}, which Dynamo left to it" for add in adds]
    refusals = tuple(Refusal.of("left_to_python", add.node, add.path, text) for add, text in zip(adds, why, strict=True))
    rows = tuple(AddReport.left(r) for r in refusals)
    return Report(len(rows), 0, (), refusals, (), 0, rows)
