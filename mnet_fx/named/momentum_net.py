"""`MomentumNet` and `transform_to_momentumnet`: the interface of the package momentumnet 0.10, on this runtime.

v[t+1] = gamma * v[t] + (1 - gamma) * f[t](x[t], *args)
x[t+1] = x[t] + v[t+1]
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arithmetic.device_planes import Reserve
from ..checkpoints import check, gamma_record, note, remember_transform
from ..errors import UNCOMPILED, MnetError, SettingsError, StreamError
from ..reporting.build import REPORT, note_transform
from ..runtime.own_copies import Learnt
from ..runtime.start import Recurrence
from ..runtime.steps import Chain
from ..runtime.tape import ReversingTape
from ..runtime.unreturned import Leaving
from ..settings import Settings
from .layer_step import LayerCall, LayerStep
from .layers import layers_of, name_region, paths_of

__all__ = ["FinalVelocity", "MomentumNet", "convert_momentumnet_state_dict", "transform_to_momentumnet"]


class MomentumNet(nn.Module):
    """A momentum residual network of given functions.

    Args:
        functions: modules `f[t](x, *args)` that keep the shape of x: a list, a ModuleList or a Sequential. The same one may occur several
            times, and without any the network returns x. They become the children "0", "1", ...
        gamma: the momentum, in [0, 1).
        init_speed: start from v[0] = init_function(x[0]) instead of 0.
        init_function: module that gives v[0]; becomes the child "init".
        use_backprop: autograd stores the activations; False: none are stored, the backward pass works them out again, exactly.
        is_residual: False if the functions are whole blocks, so that `f[t](x) - x` is iterated.

    Called as `net(x, *args, **kwargs)` with x of any shape and real floating dtype; every function gets `args` and `kwargs` too. Outputs
    and gradients are the same bits for both values of `use_backprop`.

    Raises:
        SettingsError: gamma is out of range, or a function is no module.
        StreamError: in a call: x is not real floating point, or a function or init_function does not keep its shape.

    Source: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870, eq. 2.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        gamma: float = 0.9,
        init_speed: bool = False,
        init_function: nn.Module | None = None,
        use_backprop: bool = True,
        is_residual: bool = True,
    ) -> None:
        super().__init__()
        found = list(functions) if isinstance(functions, Iterable) else [functions]
        if not isinstance(functions, Iterable) or not all(isinstance(function, nn.Module) for function in found):
            wrong = next((function for function in found if not isinstance(function, nn.Module)), functions)
            raise SettingsError(f"MomentumNet takes a list of modules f[t], or a Sequential; got {_brief(wrong)}")
        if init_speed and init_function is None:
            raise SettingsError("init_speed=True needs an init_function, the module that gives v[0] from x[0]")
        if init_function is not None and not isinstance(init_function, nn.Module):
            raise SettingsError(f"init_function must be a module that gives v[0] from x[0], got {_brief(init_function)}")
        for i, function in enumerate(found):
            self.add_module(str(i), function)
        if init_function is not None:
            self.add_module("init", init_function)
        self.gamma, self.init_speed, self.use_backprop, self.is_residual = gamma, init_speed, use_backprop, is_residual
        self.n_functions = len(found)
        self.learnt, self.leaving, self.reserve = Learnt(), Leaving(), Reserve()
        self._factors()

    @property
    def functions(self) -> list[nn.Module]:
        """f[0], f[1], ..."""
        return [self._modules[str(i)] for i in range(self.n_functions)]  # type: ignore[misc]

    @property
    def init_function(self) -> nn.Module:
        """The module that gives v[0]."""
        if self._modules.get("init") is None:
            raise AttributeError("this MomentumNet has no init_function: its velocity starts at 0")
        return self._modules["init"]  # type: ignore[return-value]

    @property
    def mnet_fx_options(self) -> dict[str, Any]:
        """What decides which network this is, as its checkpoints carry it."""
        gamma = gamma_record(self.gamma, {self.n_functions})
        return {"by": "MomentumNet", "gamma": gamma, "init_speed": self.init_speed, "is_residual": self.is_residual}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note(destination, prefix, self.mnet_fx_options)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        check(local_metadata, prefix, self.mnet_fx_options, type(self).__name__)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @torch.compiler.disable(reason=UNCOMPILED)
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backward = "stored" if self.use_backprop else "reversible"
        return self._chain(_checked(x), args, kwargs, backward).x if self.n_functions else _checked(x)

    def final_state(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, FinalVelocity]:
        """(x[T], v[T]) without gradients, from which `inverse` comes back to x, bit for bit.

        Args:
            x: x[0], as in a call.
            args: likewise.
            kwargs: likewise.

        Returns:
            x[T] as a tensor; v[T] as an object that holds the exact integers besides the tensor `v.value`.
        """
        if not self.n_functions:
            raise MnetError("a MomentumNet without functions has no state: it returns x")
        x = _checked(x).detach()
        with torch.enable_grad():  # so that a reversing tape is made; the inputs need no gradients
            chain = self._chain(x, args, kwargs, "reversible", inverse=True)
        tape = chain.tape
        assert isinstance(tape, ReversingTape)
        start, before, last = tape.state_at(0), tape.state_at(self.n_functions - 1), chain.x.detach()
        return last, FinalVelocity(last - before, last, _Inverse(tape, x - start))

    def inverse(self, x: Tensor, v: FinalVelocity) -> Tensor:
        """The input of the network, bit for bit, from its final state: the recurrence run backwards on the exact integers.

        Args:
            x: what `final_state` returned.
            v: likewise. The functions and their extra arguments must be as they were then.

        Returns:
            x[0], of the shape and dtype of x.

        Raises:
            MnetError: x and v are not one final state.
            InversionError: a function does not repeat, or its parameters have changed since.
        """
        if not isinstance(v, FinalVelocity):
            raise MnetError(f"inverse needs the v that final_state returned, which holds the exact integers; got a {type(v).__name__}")
        if x.shape != v.last.shape or not torch.equal(x, v.last):
            raise MnetError("x is not the final x that belongs to this v: give both as final_state returned them")
        start = v.inverse.tape.state_at(0)
        return torch.where(start == 0, v.inverse.rest, start + v.inverse.rest)

    def _factors(self) -> tuple[tuple[float, float], ...]:
        return Settings(gamma=self.gamma).factors(self.n_functions)

    def _chain(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], backward: str, inverse: bool = False) -> Chain:
        velocity = self.init_function if self.init_speed else None
        widest = {p.dtype for p in self.parameters() if p.is_floating_point()}
        known: dict[str, Any] = {"learnt": self.learnt, "leaving": self.leaving, "reserve": self.reserve}
        recurrence = Recurrence("MomentumNet", self._factors(), backward, "raise", velocity, widest, None, **known)
        chain = recurrence.start(x, reversing=inverse)
        for i, function in enumerate(self.functions):
            call = LayerCall(str(i), (x, *args), kwargs)
            chain.step(LayerStep(function, function, call, str(i), residual=self.is_residual), call.sides)
        return chain


@dataclass(frozen=True)
class _Inverse:
    """What it takes to go back: the tape, and what the grid took from x[0]."""

    tape: ReversingTape
    rest: Tensor


@dataclass(frozen=True)
class FinalVelocity:
    """v[T] of one run of a `MomentumNet`.

    Attributes:
        value: v[T] as a tensor of the shape and dtype of x.
        last: x[T].
        inverse: the exact state, for `MomentumNet.inverse`.
    """

    value: Tensor
    last: Tensor
    inverse: _Inverse


class _MomentumContainer(MomentumNet):
    """Takes the place of a container of residual functions that Python loops over: the loop, by items or indices, meets one network.

    With `kept` layers at the start that stay as they are; the children keep the names they had in the container.
    """

    def __init__(self, layers: Sequence[nn.Module], kept: int, **options: Any) -> None:
        super().__init__(layers[kept:], **options)
        self._modules.clear()
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)
        self.kept = kept

    @property
    def functions(self) -> list[nn.Module]:
        return self._layers()[self.kept :]

    def _layers(self) -> list[nn.Module]:
        return [layer for layer in self._modules.values() if layer is not None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for layer in self._layers()[: self.kept]:
            x = layer(x)
        return super().forward(x, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        yield from self._layers()[: self.kept]
        yield super().forward

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]

    def __len__(self) -> int:
        return self.kept + 1


def transform_to_momentumnet(
    model: nn.Module,
    sub_layers: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    keep_first_layer: bool = True,
    gamma: float = 0.9,
    use_backprop: bool = False,
    is_residual: bool = False,
) -> nn.Module:
    """The momentum counterpart of a model: the layers of each named container become one momentum network.

    `momentumize(model)` finds the residual chains by itself; this function does what it is told.

    Args:
        model: any module; left as it was. The result has parameters of its own, with the same values, and the same `state_dict` keys.
        sub_layers: paths of containers.
        keep_first_layer: leave the first layer of each container alone, which may change the shape.
        gamma: the momentum, in [0, 1).
        use_backprop: autograd stores the activations; False: none are stored.
        is_residual: False: the layers are whole blocks, x + f(x) or not, and f(x) - x is iterated, wherever the model calls them. True:
            they are residual functions; code that loops over the container then meets a single network in their place.

    Returns:
        A copy of the model, with a `report` as after `momentumize`. May be transformed again, with other containers.

    Raises:
        SettingsError: there is no such container, or gamma is out of range, or `momentumize` has rewritten the model already.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"transform_to_momentumnet takes an nn.Module, got a {type(model).__name__}")
    if REPORT in model.__dict__:
        raise SettingsError(
            "momentumize has rewritten this model already: transform the original, or momentumize it again with other options"
        )
    net, containers = copy.deepcopy(model), []
    settings = Settings(gamma=gamma, backward="stored" if use_backprop else "reversible")
    for path in paths_of(sub_layers):
        layers_of(net, path, int(keep_first_layer))  # or says what is wrong with it
        if not is_residual:
            containers.append(name_region(net, path, settings, skip=int(keep_first_layer)).shown)
            continue
        layers = [layer for layer in net.get_submodule(path)._modules.values() if layer is not None]  # children() skips repeats
        parent, _, name = path.rpartition(".")
        container = _MomentumContainer(layers, int(keep_first_layer), gamma=gamma, use_backprop=use_backprop, is_residual=True)
        setattr(net.get_submodule(parent), name, container)
        containers.append((path, container.n_functions, container.learnt.sizes))
    note_transform(net, containers, settings)
    gamma_now = gamma_record(settings.gamma, {steps for _, steps, _ in containers})
    remember_transform(net, sub_layers=paths_of(sub_layers), keep_first_layer=keep_first_layer, gamma=gamma_now, is_residual=is_residual)
    return net


def convert_momentumnet_state_dict(state_dict: dict[str, Any], keep_first_layer: bool = True) -> dict[str, Any]:
    """Keys of momentumnet 0.10 -> keys of this package, which are those of the model before the transform.

        network.3.weight                   ->  3.weight                 MomentumNet
        network.init.weight                ->  init.weight
        layer1.0.conv1.weight              ->  the same                 the first layer, kept
        layer1.1.0.network.2.conv1.weight  ->  layer1.3.conv1.weight    transform_to_momentumnet
        encoder.layers.0.network.2.norm    ->  encoder.layers.2.norm    with keep_first_layer=False

    Args:
        state_dict: what `state_dict()` of a momentumnet model gave.
        keep_first_layer: as in the transform that made that model.

    Returns:
        A new dictionary with the same values.

    Raises:
        SettingsError: it is no dictionary.
    """
    if not isinstance(state_dict, Mapping):
        raise SettingsError(f"convert_momentumnet_state_dict takes what net.state_dict() gives, got {_brief(state_dict)}")
    inner = r"\.1\.0" if keep_first_layer else r"\.0"
    container = re.compile(rf"^(.+?){inner}\.network\.(\d+)\.")

    def converted(key: str) -> str:
        key = container.sub(lambda m: f"{m[1]}.{int(m[2]) + int(keep_first_layer)}.", key)
        return re.sub(r"^network\.(\d+|init)\.", r"\1.", key)

    return {converted(key): value for key, value in state_dict.items()}


def _checked(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise StreamError(f"MomentumNet: x must be a real floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return x


def _brief(thing: Any) -> str:
    return "None" if thing is None else f"a {type(thing).__name__}"
