"""Model and example inputs -> graph, by `torch.export`, for what symbolic tracing cannot read.

    forward(ids, mask=None, *, scale=1.0)        called as forward(ids, scale=2.0)
      | torch.export, non-strict, every size that may vary left free
    graph(flat_0, flat_1)                        leaves of (args, kwargs); scale=2.0 is fixed, and checked at each call
      | parameters and buffers read from the model by path, constants of the trace kept in `constants`

What export itself would lose is looked for. A module that calls a custom autograd function, whose backward would be gone, or that export
cannot read, is blamed, so that it can stay Python inside the graph (see `live`). Python's and NumPy's random numbers, and attributes that
forward sets, make a refusal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules import transformer

from passes.exported_graph import WRAPPED, attribute, rebuilt
from passes.facts import Facts, owner_path
from passes.live import LIVE, live_results
from passes.live_calls import LiveCalls, LiveError
from passes.standins import Outside
from passes.tracer import Blame
from passes.watch import Attributes, keeping_python_rng, python_rng_state, watching_functions

__all__ = ["ExportError", "Interface", "SetsAttribute", "export"]


class ExportError(Exception):
    """A module cannot be exported, or the graph would lose something; the message says what."""


class SetsAttribute(ExportError):
    """Forward sets an attribute of a module; if only at the first call, another try after one may work."""


@dataclass(frozen=True)
class Interface:
    """How a call of the module maps to the flat inputs and outputs of its graph.

    Attributes:
        in_spec: structure of `(args, kwargs)` that the graph takes.
        leaves: for each leaf what it must be: dtype, device and sizes of a tensor, or the one value of anything else.
        conditions: Python conditions on the leaves `L['flat'][i]` that the graph takes for granted.
        out_spec: structure of what forward returns.
    """

    in_spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    conditions: tuple[str, ...]
    out_spec: pytree.TreeSpec

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs of the graph for a call.

        Raises:
            ExportError: the graph does not stand for a call like this one.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise ExportError(f"the arguments have the structure {_short(spec)}, the example inputs had {_short(self.in_spec)}")
        for i, (leaf, expected) in enumerate(zip(leaves, self.leaves, strict=True)):
            if (found := _unlike(leaf, expected)) is not None:
                raise ExportError(f"{self._name(i)} {found}")
        for condition in self.conditions:
            if not _holds(condition, leaves):
                raise ExportError(f"the sizes of the inputs must satisfy {condition}, which held for the example inputs")
        return leaves

    def _name(self, i: int) -> str:
        args, kwargs = pytree.tree_unflatten(list(range(len(self.leaves))), self.in_spec)
        paths = [*pytree.tree_leaves_with_path(list(args)), *pytree.tree_leaves_with_path(kwargs)]
        return next(f"argument {pytree.keystr(path)}" for path, leaf in paths if leaf == i)


@dataclass(frozen=True)
class _Free:
    """A tensor leaf as the graph expects it."""

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int | None, ...]


def _unlike(leaf: Any, expected: Any) -> str | None:
    if not isinstance(expected, _Free):
        same = leaf is expected or (type(leaf) is type(expected) and not isinstance(leaf, Tensor) and bool(leaf == expected))
        return None if same else f"is {_brief(leaf)}, the example inputs had {expected!r}"
    if not isinstance(leaf, Tensor):
        return f"is {_brief(leaf)}, the example inputs had a tensor"
    found = (leaf.dtype, leaf.device, leaf.dim())
    if found != (wanted := (expected.dtype, expected.device, len(expected.sizes))):
        return "has dtype {}, device {} and {} dimensions, the example inputs had {}, {} and {}".format(*found, *wanted)
    fixed = [(i, size) for i, size in enumerate(expected.sizes) if size is not None and leaf.shape[i] != size]
    return None if not fixed else "has size {} in dimension {}, which must be {}".format(leaf.shape[fixed[0][0]], *fixed[0])


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def _short(spec: pytree.TreeSpec) -> str:
    return repr(pytree.tree_unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")


def _holds(condition: str, leaves: list[Any]) -> bool:
    scope = {"L": {"flat": leaves}, "math": math, "torch": torch}
    try:
        return bool(eval(condition, scope))  # written by torch.export
    except ArithmeticError:
        return False


class _Flat(nn.Module):
    """The module as a function of the leaves of its arguments; keeps the structure of its result."""

    def __init__(self, module: nn.Module, in_spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.add_module(WRAPPED, module)
        self.training = module.training
        self.specs = SimpleNamespace(input=in_spec, output=None, changed=[])  # opaque to export, which puts attributes back as they were

    def forward(self, *flat: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(flat), self.specs.input)
        attributes = Attributes(self)  # compared here, since export puts most of them back by itself, and says nothing
        result = self._modules[WRAPPED].forward(*args, **kwargs)  # type: ignore[union-attr]  # its own hooks will fire around its graph
        leaves, self.specs.output = pytree.tree_flatten(result)
        changed = attributes.restore()
        self.specs.changed = [(path, name) for path, name in changed if not _is_torch(self.get_submodule(path))]
        return tuple(leaves)


def export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], holder: str, live: LiveCalls | None = None
) -> tuple[fx.GraphModule, Interface, dict[str, Any]]:
    """Export a module in its current mode; the module is not changed.

    Args:
        module: any module; its parameters keep their names in the graph.
        args, kwargs: a call of it. Sizes of tensors may vary later where the model allows it; everything else is fixed.
        holder: attribute name under which the graph will look for its constants.
        live: watches the modules inside, and is left with those to blame.

    Returns:
        The graph, with flat placeholders and a flat tuple as its output, that reads attributes by their path in the module; how calls map
        to it; and by name what it reads as `<holder>.<name>`, since the module does not have it.

    Raises:
        ExportError: torch.export fails, or the graph would lose something.
    """
    leaves, in_spec = pytree.tree_flatten((args, kwargs))
    flat, live = _Flat(module, in_spec), live or LiveCalls(module, {}, None)
    free = tuple(map(_free_sizes, leaves))
    with _watched(module, flat, live):
        try:
            program = torch.export.export(flat, tuple(leaves), dynamic_shapes={"flat": free}, strict=False)
            gm = program.module(check_guards=False)
        except LiveError as error:
            raise ExportError(f"the module {error}") from error
        except Exception as error:
            raise ExportError(f"torch.export failed with {type(error).__name__}: {_first_line(error)}") from error
    _require_pure_subgraphs(gm)
    _require_no_transforms(gm, live)
    placeholders = gm.graph.find_nodes(op="placeholder")
    expected = tuple(_expected(leaf, node.meta["val"]) for leaf, node in zip(leaves, placeholders, strict=True))
    conditions = (*program._guards_code, *_relations(placeholders, program.range_constraints))
    _require_all_live(gm, module, live)
    graph_module, constants = rebuilt(gm, module, holder, live.made)
    _require_unwritten(graph_module)
    interface = Interface(in_spec, expected, conditions, flat.specs.output)
    return graph_module, interface, constants


def _free_sizes(leaf: Any) -> dict[int, Any] | None:
    """All sizes of token and sequence inputs; of images and videos the batch alone, since windows and strides make height and width
    costly to reason about (minutes for one DaViT), and a call with others is captured again."""
    if not isinstance(leaf, Tensor):
        return None
    return dict.fromkeys(range(leaf.dim() if leaf.dim() < 4 else 1), torch.export.Dim.AUTO)


def _is_torch(module: nn.Module) -> bool:
    """torch.nn's own modules, whose attributes are caches (as the `_flat_weights` of an LSTM)."""
    return type(module).__module__.startswith("torch.nn.modules.")


@contextlib.contextmanager
def _watched(module: nn.Module, flat: _Flat, live: LiveCalls) -> Iterator[None]:
    """Quiet, with gradients on; raises if something happened that the graph cannot hold."""
    attributes, outside = Attributes(module), Outside(module)
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # a failed export prints its graph there
        stack.enter_context(torch.enable_grad())
        stack.enter_context(keeping_python_rng())
        stack.enter_context(watching_functions(live.blame))
        stack.enter_context(live.watching())
        stack.enter_context(mock.patch.object(transformer, "_detect_is_causal_mask", _causal_as_told))
        before = python_rng_state()
        try:
            yield
        finally:
            drew = python_rng_state() != before
            attributes.restore()
            outside.clean()
    _require_no_blames(live)
    if drew:
        raise ExportError("the module draws from Python's random module or NumPy's, whose result a graph would bake in")
    for path, name in flat.specs.changed:
        where = " ".join(filter(None, ("the module", path.removeprefix(WRAPPED).removeprefix("."))))
        raise SetsAttribute(f"{where} sets its attribute {name}, which a graph would not do again")


def _causal_as_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Instead of torch.nn's look at the values of a mask, which no graph can hold: a mask that is not called causal is applied as it is."""
    return is_causal is True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _expected(leaf: Any, recorded: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return _Free(leaf.dtype, leaf.device, tuple(size if isinstance(size, int) else None for size in recorded.shape))


def _relations(placeholders: list[fx.Node], ranges: dict[Any, Any]) -> Iterator[str]:
    """Conditions on the sizes of the inputs that their symbols stand for: equal ones, and ranges."""
    first: dict[Any, str] = {}
    for i, node in enumerate(placeholders):
        for d, size in enumerate(getattr(node.meta["val"], "shape", ())):
            if isinstance(size, int):
                continue
            expression, text = size.node.expr, f"L['flat'][{i}].size()[{d}]"
            if expression in first:
                yield f"{text} == {first[expression]}"
                continue
            first[expression] = text
            if (known := ranges.get(expression)) is not None:
                if int(known.lower) > 2:  # 0 and 1 are excluded by convention, not by the model
                    yield f"{text} >= {int(known.lower)}"
                if not math.isinf(float(known.upper)) and int(known.upper) < 2**31:
                    yield f"{text} <= {int(known.upper)}"


def _require_all_live(gm: fx.GraphModule, module: nn.Module, live: LiveCalls) -> None:
    """Every call of a live module is in the graph, and nothing else reads what it may write to."""
    found = gm.graph.find_nodes(op="call_function", target=LIVE)
    if len(found) != len(live.made):
        paths = sorted({call.path for i, call in enumerate(live.made) if i not in {node.args[0] for node in found}})
        raise ExportError(f"a call of {paths[0]}, which stays Python, is under another grad or autocast mode, or serves nothing")
    buffers = {id(buffer) for call in live.made for buffer in module.get_submodule(call.path).buffers()}
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.users and id(attribute(gm, str(node.target))) in buffers:
            raise ExportError(f"the buffer {node.target} is read both in the graph and by a module that stays Python")


def _require_unwritten(gm: fx.GraphModule) -> None:
    """A result of which only a run is known may on other values be memory that the module was given: no write may show that."""
    facts = Facts.of(gm)
    for node in gm.graph.find_nodes(op="call_function", target=live_results):
        call, _, sizes, _ = node.args
        if sizes is None:
            continue
        given = {facts.base[source] for source in call.all_input_nodes}
        readers = [other for other in facts.nodes if any(facts.base[source] is node for source in other.all_input_nodes)]
        for write, memories in facts.writes.items():
            read_later = any(facts.index[reader] > facts.index[write] for reader in readers)
            to_given = facts.index[write] > facts.index[node] and not given.isdisjoint(memories) and read_later
            if node in memories or to_given:
                raise ExportError(f"{call.target} stays Python, and may return memory that it is given, to which {write.target} writes")


def _require_no_blames(live: LiveCalls) -> None:
    for path, blame in live.blames.items():
        raise ExportError(f"the module {path} {blame.reason}".replace("  ", " "))


def _require_no_transforms(gm: fx.GraphModule, live: LiveCalls) -> None:
    """What begins and ends a vmap are operations of their own, tied to those between by nothing that a graph shows."""
    found = [node for node in gm.graph.nodes if str(getattr(node.target, "__module__", "")).startswith("torch._functorch")]
    blame = Blame("lost_context", "runs a transform of torch.func, which a graph would take apart")
    live.blames |= {owner_path(node).removeprefix(WRAPPED).removeprefix("."): blame for node in found}
    _require_no_blames(live)


def _require_pure_subgraphs(gm: fx.GraphModule) -> None:
    """A no_grad or autocast block is one node of the graph, which the passes take to write to nothing that it is given."""
    for path, inner in gm.named_modules():
        if not path or not isinstance(inner, fx.GraphModule):
            continue
        for node, memories in Facts.of(inner).writes.items():
            if any(memory.op in ("placeholder", "get_attr") for memory in memories):
                raise ExportError(f"a no_grad or autocast block writes in place to a tensor from outside ({node.target})")
