"""Read maps and frames fitted to streams; what `calibrate` does with tokens once it has them. All in float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["FULL_AT_LEAST", "FULL_FROM", "Kind", "affine", "chosen", "frame"]

Kind = Literal["auto", "diagonal", "low-rank", "full"]
RIDGE = 3e-3  # of the mean variance of a channel
FULL_FROM, FULL_AT_LEAST = 6, 4  # tokens per channel: "auto" fits full maps from the first on; below the second they are worse than none
PER_RANK, WIDEST = 16, 4  # "auto", with too few tokens for full maps: tokens for each unit of rank; the rank is at most width // WIDEST


def chosen(kind: Kind, rank: int | None, tokens: int, width: int) -> tuple[Kind, int | None]:
    """Kind and rank of a map fitted to so many tokens."""
    if kind == "auto" and tokens >= FULL_FROM * width:
        kind = "full"
    elif kind == "auto":
        kind, rank = "low-rank", min(tokens // PER_RANK, width // WIDEST)
    elif kind == "low-rank" and rank is None:
        rank = width // WIDEST
    return kind, None if rank is None else min(max(rank, 1), width)


def affine(x: Tensor, e: Tensor, kind: str, rank: int | None) -> dict[str, Tensor]:
    """m and W of e ~ m + x W, for (tokens, n) each.

    Source of the low-rank fit: reduced-rank regression, Izenman 1975, doi 10.1016/0047-259X(75)90042-1: the fit of full rank, projected
    onto the directions in which what it predicts varies most.
    """
    mean_x, mean_e = x.mean(0), e.mean(0)
    x, e = x - mean_x, e - mean_e
    if kind == "diagonal":
        weight = (x * e).mean(0) / ((x * x).mean(0) * (1 + RIDGE) + 1e-12)
        return {"shift": mean_e - mean_x * weight, "weight": weight}
    covariance = x.T @ x / len(x)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(covariance, x.T @ e / len(x))
    if rank is None:
        return {"shift": mean_e - mean_x @ weight, "weight": weight}
    up = torch.linalg.eigh(weight.T @ covariance @ weight).eigenvectors[:, -rank:].T  # orthonormal rows
    down = weight @ up.T
    return {"shift": mean_e - mean_x @ down @ up, "down": down, "up": up}


def frame(z: Tensor, e: Tensor, kind: str, rank: int | None, sensitivity: Tensor) -> Tensor:
    """The orthogonal Q, (n, n), for which reading at z - a e Q in place of z changes the outputs least, to first order.

    The part of e that a map of that kind predicts from z does no harm, as the map takes it away. Of the rest, Q turns the directions of
    largest variance into those to which the outputs are least sensitive: of all Q, this pairing has the least trace of (covariance of e Q)
    times sensitivity, by the rearrangement inequality.

    Args:
        z: (tokens, n), what the original would read.
        e: (tokens, n), a multiple of which lies between z and what is read; in the frame in which the chain began.
        sensitivity: (n, n), the mean of g g' over tokens, with g the gradient of the outputs by what is read.
    """
    shift, *factors = affine(z, e, kind, rank).values()
    for factor in factors:
        z = z * factor if factor.dim() == 1 else z @ factor
    rest = e - z - shift
    largest_first = torch.linalg.eigh(rest.T @ rest / len(rest)).eigenvectors.flip(1)
    return largest_first @ torch.linalg.eigh(sensitivity).eigenvectors.T
