"""What the user chose, checked once; and the factors g[t], b[t] of the recurrence that follow from it."""

from __future__ import annotations

import numbers
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from .budget.sizes import parsed
from .errors import SettingsError
from .read_maps import maps_of

__all__ = ["Settings", "matched_weights", "momentum_weights"]

Gamma = float | Callable[[int, int], float]
Backward = Literal["reversible", "stored"]
Granularity = Literal["add", "module"] | int
OnDrift = Literal["raise", "warn", "ignore"]
Precision = Literal["standard", "high"]
Rest = Literal["store", "checkpoint"]
Weights = Literal["momentum", "matched", "signed"]


def momentum_weights(gammas: Sequence[float]) -> tuple[float, ...]:
    """b[t] = 1 - g[t], the weights of Sander et al. 2021 (arXiv 2102.07870, eq. 2)."""
    return tuple(1.0 - g for g in gammas)


def matched_weights(gammas: Sequence[float]) -> tuple[float, ...]:
    """Weights with which a chain that starts at v[0] = 0 ends where the original network's recurrence does.

    With c[T] = 0, c[t] = g[t] * (1 + c[t+1]) and b[t] = 1 / (1 + c[t+1]), the quantity z[t] = x[t] + c[t] * v[t] obeys
    z[t+1] = z[t] + f[t](x[t]): the original recurrence, but for f being read at x instead of z. z[0] = x[0] because v[0] = 0, and
    x[T] = z[T] because c[T] = 0.
    """
    rest, weights = 0.0, []
    for gamma in reversed(gammas):
        weights.append(1.0 / (1.0 + rest))
        rest = gamma * (1.0 + rest)
    return tuple(reversed(weights))


class _Schedule:
    """A schedule `(t, steps) -> g[t]` that keeps what it gave, so that a pickle can do without the function where that has no name."""

    def __init__(self, function: Callable[[int, int], float]) -> None:
        self.function: Callable[[int, int], float] | None = function
        self.known: dict[tuple[int, int], Any] = {}

    def __call__(self, t: int, steps: int) -> Any:
        if (t, steps) not in self.known:
            if self.function is None:
                raise SettingsError(
                    f"gamma is a schedule that could not be pickled (a lambda), and a chain of {steps} steps is new to it: give "
                    "momentumize a function of a module"
                )
            self.known[t, steps] = self.function(t, steps)
        return self.known[t, steps]

    def __deepcopy__(self, memo: dict) -> _Schedule:
        return self

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.function)
        except Exception:  # pickle says so in several ways
            return self.__dict__ | {"function": None}
        return self.__dict__


_CHOICES: dict[str, Any] = {
    "weights": Weights,
    "backward": Backward,
    "on_drift": OnDrift,
    "precision": Precision,
    "rest": Rest,
}


@dataclass(frozen=True)
class Settings:
    """Options of `momentumize` that concern the recurrence and its backward; see there for their meaning.

    Attributes:
        calibration: the network's read maps, which `calibrate` fills in; given as `read_maps.maps_of` takes them.

    Raises:
        SettingsError: an option has a value that cannot work; the message says which do.
    """

    gamma: Gamma = 0.9
    initial_velocity: str | nn.Module = "zero"
    weights: Weights = "momentum"
    granularity: Granularity = "add"
    backward: Backward = "reversible"
    min_steps: int = 2
    on_drift: OnDrift = "raise"
    precision: Precision = "standard"
    rest: Rest = "store"
    calibration: Any = field(default=None, compare=False, repr=False)
    keep: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        if not callable(self.gamma):
            _check_gamma(self.gamma)
        elif not isinstance(self.gamma, _Schedule):
            object.__setattr__(self, "gamma", _Schedule(self.gamma))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise SettingsError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {getattr(self, name)!r}")
        known = self.granularity in ("add", "module")
        if not known and (isinstance(self.granularity, bool) or not isinstance(self.granularity, int) or self.granularity < 1):
            raise SettingsError(f"granularity must be 'add', 'module' or how many blocks make a step, got {self.granularity!r}")
        if self.velocity is not None and not isinstance(self.velocity, nn.Module):
            raise SettingsError(f"initial_velocity must be 'zero', 'first' or a module that gives v[0] from x[0], got {self.velocity!r}")
        if self.matched and self.velocity is not None:
            raise SettingsError(f"weights={self.weights!r} needs v[0] = 0: use initial_velocity='zero' or 'first', or weights='momentum'")
        if not isinstance(self.offload, bool):
            raise SettingsError(f"offload must be True or False, got {self.offload!r}")
        object.__setattr__(self, "keep", parsed(self.keep, "keep", least=0))
        object.__setattr__(self, "calibration", maps_of(self.calibration))
        if self.calibration and not self.matched:
            raise SettingsError("calibration needs weights='matched' or 'signed', as calibrate does")
        if isinstance(self.min_steps, bool) or not isinstance(self.min_steps, int) or self.min_steps < 1:
            raise SettingsError(f"min_steps must be a whole number of steps, 1 or more, got {self.min_steps!r}")

    @property
    def matched(self) -> bool:
        """Whether the chain ends where the original network's recurrence does, but for where f is read: see `matched_weights`."""
        return self.weights != "momentum"

    @property
    def held(self) -> torch.dtype | None:
        """The dtype as which states hold every stream, whatever its own; None: its own."""
        return torch.float64 if self.precision == "high" else None

    @property
    def velocity(self) -> Any:
        """The module that gives v[0], or None for v[0] = 0."""
        is_name = isinstance(self.initial_velocity, str) and self.initial_velocity in ("zero", "first")
        return None if is_name else self.initial_velocity

    def gammas(self, steps: int) -> tuple[float, ...]:
        """g[0], ..., g[steps - 1]."""
        gammas = [self._scheduled(t, steps) if callable(self.gamma) else self.gamma for t in range(steps)]
        if self.initial_velocity == "first":
            gammas[0] = 0.0
        return tuple(_check_gamma(g, f"gamma({t}, {steps})") for t, g in enumerate(gammas))

    def _scheduled(self, t: int, steps: int) -> Any:
        assert callable(self.gamma)
        try:
            return self.gamma(t, steps)
        except Exception as error:
            raise SettingsError(
                f"gamma({t}, {steps}) failed ({type(error).__name__}: {error}); a schedule is a function (t, steps) -> number in [0, 1) "
                "of the step t = 0, ..., steps - 1"
            ) from error

    def factors(self, steps: int) -> tuple[tuple[float, float], ...]:
        """(g[t], b[t]) for t = 0, ..., steps - 1."""
        gammas = self.gammas(steps)
        weights = matched_weights(gammas) if self.matched else momentum_weights(gammas)
        return tuple(zip(gammas, weights, strict=True))


def _check_gamma(gamma: Any, name: str = "gamma") -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real) or not 0 <= float(gamma) < 1:
        hint = "" if isinstance(gamma, numbers.Real) else "; a schedule is a function (t, steps) -> number"
        hint = ": at 1 the residual branch has no weight; use 0.99" if not hint and gamma == 1 else hint
        raise SettingsError(f"{name} must be a number in [0, 1), got {gamma!r}{hint}")
    return float(gamma)
