"""`plan`: what to keep and what to run again, so that a training step fits in the memory there is.

    least kept  --keep more, what saves most work for its bytes first--> most that fits        `compiled.keeping`, `momentumize(keep=...)`

Each try is a training step on fake tensors, as for an estimate, in one capture of the model.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from ..compiled.keeping import Keeping
from ..errors import MnetError, SettingsError
from ..progress import working
from .estimates import Way
from .estimating import Request
from .sizes import parsed, shown
from .ways import Taken, default_loss

__all__ = ["Plan", "plan"]


_CHOSEN = {"rest": "store", "keep": 0, "regions": None, "backward": "reversible"}
"""Options that a plan decides on, and what they are by default."""


@dataclass(frozen=True)
class Plan:
    """What `plan` chose.

    Attributes:
        model: name of the class.
        memory: bytes that were asked for.
        options: those of `momentumize` with which the model keeps to it: `momentumize(model, **plan.options)`.
        predicted: the training step with these options; its `total_bytes` are at most `memory`.
        least, plain: with the least kept, and of the original model.
        kept: for each chain, and each segment of the rest that can be run again: what it is, how many steps or segments are kept, and of
            how many.
        seconds_taken: how long it took to plan.
    """

    model: str
    memory: int
    options: dict[str, Any]
    predicted: Way
    least: Way
    plain: Way
    kept: tuple[tuple[str, int, int], ...] = field(repr=False)
    seconds_taken: float = field(compare=False)
    _at: Callable[[str | float], Plan] = field(repr=False, compare=False)

    def at(self, memory: str | float) -> Plan:
        """The plan for other memory, without another capture.

        Raises:
            SettingsError, MnetError: as of `plan`.
        """
        began = time.perf_counter()
        return replace(self._at(memory), seconds_taken=time.perf_counter() - began)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what json.dumps takes, if the options are."""
        ways = {"predicted": asdict(self.predicted), "least": asdict(self.least), "plain": asdict(self.plain)}
        kept = [{"what": what, "kept": some, "of": all_} for what, some, all_ in self.kept]
        return {"model": self.model, "memory": self.memory, "options": self.options, **ways, "kept": kept}

    def __str__(self) -> str:
        ways = {"plain": self.plain, "this plan": self.predicted, "least kept": self.least}
        rows = [["total at the peak", *(shown(way.total_bytes) for way in ways.values())]]
        rows += [["peak of forward and backward", *(shown(way.peak_bytes) for way in ways.values())]]
        rows += [["operations / plain", *(f"{way.flops_ratio:.2f}" for way in ways.values())]]
        table = tabulate(rows, ["", *ways], tablefmt="simple", disable_numparse=True, colalign=("left", "right", "right", "right"))
        kept = tabulate([[name, f"{some} of {all_}"] for name, some, all_ in self.kept], ["kept", ""], tablefmt="simple")
        granularity = self.options.get("granularity", "add")
        chosen = f"rest={self.options['rest']!r}, keep={self.options['keep']}" + (
            "" if granularity == "add" else f", granularity={granularity!r}"
        )
        return f"{self.model} in {shown(self.memory)}: {chosen}\n\n{table}\n\n{kept}"


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    memory: str | float,
    optimizer: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> Plan:
    """Chooses `rest` and `keep` for `momentumize`, so that a training step fits in the memory there is and least is run again.

    Args:
        model: any module that can be captured, on any device (also "meta"); the original.
        example_inputs: the largest call of the model in training, as for `estimate`.
        memory: bytes that forward, backward and the optimizer may take at their peak, parameters and all included, as a number or a text
            such as "16GiB"; or a number below 1, relative to `total_bytes` of plain training.
        optimizer: as for `estimate`.
        loss: as for `estimate`.
        options: those of `momentumize`, but for rest, keep and regions. granularity may be several, such as ("add", "module", 2): each
            makes another momentum network, and the one is taken of which least is run again in the memory there is.

    Returns:
        A `Plan`; print it. Less memory never gives a plan with a higher peak.

    What it supposes is what `estimate` supposes; work space of cuDNN and fragmentation come on top. Bytes that the model keeps in eval mode
    or for larger calls are not counted.

    Raises:
        SettingsError: an argument cannot be used, or is chosen by the plan.
        MnetError: there is no way to take so little; the message says what the least is. Or the model cannot be estimated.
    """
    began = time.perf_counter()
    if chosen := [name for name, default in _CHOSEN.items() if options.pop(name, default) != default]:
        raise SettingsError(f"plan chooses how much is kept of a captured model: leave {', '.join(chosen)} out")
    many = options.pop("granularity", "add")
    kinds = many if isinstance(many, (tuple, list)) else [many]
    if not kinds:
        raise SettingsError("granularity must be one or more of what may make a step, got none")
    loss = default_loss if loss is None else loss
    each = [{**options, "granularity": kind, "rest": "checkpoint"} for kind in kinds]
    requests = [Request.of(model, example_inputs, optimizer, loss, chosen) for chosen in each]
    with working(f"planning {type(model).__name__}"):
        plain = requests[0].taken("plain", None)
        assert plain is not None
        best = _best([_Tries(request, plain) for request in requests], memory)
    return replace(best, seconds_taken=time.perf_counter() - began)


def _best(tries: Sequence[_Tries], memory: str | float) -> Plan:
    """Of the plans that fit, that with the least work.

    Raises:
        MnetError: none does.
    """
    size = _size(memory, tries[0].plain.way)
    fitting = [each for each in tries if each.at(0).total_bytes <= size]
    if not fitting:
        least = min(tries, key=lambda each: each.at(0).total_bytes)
        raise MnetError(_too_little(type(least.request.model).__name__, size, least.at(0), least.plain.way))
    plans = [each.plan(size) for each in fitting]
    best = min(plans, key=lambda plan: (plan.predicted.flops_ratio, plan.predicted.total_bytes))
    return replace(best, _at=partial(_best, tries))


class _Tries:
    """Steps with so much kept, of one model."""

    def __init__(self, request: Request, plain: Taken) -> None:
        self.request, self.plain = request, plain
        self.known: dict[int, Way] = {}

    def plan(self, size: int) -> Plan:
        """What fits in so many bytes; the least must."""
        keep = self._most(size)
        return Plan(
            model=type(self.request.model).__name__,
            memory=size,
            options={**self.request.options, "keep": keep},
            predicted=self.at(keep),
            least=self.at(0),
            plain=self.plain.way,
            kept=self.kept(keep),
            seconds_taken=0.0,
            _at=partial(_best, [self]),
        )

    def _most(self, size: int) -> int:
        """The most that can be kept, if a step may take so many bytes.

        The more is kept the more it takes, mostly byte for byte: so the next try is where that would meet `size`, or, every third time that
        this does not halve what is left, the middle.
        """
        sizes = self.sizes
        low, high = 0, len(sizes)  # the first fits, the second does not
        guess, slow = high - 1, 0
        while high - low > 1:
            before = high - low
            if self.at(sizes[guess]).total_bytes <= size:
                low = guess
            else:
                high = guess
            spare = size - self.at(sizes[low]).total_bytes
            guess = min(max(bisect_right(sizes, sizes[low] + spare) - 1, low + 1), high - 1)
            slow = slow + 1 if high - low > before // 2 else 0
            if slow % 3 == 2:
                guess = (low + high) // 2
        return sizes[low]

    @property
    def keepings(self) -> list[Keeping]:
        """Of the graphs that were captured; to be asked after a try."""
        forward: Any = self.request.momentum.__dict__["forward"]
        return forward.keepings

    @property
    def sizes(self) -> list[int]:
        """Values of keep that make a difference, from 0 on."""
        sums = (accumulate(cost.size for _, cost in keeping.items) for keeping in self.keepings)
        return sorted({0, *(size for found in sums for size in found)})

    def at(self, keep: int) -> Way:
        if keep not in self.known:
            if self.known:
                for keeping in self.keepings:
                    keeping.spend(keep)
            taken = self.request.again("momentum")
            self.known[keep] = replace(taken.way, flops_ratio=taken.flops / self.plain.flops if self.plain.flops else 1.0)
        return self.known[keep]

    def kept(self, keep: int) -> tuple[tuple[str, int, int], ...]:
        for keeping in self.keepings:
            keeping.spend(keep)
        return tuple((keeper.title, keeper.stored, many) for keeping in self.keepings for keeper, many in keeping.counts())


def _size(memory: str | float, plain: Way) -> int:
    if isinstance(memory, float):
        return int(memory * plain.total_bytes) if 0 < memory <= 1 else parsed(f"{memory:.0f}")
    return parsed(memory)


def _too_little(name: str, size: int, least: Way, plain: Way) -> str:
    part, most = max(least.parts.items(), key=lambda item: item[1])
    return (
        f"{name} does not fit in {shown(size)}: with the least kept, a training step takes {shown(least.total_bytes)}, of which most are "
        f"{part} ({shown(most)}); plain training takes {shown(plain.total_bytes)}. A smaller batch takes less, and a gamma nearer to 1 if "
        "states of chains are much; print(mnet_fx.estimate(...)) shows where it goes"
    )
