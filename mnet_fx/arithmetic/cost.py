"""What a chain costs in bits and bytes, by theory.

A momentum step v' = g v + b f(x), x' = x + v' maps (x, v) to (x', v'). Its Jacobian has determinant g for each element, whatever f is:
adding a function of the other variable (the two shears) has determinant 1, and only the factor g of v contracts. So the step maps any
set of states onto one of g times the volume; on a grid of fixed resolution, states collide. To tell them apart on the way back takes
log2(1/g) bits per element and step, and no code can do with less (MacKay et al. 2018, arXiv 1810.10999, say the same of reversible
recurrent networks that forget). A step with g = 0 forgets v altogether and costs what v holds.

The first step costs nothing when v[0] = 0, since then there is nothing to forget.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence

import torch

from ..errors import SettingsError
from .formats import Format

__all__ = ["spilled_planes", "state_bits", "state_bytes", "step_bits", "storage"]

WHOLE = 32.0  # bits of a whole v: what a step with g = 0 sheds


def step_bits(gamma: float) -> float:
    """Bits per element that one step with momentum `gamma` must put aside to be undone: log2(1 / gamma), at most those of a whole v (32).

    Args:
        gamma: g in [0, 1).

    Raises:
        SettingsError: gamma is outside [0, 1).
    """
    if not isinstance(gamma, numbers.Real) or not 0 <= gamma < 1:
        raise SettingsError(f"gamma must be a number in [0, 1), got {gamma!r}")
    return WHOLE if gamma == 0 else min(WHOLE, math.log2(1 / gamma))


def state_bits(gamma: float | Sequence[float], steps: int | None = None, zero_velocity: bool = True) -> float:
    """Bits per element that a chain must put aside to be undone, beyond the state (x, v) itself: the sum of `step_bits`.

    Args:
        gamma: momentum of all steps, or g[0], g[1], ... of each.
        steps: number of steps T; needed where gamma is one number.
        zero_velocity: whether v[0] = 0, so that the first step sheds nothing.

    Returns:
        Bits per element of the stream, for all steps together.

    Raises:
        SettingsError: a gamma is outside [0, 1), or `steps` is missing or contradicts the list.

    Source: MacKay, Vicol, Ba, Grosse, "Reversible Recurrent Neural Networks", 2018, arXiv 1810.10999.
    """
    if isinstance(gamma, numbers.Real):
        if steps is None or steps < 1:
            raise SettingsError(f"steps, how many there are, is needed where gamma is one number, got {steps}")
        gamma = [float(gamma)] * steps
    gammas = list(gamma) if isinstance(gamma, Iterable) else []
    if not isinstance(gamma, Iterable) or steps not in (None, len(gammas)):
        raise SettingsError(f"gamma must be one number, or a list of one for each of steps={steps}, got {gamma!r}")
    return math.fsum(step_bits(g) for g in gammas[1 if zero_velocity else 0 :])


def state_bytes(gammas: Sequence[float], dtype: torch.dtype = torch.float32, zero_velocity: bool = True) -> float:
    """Bytes per element that the runtime keeps for a chain: x and u, and the shed bits that u has no room for, in whole bytes.

    For a stream that keeps its magnitude; one that outgrows its grid keeps a byte or so more for each factor of a few.

    Args:
        gammas: g[t] of the steps.
        dtype: dtype of the stream.
        zero_velocity: whether v[0] = 0.

    Returns:
        Bytes per element of the stream, for all steps together.

    Raises:
        SettingsError: `gammas` is no list of numbers in [0, 1), or dtype is not real floating point.
    """
    if not isinstance(gammas, Iterable):
        raise SettingsError(f"gammas must be a list with the momentum of each step, such as [0.9] * 12, got {gammas!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"dtype must be a real floating torch.dtype, got {dtype!r}")
    gammas = list(gammas)
    for gamma in gammas:
        step_bits(gamma)  # raises where it is out of range
    form = Format.of(dtype)
    return float(form.state_bytes + spilled_planes(gammas, form, zero_velocity)[-1])


def spilled_planes(gammas: Sequence[float], form: Format, zero_velocity: bool = True) -> list[int]:
    """Bytes per element that u has shed by theory until each time 0 ... len(gammas), see `state_bytes`."""
    room, shed, spilled, planes = math.log2(form.u_limit) - form.bits - 8, 0.0, 0, [0]
    for t, gamma in enumerate(gammas):
        if gamma < 2.0**-300 and (t > 0 or not zero_velocity):  # as none
            spilled += math.ceil((form.bits + 4) / 8)
            shed = 0.0
        elif t > 0 or not zero_velocity:
            shed += math.log2(1 / gamma)
            if shed > room:
                moved = math.ceil((shed - room) / 8)
                spilled, shed = spilled + moved, shed - 8 * moved
        planes.append(spilled)
    return planes


def storage(gammas: Sequence[float], dtype: torch.dtype, zero_velocity: bool = True, held: torch.dtype | None = None) -> tuple[str, float]:
    """How a chain is taken back with the fewest bytes, and how many that are.

    Args:
        gammas, dtype, zero_velocity: as in `state_bytes`.
        held: dtype as which the state holds the stream, default its own.

    Returns:
        "reverse" (keep x, u and what u spills) or "inputs" (keep each x[t], as a checkpoint does), and bytes per stream element.
    """
    reverse, inputs = state_bytes(gammas, held or dtype, zero_velocity), float(len(gammas) * dtype.itemsize)
    return ("inputs", inputs) if inputs <= reverse else ("reverse", reverse)
