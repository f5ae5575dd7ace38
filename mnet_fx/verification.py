"""Proof on the user's own model and data that a rewritten network is what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

__all__ = ["Check", "Verification"]


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
        title = f"{self.model}: {'all checks passed' if self.ok else 'NOT verified'}"
        return title + "\n\n" + tabulate(rows, headers=["check", "holds", "found"], tablefmt="simple", maxcolwidths=[None, None, 74])
