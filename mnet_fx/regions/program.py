"""Generated code that runs on live modules, pickles, and copies."""

from __future__ import annotations

import hashlib
import importlib
import linecache
from types import ModuleType
from typing import Any

import torch.fx as fx

__all__ = ["Program"]


class Program:
    """The function a graph stands for, called with the module whose attributes it reads: `program(owner, *args, **kwargs)`.

    An `fx.GraphModule` holds its submodules itself; a program looks them up on `owner` at each call, so replacing one has its effect.
    Pickles as source text and the names it refers to.

    Attributes:
        source: Python source of one function `forward(self, ...)`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        code = graph.python_code("self")
        self.source = code.src[code.src.index("def forward(") :]  # leaves out fx.wrap calls, which only matter to another trace
        self._names = dict(code.globals)
        self._compile()

    def _compile(self) -> None:
        file = f"<mnet_fx {hashlib.sha1(self.source.encode()).hexdigest()[:12]}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)  # for tracebacks
        scope = dict(self._names)
        exec(compile(self.source, file, "exec"), scope)
        self._function = scope["forward"]

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return self._function(owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Program:
        return self

    def __getstate__(self) -> dict[str, Any]:
        modules = {name: value.__name__ for name, value in self._names.items() if isinstance(value, ModuleType)}
        return {"source": self.source, "modules": modules, "names": {n: v for n, v in self._names.items() if n not in modules}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source = state["source"]
        self._names = state["names"] | {name: importlib.import_module(module) for name, module in state["modules"].items()}
        self._compile()
