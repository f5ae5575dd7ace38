"""The `forward` that a rewritten module gets: a call is matched with what was captured, checked, and run as a program."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes import Call, ExportError, Interface

from .errors import UNCOMPILED, MnetError
from .guard import Guard
from .program import Program

__all__ = ["Constants", "ExportedForward", "Forward", "Variant", "canonical", "signature"]

log = logging.getLogger("mnet_fx")

Variant = dict[bool, tuple[Program, Interface]]  # by training flag
_MOST_VARIANTS = 16


class Forward:
    """The `forward` of a module that was captured by symbolic trace: one program for train mode, one for eval mode.

    Args:
        owner: the module whose forward this is.
        programs: by training flag.
        pinned: arguments that the graphs were captured for one value of, by name.
        guard: what the programs take for granted.
        otherwise: runs the calls that set a pinned argument to something else.
    """

    def __init__(
        self, owner: nn.Module, programs: dict[bool, Program], pinned: dict[str, Any], guard: Guard, otherwise: ExportedForward
    ) -> None:
        self.owner, self.programs, self.pinned, self.guard, self.otherwise = owner, programs, pinned, guard, otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound, other = self._matched(args, kwargs)
        if other is not None:
            captured, given = other
            return self.otherwise.run(captured, given, args, kwargs)
        return self.programs[self.owner.training](self.owner, *bound.args, **bound.kwargs)

    @torch.compiler.disable(reason=UNCOMPILED)
    def _matched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[inspect.BoundArguments, tuple[str, str] | None]:
        """The arguments by name; and where they are not those of the graphs, what these were captured with, and what was given."""
        bound = _bound(self.owner, args, kwargs)
        for name, value in self.pinned.items():
            if not _same(given := bound.arguments.pop(name, value), value):
                return bound, (f"{name}={value!r}", f"{name}={_brief(given)}")
        self.guard.check(self.owner)
        return bound, None

    @property
    def __signature__(self) -> inspect.Signature:
        return signature(self.owner)

    @property
    def __code__(self) -> Any:  # torch.export wants a file and a line
        return type(self).__call__.__code__


class ExportedForward:
    """The `forward` of a module that was captured by torch.export: programs on flat inputs, for each kind of call.

    A call that fits none of the variants (another set of arguments, a size that the export had to fix) makes a new one.

    Args:
        owner: the module whose forward this is.
        variants: programs and interfaces of the captures so far.
        guard: what the programs take for granted.
        capture: makes the variant for a call, `capture(owner, call, number) -> Variant`; not kept by pickle.
    """

    def __init__(
        self, owner: nn.Module, variants: Sequence[Variant], guard: Guard, capture: Callable[[nn.Module, Call, int], Variant] | None
    ) -> None:
        self.owner, self.variants, self.guard, self.capture = owner, list(variants), guard, capture

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run("other arguments", "these", args, kwargs)

    def run(self, captured: str, given: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers a call.

        Args:
            captured, given: what the error says about the captures so far and this call, where the variants say no more.
            args, kwargs: the call.
        """
        program, interface, flat = self._fitting(captured, given, args, kwargs)
        return pytree.tree_unflatten(list(program(self.owner, *flat)), interface.out_spec)

    @torch.compiler.disable(reason=UNCOMPILED)
    def _fitting(self, captured: str, given: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Interface, list[Any]]:
        """The program for a call, its interface, and the arguments as the program takes them."""
        self.guard.check(self.owner)
        call, reason = canonical(_bound(self.owner, args, kwargs)), f"it was captured with {captured}, not {given}"
        for variant in self.variants:
            program, interface = variant[self.owner.training]
            try:
                return program, interface, interface.flat(*call)
            except ExportError as error:
                reason = str(error)
        name = f"{type(self.owner).__name__}.forward"
        if self.capture is None or len(self.variants) == _MOST_VARIANTS:
            raise MnetError(f"{name} was captured for other calls than this one: {reason}; give momentumize example_inputs like this call")
        log.info("%s is captured again: %s", name, reason)
        try:
            self.variants.append(self.capture(self.owner, call, len(self.variants) + 1))  # 0 is the first capture, or a trace
        except ExportError as error:
            raise MnetError(
                f"{name} was captured for other calls than this one ({reason}) and cannot be captured for this one: {error}; "
                "call it as when it was captured, or name its list of layers with regions=[...], which needs no capture"
            ) from error
        program, interface = self.variants[-1][self.owner.training]
        return program, interface, interface.flat(*call)

    @property
    def __signature__(self) -> inspect.Signature:
        return signature(self.owner)

    @property
    def __code__(self) -> Any:  # torch.export wants a file and a line
        return type(self).__call__.__code__

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"capture": None}


class Constants(nn.Module):
    """What an exported graph reads and its module does not have: literals, and the bodies of no_grad and autocast blocks.

    No submodule of the model, so it is in no state_dict.

    Args:
        values: by attribute name.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value)


def signature(owner: nn.Module) -> inspect.Signature:
    """Signature of the forward of a module's class, without self."""
    return inspect.Signature(list(inspect.signature(inspect.unwrap(type(owner).forward)).parameters.values())[1:])


def _bound(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name; a TypeError that names the forward where they do not fit, as Python's would."""
    try:
        return signature(owner).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(owner).__name__}.forward(): {error}") from None


def canonical(bound: inspect.BoundArguments) -> Call:
    """A call in the form that all equal calls share: positions before keywords, defaults left out. Takes these out of `bound`."""
    for name, value in list(bound.arguments.items()):
        if _same(value, bound.signature.parameters[name].default):
            del bound.arguments[name]
    return bound.args, dict(sorted(bound.kwargs.items()))


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, (Tensor, torch.Generator)) and _equal(a, b))


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # the comparison of a user's type
        return False


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
