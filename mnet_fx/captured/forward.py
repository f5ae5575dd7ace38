"""The forward of a rewritten model: captured by Dynamo at the first call of each kind, guarded, and captured again where a guard fails.

    net(x) -> CapturedForward -> torch.compile(a function of this model's own) -> Dynamo's guards and code -> graphs with regions

What Python decided while it was captured (attributes, globals, sizes, modes, hooks) is Dynamo's to guard. What is ours is that the original
network never runs in place of the momentum network: a call in which no graph of ours ran is an error, and so is one that would make
another network than the first did (`network`).

Where tensors are not what Dynamo can guard (torch.export, torch.jit.trace, make_fx, torch.func, dispatch modes), Dynamo's guards choose the
program on stand-ins of the same kind, without running it, and plain Python then runs that program on what was given.
"""

from __future__ import annotations

import copy
import dis
import inspect
import logging
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.eval_frame import cached_backends, remove_from_cache
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..arithmetic.valueless import valueless
from ..compiled.keeping import Keeping
from ..errors import UNCOMPILED, MnetError, MnetWarning
from ..inner import Inner
from ..regions.region import ChainRegion
from ..reporting.build import REPORT
from ..reporting.report import Report
from ..runtime.surroundings import exported, transformed
from ..settings import Settings
from .calls import Call, Stopped, forget, function_of
from .capturing import Capture, cut, said
from .configured import CONFIG, configured, stance, switched_off
from .doors import check_caller, close, install, passed_by
from .left_out import left_out
from .network import Network
from .previewed import Previewed, behind_a_break, previewed
from .stand_ins import stand_ins
from .value_sizes import cannot, explained

__all__ = ["CapturedForward"]

log = logging.getLogger("mnet_fx")

_SLOW = 2.0  # seconds of a capture that are worth a line in the log
_COURSES = 1000  # that are remembered at most; where layers are dropped at random, nearly each call takes another


class CapturedForward:
    """The `forward` of a rewritten model.

    Args:
        owner: the model, whose `forward` this becomes.
        settings: the recurrence.
        inner: what runs or compiles the steps and everything between the chains.
    """

    def __init__(self, owner: nn.Module, settings: Settings, inner: Inner) -> None:
        self.owner, self.settings, self.inner = owner, settings, inner
        self.own_forward: Callable[..., Any] | None = owner.__dict__.pop("forward", None)
        self.network = Network()
        self.inside = {path: module for path, module in owner.named_modules() if path}
        self.logged = self.warned = False
        self.sized = True  # whether sizes that depend on values go into graphs
        self.told: set[str] = set()
        self.broken_at = ""  # where Dynamo broke its graph first in the last capture in which it did
        self._prepare()

    def _prepare(self) -> None:
        self.calls = threading.local()
        self.regions: list[ChainRegion] = []  # of all graphs
        self.keepings: list[Keeping] = []  # likewise
        self.taken_in: set[Any] = set()  # courses of calls that went through
        self.spoilt = False  # whether Dynamo may have noted in a call that raised to leave the model's code to Python
        install(self.inside, self)

    @cached_property
    def compiled(self) -> tuple[types.FunctionType, Callable[..., Any]]:
        """The model's function, and what Dynamo makes of it."""
        return self._compiled(self.inner)  # at the first call, as torch.compile does nothing where torch.export copies the model

    @cached_property
    def plain(self) -> tuple[types.FunctionType, Callable[..., Any]]:
        """Likewise, for the programs that plain Python runs."""
        return self.compiled if self.inner == "eager" else self._compiled("eager")

    def _compiled(self, inner: Inner) -> tuple[types.FunctionType, Callable[..., Any]]:
        function = function_of(self.owner, self.own_forward is not None)
        backend = Capture(self, inner)
        compiled = torch.compile(function, backend=backend)
        for key, known in list(cached_backends.items()):  # where Dynamo would keep it, and so the model, for ever
            if getattr(known, "compiler_fn", None) is backend:
                cached_backends.pop(key, None)
        # The garbage collector does not see what Dynamo attaches to code, nor that it leads back to the code.
        weakref.finalize(self, remove_from_cache, function.__code__).atexit = False
        return function, compiled

    @torch.compiler.disable(reason=UNCOMPILED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_caller(self.owner)
        if transformed() or exported() or _get_current_dispatch_mode_stack() or valueless(*args, *kwargs.values()):
            return self._program(args, kwargs)(self.owner, *args, **kwargs)
        if self.spoilt:
            self._renew()
        with self.call() as call:
            with self._spoiling():
                result = self._run(call, False, args, kwargs)
            self._finish(call)
        return result

    def _run(self, call: Call, plain: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call, as Dynamo makes it. Where that cannot do with sizes that depend on values, as `x[mask].tolist()`, they end graphs."""
        try:
            return (self.plain if plain else self.compiled)[1](self.owner, *args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            if call.graphs or call.entered or call.left or not self.sized:
                raise cannot(self.owner, error) from error
        except RuntimeError as error:
            if (found := explained(self.owner, error)) is None:
                raise
            raise found from error
        self.sized = False
        self._renew()
        function, compiled = self.plain if plain else self.compiled
        call.dry = call.dry and function.__code__.co_name
        with configured(sized=False):
            return compiled(self.owner, *args, **kwargs)

    @contextmanager
    def _spoiling(self) -> Iterator[None]:
        """An exception of the model's own, where Dynamo meets it as it captures, has it leave that code to Python from then on."""
        before = convert_frame.FRAME_COUNTER
        try:
            yield
        except BaseException as error:  # such as KeyboardInterrupt
            if before != convert_frame.FRAME_COUNTER and not isinstance(error, (TorchDynamoException, MnetError)):
                self.spoilt = True
                forget(self.owner)  # at once, as other models may have modules of these classes
            raise

    def _renew(self) -> None:
        """Has Dynamo begin anew with the model's function too."""
        for name in ("compiled", "plain"):
            if name in self.__dict__:
                remove_from_cache(self.__dict__.pop(name)[0].__code__)
        forget(self.owner)
        self.regions, self.keepings, self.spoilt = [], [], False

    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any], plain: bool = False) -> types.CodeType | None:
        """Captures a kind of call, if it has not been, without running it.

        Args:
            args, kwargs: the call; of its tensors nothing but what they are like is read.
            plain: whether for the program that plain Python runs.

        Returns:
            The code that Dynamo made of the model's function for this kind of call; None if it begins with a graph break.
        """
        try:
            with self.call((self.plain if plain else self.compiled)[0].__code__.co_name, plain) as call:
                self._run(call, plain, args, kwargs)
        except Stopped as stopped:
            function = (self.plain if plain else self.compiled)[0]
            whole = stopped.code not in (None, function.__code__) and all(graph.complete for graph in call.graphs)
            self._take_in(call, complete=whole)
            if not whole and not plain:
                warnings.warn(
                    f"{type(self.owner).__name__}: Dynamo breaks its graph{said(call.breaks)}, and sees nothing beyond before the model "
                    "runs: net.report is a preview until the first call",
                    MnetWarning,
                    stacklevel=4,
                )
            return stopped.code if whole else None
        return self._without_graphs((self.plain if plain else self.compiled)[0], call)

    @contextmanager
    def call(self, dry: str | None = None, whole: bool = False) -> Iterator[Call]:
        """A call of the model in this thread; arguments as for `Call`."""
        if (reason := switched_off()) is not None:  # before Dynamo notes for ever that it is to skip the code of the model
            raise MnetError(self._left(reason, "would run"))
        call, outer = Call(dry, whole), self.running()
        self.calls.now = call
        try:
            with configured(self.sized or whole):
                yield call
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, MnetError):
                raise error.inner_exception from None
            raise
        except FailOnRecompileLimitHit as error:
            raise MnetError(
                f"{type(self.owner).__name__} was captured for {CONFIG['recompile_limit']} kinds of calls, which is the limit: something "
                "that its forward reads is another at each call (TORCH_LOGS=recompiles says what); keep that constant or make it a "
                "tensor, or name the list of layers with regions=[...], which needs no capture"
            ) from error
        finally:
            self.calls.now = outer

    def running(self) -> Call | None:
        return getattr(self.calls, "now", None)

    def closed(self, probably: bool = False) -> Collection[str]:
        return self.previewed.closed if probably and not self.network.reports else self.network.closed

    @cached_property
    def previewed(self) -> Previewed:
        return previewed(self.owner, self.settings)

    def previewed_report(self) -> Report:
        """What a capture will probably make of the model."""
        return behind_a_break(self.previewed.report, self.broken_at)

    def _finish(self, call: Call) -> None:
        """Looks back at a call that went through."""
        if not call.graphs and not self.network.none_ran(call.entered, passed_by(self.inside, [""])):
            self._without_graphs(self.compiled[0], call)
            if not self.network.reports and not self.previewed.report.regions:
                self._warn_of_nothing(call)
        if call.new or (call.graphs and call.course not in self.taken_in):  # also of what was captured in a call that raised
            self._take_in(call)
            if len(self.taken_in) >= _COURSES:
                self.taken_in.clear()
            self.taken_in.add(call.course)

    def _take_in(self, call: Call, complete: bool = True) -> None:
        shown = self.owner.__dict__.get(REPORT) is self.owner.__dict__.get("report")
        self.broken_at = said(call.breaks) or self.broken_at
        broken = [graph.broken for graph in call.new or call.graphs if graph.broken is not None]
        between = cut(self.owner, call.graphs, self.broken_at) if complete else None
        broken = broken or ([] if between is None else [between])
        left, missed = left_out(self.owner, call, self.settings) if complete else (None, None)
        broken += [] if missed is None else [missed]
        self.network.add(call.graphs, self.owner.training, complete, call.entered, passed_by(self.inside, call.entered), left)
        if self.network.reports:
            self.owner.__dict__ |= {REPORT: self.network.report} | ({"report": self.network.report} if shown else {})
        seconds = time.perf_counter() - call.began
        if seconds > _SLOW and call.new and not self.logged:
            self.logged = True
            log.warning("%s was captured in %.1f s; later calls of this kind need no capture", type(self.owner).__name__, seconds)
        for text in set(broken) - self.told:
            warnings.warn(text, MnetWarning, stacklevel=4)
        self.told |= set(broken)
        if complete and not any(graph.chains for graph in call.graphs) and (call.new or not self.network.chains):
            self._warn_of_nothing(call)

    def _warn_of_nothing(self, call: Call) -> None:
        told = said(call.breaks)
        why = f"Dynamo breaks its graph{told}" if told else "print(net.report) says why"
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{type(self.owner).__name__}: no residual chain was rewritten, it computes what it did; {why}",
                MnetWarning,
                stacklevel=5,
            )

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The program of a kind of call as a function that plain Python runs: (model, *args, **kwargs) -> result."""
        with stand_ins(self.owner, args, kwargs) as (args, kwargs):
            code = self.capture(args, kwargs, plain=True)
        if code is None:
            raise MnetError(
                f"{type(self.owner).__name__}: Dynamo breaks its graph of the model (TORCH_LOGS=graph_breaks says where), so there is no "
                "one program to export, trace or transform; give momentumize what is inside of the break, or name its list of layers with "
                "regions=[...]"
            )
        return types.FunctionType(code, self.plain[0].__globals__)

    def _without_graphs(self, function: types.FunctionType, call: Call) -> types.CodeType | None:
        """A call ran no graph: fine where the model computes nothing on tensors, or is read without any residual add; else an error.

        Dynamo's code for a call, that which ran last being the first in its list, calls the model's forward only where it left that to
        Python.

        Returns:
            That code; None if the call was left to Python.
        """
        if not call.entered and not call.left and torch._dynamo.eval_frame._stance.stance == "default":
            for entry in torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)[:1]:
                named = [str(instruction.argval) for instruction in dis.get_instructions(entry.code)]  # co_names has more than is used
                if not any(name in ("forward", "own_forward") or name.startswith("__resume_at") for name in named):
                    return entry.code
        seen = previewed(self.owner, self.settings).report  # anew: what the model's attributes are by now decides
        if not seen.residual_adds and not seen.refusals:
            return None
        reason = stance() or f"Dynamo left the whole forward to Python{said(call.breaks) or ' (TORCH_LOGS=graph_breaks may say why)'}"
        raise MnetError(self._left(reason))

    def _left(self, reason: str, ran: str = "ran") -> str:
        return (
            f"{type(self.owner).__name__}: in this call {reason}, so the original network {ran} and not the momentum network: undo "
            "that, or name its list of layers with regions=[...], which needs no capture"
        )

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own_forward or type(self.owner).forward.__get__(self.owner))

    @property
    def __code__(self) -> Any:  # torch.export wants a file and a line
        return type(self).__call__.__code__

    def release(self) -> nn.Module | None:
        """Makes the model what it was before; returns the module for v[0], which it had not."""
        del self.owner.__dict__["forward"]
        if self.own_forward is not None:
            self.owner.__dict__["forward"] = self.own_forward
        close(self.owner)
        return self.settings.velocity

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedForward:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self._state(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if callable(self.settings.gamma) and not self.network.reports:
            for region in self.previewed.report.regions:  # a schedule that cannot be pickled remembers what it gave
                self.settings.gammas(region.steps)
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("calls", "compiled", "plain", "previewed", "regions", "keepings", "taken_in", "spoilt")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._prepare()


for _function_of_ours in (CapturedForward.running, CapturedForward.closed):  # called between graphs, where Dynamo looks at every frame
    torch._dynamo.eval_frame.skip_code(_function_of_ours.__code__)
