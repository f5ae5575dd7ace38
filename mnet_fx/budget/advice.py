"""What an estimate means, in words."""

from __future__ import annotations

from collections.abc import Sequence

from ..arithmetic.fake_state import Seen
from ..reporting.report import Report
from .estimates import Estimate, Way
from .sizes import shown

__all__ = ["advice", "notes"]

_FIXED = ("parameters", "gradients", "optimizer state")


def advice(estimate: Estimate, report: Report, handed: int = 0) -> tuple[str, ...]:
    """Sentences: what dominates the momentum network's step, and what to do about it.

    Args:
        estimate: the figures.
        report: on the momentum network.
        handed: bytes of what the steps of a chain give to the outside, all of which is there when it ends.
    """
    way = estimate.momentum
    found = [_what_dominates(way)]
    fixed = sum(way.parts[part] for part in _FIXED)
    if fixed > estimate.plain.total_bytes / 2:
        found.append(
            "Activations are the smaller part of plain training, so no way of recomputing them saves much: shard parameters and optimizer "
            "state (FSDP2), train fewer of them (LoRA), or hold them in fewer bits."
        )
    found += _outside(estimate, report)
    if not report.regions:
        found.append("No residual chain was found: print(mnet_fx.momentumize(model).report) says why.")
    elif any(region.storage == "inputs" for region in report.regions):
        short = sum(region.storage == "inputs" for region in report.regions)
        found.append(
            f"{short} of {len(report.regions)} chains are so short that their inputs are kept, as a checkpoint does, whatever gamma is: "
            "longer runs of blocks of one shape gain more."
        )
    if handed > way.total_bytes / 5 and all(part.front_end != "named" for part in report.captured):
        found.append(
            f"{shown(handed)} are what the steps of a chain give to the outside, such as skip outputs, and are there at once when it ends: "
            "add each up as it comes, total = total + skip, in place of a stack, and the chain forms that sum while it runs."
        )
    if way.parts["spilled bits"] > way.total_bytes / 10:
        found.append("Much of it is spilled bits, log2(1/gamma) for each element and step: gamma nearer to 1 keeps fewer.")
    if estimate.plain.total_bytes <= way.total_bytes:
        found.append("Plain training takes no more: there is nothing to gain here at this batch and depth.")
    return tuple(found)


def _what_dominates(way: Way) -> str:
    part, size = max(way.parts.items(), key=lambda item: item[1])
    return f"momentum, the largest part: {part}, {shown(size)} of {shown(way.total_bytes)} ({size / max(way.total_bytes, 1):.0%})."


def _outside(estimate: Estimate, report: Report) -> list[str]:
    """About what is kept outside of chains, where that is much."""
    way = estimate.momentum
    outside = sum(way.outside.values())
    if outside <= way.kept_bytes / 2 or outside <= way.total_bytes / 20:
        return []
    first = [f"{path or 'the root'} {shown(size)}" for path, size in list(way.outside.items())[:3]]
    return [
        f"Of {shown(way.kept_bytes)} kept after the forward, {shown(outside)} lie outside of chains, most in {', '.join(first)}: stages "
        "and projections between the chains, or a head (where logits are large, compute the loss in chunks)"
        + (". rest='checkpoint' runs them again instead of keeping that." if report.rest == "store" else ".")
    ]


def notes(estimate: Estimate, said: Sequence[str], seen: Seen) -> tuple[str, ...]:
    """Sentences: what the figures suppose or leave out."""
    found = list(dict.fromkeys(said))
    if estimate.gpu is not None:
        found.append("Seconds are a lower bound by the roofline; work space of cuDNN and fragmentation come on top of the bytes.")
    if estimate.checkpoint is None:
        found.append("There are no blocks to put a checkpoint around, so that way is left out.")
    if estimate.momentum.parts["spilled bits"] and seen.supposed:
        found.append(
            "Spilled bits are those of a stream that keeps its magnitude: a byte per element of a chain more or less; values=True looks."
        )
    if seen.rotated:
        found.append("Velocities are rotated: what that takes while a step runs, several float64 copies of the stream, is not counted.")
    return tuple(found)
