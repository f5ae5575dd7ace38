"""Named regions: the layers of a container become steps of a chain, without tracing the code that calls them.

    regions=["encoder.layers"]          for layer in self.layers:           the model's own Python, as it was
                                            x = layer(x, mask)[0]           each call is a step; layers find the running chain by x

The stream tensor that one layer returns leads the next to the chain: a table from tensors (by identity, weakly) to chains. A chain goes on
only if the tensor is that very one, unchanged, or an alias that one autograd function made of it (FSDP2's hooks hand such a one to each
layer); anything else starts a new chain, with a warning, or is an error.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.weak import WeakIdKeyDictionary

from ..arithmetic.device_planes import Reserve
from ..errors import UNCOMPILED, MnetError, MnetWarning, SettingsError, StreamError
from ..inner import Inner, WholeSteps, checked_inner, with_hook_guards
from ..runtime.own_copies import Learnt
from ..runtime.reads import Reads
from ..runtime.start import Recurrence
from ..runtime.steps import Chain
from ..runtime.unreturned import Leaving
from ..settings import Settings
from .layer_step import LayerCall, LayerStep, OwnForward

__all__ = ["NamedLayer", "NamedRegion", "layers_of", "name_region", "paths_of"]


@dataclass
class _Running:
    """A chain that a stream tensor belongs to.

    Of all records of a chain only the last one holds it: what autograd keeps for its steps may hold the streams before, so that they would
    hold each other for ever where no backward pass comes.
    """

    held: Chain | None
    chain: weakref.ref[Chain]
    t: int  # the time at which that tensor is the stream
    next: int  # index of the layer that comes next
    version: int


class NamedRegion:
    """One container whose layers are steps.

    Args:
        path: of the container in the model.
        layers: by their names in the container, in order; the same one may occur several times.
        settings: the recurrence.
        found: whether it was found, and not named: then a layer that never follows another is an error.
    """

    def __init__(self, path: str, layers: dict[str, nn.Module], settings: Settings, found: bool = False) -> None:
        self.path, self.factors = path, settings.factors(len(layers))
        self.names = [f"{path}.{name}" if path else name for name in layers]
        self.backward, self.on_drift, self.offload = settings.backward, settings.on_drift, settings.offload
        self.velocity = (settings.velocity,)  # in a tuple: `momentumize` makes it a submodule of the model
        self.positions: dict[int, list[int]] = {}
        self.widest = {p.dtype for layer in layers.values() for p in layer.parameters() if p.is_floating_point()}
        self.widest |= set() if settings.held is None else {settings.held}
        self.layers = list(layers.values())
        self.confirmed: set[int] | None = set() if found else None  # indices of layers that are known to begin or continue a chain
        self.learnt, self.leaving, self.reserve = Learnt(), Leaving(), Reserve()
        self.weights, self.read_maps = settings.weights, Reads(settings.calibration, tuple(self.names), settings.weights == "signed")
        self._index()

    @property
    def title(self) -> str:
        """The region in messages."""
        return self.path or "(root)"

    @property
    def shown(self) -> tuple[str, int, dict[str, int]]:
        """For the report: its path, number of layers, and what turns out to be copied."""
        return self.path, len(self.layers), self.learnt.sizes

    def _index(self) -> None:
        self.positions = {}
        for i, layer in enumerate(self.layers):
            self.positions.setdefault(id(layer), []).append(i)
        self.running: Any = WeakIdKeyDictionary()
        self.warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("running", "positions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._index()

    def step(self, layer: nn.Module, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of one of the layers.

        Raises:
            StreamError: the stream cannot be carried, or the call is a second one on a stream whose chain has gone on since.
        """
        call = LayerCall(f"a layer of {self.title}", args, kwargs)
        x = call.stream(args, kwargs)
        running = self._running(x)
        index = self._position(layer, running)
        chain = self._started(index, x) if running is None else self._continued(running, index, x)
        step = LayerStep(layer, function, call, self.names[index])
        try:
            extras = chain.step(step, call.sides, index)
            x = chain.x
        finally:
            chain.x = None  # the caller's alone from here on, so that the table can see it go; also where the layer raised
        if self.confirmed is not None:
            self.confirmed.add(index)
        if running is not None and running.held is chain:
            running.held = None
        if index + 1 < len(self.layers):
            self.running[x] = _Running(chain, weakref.ref(chain), chain.t, index + 1, 0 if x.is_inference() else x._version)
        return step.joined(x, extras)

    def _running(self, x: Tensor) -> _Running | None:
        """The chain whose stream x is, or is an alias of: the same memory, and its gradient goes straight to the stream's."""
        if x in self.running or x.grad_fn is None:
            return self.running.get(x)
        streams = [stream for ref in self.running.keyrefs() if (stream := ref()) is not None]  # a copy: threads share the table
        edges = x.grad_fn.next_functions
        alias = next((s for s in streams if (s.grad_fn, s.output_nr) in edges and _place(s) == _place(x)), None)
        return None if alias is None else self.running.get(alias)

    def _position(self, layer: nn.Module, running: _Running | None) -> int:
        known = self.positions[id(layer)]
        return next((i for i in known if running is not None and i >= running.next), known[0])

    def _started(self, index: int, x: Tensor) -> Chain:
        if not x.dtype.is_floating_point:
            raise StreamError(f"{self.names[index]}: the stream must be a real floating tensor, got {x.dtype}")
        if index:
            self._broken(index)
        recurrence = Recurrence(
            self.title,
            self.factors[index:],
            self.backward,
            self.on_drift,
            self.velocity[0],
            self.widest,
            None,
            self.learnt,
            self.reserve,
            self.read_maps,
            leaving=self.leaving,
            offload=self.offload,
        )
        return recurrence.start(x)

    def _broken(self, index: int) -> None:
        """A chain that begins in the middle."""
        if torch._C._current_graph_task_id() != -1:
            raise StreamError(
                f"{self.names[index]} is run again in a backward pass without the chain it belongs to, by a torch.utils.checkpoint around "
                "this layer: remove it (gradient_checkpointing_disable()), the chain keeps no activations by itself"
            )
        if self.confirmed and index not in self.confirmed:
            raise StreamError(
                f"regions='auto' took the layers of {self.title} for a chain, but {self.names[index]} was called with another tensor than "
                f"{self.names[index - 1]} returned: leave regions out, which captures the model; or name the containers that are chains "
                f"(print(net.report) lists those that were found), with {self.path!r} among them only if its layers are residual and "
                f"chains shall begin anew where the model adds something between them, as in regions=[{self.path!r}]"
            )
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.names[index]} was called with another tensor than {self.names[index - 1]} returned (or alone), so a new "
                "chain starts there with velocity 0: the model changes the stream between the two, or calls only part of the container",
                MnetWarning,
                stacklevel=4,
            )

    def _continued(self, running: _Running, index: int, x: Tensor) -> Chain:
        chain, name = running.chain(), self.names[index]
        if not x.is_inference() and x._version != running.version:
            raise StreamError(
                f"{name}: the stream was changed in place since {self.names[running.next - 1]} returned it: use an out-of-place operation"
            )
        if chain is None or chain.t != running.t:
            raise StreamError(
                f"{name} was called on a stream whose chain has gone on since: a layer called twice on one tensor (branch off with a clone "
                "of it), or run again by a torch.utils.checkpoint around it (remove it, the chain keeps no activations by itself)"
            )
        if index < running.next:  # the loop starts over: another pass through the container
            return self._started(index, x)
        if index > running.next:  # layers were skipped, as by LayerDrop: the velocity waits
            chain.tape.factors = (*chain.tape.factors[: chain.t], *self.factors[index:])
        chain.x = x
        return chain


class NamedLayer(OwnForward):
    """The `forward` of a layer in a named region.

    Args:
        owner: the layer.
        region: the region it is part of.
    """

    def __init__(self, owner: nn.Module, region: NamedRegion) -> None:
        super().__init__(owner)
        self.region = region
        self.how: dict[str, Any] | None = None  # arguments of torch.compile for it
        self.compiled: Any = None

    @torch.compiler.disable(reason=UNCOMPILED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.region.step(self.owner, self.function, args, kwargs)

    @property
    def function(self) -> Any:
        """What runs the layer."""
        if self.how is None:
            return self.original
        if self.compiled is None:
            self.compiled = with_hook_guards(torch.compile(self.original, **self.how))
        return self.compiled

    def compile(
        self,
        *,
        backend: Inner = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        dynamic: bool | None = None,
        **how: Any,
    ) -> None:
        """What stands in the place of the layer's `compile`, which would compile this object's call and not what the layer computes.

        Args:
            backend, mode, options, dynamic, how: as for torch.compile.

        Raises:
            SettingsError: inductor would use CUDA graphs, or the backend is this package's.
        """
        self.compiled, self.how = None, {"backend": WholeSteps(checked_inner(backend), mode, options, dynamic), "dynamic": dynamic} | how

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"compiled": None}  # which is of this very layer

    def release(self) -> nn.Module | None:
        super().release()
        del self.owner.compile
        return self.region.velocity[0]


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor are, and how to read them."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.dtype, x.shape, x.stride(), x.is_neg()


def layers_of(net: nn.Module, path: str, skip: int = 0) -> dict[str, nn.Module]:
    """The layers of a container by their names in it; arguments and errors are those of `name_region`."""
    try:
        container = net.get_submodule(path)
    except AttributeError:
        close = [name for name, module in net.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1]
        raise SettingsError(f"{type(net).__name__} has no container {path!r}; containers of several layers are {close[:10]}") from None
    layers = list(container._modules.items())
    if skip and 0 < len(layers) <= skip:
        raise SettingsError(f"{path!r} holds no layer but the first, which stays as it is: use keep_first_layer=False, or leave it out")
    found = {name: layer for name, layer in layers[skip:] if layer is not None}
    if not found or len(found) < len(layers) - skip:
        raise SettingsError(f"{path!r} holds no layers to rewrite: name a ModuleList, a Sequential or another container of layers")
    return found


def paths_of(named: Any) -> list[str]:
    """The paths of containers that were given as a list, or as one string.

    Raises:
        SettingsError: they are something else.
    """
    paths = [named] if isinstance(named, str) else list(named) if isinstance(named, Iterable) else [named]
    if not all(isinstance(path, str) for path in paths):
        raise SettingsError(f"containers are named by their paths in the model, as in ['encoder.layers'], got {named!r}")
    return paths


def name_region(net: nn.Module, path: str, settings: Settings, skip: int = 0, found: bool = False, inner: Inner = "eager") -> NamedRegion:
    """Makes the layers of a container steps of one chain, in place.

    Args:
        net: the model.
        path: of a ModuleList, Sequential, or any module whose children are called one after the other.
        settings: the recurrence.
        skip: how many layers at the start stay as they are.
        found: as for `NamedRegion`.
        inner: what compiles the layers.

    Raises:
        SettingsError: there is no such container, or a layer of it is in another region.
    """
    layers = layers_of(net, path, skip)
    region = NamedRegion(path, layers, settings, found)
    for layer in dict.fromkeys(layers.values()):
        if isinstance(layer, OptimizedModule) or layer._compiled_call_impl is not None:
            raise SettingsError(
                f"a layer of {path!r} is compiled already: momentumize the model before that, with inner='inductor', or compile the layers "
                "then; or leave regions out, as the layers are captured through their wrappers"
            )
        if "forward" in layer.__dict__ or "compile" in layer.__dict__:
            raise SettingsError(f"a layer of {path!r} has a forward of its own or is in another region: name each container once")
        if isinstance(layer, torch.jit.ScriptModule):
            raise MnetError(f"a layer of {path!r} is a ScriptModule, whose forward cannot be replaced")
        layer.forward = named = NamedLayer(layer, region)
        layer.compile = named.compile  # type: ignore[method-assign]
        if inner != "eager":
            named.compile(backend=inner)
    return region
