"""What the nodes of a captured graph do to memory, observed in a run on fake tensors of the kinds that the capture recorded.

    y = x.view(3, 4)     lies in the storage of x          whatever made it: two values with one storage share memory
    y.mul_(2)            overwrites that storage           as the schemas of the aten operations say that the node makes
    z = torch.exp(y)     autograd saves the storage of z   as `saved_tensors_hooks` see it

Nothing is computed, an operation that repeats an earlier one is not run (`doubles`), and the capture's own fake tensors are not touched.
What a node did is noted in its meta data, as numbers of storages, so that copies of the graph know it too. A node that cannot be run so is
taken to return and to overwrite all memory that it was given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.graphs.doubles import NUMBERS, Double, Doubles, UnlikeError, form_of, fresh, made_of, repeats
from passes.graphs.work import hint, work_of_operation
from passes.graphs.writes import is_hook

__all__ = ["Effect", "forget_effect", "is_measured", "noted", "observed", "work_of"]

_NOTE = "mnet_fx_effect"
_RUNS_GRAPHS = frozenset(
    {"autograd_function_apply", "tag_activation_checkpoint", "wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled", "checkpoint"}
)

_PLAIN = (Double, bool, int, float, str, torch.dtype, torch.device, type(None))  # in what a node gives: the same for whoever repeats it


@dataclass(frozen=True)
class Effect:
    """What one node does to memory. Storages are numbers.

    Attributes:
        memory: the storages that its value lies in.
        written: of the storages that it was given, those that it overwrites.
        saved: the storages that autograd keeps for its gradient, each with its bytes; None where these depend on values.
        known: False where it could not be run.
        work: what it takes, see `work`.
    """

    memory: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    saved: tuple[tuple[int, int | None], ...] = ()
    known: bool = True
    work: int = 0


def observed(gm: fx.GraphModule) -> dict[fx.Node, Effect]:
    """The effect of each node of a graph that records fake tensors; of one that does not, nothing is known."""
    nodes = list(gm.graph.nodes)
    if not all(_NOTE in node.meta for node in nodes):
        mode = _mode_of(nodes)
        if mode is None:
            return {}
        try:
            effects = _effects(gm, mode)
        except Exception:  # inputs without a storage, such as sparse ones
            return {}
        for node, effect in effects.items():
            node.meta[_NOTE] = effect
    return {node: node.meta[_NOTE] for node in nodes}


def noted(node: fx.Node) -> Effect | None:
    """The effect of a node if its graph, or the one it was copied from, has been observed."""
    return node.meta.get(_NOTE)


def is_measured(nodes: Iterable[fx.Node]) -> bool:
    """Whether it is known how many bytes autograd keeps for some nodes."""
    effects = [noted(node) for node in nodes]
    return all(effect is not None and effect.known and all(size is not None for _, size in effect.saved) for effect in effects)


def work_of(node: fx.Node) -> int:
    """What a node takes, as in `work`; 0 where it has not been observed."""
    effect = noted(node)
    return 0 if effect is None else effect.work


@contextmanager
def _no_transform_left() -> Iterator[None]:
    """A graph may begin transforms of torch.func, as vmap does, and be given up before it ends them: they would go on for everybody."""
    before = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        yield
    finally:
        for _ in range(len(torch._C._functorch.get_interpreter_stack() or ()) - before):
            torch._C._functorch.pop_dynamic_layer_stack()


def _effects(gm: fx.GraphModule, mode: FakeTensorMode) -> dict[fx.Node, Effect]:
    try:
        return _Run(gm, mode).effects()
    except UnlikeError:
        return _Run(gm, mode, sharing=False).effects()


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
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if places := _written_places(func):
            given = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
            self.written += [value for value in tree_leaves(given) if isinstance(value, Tensor)]
            self.exchanged |= "set_" in func._schema.name
        result = func(*args, **kwargs)
        self.work += work_of_operation(func, args, kwargs, result)
        return result


@cache
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Positions and names of the arguments that an operation overwrites."""
    arguments = func._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


@dataclass(frozen=True)
class _Known:
    """What one node did, for all that repeat it. Storages are those it was given, by their places, and -1, -2, ... for those it made.

    Attributes:
        value: what it gave.
        effect: what it did.
    """

    value: Any
    effect: Effect


class _Run:
    """One run of a graph on doubles of its tensors, in which an operation that repeats an earlier one is not run again.

    Args:
        gm: the graph.
        mode: of its fake tensors.
        sharing: False to run every operation.
    """

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, sharing: bool = True) -> None:
        self.gm, self.mode, self.sharing, self.watch = gm, mode, sharing, _Watch()
        self.doubles = Doubles(self._again)
        self.values = self.doubles.values
        self.saved: dict[int, int | None] = {}
        self.equal: dict[int, int] = {}  # numbers of storages that were exchanged
        self.known: dict[Hashable, _Known] = {}
        self.ran = 0  # how many operations were run
        self.states = 0  # how many calls may have changed a state of torch's, such as the grad mode
        self.grad: dict[fx.Node, bool] = {}  # the grad mode in which a node ran

    def effects(self) -> dict[fx.Node, Effect]:
        with ExitStack() as stack:
            stack.enter_context(_no_transform_left())
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # back to what it is, whatever the graph sets
            if (shapes := self.mode.shape_env) is not None:
                stack.enter_context(shapes.suppress_guards())
                stack.enter_context(shapes.ignore_fresh_unbacked_symbols())
            stack.enter_context(self.mode)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unheld(self._save), lambda t: t))
            if any(_has_symbols(_value(node)) for node in self.gm.graph.nodes):
                stack.enter_context(enable_python_dispatcher())
            found = {node: self._effect(node) for node in self.gm.graph.nodes}
        return {node: self._joined(effect) for node, effect in found.items()} if self.equal else found

    def _effect(self, node: fx.Node) -> Effect:
        if node.op == "output":
            return Effect()
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = self.doubles.of_input(node, self._input(node))
            return Effect(self.doubles.memory(node))
        if is_hook(node):
            self.values[node] = self.values[node.all_input_nodes[0]]
            return Effect(self.doubles.memory(node), self.doubles.memory(node))
        if _is_number(node):
            self.values[node] = _value(node)  # also where it was read from the values of a tensor
            return Effect()
        given, self.grad[node] = self.doubles.memory(*node.all_input_nodes), torch.is_grad_enabled()
        key = self._key(node, given)
        if key is not None and key in self.known:
            return self._repeated(node, given, self.known[key])
        return self._run(node, given, key)

    def _key(self, node: fx.Node, given: tuple[int, ...]) -> Hashable:
        """Equal for operations that do the same to what they are given; None for one of which that cannot be told."""
        if not (self.sharing and repeats(node)):
            return None
        places = {number: i for i, number in enumerate(given)}
        key = (self.states, node.op, node.target, *(form_of(values, self.values, places) for values in (node.args, dict(node.kwargs))))
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _repeated(self, node: fx.Node, given: tuple[int, ...], known: _Known) -> Effect:
        made: dict[int, int] = {}

        def number(place: int) -> int:
            return given[place] if place >= 0 else made.setdefault(place, next(NUMBERS))

        self.values[node] = self.doubles.repeated(node, known.value, number, given)
        effect = known.effect
        return Effect(tuple(map(number, effect.memory)), (), tuple((number(place), size) for place, size in effect.saved), work=effect.work)

    def _run(self, node: fx.Node, given: tuple[int, ...], key: Hashable) -> Effect:
        self.doubles.make_waiting(given)
        self.watch, self.saved, newest = _Watch(), {}, next(NUMBERS)
        before = self.doubles.kinds(*node.all_input_nodes)
        try:
            with self.watch:
                value = self._call(node)
            known = True
        except Exception:
            value, known = tree_map_only(Tensor, fresh, _value(node)), False
        self.ran += 1
        self.doubles.changed(given)
        self.values[node] = self.doubles.of_result(node, value, newest)
        if not known:
            memory = tuple(dict.fromkeys([*given, *self.doubles.memory(node)]))
            return Effect(memory, given, tuple(self.saved.items()), known=False)
        effect = self._seen(node, given)
        if not given and not effect.memory:
            self.states += 1
        own = all(self.doubles.number(value) > newest for value in self.watch.written)
        if key is not None and own and before == self.doubles.kinds(*node.all_input_nodes):
            self._learn(key, node, given, newest, effect)
        return effect

    def _learn(self, key: Hashable, node: fx.Node, given: tuple[int, ...], newest: int, effect: Effect) -> None:
        """Notes what a node did, unless that has to do with storages of others, or with objects that are no tensors."""
        value = self.values[node]
        made = dict.fromkeys((*effect.memory, *(number for number, _ in effect.saved)))
        places = {number: -1 - i for i, number in enumerate(made)} | {number: i for i, number in enumerate(given)}
        if not effect.memory or any(places[number] < 0 and number < newest for number in made):
            return
        if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value)):
            saved = tuple((places[number], size) for number, size in effect.saved)
            value = self.doubles.template(value, places)
            self.known[key] = _Known(value, Effect(tuple(places[number] for number in effect.memory), (), saved, work=effect.work))

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() not in _RUNS_GRAPHS:
            raise NotImplementedError  # it may run any code
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: made_of(self.values[source]))
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return (self.gm.get_submodule(target) if node.op == "call_module" else target)(*args, **kwargs)

    def _seen(self, node: fx.Node, given: tuple[int, ...]) -> Effect:
        written = {self.doubles.number(value) for value in self.watch.written}
        if self.watch.exchanged:
            after = {*self.doubles.memory(*node.all_input_nodes), *written, *given}
            self.equal |= dict.fromkeys(after, min(after))
        overwritten = tuple(number for number in given if number in written)
        return Effect(self.doubles.memory(node), overwritten, tuple(self.saved.items()), work=self.watch.work)

    def _joined(self, effect: Effect) -> Effect:
        """The effect with one number for storages that were exchanged."""

        def joined(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(self._root(number) for number in numbers))

        saved = {self._root(number): size for number, size in effect.saved}
        return Effect(joined(effect.memory), joined(effect.written), tuple(saved.items()), effect.known, effect.work)

    def _root(self, number: int) -> int:
        while self.equal.get(number, number) != number:
            number = self.equal[number]
        return number

    def _save(self, tensor: Tensor) -> Tensor:
        size = tensor.untyped_storage().nbytes()
        self.saved[self.doubles.number(tensor)] = size if isinstance(size, int) else hint(size)
        return tensor.detach()  # an operation that saved its own result would keep it, where the garbage collector does not see that

    def _again(self, node: fx.Node) -> Any:
        """What a node gives, without a note of what it does."""
        saved, self.saved = self.saved, {}
        with torch.set_grad_enabled(self.grad[node]):
            value = self._call(node)
        self.saved, self.ran = saved, self.ran + 1
        return value

    def _input(self, node: fx.Node) -> Any:
        value = _value(node)
        return _attribute(self.gm, str(node.target)) if value is None and node.op == "get_attr" else value


def _unheld(method: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A bound method that does not keep its object, as autograd holds hooks where the garbage collector does not see them."""
    reference = weakref.WeakMethod(method)
    return lambda tensor: tensor.detach() if (known := reference()) is None else known(tensor)


def _is_number(node: fx.Node) -> bool:
    """Whether a node gives a number, by a function of torch's or Python's, which writes to nothing then."""
    numbers = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(_value(node), numbers) and not isinstance(node.target, torch._ops.OperatorBase) and node.op != "call_module"


def _has_symbols(value: Any) -> bool:
    return isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and value._has_symbolic_sizes_strides)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    owner: nn.Module = gm.get_submodule(parent)
    return getattr(owner, name)
