"""Proof on the user's own model and data that a rewritten network is what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..arithmetic.fingerprints import fingerprint
from ..arithmetic.formats import Format
from ..budget.estimating import estimate
from ..budget.measured import measure
from ..budget.sizes import shown
from ..budget.undoing import same, undone
from ..errors import InversionError, MnetError, SettingsError
from ..progress import working
from ..reporting.build import report_of
from ..runtime.guise import plain
from ..runtime.start import FLOATING
from ..runtime.steps import watched
from .subject import Outcome, Subject, Undecided, off_by

__all__ = ["Check", "Verification", "verify"]

_CLOSE = {torch.float64: 1e-8, torch.float32: 1e-5}  # relative; wider than roundings, narrower than any mistake
_SAME = 1e-6  # of a stream, in float64 mostly
_ANY = 1e-2  # for 16-bit networks, which are tried in float64 as well


@dataclass(frozen=True)
class Check:
    """One thing that was proved or refuted.

    Attributes:
        name: "sound" (with gamma=0 the rewritten network computes the original), "exact" (the backward restores the state and reruns
            repeat), "gradients" (equal to those of stored activations, bit for bit), "recurrence" (the output against the recurrence in
            float64), or "saves" (bytes measured, beside those estimated).
        ok: True, False, or None where it could not be decided, or does not apply; `detail` then says why.
        detail: one sentence with the numbers.
        where: the smallest region and step that shows a failure, such as "momentum_region_0, step 3 (layers.3)"; "" where all is well
            or nothing smaller than the whole model shows it.
    """

    name: str
    ok: bool | None
    detail: str
    where: str = ""


@dataclass(frozen=True)
class Verification:
    """What `mnet_fx.verify` found; `str(...)` is a table.

    Attributes:
        model: name of the model's class.
        checks: the rows, in the order in which they were made.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed, and at least one was decided."""
        return all(check.ok is not False for check in self.checks) and any(check.ok for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def check(self, name: str) -> Check:
        """The row of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that json.dumps takes; "schema" as in `Estimate.to_dict`."""
        rows = [{"name": c.name, "ok": c.ok, "detail": c.detail, "where": c.where} for c in self.checks]
        return {"schema": 1, "model": self.model, "ok": self.ok, "checks": rows}

    def __str__(self) -> str:
        words = {True: "yes", False: "NO", None: "-"}
        rows = [(c.name, words[c.ok], c.detail + (f"; first seen at {c.where}" if c.where else "")) for c in self.checks]
        undecided = [check.name for check in self.checks if check.ok is None]
        passed = "all checks passed" + f"; not decided: {', '.join(undecided)}" * bool(undecided)
        title = f"{self.model}: {passed if self.ok else 'NOT verified'}"
        return title + "\n\n" + tabulate(rows, headers=["check", "holds", "found"], tablefmt="simple", maxcolwidths=[None, None, 74])


def verify(net: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Verification:
    """Proves on a model and data of the user's that a rewritten network is what it should be; `print` the result.

    Five checks, each on forward and backward passes from the same state and random seed:
    *sound*: with gamma=0 the network computes what the original does (tried in float64 where roundings leave a doubt);
    *exact*: every step, run again in the backward pass, gives what it gave in the forward pass, and the state comes back bit for bit;
    *gradients*: those of parameters and inputs equal those of stored activations, bit for bit;
    *recurrence*: the output errs from the recurrence in float64 no more than the recurrence in the model's own dtype does (or, in a float64
    model, than by 64 units of its integers);
    *saves*: bytes kept by the forward pass, measured, beside those of the original and those that `estimate` tells.

    Args:
        net: what `mnet_fx.momentumize` returned, in the mode (train or eval) in which it is to be tried. Left as it is: buffers, random
            states and `.grad` are put back.
        inputs: positional arguments of a call of it.
        kwargs: its keyword arguments.
        loss: a function (output) -> scalar tensor; default the output's own `.loss`, or a sum of all floating tensors with random weights.

    Raises:
        SettingsError: `net` is no rewritten network; or the arguments were given as one tuple, list or dictionary.

    What no run can show is not shown: other inputs, other modes, and noise that touches neither outputs nor gradients.
    """
    subject = Subject(net, inputs, kwargs, loss)
    try:
        subject.run(gradients=False)  # captures
    except Exception as error:
        if len(inputs) == 1 and not kwargs and isinstance(inputs[0], (tuple, list, dict)):
            raise SettingsError(
                f"the call fails ({type(error).__name__}: {str(error)[:200]}). verify takes the arguments of a call one by one: "
                "verify(net, *args, **kwargs), and not as one tuple or dictionary, as estimate does"
            ) from error
        raise
    if not subject.regions:
        return Verification(type(net).__name__, (Check("sound", None, "nothing was rewritten; print(net.report) says why"),))
    found: list[Check] = []
    for name, make in (("sound", _sound), ("exact", _exact), ("gradients", _gradients), ("recurrence", _recurrence), ("saves", _saves)):
        try:
            with working(f"verifying {type(net).__name__}: {name}"):
                found.append(make(subject))
        except InversionError as error:
            ok = None if name == "saves" else False
            found.append(Check(name, ok, f"{error.what} differs in a rerun", subject.where(error.region, error.step)))
        except (MnetError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            ok = None if name in ("recurrence", "saves") else False
            found.append(Check(name, ok, f"could not be run: {type(error).__name__}: {error}"))
    return Verification(type(net).__name__, tuple(found))


def _sound(subject: Subject) -> Check:
    error, repeats = _from_original(subject)
    if not any(bool(t.isfinite().any()) for t in subject.run(subject.original(), gradients=False).outputs if t.is_floating_point()):
        return Check("sound", False, "no entry of the original's output is finite, so that nothing could be compared: give other inputs")
    dtype = next((t.dtype for t in subject.net.parameters() if t.is_floating_point()), torch.float32)
    if error <= _CLOSE.get(dtype, 0.0):
        return Check("sound", True, f"with gamma=0 the output is off the original's by {error:.1e} ({dtype})")
    if repeats > 0:
        return Check("sound", False, f"the original gives another output each time (off by {repeats:.1e}): nothing can equal it")
    told = f"with gamma=0 the output is off the original's by {error:.1e} ({dtype})"
    try:
        precise = subject.doubled()
    except Undecided as why:
        return Check("sound", None if error <= _ANY else False, f"{told}, and whether that is rounding is not known: {why}")
    in_float64, _ = _from_original(precise)
    told += f", {in_float64:.1e} in float64"
    if in_float64 <= _CLOSE[torch.float64] and error <= _ANY:
        return Check("sound", True, told)
    return Check("sound", False, told, _departure(precise if in_float64 > _CLOSE[torch.float64] else subject))


def _from_original(subject: Subject) -> tuple[float, float]:
    """How far the network with gamma=0 is from the original, and how far that is from itself."""
    model = subject.original()
    expected, again = (subject.run(model, gradients=False).outputs for _ in range(2))
    with subject.set(gamma=0.0, backward="stored"):
        return off_by(subject.run(gradients=False).outputs, expected), off_by(again, expected)


def _departure(subject: Subject) -> str:
    """The first step after which the stream, with gamma=0, is no value that the original computes."""
    seen: list[tuple[str, int, Tensor]] = []
    with watched(lambda tape, t, x: seen.append((tape.region, t, x.detach().clone()))), subject.set(gamma=0.0, backward="stored"):
        subject.run(gradients=False)
    with _Values({x.shape for _, _, x in seen}) as values:
        subject.run(subject.original(), gradients=False)
    for region, t, x in seen:
        if not any(off_by([x], [value]) <= _SAME for value in values.found if value.shape == x.shape):
            return subject.where(region, t - 1)
    return ""


class _Values(TorchDispatchMode):
    """Keeps copies of all floating values of some shapes that operations give."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.found = shapes, list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.shape in self.shapes:
            self.found.append(result.detach().clone())
        return result


def _exact(subject: Subject) -> Check:
    if all(region.backward == "stored" for region in subject.regions):
        return Check("exact", None, "backward='stored': no step runs again")
    ran: list[int] = []
    with subject.set(on_drift="raise"), watched(lambda tape, t, x: ran.append(t)):
        subject.run()
    kinds = dict.fromkeys(region.storage for region in report_of(subject.net).regions)
    return Check("exact", True, f"{len(ran)} steps ran again and gave the same bits (storage: {', '.join(kinds) or 'none'})")


def _gradients(subject: Subject) -> Check:
    prints: list[list[tuple[str, int, Any]]] = [[], []]
    runs = []
    with subject.set(backward="stored"):
        for seen in prints:
            with watched(lambda tape, t, x, seen=seen: seen.append((tape.region, t, fingerprint(plain(x.detach()))))):  # type: ignore[misc]
                runs.append(subject.run())
    stored, again = runs
    if unsteady := _unlike(again, stored):
        moved = next(((region, t) for (region, t, a), (_, _, b) in zip(*prints, strict=False) if a != b), None)
        where = subject.step_of(_last(subject, unsteady)) if moved is None else subject.where(moved[0], moved[1] - 1)
        return Check(
            "gradients", False, f"two runs with stored activations differ, in {_listed(unsteady)}: the model does not repeat", where
        )
    with subject.set(on_drift="ignore"):
        found = subject.run()
    if wrong := _unlike(found, stored):
        worst = max(
            (off_by([a], [b]) for n in wrong if (a := found.gradients.get(n)) is not None and (b := stored.gradients[n]) is not None),
            default=0.0,
        )
        where = subject.step_of(_last(subject, wrong))
        return Check(
            "gradients", False, f"{len(wrong)} differ from those of stored activations, by up to {worst:.1e}: {_listed(wrong)}", where
        )
    there = sum(gradient is not None for gradient in stored.gradients.values())
    none = f"; {len(stored.gradients) - there} parameters have none" if there < len(stored.gradients) else ""
    return Check("gradients", True, f"{there} gradients equal those of stored activations, bit for bit{none}")


def _unlike(a: Outcome, b: Outcome) -> list[str]:
    """Names of the outputs and gradients that differ in a bit."""
    names = [f"output {i}" for i, (x, y) in enumerate(zip(a.outputs, b.outputs, strict=True)) if not _same(x, y)]
    return names + [name for name in b.gradients if not _same(a.gradients[name], b.gradients[name])]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return same(a, b)


def _last(subject: Subject, names: list[str]) -> str:
    """Of the parameters that differ, one of the last step: what is wrong there spoils the gradients of all before."""
    places = {name: place for name in names if (place := subject.place_of(name)) is not None}
    return max(places, key=lambda name: places[name], default="")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _recurrence(subject: Subject) -> Check:
    try:
        precise = subject.doubled()
    except Undecided as why:
        return Check("recurrence", None, f"not compared: {why}")
    with precise.set(backward="stored"), _floating():
        reference = precise.run(gradients=False)
    with subject.set(backward="stored"), _floating():
        floating = subject.run(gradients=False)
    found = subject.run(gradients=False)
    ours, theirs = off_by(found.outputs, reference.outputs), off_by(floating.outputs, reference.outputs)
    resolution = max((max(torch.finfo(t.dtype).eps, 2.0 ** -Format.of(t.dtype).bits) for t in found.outputs), default=0.0)
    told = f"the output errs by {ours:.1e} from the recurrence in float64; the recurrence in floating point errs by {theirs:.1e}"
    return Check("recurrence", ours <= max(4 * theirs, 64 * resolution), told)


@contextmanager
def _floating() -> Iterator[None]:
    """Runs chains as the recurrence in floating point, without integers."""
    token = FLOATING.set(True)
    try:
        yield
    finally:
        FLOATING.reset(token)


def _saves(subject: Subject) -> Check:
    model = subject.original()
    sizes = []
    for net in (subject.net, model):
        with undone(net, subject.call):
            subject.step(net)
            sizes.append(measure(lambda net=net: subject.step(net)).kept)  # type: ignore[misc]
    kept, plain = sizes
    try:
        args, kwargs = subject.call
        expected = estimate(subject.net, kwargs if kwargs and not args else args, loss=subject.loss, values=True).momentum.kept_bytes
        told = f", {shown(expected)} estimated"
    except MnetError as error:
        told = f" (no estimate: {str(error)[:120]})"
    return Check("saves", kept < plain, f"the forward pass keeps {shown(kept)}{told}; the original {shown(plain)}")
