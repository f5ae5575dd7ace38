"""Tensors that stand for those of a graph: described at once, made when an operation needs them.

What an operation does to memory depends on what its tensors are like, and on which of them share memory, but not on their elements. So an
operation whose arguments are described as those of an earlier one does what that one did, and need not be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from passes.graphs.ops import package_of

__all__ = ["NUMBERS", "Double", "Doubles", "UnlikeError", "form_of", "fresh", "made_of", "repeats"]

NUMBERS = count()  # of all storages of all graphs, so that notes of two runs never seem to be about one storage


class UnlikeError(Exception):
    """An operation that was not run would have done something else than the one that it repeats."""


@dataclass(eq=False)
class Double:
    """Stands for a tensor that a node gives, which is made only when an operation needs it.

    Attributes:
        kind: its description.
        number: of its storage.
        node: which gives it.
        own: whether the node made its storage, for it alone.
        like: a tensor of this description.
        made: the tensor itself, once it was needed.
        version: how many operations had been run on its storage when it was described.
    """

    kind: Hashable
    number: int
    node: fx.Node
    own: bool
    like: Tensor
    made: Tensor | None = None
    version: int = 0


def _described(tensor: Tensor) -> Hashable:
    """All of a tensor that can decide what an operation does to memory, except which others share its memory. An object that equals nothing
    where that cannot be said, as of a sparse tensor, or of a size that depends on values."""
    try:
        sizes = (_number(size) for size in (*tensor.size(), *tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes()))
        grad = (tensor.requires_grad, tensor.is_leaf, tensor.retains_grad, tensor.is_inference())
        return (type(tensor), *sizes, *_elements(tensor), *grad, tensor.is_conj(), tensor.is_neg())
    except Exception:  # a layout without strides, a storage without a size
        return object()


def _fresh_description(recorded: Tensor) -> Hashable:
    """The description of `fresh(recorded)`; None where only that itself can tell."""
    size, stride = recorded.size(), recorded.stride()
    if not all(isinstance(number, int) for number in (*size, *stride)):
        return None
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    nbytes = 0 if 0 in size else (last + 1) * recorded.itemsize
    grad = (recorded.requires_grad, recorded.is_leaf, False, False)
    return (FakeTensor, *size, *stride, 0, nbytes, *_elements(recorded), *grad, False, False)


def fresh(recorded: Tensor) -> Tensor:
    """A tensor like a recorded one, in a storage of its own."""
    with torch.enable_grad():
        if recorded.requires_grad and not recorded.is_leaf:
            seed = torch.empty((), dtype=recorded.dtype, device=recorded.device, requires_grad=True)
            return _Computed.apply(seed, recorded)
        return _empty_like(recorded).requires_grad_(recorded.requires_grad)


class _Computed(torch.autograd.Function):
    """A tensor like a recorded one that is no leaf of autograd, whatever its strides."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, recorded: Tensor) -> Tensor:
        return _empty_like(recorded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


def _empty_like(recorded: Tensor) -> Tensor:
    return torch.empty_strided(recorded.size(), recorded.stride(), dtype=recorded.dtype, device=recorded.device)


def _elements(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.dim(), tensor.dtype, tensor.device


def _number(value: Any) -> Hashable:
    """A size that is known or given by the sizes of inputs.

    Raises:
        ValueError: it depends on values, and so is another one each time.
    """
    if isinstance(value, int):
        return value
    if not value.node.has_hint():
        raise ValueError
    return value.node._expr


def _doubles_in(value: Any) -> Iterator[Double]:
    """The doubles in what a node gives."""
    return (leaf for leaf in ((value,) if isinstance(value, Double) else tree_leaves(value)) if isinstance(leaf, Double))


def made_of(value: Any) -> Any:
    """What a node gives, with tensors, which have been made."""
    return _mapped(Double, lambda double: double.made, value)


def repeats(node: fx.Node) -> bool:
    """Whether a node does the same each time that it is given the same: a function of torch's or Python's that runs no graph."""
    if node.op == "call_function":
        known = package_of(node.target) in ("torch", "_operator", "builtins", "math")
        return known and not isinstance(node.target, torch._ops.HigherOrderOperator)
    return node.op == "call_method"


def form_of(argument: Any, values: Mapping[fx.Node, Any], places: Mapping[int, int]) -> Hashable:
    """A key for an argument of a node: what has equal keys has equal effects. It cannot be hashed where that cannot be told.

    Args:
        argument: of a node.
        values: what each node gave.
        places: for the number of each storage that the node is given, its position among them.
    """
    if isinstance(argument, fx.Node):
        argument = values[argument]
    if isinstance(argument, Double):
        return argument.kind, places[argument.number]
    if isinstance(argument, (tuple, list)):
        return type(argument), *(form_of(value, values, places) for value in argument)
    if isinstance(argument, dict):
        return dict, *((key, form_of(value, values, places)) for key, value in argument.items())
    if isinstance(argument, slice):
        return slice, *(form_of(value, values, places) for value in (argument.start, argument.stop, argument.step))
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(argument), argument.node._expr
    return type(argument), argument


class Doubles:
    """What the nodes of a graph give, with doubles for tensors, in one run.

    Args:
        run: runs a node again for what it gives.
    """

    def __init__(self, run: Callable[[fx.Node], Any]) -> None:
        self.run = run
        self.values: dict[fx.Node, Any] = {}
        self.numbers: dict[int, int] = {}  # by the address of a storage
        self.alive: list[Any] = []  # all storages, as an address is only its own while it lives
        self.inputs: dict[int, int] = {}  # numbers by the storages of the recorded inputs
        self.versions: dict[int, int] = {}  # of storages, see `Double`
        self.waiting: dict[int, list[Double]] = {}  # by storage: doubles in it or computed from it, which may not have been made

    def number(self, tensor: Tensor) -> int:
        """The number of the storage of a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.numbers:
            self.numbers[storage._cdata] = next(NUMBERS)
            self.alive.append(storage)
        return self.numbers[storage._cdata]

    def memory(self, *nodes: fx.Node) -> tuple[int, ...]:
        """Numbers of the storages of the tensors that nodes gave, each once."""
        return tuple(dict.fromkeys(double.number for double in self._of(nodes)))

    def kinds(self, *nodes: fx.Node) -> list[Hashable]:
        """Descriptions of the tensors that nodes gave, as they are now."""
        return [double.kind for double in self._of(nodes)]

    def _of(self, nodes: Iterable[fx.Node]) -> Iterator[Double]:
        for double in (double for node in nodes for double in _doubles_in(self.values[node])):
            if double.made is not None and double.version != self._version(double.number):
                double.kind, double.number = _described(double.made), self.number(double.made)
                double.version = self._version(double.number)
            yield double

    def _version(self, number: int) -> int:
        return self.versions.get(number, 0)

    def changed(self, given: Iterable[int]) -> None:
        """An operation was run on storages, so tensors in them may be others by now."""
        self.versions |= {number: self._version(number) + 1 for number in given}

    def of_input(self, node: fx.Node, value: Any) -> Any:
        """What an input gives, with doubles like the recorded tensors; those that shared memory share the number of their storage."""
        return _mapped(Tensor, lambda recorded: self._input(node, recorded), value)

    def _input(self, node: fx.Node, recorded: Tensor) -> Double:
        self.alive.append(storage := recorded.untyped_storage())
        number = self.inputs.setdefault(storage._cdata, next(NUMBERS))
        if (kind := _fresh_description(recorded)) is not None:
            return self._waiting(Double(kind, number, node, True, recorded), ())
        made = fresh(recorded)
        self._place(double := Double(_described(made), number, node, True, made), made)
        return double

    def of_result(self, node: fx.Node, value: Any, newest: int) -> Any:
        """What a node that was run gave; storages of higher numbers than `newest` are new."""
        numbers = [self.number(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]

        def double(tensor: Tensor) -> Double:
            number = self.number(tensor)
            own = number > newest and numbers.count(number) == 1
            return Double(_described(tensor), number, node, own, tensor, tensor, self._version(number))

        return _mapped(Tensor, double, value)

    def template(self, value: Any, places: Mapping[int, int]) -> Any:
        """What a node gave, with the numbers of storages replaced by their positions among those that it was given."""
        return _mapped(Double, lambda double: replace(double, number=places[double.number], made=None), value)

    def repeated(self, node: fx.Node, template: Any, number: Callable[[int], int], given: Iterable[int]) -> Any:
        """What a node gives that repeats another, and so is not run."""

        def double(first: Double) -> Double:
            place = number(first.number)
            return self._waiting(replace(first, number=place, node=node, version=self._version(place)), given)

        return _mapped(Double, double, template)

    def _waiting(self, double: Double, given: Iterable[int]) -> Double:
        for number in {double.number, *given}:
            self.waiting.setdefault(number, []).append(double)
        return double

    def make_waiting(self, given: Iterable[int]) -> None:
        """Makes what lies in some storages, and what was computed from them, before an operation that may change them."""
        for number in given:
            for double in self.waiting.pop(number, ()):
                self._make(double)

    def _make(self, double: Double) -> None:
        stack = [double]
        while stack:
            wanted = stack[-1]
            if wanted.made is None and wanted.own:
                self._stand_in(wanted)
            if wanted.made is not None:
                stack.pop()
                continue
            sources = [d for source in wanted.node.all_input_nodes for d in _doubles_in(self.values[source]) if d.made is None]
            stack += sources
            if not sources:
                self._run_again(wanted.node)

    def _stand_in(self, double: Double) -> None:
        """A tensor in a storage of its own, if that is like the double."""
        made = fresh(double.like)
        if _described(made) == double.kind:
            self._place(double, made)
        elif double.node.op in ("placeholder", "get_attr"):
            raise UnlikeError

    def _run_again(self, node: fx.Node) -> None:
        """Runs a node for what it gives: a view of what it is given, or a layout that no fresh tensor has."""
        tensors = [leaf for leaf in tree_leaves(self.run(node)) if isinstance(leaf, Tensor)]
        for double, tensor in zip(_doubles_in(self.values[node]), tensors, strict=True):
            if double.made is None:
                if _described(tensor) != double.kind:
                    raise UnlikeError
                self._place(double, tensor)

    def _place(self, double: Double, made: Tensor) -> None:
        self.alive.append(storage := made.untyped_storage())
        if self.numbers.setdefault(storage._cdata, double.number) != double.number:
            raise UnlikeError
        double.made = made


def _mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    return function(value) if isinstance(value, kind) else tree_map_only(kind, function, value)
