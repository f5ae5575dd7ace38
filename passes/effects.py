"""What the nodes of a captured graph do to memory, observed in a run on fake tensors of the kinds that the capture recorded.

    y = x.view(3, 4)     lies in the storage of x          whatever made it: two values with one storage share memory
    y.mul_(2)            overwrites that storage           as the schemas of the aten operations say that the node makes
    z = torch.exp(y)     autograd saves the storage of z   as `saved_tensors_hooks` see it

Nothing is computed, and the capture's own fake tensors are not touched. What a node did is noted in its meta data, as numbers of storages,
so that copies of the graph know it too. A node that cannot be run so is taken to return and to overwrite all memory that it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.memory import is_hook

__all__ = ["Effect", "forget_effect", "noted", "observed"]

_NOTE = "mnet_fx_effect"
_NUMBERS = count()  # of all storages of all graphs, so that notes of two runs never seem to be about one storage
_RUNS_GRAPHS = frozenset(
    {"autograd_function_apply", "tag_activation_checkpoint", "wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "checkpoint"}
)


@dataclass(frozen=True)
class Effect:
    """What one node does to memory. Storages are numbers.

    Attributes:
        memory: the storages that its value lies in.
        written: of the storages that it was given, those that it overwrites.
        saved: the storages that autograd keeps for its gradient, each with its bytes; None where these depend on values.
        known: False where it could not be run.
    """

    memory: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    saved: tuple[tuple[int, int | None], ...] = ()
    known: bool = True


def observed(gm: fx.GraphModule) -> dict[fx.Node, Effect]:
    """The effect of each node of a graph that records fake tensors; of one that does not, nothing is known."""
    nodes = list(gm.graph.nodes)
    if not all(_NOTE in node.meta for node in nodes):
        mode = _mode_of(nodes)
        if mode is None:
            return {}
        try:
            effects = _Run(gm, mode).effects()
        except Exception:  # inputs without a storage, such as sparse ones
            return {}
        for node, effect in effects.items():
            node.meta[_NOTE] = effect
    return {node: node.meta[_NOTE] for node in nodes}


def noted(node: fx.Node) -> Effect | None:
    """The effect of a node if its graph, or the one it was copied from, has been observed."""
    return node.meta.get(_NOTE)


def forget_effect(node: fx.Node) -> None:
    """To be called by whoever changed a node, so that its graph is observed again."""
    node.meta.pop(_NOTE, None)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _mode_of(nodes: list[fx.Node]) -> FakeTensorMode | None:
    """The mode of the recorded fake tensors, where all inputs of a graph have recorded values."""
    inputs = [node for node in nodes if node.op == "placeholder"]
    if any("example_value" not in node.meta and "val" not in node.meta for node in inputs):
        return None
    values = (value for node in nodes for value in tree_leaves(_value(node)))
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


class _Watch(TorchDispatchMode):
    """Notes which storages the operations of one node overwrite, and which exchange theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Tensor] = []
        self.exchanged = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if places := _written_places(func):
            given = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
            self.written += [value for value in tree_leaves(given) if isinstance(value, Tensor)]
            self.exchanged |= "set_" in func._schema.name
        return func(*args, **kwargs)


@cache
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operation overwrites."""
    arguments = func._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


class _Run:
    """One run of a graph on fresh fake tensors."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        self.gm, self.mode, self.watch = gm, mode, _Watch()
        self.values: dict[fx.Node, Any] = {}
        self.numbers: dict[int, int] = {}  # by the address of a storage
        self.alive: list[Any] = []  # all storages, as an address is only its own while it lives
        self.inputs: dict[int, int] = {}  # numbers by the storages of the recorded inputs
        self.saved: dict[int, int | None] = {}
        self.equal: dict[int, int] = {}  # numbers of storages that were exchanged

    def effects(self) -> dict[fx.Node, Effect]:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # back to what it is, whatever the graph sets
            if (shapes := self.mode.shape_env) is not None:
                stack.enter_context(shapes.suppress_guards())
                stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
            stack.enter_context(self.mode)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t))
            if any(_has_symbols(_value(node)) for node in self.gm.graph.nodes):
                stack.enter_context(enable_python_dispatcher())
            found = {node: self._effect(node) for node in self.gm.graph.nodes}
        return {node: self._joined(effect) for node, effect in found.items()} if self.equal else found

    def _effect(self, node: fx.Node) -> Effect:
        if node.op == "output":
            return Effect()
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = self._input(node)
            return Effect(tuple(self._memory(self.values[node])))
        if is_hook(node):
            self.values[node] = self.values[node.all_input_nodes[0]]
            memory = tuple(self._memory(self.values[node]))
            return Effect(memory, memory)
        if _is_number(node):
            self.values[node] = _value(node)  # also where it was read from the values of a tensor
            return Effect()
        self.watch, self.saved = _Watch(), {}
        given = self._given(node)
        try:
            with self.watch:
                self.values[node] = self._call(node)
            return self._seen(node, given)
        except Exception:
            self.values[node] = tree_map_only(Tensor, self._fresh, _value(node))
            memory = tuple(dict.fromkeys([*given, *self._memory(self.values[node])]))
            return Effect(memory, tuple(given), tuple(self.saved.items()), known=False)

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() not in _RUNS_GRAPHS:
            raise NotImplementedError  # it may run any code
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return (self.gm.get_submodule(target) if node.op == "call_module" else target)(*args, **kwargs)

    def _given(self, node: fx.Node) -> list[int]:
        """The storages that a node is given, without those of the graphs it may be given."""
        return list(dict.fromkeys(number for source in node.all_input_nodes for number in self._memory(self.values[source])))

    def _seen(self, node: fx.Node, given: list[int]) -> Effect:
        written = {number for value in self.watch.written for number in self._memory(value)}
        if self.watch.exchanged:
            after = set(self._given(node)) | written
            self.equal |= dict.fromkeys(after | set(given), min(after | set(given)))
        return Effect(
            tuple(dict.fromkeys(self._memory(self.values[node]))),
            tuple(number for number in given if number in written),
            tuple(self.saved.items()),
        )

    def _joined(self, effect: Effect) -> Effect:
        """The effect with one number for storages that were exchanged."""

        def joined(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(self._root(number) for number in numbers))

        saved = {self._root(number): size for number, size in effect.saved}
        return Effect(joined(effect.memory), joined(effect.written), tuple(saved.items()), effect.known)

    def _root(self, number: int) -> int:
        while self.equal.get(number, number) != number:
            number = self.equal[number]
        return number

    def _memory(self, value: Any) -> Iterator[int]:
        """Numbers of the storages of the tensors in a value."""
        for tensor in (value,) if isinstance(value, Tensor) else tree_leaves(value):
            if isinstance(tensor, Tensor):
                yield self._number(tensor.untyped_storage())

    def _number(self, storage: Any) -> int:
        if storage._cdata not in self.numbers:
            self.numbers[storage._cdata] = next(_NUMBERS)
            self.alive.append(storage)
        return self.numbers[storage._cdata]

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.saved[self._number(storage)] = size if isinstance(size, int) else _hint(size)
        return tensor

    def _input(self, node: fx.Node) -> Any:
        """A fresh value like a recorded one; values that shared memory share the number of their storage."""
        value = _value(node)
        if value is None and node.op == "get_attr":
            value = _attribute(self.gm, str(node.target))
        return self._like(value) if isinstance(value, Tensor) else tree_map_only(Tensor, self._like, value)

    def _like(self, recorded: Tensor) -> Tensor:
        made, storage = self._fresh(recorded), recorded.untyped_storage()
        self.alive += (storage, made.untyped_storage())
        self.numbers[made.untyped_storage()._cdata] = self.inputs.setdefault(storage._cdata, next(_NUMBERS))
        return made

    def _fresh(self, recorded: Tensor) -> Tensor:
        made = torch.empty_strided(recorded.size(), recorded.stride(), dtype=recorded.dtype, device=recorded.device)
        if not recorded.requires_grad:
            return made
        return made.requires_grad_() if recorded.is_leaf else made.requires_grad_().clone()


def _is_number(node: fx.Node) -> bool:
    """Whether a node gives a number, by a function of torch's or Python's, which writes to nothing then."""
    numbers = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(_value(node), numbers) and not isinstance(node.target, torch._ops.OperatorBase) and node.op != "call_module"


def _hint(size: torch.SymInt) -> int | None:
    return int(size.node.hint) if size.node.has_hint() else None  # type: ignore[arg-type]


def _has_symbols(value: Any) -> bool:
    return isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and value._has_symbolic_sizes_strides)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    owner: nn.Module = gm.get_submodule(parent)
    return getattr(owner, name)
