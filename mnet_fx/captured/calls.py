"""One call of a rewritten model, and the function that Dynamo captures for it."""

from __future__ import annotations

import itertools
import sys
import time
import types
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo.utils import graph_break_reasons

from ..errors import MnetError
from .graphs import Graph

__all__ = ["PREFIX", "Call", "Stopped", "forget", "function_of"]

PREFIX = "mnet_fx_forward_of_"  # of the names of these functions
_number = itertools.count()


class Stopped(BaseException):
    """Ends a call before the first graph runs; carries the code that Dynamo made for it."""

    def __init__(self, code: types.CodeType | None) -> None:
        super().__init__("stopped before running")
        self.code = code


class Call:
    """One call of a rewritten model.

    Attributes:
        graphs: those that ran so far.
        new: those captured in it.
        entered: paths of the modules inside that Python, and not Dynamo, called.
        within: those of them that it is in now, outermost first.
        places: for each graph that ran, the innermost of them at that time: not all of its own code was left to Python.
        left: whether Python ran the model's function.
        dry: the name of the model's function, to stop before the first graph runs; None to run it.
        whole: whether all must be in one graph, so that plain Python can run the code that Dynamo makes.
    """

    def __init__(self, dry: str | None = None, whole: bool = False) -> None:
        self.graphs: list[Graph] = []
        self.new: list[Graph] = []
        self.entered: set[str] = set()
        self.within: list[str] = []
        self.places: set[str] = set()
        self.left, self.whole = False, whole
        self.dry, self.began, self.breaks_before = dry, time.perf_counter(), len(graph_break_reasons)

    @property
    def breaks(self) -> list[Any]:
        """Why Dynamo broke graphs in it, in order."""
        return graph_break_reasons[self.breaks_before :]

    @property
    def place(self) -> str:
        """Path of the module that Python is in, "" for the model itself."""
        return self.within[-1] if self.within else ""

    @property
    def course(self) -> tuple[frozenset[int], frozenset[str]]:
        """What ran in it: graphs, by their numbers, and what Python called."""
        return frozenset(graph.number for graph in self.graphs), frozenset(self.entered)

    def ran(self, graph: Graph) -> None:
        """A graph is about to run."""
        graph = graph.at(self.place)
        if graph.refused is not None:
            raise MnetError(graph.refused)
        self.graphs.append(graph)
        self.places.add(self.place)
        if self.dry is not None:
            raise Stopped(None if self.entered else _running_code(self.dry))


def _running_code(name: str) -> types.CodeType | None:
    """The code that Dynamo made of the function of that name; None if a module inside, captured by itself, called the graph."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return None if frame is None else frame.f_code


def _left(owner: nn.Module) -> None:
    """Called where Python runs the function of a model, and not what Dynamo made of it."""
    if (call := owner.__dict__["forward"].running()) is not None:
        call.left = True


torch._dynamo.eval_frame.skip_code(_left.__code__)


def _through_class(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    if not torch.compiler.is_dynamo_compiling():
        _left(self)
    return type(self).forward(self, *args, **kwargs)


def _through_instance(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    if not torch.compiler.is_dynamo_compiling():
        _left(self)
    return self.__dict__["forward"].own_forward(*args, **kwargs)


def function_of(owner: nn.Module, has_own: bool) -> types.FunctionType:
    """A function (model, *args) -> result of its forward, with a code object of its own.

    Dynamo attaches what it compiles to the code object, and counts recompilations there. With one for each model, those of a class neither
    use up each other's limit nor keep each other alive. Nothing here refers to the model: the garbage collector does not see what hangs on
    code.
    """
    template = _through_instance if has_own else _through_class
    code = template.__code__.replace(co_name=f"{PREFIX}{type(owner).__name__}_{next(_number)}")
    return types.FunctionType(code, {"__builtins__": __builtins__, "__name__": __name__, "torch": torch, "_left": _left})


def forget(owner: nn.Module) -> None:
    """Has Dynamo forget what it compiled for modules of a model that it captured apart from the model's function."""
    for cls in {type(module) for module in owner.modules()}:
        function: Any = None if cls.__module__.startswith("torch.") else cls.forward
        while hasattr(function, "__code__"):
            reset_code(function.__code__)
            function = getattr(function, "__wrapped__", None)
