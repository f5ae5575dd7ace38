"""Read maps as data: what `calibrate` fits, `momentumize(calibration=...)` takes, and checkpoints carry. They act in `runtime.reads`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SettingsError

__all__ = ["Maps", "Place", "ReadMap", "data_of", "fingerprint", "maps_of"]

_NAMES = ("shift", "weight", "down", "up")  # of the tensors of a map, in the order in which they act
_FRAME = "frame"
Place = tuple[str, ...]
"""What tells a chain from the others of its model: the paths of its layers, or of the modules that own its steps."""


class ReadMap:
    """What a step reads and leaves: one affine map of channels, x + m + x W, and the frame of the velocity after the step.

    Args:
        tensors: "shift": m, of shape (n,), and W: as "weight" of shape (n, n), or (n,) for a diagonal one; or as its factors "down", of
            shape (n, rank), and "up", of shape (rank, n); and "frame", orthogonal, of shape (n, n), see `arithmetic.rotations`. The first
            of these or the last may be missing. All of one floating dtype.

    Raises:
        TypeError, ValueError: they are others, or of other shapes.
    """

    def __init__(self, **tensors: Tensor) -> None:
        if not _fitting(**tensors):
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            raise ValueError(f"a read map of {shapes}")
        self._own = {name: nn.Parameter(tensors[name].detach(), requires_grad=False) for name in _NAMES if name in tensors}
        self._frame = tensors[_FRAME].detach() if _FRAME in tensors else None
        self._frames: dict[torch.device, Tensor] = {}
        self._given: dict[Any, dict[str, nn.Parameter]] = {}

    @property
    def width(self) -> int:
        """Channels."""
        return len(next(iter(self.data().values())))

    @property
    def reads(self) -> bool:
        """Whether the step reads elsewhere than at x[t]."""
        return bool(self._own)

    @property
    def rotates(self) -> bool:
        """Whether the velocity has another frame after the step."""
        return self._frame is not None

    def frame(self, device: torch.device) -> Tensor | None:
        """That of the velocity after the step, (n, n); None where the step leaves it as it is."""
        if self._frame is None or self._frame.device == device:
            return self._frame
        if device not in self._frames:
            with torch.no_grad(), torch.inference_mode(False):
                self._frames[device] = self._frame.to(device)
        return self._frames[device]

    def data(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {name: t.data for name, t in self._own.items()} | ({} if self._frame is None else {_FRAME: self._frame})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_given": {}, "_frames": {}}

    def parameters(self, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
        """The tensors, by name, as a stream of this kind needs them."""
        shift = self._own["shift"]
        if (shift.dtype, shift.device) == (dtype, device):
            return self._own
        versions = tuple(t._version for t in self._own.values())
        if (dtype, device, versions) not in self._given:
            with torch.no_grad(), torch.inference_mode(False):
                found = {name: nn.Parameter(t.to(device, dtype), requires_grad=False) for name, t in self._own.items()}
            self._given = {k: v for k, v in self._given.items() if k[2] == versions} | {(dtype, device, versions): found}
        return self._given[dtype, device, versions]


def _fitting(frame: Tensor | None = None, **affine: Tensor) -> bool:
    """Whether these make a map."""
    if frame is None:
        return _is_affine(**affine)
    square = frame.dim() == 2 and frame.shape[0] == frame.shape[1] and frame.dtype.is_floating_point
    return square and _is_orthogonal(frame) and (not affine or (_is_affine(**affine) and affine["shift"].shape[0] == len(frame)))


def _is_orthogonal(frame: Tensor) -> bool:
    """Whether it leaves the lengths of four random vectors as they are, but for roundings of bfloat16."""
    with torch.no_grad(), torch.inference_mode(False):
        drawn = torch.randn(4, len(frame), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(frame.device)
        off = (drawn @ frame.detach().double()).norm(dim=1) / drawn.norm(dim=1) - 1
        return bool((off.abs() < 0.01).all())


def _is_affine(shift: Tensor, weight: Tensor | None = None, down: Tensor | None = None, up: Tensor | None = None) -> bool:
    width = shift.shape[0] if shift.dim() == 1 else -1
    if weight is not None:
        return down is up is None and tuple(weight.shape) in ((width,), (width, width))
    return down is not None and up is not None and tuple(down.shape) == (width, len(up)) and tuple(up.shape) == (len(up), width)


class Maps(dict[Place, tuple[ReadMap | None, ...]]):
    """Those of a network: for each chain, one for each step, or None.

    Attributes:
        streams: of each chain, how many dimensions its stream has, by which its channels are told, and how many channels; known from the
            first run that asks.
    """

    def __init__(self, given: Mapping[Place, tuple[ReadMap | None, ...]], streams: Mapping[Place, tuple[int, int]] | None = None) -> None:
        super().__init__(given)
        self.streams: dict[Place, tuple[int, int]] = dict(streams or {})


def data_of(maps: Maps) -> list[dict[str, Any]]:
    """Maps as lists, dictionaries and tensors, which torch.load(weights_only=True) reads. The tensors are shared."""
    found = {place: {"place": list(place), "maps": [None if m is None else m.data() for m in row]} for place, row in maps.items()}
    return [chain | ({"stream": list(maps.streams[place])} if place in maps.streams else {}) for place, chain in found.items()]


def maps_of(given: Any) -> Maps:
    """Maps from what a user gives as `calibration`.

    Args:
        given: None; a `Calibration`; its `maps`, or what `data_of` gave; or the maps themselves, of which a new dictionary is made.

    Raises:
        SettingsError: it is none of these.
    """
    given = getattr(given, "maps", given)
    if given is None or isinstance(given, Mapping):
        return Maps(given or {}, getattr(given, "streams", None))
    try:
        found = {tuple(chain["place"]): tuple(map(_map_of, chain["maps"])) for chain in given}
        streams = {tuple(chain["place"]): (int(chain["stream"][0]), int(chain["stream"][1])) for chain in given if "stream" in chain}
        return Maps(found, streams)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"calibration must be what mnet_fx.calibrate returned, or its maps, got {type(given).__name__} ({error!r})"
        ) from error


def _map_of(data: Any) -> ReadMap | None:
    return None if data is None else ReadMap(**data)


def fingerprint(maps: Maps) -> str:
    """SHA-256 of the places and the values, hexadecimal."""
    digest = hashlib.sha256()
    for place, found in sorted(maps.items()):
        tensors = [None if m is None else list(m.data().values()) for m in found]
        rotated = [m is not None and m.rotates for m in found]
        digest.update(repr(rotated).encode() if any(rotated) else b"")
        digest.update(repr((place, [None if m is None else (m[-1].dtype, *(tuple(t.shape) for t in m[1:])) for m in tensors])).encode())
        for tensor in (t for m in tensors if m is not None for t in m):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
