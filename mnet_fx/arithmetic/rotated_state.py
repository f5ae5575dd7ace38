"""The state of a chain whose velocity is rotated: `State`, but what the shears multiply by are matrices over channels, not numbers.

All is computed by torch's own operations in float64, part by part. A rerun makes the same products of the same parts; should they come out
otherwise, the fingerprints say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .fixed_point import Record, State
from .formats import Format
from .kernels.eager import CHUNK_CPU, CHUNK_DEVICE, EAGER, LARGEST, Kernels, max_abs, read, strides, unshear_u
from .rotations import Rotation

__all__ = ["RotatedState"]


class RotatedState(State):
    """A state of which each step may be rotated."""

    def step(self, y: Tensor, gamma: float, weight: float, rotation: Rotation | None = None) -> tuple[Record, Tensor]:
        """One step, in place: v <- gamma * v + weight * y; x <- x + v + c (v - v O); v <- v O.

        Args:
            y, gamma, weight: as in `State.step`.
            rotation: O and c; None: O is the identity.
        """
        if rotation is None:
            return super().step(y, gamma, weight)
        record = self._record()
        record.rotation = rotation
        y, _ = self._finite(y)
        record.finite = self.mask is record.mask
        self.dtype = torch.promote_types(self.dtype, y.dtype)
        self._widen(Format.of(self.dtype))
        added = torch.empty_like(self.U, dtype=torch.float64)
        for turn, part, given in _parts(rotation, added, y):
            part.copy_(_in_frame(turn, given, record.finite))
        v_bound = gamma * self.v_bound + abs(weight) * max_abs(added)
        held = self.v_bound / (self.ratio * self.unit)  # a bound of |U|, taken now: room for X may make the ratio underflow
        if self._is_full(self.x_bound + v_bound):
            self.x_bound = min(self.x_bound, self._largest(self.X) * self.unit)
            v = self.U.double().mul(gamma * self.ratio * self.unit).add_(added, alpha=weight)
            roundings = v.shape[rotation.axis] * (1 + 2 * rotation.reach) * self.unit  # of U: at most a unit for each channel
            self._room_in_x(record, self.x_bound + max(v_bound, max_abs(_moves(rotation, v, v)) + roundings))
            del v
        self._add_to_u(record, gamma, weight, v_bound, held, added)
        self._add_to_x(record, _moves(rotation, self.U, added))
        out = torch.empty_like(self.X, dtype=self.dtype)
        read(self.X, out, self.unit)
        return record, self._held(out)

    def _is_full(self, x_bound: float) -> bool:
        """Whether X has no room for x up to that bound."""
        return x_bound >= (self.format.limit - 4) * self.unit

    def _add_to_u(self, record: Record, gamma: float, weight: float, v_bound: float, held: float, added: Tensor) -> None:
        """Brings U, the ratio and the bound of v to t + 1. v_bound: that without roundings; held: a bound of |U| before the step."""
        self._room_in_u(record, gamma, v_bound, held)
        self.v_bound = v_bound * (1 + 1e-9) + self.ratio * self.unit
        record.scale = weight / (self.ratio * self.unit)
        _add(self.U, added, record.scale)

    def _add_to_x(self, record: Record, moved: Tensor) -> None:
        """Brings X and the bound of x to t + 1. moved: what v adds to x, in units of U."""
        most = max_abs(moved) * self.ratio * self.unit
        if self._is_full(self.x_bound + most):
            self.x_bound = min(self.x_bound, self._largest(self.X) * self.unit)
        assert record.x_spill is None or not self._is_full(self.x_bound + most)  # room was made for that
        self._room_in_x(record, self.x_bound + most)
        record.ratio = self.ratio
        self.x_bound = (self.x_bound + most) * (1 + 1e-9) + 2 * self.unit
        _add(self.X, moved, record.ratio)

    def _loops(self, record: Record, finite: bool = True) -> Kernels:
        rotation = record.rotation
        if rotation is None:
            return super()._loops(record, finite)

        def unshear_x(X: Tensor, U: Tensor, out: Tensor, ratio: float, unit: float) -> None:
            for turn, x, u in _parts(rotation, X, U):
                unshear_u(x, _like(x, turn.velocity(u.double())), ratio)
            read(X, out, unit)

        def unshear_rotated_u(U: Tensor, y: Tensor, scale: float, finite: bool = True) -> None:
            for turn, u, part in _parts(rotation, U, y):
                unshear_u(u, _like(u, _in_frame(turn, part, finite)), scale)

        return Kernels(EAGER.shear, unshear_x, unshear_rotated_u)


def _add(T: Tensor, y: Tensor, scale: float) -> None:
    """T += round(y * scale), which `unshear_u` with that scale takes back."""
    unshear_u(T, y, -scale)


def _in_frame(rotation: Rotation, y: Tensor, finite: bool) -> Tensor:
    """y in float64, in the frame of U; elements that are not finite are 0."""
    y = y.double()
    return rotation.residual(y if finite else torch.where(y.abs() <= LARGEST, y, 0.0))


def _moves(rotation: Rotation, u: Tensor, out: Tensor) -> Tensor:
    """`rotation.velocity` of u, part by part, in float64, written to `out`."""
    for turn, part, given in _parts(rotation, out, u):
        part.copy_(turn.velocity(given.double()))
    return out


def _parts(rotation: Rotation, *tensors: Tensor) -> Iterator[tuple[Rotation, Tensor, Tensor]]:
    """Views of two dense tensors of equal strides, part by part, each with the rotation as it acts on them. Tensors of one shape always
    have the same parts: how a product of matrices is rounded may depend on the number of rows.
    """
    first = tensors[0]
    n = first.shape[rotation.axis]
    if first.is_contiguous() and rotation.axis == first.dim() - 1:
        rotation, tensors = replace(rotation, axis=1), tuple(t.view(-1, n) for t in tensors)
    elif rotation.axis == 0 or any(stride > first.stride(0) for stride, _ in strides(first)):
        yield rotation, tensors[0], tensors[1]
        return
    most = max(CHUNK_CPU if first.device.type == "cpu" else CHUNK_DEVICE, n * n)
    rows = max(1, most // max(1, first.numel() // max(1, tensors[0].shape[0])))
    for one, other in zip(*(t.split(rows) for t in tensors), strict=True):
        yield rotation, one, other


def _like(t: Tensor, other: Tensor) -> Tensor:
    """`other` in the layout of t."""
    return other if strides(other) == strides(t) else torch.empty_like(t, dtype=other.dtype).copy_(other)
