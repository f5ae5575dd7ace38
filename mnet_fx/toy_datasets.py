"""Small data sets to try a network on: the functions of `momentumnet.toy_datasets`, which draw the same points from the same seed.

Importing this module seeds nothing; call `torch.manual_seed` for points that repeat.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["make_circle", "make_data", "make_data_1D", "random_points_1D"]


def make_circle(radius: float = 1, N: int = 100, label: float = 0, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Points in a ring around the origin, whose inner radius is 3 * radius and whose width is 3 * noise.

    Args:
        radius: a third of the inner radius.
        N: number of points.
        label: the label of all of them.
        noise: a third of the width.

    Returns:
        The points, of shape (2, N), and their labels, of shape (N,), both float.
    """
    angles = 2 * math.pi * torch.rand(1, N)
    distances = 3 * (radius + noise * torch.rand(1, N))
    return torch.cat([angles.cos() * distances, angles.sin() * distances]), torch.full((N,), float(label))


def make_data(N: int = 100, n_r: int = 2) -> tuple[Tensor, Tensor]:
    """Nested rings, which no line separates: the labels of neighbours are 0, 1, 0, 1, ...

    Args:
        N: number of points in each ring.
        n_r: number of rings.

    Returns:
        The points, of shape (n_r * N, 2), float, and their labels, of shape (n_r * N,), int64.
    """
    rings = [make_circle(0.5 * (i + 1), N, i % 2) for i in range(n_r)]
    points, labels = zip(*rings, strict=True)
    return torch.cat(points, 1).T.contiguous(), torch.cat(labels).long()


def random_points_1D(N: int = 100) -> Tensor:
    """N numbers, uniform in [-1, 1), of shape (1, N)."""
    return 2 * torch.rand(1, N) - 1


def make_data_1D(N: int) -> Tensor:
    """N numbers, uniform in [-1, 1), of shape (N, 1)."""
    return random_points_1D(N).view(-1, 1)
