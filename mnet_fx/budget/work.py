"""Operations and seconds: floating point operations as torch counts them, and the roofline of a named GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..errors import MnetError, SettingsError

__all__ = ["Work", "checked_gpu"]


class Work:
    """Adds up what operations take; called after each.

    Args:
        gpu: name of a GPU in torch's data sheets, or None.

    Attributes:
        flops: as `torch.utils.flop_counter.FlopCounterMode` counts them, with its formulas.
        seconds: each operation takes the longer of its arithmetic, at three quarters of the peak, and the reading and writing of its
            tensors (torch.utils._runtime_estimation).
    """

    def __init__(self, gpu: str | None) -> None:
        self.gpu, self.flops, self.seconds = gpu, 0, 0.0

    def __call__(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
        self.flops += flops
        if self.gpu is not None:
            self.seconds += _seconds(packet, flops, args, kwargs, result, self.gpu)

    def move(self, size: int) -> None:
        """Counts the reading and writing of bytes by what is no operation of torch."""
        if self.gpu is not None:
            from torch._inductor.analysis.device_info import datasheet_dram_bw_gbs

            self.seconds += size / (datasheet_dram_bw_gbs(self.gpu) or 1.0) / 1e9


def _seconds(packet: Any, flops: int, args: Any, kwargs: Any, result: Any, gpu: str) -> float:
    from torch.utils import _runtime_estimation as roofline  # late, as it imports much

    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if not outputs or packet in roofline._IGNORE_OPS:
        return 0.0
    floating = [t for t in outputs if t.dtype in roofline._FLOAT_TYPES]
    compute = roofline.flops_to_ns(flops, floating[0].dtype, gpu_type=gpu) if flops and floating else 0.0
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return max(compute, roofline.get_transfer_time(inputs, outputs, gpu_type=gpu)) / 1e9


def checked_gpu(gpu: str | None) -> str | None:
    """The name, if torch has its data sheet.

    Raises:
        SettingsError: it has none; the message names those there are.
        MnetError: this version of torch has no such data sheets.
    """
    if gpu is None:
        return None
    try:
        from torch._inductor.analysis import device_info
        from torch.utils import _runtime_estimation

        known = device_info._device_mapping
        found = device_info.lookup_device_info(gpu) if isinstance(gpu, str) else None
        _runtime_estimation.flops_to_ns(1, torch.float32, gpu_type="NVIDIA H100")
    except (ImportError, AttributeError, TypeError) as error:
        raise MnetError(f"torch {torch.__version__} has no roofline for GPUs that are named ({error}): leave gpu out") from error
    if found is None:
        raise SettingsError(f"gpu must be one that torch has a data sheet of: {', '.join(map(repr, known))}; got {gpu!r}")
    return gpu
