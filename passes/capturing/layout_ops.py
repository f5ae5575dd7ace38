"""Changes of layout in the three dialects of `passes.graphs.ops`: which operations they are, what undoes them, which runs do nothing.

    x.view(2, -1, 8)    aten.permute(x, [0, 2, 1])    torch.roll(x, shifts=1, dims=0)    x.mT    aten.contiguous(x)

Arguments are written in many ways, so what an operation does is found by running it. Operations that are new are methods of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.node import map_arg

from passes.graphs.facts import recorded
from passes.graphs.ops import kind, word_of, words

__all__ = ["Operation", "Path", "again", "inverse", "is_identity", "is_layout", "recorded_dtype", "sizes_of"]

_PERMUTING = words("permute transpose swapaxes swapdims movedim moveaxis t T mT numpy_T")
_RESHAPING = words("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as _unsafe_view")
_KNOWN = _PERMUTING | _RESHAPING | words("roll contiguous clone")
_ANY_STRIDES = {"view": "reshape", "_unsafe_view": "reshape", "view_as": "reshape_as"}
_PRIMES = ((5, 11, 17, 23, 31), (7, 13, 19, 29, 37))
_LARGEST = 2**24  # elements to number

Path = tuple[fx.Node, ...]
Operation = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""Op, target, arguments and keyword arguments of a node."""
Factor = tuple[int, int]
"""A size and a stride."""


def is_layout(node: fx.Node) -> bool:
    """True for an operation that gives all values of its first argument in another order or shape, where shapes are recorded."""
    if node.op not in ("call_function", "call_method") or _word(node) not in _KNOWN or kind(node, {}) not in ("layout", "identity"):
        return False
    source, *more = (*node.args, *node.kwargs.values())
    if not node.args or not isinstance(source, fx.Node) or sizes_of(source) is None or sizes_of(node) is None:
        return False
    known = len(node.all_input_nodes) == 1 or _word(node) in _RESHAPING
    return known and recorded_dtype(source) == recorded_dtype(node) and not any(isinstance(value, torch.dtype) for value in more)


def sizes_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Sizes, symbolic ones as expressions, which compare by form."""
    shape = getattr(recorded(node), "shape", None)
    return None if shape is None else tuple(size if isinstance(size, int) else size.node.expr for size in shape)


def recorded_dtype(node: fx.Node) -> Any:
    """The dtype that the capture recorded, or None."""
    return getattr(recorded(node), "dtype", None)


def again(node: fx.Node, value: fx.Node) -> Operation:
    """The same layout operation on another value of the same sizes, which may have other strides, so that a view may have to copy."""
    word = _word(node)
    if word not in _ANY_STRIDES:
        return node.op, node.target, (value, *node.args[1:]), dict(node.kwargs)
    named = {"shape" if name == "size" else name: size for name, size in node.kwargs.items()}
    return "call_method", _ANY_STRIDES[word], (value, *node.args[1:]), named


def inverse(node: fx.Node, value: fx.Node, sizes: Callable[[fx.Node], list[Any]]) -> Operation:
    """The operation that undoes a layout operation, applied to `value`; `sizes` gives those of a node as arguments of reshape."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if _word(node) in _PERMUTING:
        dims = _permutation(node, len(sizes_of(source) or ()))
        return "call_method", "permute", (value, [dims.index(i) for i in range(len(dims))]), {}
    if _word(node) == "roll":
        shifts, *dims = _values(node, ("shifts", "dims"))
        back = [-n for n in shifts] if isinstance(shifts, (list, tuple)) else -shifts
        return "call_method", "roll", (value, back, *dims), {}
    return "call_method", "reshape", (value, sizes(source)), {}


def is_identity(root: fx.Node, path: Path) -> bool:
    """True if the operations of `path` bring every element of `root` back to its place."""
    if sizes_of(root) != sizes_of(path[-1]):
        return False
    return all(_comes_back(root, path, primes) for primes in _PRIMES)


def _word(node: fx.Node) -> str:
    return str(node.args[1]) if node.target is getattr else word_of(node.target)


def _values(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    """Arguments after the first, of which some may be given by name."""
    return [*node.args[1:], *(node.kwargs[name] for name in names if name in node.kwargs)]


def _permutation(node: fx.Node, dims: int) -> list[int]:
    """For each dimension of the result, which one of the input it is."""
    value = torch.empty(tuple(range(2, 2 + dims)), device="meta")  # each dimension has a size of its own
    return [size - 2 for size in _run(node.op, node.target, (value, *node.args[1:]), node.kwargs).shape]


def _run(op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    value = getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)
    assert isinstance(value, Tensor)
    return value


def _comes_back(root: fx.Node, path: Path, primes: tuple[int, ...]) -> bool:
    """Whether a path is the identity with primes for the free sizes."""
    shapes = [size for node in (root, *path) for size in sizes_of(node) or ()]
    symbols = sorted({symbol for size in shapes if not isinstance(size, int) for symbol in size.free_symbols}, key=str)
    if len(symbols) > len(primes):
        return False
    assigned = dict(zip(symbols, primes, strict=False))
    by_strides = _keeps_strides(root, path, assigned)
    return _keeps_numbers(root, path, assigned) if by_strides is None else by_strides


def _keeps_strides(root: fx.Node, path: Path, assigned: Mapping[Any, int]) -> bool | None:
    """Follows for each dimension the sizes and strides, within `root`, of the factors that make it up; None where these do not tell."""
    shape = _shape(root, assigned)
    dims = [[(size, math.prod(shape[i + 1 :]))] for i, size in enumerate(shape)]
    start = _joined(dims)
    for node in path:
        if _word(node) == "roll" or not math.prod(shape):
            return None
        if _word(node) in _PERMUTING:
            dims = [dims[i] for i in _permutation(node, len(dims))]
        elif (grouped := _grouped(_joined(dims), _shape(node, assigned))) is not None:
            dims = grouped
        else:
            return None
    return _joined(dims) == start


def _joined(dims: list[list[Factor]]) -> list[Factor]:
    """All factors in order, those that lie behind one another in memory as one."""
    joined: list[Factor] = []
    for size, stride in (factor for dim in dims for factor in dim if factor[0] != 1):
        if joined and joined[-1][1] == size * stride:
            joined[-1] = joined[-1][0] * size, stride
        else:
            joined.append((size, stride))
    return joined


def _grouped(factors: list[Factor], shape: list[int]) -> list[list[Factor]] | None:
    """Factors as dimensions of the given sizes, split where need be; None where they cannot be."""
    rest = factors[::-1]
    dims: list[list[Factor]] = []
    for missing in shape:
        dims.append([])
        while missing != 1:
            size, stride = rest.pop() if rest else (1, 0)
            common = math.gcd(size, missing)
            if common not in (size, missing) or size == 1:
                return None
            dims[-1].append((common, stride * (size // common)))
            rest += [(size // common, stride)] if common < size else []
            missing //= common
    return None if rest else dims


def _keeps_numbers(root: fx.Node, path: Path, assigned: Mapping[Any, int]) -> bool:
    """Runs a path on numbered elements."""
    shape = _shape(root, assigned)
    if math.prod(shape) > _LARGEST:
        return False
    start = value = torch.arange(math.prod(shape), dtype=torch.int32, device="cpu").reshape(shape)
    try:
        for node in path:
            op, target, args, kwargs = again(node, node)
            rest, named = map_arg((args[1:], kwargs), lambda found: _argument(found, assigned))
            value = _run(op, target, (value, *rest), named)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):  # sizes that these operations do not take, or not of this kind
        return False
    return torch.equal(value, start) if value.shape == start.shape else False


def _shape(node: fx.Node, assigned: Mapping[Any, int]) -> list[int]:
    return [_number(size, assigned) for size in sizes_of(node) or ()]


def _argument(node: fx.Node, assigned: Mapping[Any, int]) -> Any:
    """What a node among the arguments is, a tensor without its values, for the given free sizes."""
    value = recorded(node)
    if isinstance(value, Tensor):
        return torch.empty(_shape(node, assigned), device="meta")
    return tuple(_number(size, assigned) for size in value) if isinstance(value, tuple) else _number(value, assigned)


def _number(size: Any, assigned: Mapping[Any, int]) -> int:
    size = size.node.expr if isinstance(size, torch.SymInt) else size
    return size if isinstance(size, int) else int(size.subs(assigned))
