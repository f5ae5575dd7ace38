"""Copies of Dynamo's nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx

__all__ = ["node_copy"]


def node_copy(graph: fx.Graph, node: fx.Node, values: Callable[[fx.Node], Any]) -> fx.Node:
    """As `graph.node_copy`, and it keeps where Dynamo says that an input comes from."""
    new = graph.node_copy(node, values)
    if hasattr(node, "_dynamo_source"):
        new._dynamo_source = node._dynamo_source
    return new
