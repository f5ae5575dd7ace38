"""Tensors of the same kind as others, whose values nobody reads: what a kind of call is captured with where it is not to be run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["real_tensors", "stand_ins"]


def real_tensors(model: nn.Module, tree: Any) -> Any:
    """The arguments of a call, with empty tensors on the model's device in place of those that are fake or on the meta device.

    Args:
        model: the model, which may itself be on the meta device.
        tree: any structure of tensors and other values.
    """
    first = next(chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if first is None else first.device

    def real(t: Any) -> Any:
        if not isinstance(t, Tensor) or not (isinstance(t, FakeTensor) or t.is_meta or device.type == "meta"):
            return t
        place = t.device if isinstance(t, FakeTensor) and not t.is_meta and device.type != "meta" else device
        return _empty(t, place)

    return pytree.tree_map(real, tree)


@contextmanager
def stand_ins(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Outside of every mode and transform, a call with tensors of its own; the model's tensors are replaced where these are special.

    Args:
        model: the model, whose parameters and buffers may be fake, or those of a transform.
        args, kwargs: a call of it, under torch.export, torch.jit.trace, make_fx, torch.func or a dispatch mode.
    """
    named = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    special = any(map(_is_special, named.values()))
    checked = torch._C._get_tracing_state() is not None  # torch.jit.trace checks itself without gradients: it must find the same source
    with ExitStack() as stack:
        stack.enter_context(_outside_of_everything())
        if special:
            stack.enter_context(FakeTensorMode())
            made = {id(t): _like(t) for t in named.values()}
            stack.enter_context(_reparametrize_module(model, {name: made[id(t)] for name, t in named.items()}))
        made_args = pytree.tree_map(lambda t: _like(t) if isinstance(t, Tensor) else t, (args, kwargs))
        for t in pytree.tree_leaves(made_args) if checked else ():
            if isinstance(t, Tensor) and t.is_floating_point():
                t.requires_grad_()
        yield made_args


def _is_special(t: Tensor) -> bool:
    return type(t) not in (Tensor, nn.Parameter) or is_functorch_wrapped_tensor(t)


_GLOBAL_HOOKS = [f"_global_{kind}_hooks" for kind in ("backward_pre", "backward", "forward_pre", "forward")]


def _own_hooks(name: str) -> OrderedDict[int, Any]:
    """Of the hooks on all modules those that are not torch's: these look on, as for `FlopCounterMode`, and have Dynamo break its graph."""
    hooks = getattr(nn.modules.module, name).items()
    return OrderedDict((key, hook) for key, hook in hooks if not (getattr(hook, "__module__", None) or "").startswith("torch."))


@contextmanager
def _outside_of_everything() -> Iterator[None]:
    """As if nothing traced, transformed or watched: Dynamo leaves everything to Python otherwise."""
    tracing = torch.fx._symbolic_trace
    flag = "_is_fx_tracing_flag"  # before torch 2.11
    flags: list[tuple[Any, str, Any]] = [
        (tracing, flag, False) if hasattr(tracing, flag) else (tracing._is_fx_tracing_tls, "flag", False),
        (torch.autograd.forward_ad, "_current_level", -1),
        (torch.compiler, "_is_exporting_flag", False),
        (torch.compiler, "_is_compiling_flag", False),
        (nn.modules.module, "_global_buffer_registration_hooks", OrderedDict()),  # AOTAutograd notes with it which buffers are assigned
        *((nn.modules.module, name, _own_hooks(name)) for name in _GLOBAL_HOOKS),
        (nn.Module, "__call__", torch.fx._symbolic_trace._orig_module_call),  # what a tracer of fx puts in their place
        (nn.Module, "__getattr__", torch.fx._symbolic_trace._orig_module_getattr),
    ]
    state, hooks = torch._C._get_tracing_state(), torch._C._autograd
    disabled = hooks._saved_tensors_hooks_get_disabled_error_message()  # torch.func.grad does that
    before = [getattr(owner, name, False) for owner, name, _ in flags]
    try:
        for owner, name, value in flags:
            setattr(owner, name, value)
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        hooks._saved_tensors_hooks_enable()
        grad = torch.is_grad_enabled() or state is not None
        with torch._guards.tracing(None), _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.set_grad_enabled(grad):
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
        if disabled is not None:
            hooks._saved_tensors_hooks_disable(disabled)
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


def _like(t: Tensor) -> Tensor:
    made = _empty(t, t.device)
    for i, size in enumerate(t.shape):
        if not isinstance(size, int):
            torch._dynamo.maybe_mark_dynamic(made, i)
    return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made


def _empty(t: Tensor, device: torch.device) -> Tensor:
    """An empty tensor of the shape, strides, dtype and need for gradients of another."""
    sizes = [_known(size) for size in t.shape]
    plain = t.layout is torch.strided and not is_functorch_wrapped_tensor(t)
    made = (
        torch.empty_strided(sizes, [_known(stride) for stride in t.stride()], dtype=t.dtype, device=device)
        if plain
        else torch.empty(sizes, dtype=t.dtype, device=device)
    )
    return made.requires_grad_(t.requires_grad)


def _known(size: Any) -> int:
    """A size as a number: of a symbolic one, its value in the example that it was made from."""
    return size if isinstance(size, int) else int(size.node.hint)
