"""What --input can be on the command line.

    8x3x224x224                     a float32 tensor of that shape, standard normal
    2x64:int64:0-50256              whole numbers from 0 to 50256, both included
    8x16:float64:-1-1               evenly spread between -1 and 1
    attention_mask=2x64:bool        an argument by name
    file.py:make_inputs             a function that returns a tuple of arguments, or a dict of them by name

Several are the positional arguments, in order, and those with names, by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from click import BadParameter

from .models import called, found

__all__ = ["Call", "made", "read"]

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>[a-z]\w*))?(?::(?P<range>.+))?")
_RANGE = re.compile(rf"({_NUMBER})-({_NUMBER})", re.IGNORECASE)
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128")
_FORMS = "such as 8x3x224x224, 2x64:int64:0-50256 or mask=2x64:bool"


@dataclass(frozen=True)
class Tensor:
    """What one tensor is to be.

    Attributes:
        text: what the user wrote.
        name: of the argument; empty where it is positional.
        shape: its sizes.
        dtype: name of its dtype.
        low, high: smallest and largest value; None where none were given.
    """

    text: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a model.

    Attributes:
        args, kwargs: by position, and by name.
        text: what the user wrote, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str

    @property
    def example_inputs(self) -> Any:
        """In the form that `momentumize` takes."""
        return self.kwargs if self.kwargs else self.args


def read(text: str) -> Tensor | str:
    """A text of --input: what tensor it describes, or itself where it names a function.

    Raises:
        BadParameter: it is neither.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        if re.search(r"\.py:|^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", text):
            return text
        raise _bad(f"{text!r} is no shape, {_FORMS}, and names no function, such as file.py:make_inputs")
    shape = tuple(map(int, match["shape"].split("x")))
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise _bad(f"{text!r} has the dtype {dtype!r}, and must have one of {', '.join(_DTYPES)}")
    low, high = _range(text, match["range"], dtype)
    return Tensor(text, match["name"] or "", shape, dtype, low, high)


def _range(text: str, given: str | None, dtype: str) -> tuple[float | None, float | None]:
    if given is None:
        return None, None
    match = _RANGE.fullmatch(given)
    if match is None:
        raise _bad(f"{text!r} ends in {given!r}, and not in a range low-high, such as 0-999 or -1-1")
    low, high = float(match[1]), float(match[2])
    if low > high:
        raise _bad(f"{text!r} has the range {given}, of which the first number must not be the larger one")
    if "int" in dtype and not (low.is_integer() and high.is_integer()):
        raise _bad(f"{text!r} has the range {given}, and {dtype} needs whole numbers")
    if dtype == "bool" or "complex" in dtype:
        raise _bad(f"{text!r} has a range, which {dtype} does not take")
    return low, high


def _bad(message: str) -> BadParameter:
    return BadParameter(message, param_hint="--input")


def made(texts: Sequence[str], device: str) -> Call:
    """The call that texts of --input describe.

    Args:
        texts: as above.
        device: of the tensors; "meta" for such that take no memory.

    Raises:
        BadParameter: a text is not one that can be read, a name comes twice, or positional arguments come with named ones.
    """
    read_ = [read(text) for text in texts]
    if any(isinstance(one, str) for one in read_):
        if len(read_) > 1:
            raise _bad(f"{next(one for one in read_ if isinstance(one, str))!r} gives all inputs: leave out the others")
        return _by_function(str(read_[0]), device)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for one in read_:
        assert isinstance(one, Tensor)
        if one.name in kwargs:
            raise _bad(f"{one.name!r} is given twice")
        if one.name:
            kwargs[one.name] = _filled(one, device)
        else:
            args.append(_filled(one, device))
    if args and kwargs:
        raise _bad("give all arguments by position or all by name (name=SHAPE), not some of each")
    return Call(tuple(args), kwargs, " ".join(texts))


def _by_function(text: str, device: str) -> Call:
    import torch
    from torch.utils._pytree import tree_map_only

    given = called(found(text, "--input"), {}, text, "--input")
    if device != "meta":
        given = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), given)
    if isinstance(given, Mapping):
        return Call((), dict(given), text)
    return Call(tuple(given) if isinstance(given, (tuple, list)) else (given,), {}, text)


def _filled(one: Tensor, device: str) -> Any:
    import torch

    dtype = getattr(torch, one.dtype)
    if device == "meta":
        return torch.empty(one.shape, dtype=dtype, device=device)
    if one.dtype == "bool":
        return torch.randint(2, one.shape, device=device).bool()
    if not (dtype.is_floating_point or dtype.is_complex):
        low, high = int(one.low or 0), int(1 if one.high is None else one.high)
        limits = torch.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise _bad(f"{one.text!r} has a range beyond that of {one.dtype}, {limits.min} to {limits.max}")
        return torch.randint(low, high + 1, one.shape, dtype=dtype, device=device)
    if one.low is None or one.high is None:
        return torch.randn(one.shape, dtype=dtype, device=device)
    return torch.rand(one.shape, device=device).mul(one.high - one.low).add(one.low).to(dtype)
