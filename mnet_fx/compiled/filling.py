"""A graph whose calls are pieces and regions, each compiled by itself: the whole of a Dynamo graph, or a step with regions in it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from passes import PROOF, is_hook

from ..arithmetic.valueless import Effects
from ..inner import faking
from ..regions.region import ChainRegion
from .cats import let_skips_wait_apart
from .compiler import Compiler

__all__ = ["FakeRun", "Filler", "Unseen"]


class FakeRun(fx.Interpreter):
    """Runs a graph on fake tensors.

    Args:
        gm: the graph.
        compiler: knows their mode.
        fill: called with a region and its fake arguments in place of running it, returns fake outputs.
        effects: notes what the operations do besides.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        compiler: Compiler,
        fill: Callable[[ChainRegion, tuple[Any, ...]], Any],
        effects: Effects | None = None,
    ) -> None:
        super().__init__(gm)
        self.effects = nullcontext() if effects is None else effects
        assert compiler.fake_mode is not None
        self.compiler, self.fake_mode, self.fill = compiler, compiler.fake_mode, fill

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and isinstance(getattr(self.module, str(n.target)), ChainRegion):
            return super().run_node(n)
        if is_hook(n):  # no hooks on fake tensors
            return self.fetch_args_kwargs_from_env(n)[0][0]
        with faking(self.fake_mode), self.effects:
            return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = getattr(self.module, target)
        return self.fill(module, args) if isinstance(module, ChainRegion) else super().call_module(target, args, kwargs)


class Filler(FakeRun):
    """Goes through a graph of pieces and regions, and puts the compiled form in place of each.

    Args:
        gm, compiler, fill: as in `FakeRun`.
        segment: makes the module of a piece that can be run again, of its graph and its compiled form.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        compiler: Compiler,
        fill: Callable[[ChainRegion, tuple[Any, ...]], Any],
        segment: Callable[[fx.GraphModule, Callable[..., Any]], nn.Module] | None = None,
    ) -> None:
        super().__init__(gm, compiler, fill)
        self.segment = segment

    def run_node(self, n: fx.Node) -> Any:
        is_piece = n.op == "call_module" and isinstance(getattr(self.module, str(n.target)), fx.GraphModule)
        return self._piece(n) if is_piece else super().run_node(n)

    def _piece(self, n: fx.Node) -> Any:
        piece, (args, _) = getattr(self.module, str(n.target)), self.fetch_args_kwargs_from_env(n)
        before = [_form(value) for value in args]
        with faking(self.fake_mode):
            result = piece(*args)
        if any(isinstance(value, Tensor) for value in (*args, *result)):
            # A piece that changes the form of its arguments, as by `unsqueeze_`, has changed these: it will be called with others, once.
            changed = before != [_form(value) for value in args]
            if PROOF in piece.meta and not self.compiler.traces:
                let_skips_wait_apart(piece, [i for i, arg in enumerate(n.args) if isinstance(arg, fx.Node) and self._is_shared(arg)])
            run = piece if changed else self.compiler(piece, args)
            segment = self.segment if PROOF in piece.meta and not changed else None
            setattr(self.module, str(n.target), _Piece(run) if segment is None else segment(piece, run))
        return result

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether a value of the graph's own may have other readers; what a region hands out, it may read itself."""
        if node.op == "placeholder" or any(user.op == "output" for user in node.users):
            return False  # others hold it, and keep it
        makers = [node, *node.all_input_nodes] if node.target is operator.getitem else [node]
        regions = (isinstance(getattr(self.module, str(maker.target)), ChainRegion) for maker in makers if maker.op == "call_module")
        return len(node.users) > 1 or any(regions)


def _form(value: Any) -> Any:
    """Shape, strides and need of a gradient of a tensor, which operations in place change."""
    return (value.shape, value.stride(), value.requires_grad) if isinstance(value, Tensor) and value.layout is torch.strided else None


class Unseen(nn.Module):
    """A module whose calls no hooks see: it is none of the user's, and gets parameters as inputs. A hook that waits for the gradients of
    all inputs, as those of torch's module trackers do, would gather these until the last one is there.
    """

    @property
    def _compiled_call_impl(self) -> Any:  # type: ignore[override]  # torch's slot for what runs in place of the call with hooks
        return self.forward


class _Piece(Unseen):
    """A compiled function as a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Any) -> Any:
        return self._run(*args)
