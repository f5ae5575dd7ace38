"""What values decide: the magnitudes by which chains put bytes aside, seen in one forward pass of real tensors."""

from __future__ import annotations

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
    """Runs the forward pass of a momentum network once, and puts buffers and random states back.

    Args:
        net: what `momentumize` returned.
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
    with undone(net, call), torch.enable_grad(), found.set():  # with gradients, as Dynamo would else capture another kind of call
        net(*args, **kwargs)
    return found
