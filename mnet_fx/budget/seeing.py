"""What values decide: the magnitudes by which chains put bytes aside, seen in one forward pass of real tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from ..arguments import Call
from ..arithmetic.fake_state import Seen
from ..errors import SettingsError
from .undoing import undone

__all__ = ["seen"]


def seen(net: nn.Module, call: Call) -> Seen:
    """Runs the forward pass of a momentum network once, and puts random states and inputs back.

    Args:
        net: what `momentumize` returned, or a copy of that whose buffers and attributes may change.
        call: of it.

    Raises:
        SettingsError: a parameter, buffer or input has no values.
    """
    tensors = [t for t in (*tree_leaves(call), *chain(net.parameters(), net.buffers())) if isinstance(t, Tensor)]
    empty = next((t for t in tensors if t.is_meta or isinstance(t, FakeTensor)), None)
    if empty is not None:
        raise SettingsError(
            "values=True runs the forward pass once, for which parameters, buffers and inputs need values; one of shape "
            f"{tuple(empty.shape)} is fake or on the meta device"
        )
    found = Seen()
    args, kwargs = call
    with undone(net, call), _uncast(), torch.enable_grad(), found.set():  # with gradients: else Dynamo captures another kind of call
        net(*args, **kwargs)
    return found


@contextmanager
def _uncast() -> Iterator[None]:
    """Keeps no casts of weights, which the caller's autocast would then have."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
