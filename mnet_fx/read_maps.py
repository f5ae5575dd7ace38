"""Read maps as data: what `calibrate` fits, `momentumize(calibration=...)` takes, and checkpoints carry. They act in `runtime.reads`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SettingsError

__all__ = ["Maps", "Place", "ReadMap", "data_of", "fingerprint", "maps_of"]

Place = tuple[str, ...]
"""What tells a chain from the others of its model: the paths of its layers, or of the modules that own its steps."""


class ReadMap:
    """One affine map of channels.

    Args:
        shift: m, of shape (n,).
        weight: W, of shape (n, n), or (n,) for a diagonal one. Both of one floating dtype.
    """

    def __init__(self, shift: Tensor, weight: Tensor) -> None:
        self.shift, self.weight = (nn.Parameter(t.detach(), requires_grad=False) for t in (shift, weight))
        self._given: dict[Any, tuple[nn.Parameter, nn.Parameter]] = {}

    def data(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {"shift": self.shift.data, "weight": self.weight.data}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_given": {}}

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
        """m and W as a stream of this kind needs them."""
        if (self.shift.dtype, self.shift.device) == (dtype, device):
            return self.shift, self.weight
        key = dtype, device, self.shift._version, self.weight._version
        if key not in self._given:
            with torch.no_grad(), torch.inference_mode(False):
                shift, weight = (nn.Parameter(t.to(device, dtype), requires_grad=False) for t in (self.shift, self.weight))
            self._given = {k: v for k, v in self._given.items() if k[2:] == key[2:]} | {key: (shift, weight)}
        return self._given[key]


Maps = dict[Place, tuple[ReadMap | None, ...]]
"""Those of a network: for each chain, one for each step, or None."""


def data_of(maps: Maps) -> list[dict[str, Any]]:
    """Maps as lists, dictionaries and tensors, which torch.load(weights_only=True) reads. The tensors are shared."""
    return [{"place": list(place), "maps": [None if m is None else m.data() for m in found]} for place, found in maps.items()]


def maps_of(given: Any) -> Maps:
    """Maps from what a user gives as `calibration`.

    Args:
        given: None; a `Calibration`; its `maps`, or what `data_of` gave; or the maps themselves, of which a new dictionary is made.

    Raises:
        SettingsError: it is none of these.
    """
    given = getattr(given, "maps", given)
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    try:
        return {tuple(chain["place"]): tuple(map(_map_of, chain["maps"])) for chain in given}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"calibration must be what mnet_fx.calibrate returned, or its maps, got {type(given).__name__} ({error!r})"
        ) from error


def _map_of(data: Any) -> ReadMap | None:
    if data is None:
        return None
    shift, weight = data["shift"], data["weight"]
    if shift.dim() != 1 or tuple(weight.shape) not in ((len(shift),), (len(shift), len(shift))):
        raise ValueError(f"a shift of shape {tuple(shift.shape)} with a weight of shape {tuple(weight.shape)}")
    return ReadMap(shift, weight)


def fingerprint(maps: Maps) -> str:
    """SHA-256 of the places and the values, hexadecimal."""
    digest = hashlib.sha256()
    for place, found in sorted(maps.items()):
        digest.update(repr((place, [None if m is None else (m.weight.dtype, tuple(m.weight.shape)) for m in found])).encode())
        for tensor in _tensors(found):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(found: Iterable[ReadMap | None]) -> Iterable[Tensor]:
    return (t for m in found if m is not None for t in (m.shift, m.weight))
