"""Findings as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tabulate import tabulate, tabulate_formats

from passes import Refusal, Stretch

from ..budget.sizes import shown
from ..errors import SettingsError
from .findings import CapturedPart, Findings, RegionReport

__all__ = ["Row", "gamma_text", "of_a_preview", "rows", "shape_text", "size_text", "summary", "table", "text"]

HEADERS = ("part", "modules", "adds", "becomes", "saved", "kept")


@dataclass(frozen=True)
class Row:
    """A region, or what lies between two regions.

    Attributes:
        name: of the region; "outside" between regions.
        first, last: paths of the modules where it begins and ends.
        adds, rewritten: number of residual-looking adds in it, and of those rewritten.
        becomes: what becomes of them, in words.
        saved, kept: bytes that autograd saves for the original, and that are kept after the rewrite; None where not known.
    """

    name: str
    first: str
    last: str
    adds: int
    rewritten: int
    becomes: str
    saved: int | None
    kept: int | None

    @property
    def modules(self) -> str:
        first, last = self.first or "(root)", self.last or "(root)"
        return first if first == last else f"{first} to {last}"


def rows(findings: Findings) -> tuple[Row, ...]:
    """The model from input to output; each residual-looking add is counted in one row."""
    parts = groupby(enumerate(findings.stretches), key=lambda pair: pair[1].region)
    return tuple(_row(findings, region, list(pairs)) for region, pairs in _joined(parts))


def _joined(parts: Iterable[tuple[str, Iterable[tuple[int, Stretch]]]]) -> Iterator[tuple[str, list[tuple[int, Stretch]]]]:
    """The stretches by region; one whose steps others interrupt stands where it begins."""
    found: list[tuple[str, list[tuple[int, Stretch]]]] = []
    at: dict[str, list[tuple[int, Stretch]]] = {}
    for region, pairs in parts:
        if region and region in at:
            at[region] += pairs
        elif not region and found and not found[-1][0]:
            found[-1][1].extend(pairs)
        else:
            found.append((region, list(pairs)))
            at[region] = found[-1][1]
    yield from found


def _row(findings: Findings, region: str, pairs: list[tuple[int, Stretch]]) -> Row:
    numbers = {number for number, _ in pairs}
    adds = [add for add in findings.adds if add.stretch in numbers]
    known = next((r for r in findings.regions if r.name == region), None)
    words = [] if known is None else [f"{known.steps} steps, gamma {gamma_text(known)}, {known.kind}, {known.storage}"]
    nested = [r for r in findings.regions if r.name != region and r.name in {add.region for add in adds}]
    words += [f"{r.name} nested, {r.steps} steps" for r in nested]
    codes = [add.code for add in adds if not add.rewritten]
    words += [f"{codes.count(code)} left: {code}" for code in dict.fromkeys(codes)]
    saved, kept = _sum(s.saved for _, s in pairs), _sum(s.kept for _, s in pairs)
    first, last = pairs[0][1].path, pairs[-1][1].path
    return Row(region or "outside", first, last, len(adds), sum(a.rewritten for a in adds), "; ".join(words) or "stays", saved, kept)


def _sum(sizes: Iterable[int | None]) -> int | None:
    found = list(sizes)
    return None if None in found else sum(size or 0 for size in found)


def table(findings: Findings, fmt: str = "simple") -> str:
    """The rows in a format of tabulate, and their sum."""
    if fmt not in tabulate_formats:
        raise SettingsError(f"fmt must be a format of tabulate ({', '.join(tabulate_formats)}), got {fmt!r}")
    lines = [(r.name, r.modules, str(r.adds), r.becomes, size_text(r.saved), size_text(r.kept)) for r in rows(findings)]
    total = f"{findings.rewritten_adds} rewritten"
    lines.append(("all", "", str(findings.residual_adds), total, size_text(findings.saved), size_text(findings.kept)))
    widths = [None, 24, None, 28, None, None] if fmt in ("simple", "plain", "grid", "rounded_grid") else None
    aligned = ("left", "left", "right", "left", "right", "right")
    return tabulate(lines, headers=HEADERS, tablefmt=fmt, disable_numparse=True, maxcolwidths=widths, colalign=aligned)


def size_text(size: int | None) -> str:
    return "-" if size is None else shown(size)


def gamma_text(region: RegionReport) -> str:
    return f"{region.gamma:g}" if isinstance(region.gamma, float) else "{:g} to {:g}".format(*region.gamma)


def shape_text(region: RegionReport) -> str:
    return "-" if region.shape is None else " x ".join("?" if n < 0 else str(n) for n in region.shape)


def summary(findings: Findings) -> str:
    """One line."""
    return f"{findings.rewritten_adds} of {findings.residual_adds} residual adds rewritten, in {len(findings.regions)} region(s)"


def of_a_preview(findings: Findings) -> str:
    """What makes a preview final; nothing for the report of a capture."""
    if all(part.front_end != "preview" for part in findings.captured):
        return ""
    broken = any(refusal.code == "graph_break" for refusal in findings.refusals)  # which example inputs do not help over
    return "The first call makes it final." if broken else "The first call, or example_inputs, makes it final."


def text(findings: Findings) -> str:
    """What `print(net.report)` prints."""
    parts = [summary(findings)]
    if findings.regions:
        parts.append(_table("region path steps adds kind gamma shape storage bytes/element", map(_region_row, findings.regions)))
    parts += [_copies(region) for region in findings.regions if region.all_copied]
    parts += _outside(findings)
    if of_a_preview(findings):
        parts.append(f"A preview, read without inputs. {of_a_preview(findings)}")
    if len(findings.captured) > 1 or any(part.front_end == "named" for part in findings.captured):
        parts += _parts(findings.captured)
    if left := _left(findings):
        alike: dict[tuple[str, str], list[Refusal]] = {}
        for refusal in left:
            alike.setdefault((refusal.code, refusal.explanation), []).append(refusal)
        hints = dict.fromkeys(f"{refusal.code}: {refusal.hint}" for refusal in left)
        parts.append("Not rewritten")
        parts.append(_table("path node code explanation", map(_refusal_row, alike.values())))
        parts.append("\n".join(hints))
    return "\n\n".join(parts)


def _outside(findings: Findings) -> list[str]:
    """About what lies outside of chains; with what to do where that is most of what is kept."""
    if findings.rest == "checkpoint" and findings.regions:
        said = [f"Outside of chains, {_again(findings)} (rest='checkpoint'); mnet_fx.estimate says what is kept."]
        return said + [f"The cross entropy of the logits of {head} is computed in chunks of tokens." for head in findings.heads]
    if not findings.kept_outside:
        return []
    pays = findings.kept is not None and findings.kept_outside > findings.kept / 2 and bool(findings.regions)
    more = " That is most of what is kept: rest='checkpoint' runs it again instead." if pays else ""
    return [f"Outside of chains, autograd keeps {findings.kept_outside:,} bytes for the backward pass (inputs as at the capture).{more}"]


def _again(findings: Findings) -> str:
    """What runs again in the backward pass: modules of a model with named regions, where there are any; else segments of its graph."""
    if all(part.front_end != "named" for part in findings.captured):
        return "segments run again in the backward pass"
    paths, more = findings.again[:6], len(findings.again) - 6
    if not paths:
        return "no module saves much more than its input, so none runs again in the backward pass"
    listed = ", ".join(paths) + (f" and {more} more" if more > 0 else "")
    return f"{len(findings.again)} module(s) run again in the backward pass, each by itself: {listed}"


def _left(findings: Findings) -> list[Refusal]:
    """Each add that was left, once and in order, then what is refused of no one add: whole modules, and ends at graph breaks."""
    adds = [Refusal(a.code, a.node, a.path, a.explanation, a.hint) for a in findings.adds if not a.rewritten]
    about = {(a.path, a.node) for a in adds}
    bodies = {a.node.rpartition(".")[0] for a in adds} - {""}
    rest = [r for r in findings.refusals if (r.path, r.node) not in about and r.node not in bodies]
    return [*adds, *rest]


def _table(headers: str, lines: Iterable[tuple[str, ...]]) -> str:
    cells: Callable[..., Any] = tabulate
    return str(cells(list(lines), headers=headers.split(), tablefmt="simple", disable_numparse=True, maxcolwidths=60))


def _parts(captured: Sequence[CapturedPart]) -> list[str]:
    """What was captured of the model, where that was not one graph."""
    found = [part for part in captured if part.residual_adds]
    left = len(captured) - len(found)
    lines = [f"Captured in {len(captured)} parts, {left} of them without residual adds."] if left else []
    return [*lines, _table("path captured-by adds rewritten", map(_captured_row, found))] if found else lines


def _captured_row(part: CapturedPart) -> tuple[str, ...]:
    return part.path or "(root)", part.front_end, str(part.residual_adds), str(part.rewritten_adds)


def _region_row(r: RegionReport) -> tuple[str, ...]:
    kept = "-" if r.state_bytes_per_element is None else f"{r.state_bytes_per_element:g}"
    return r.name, r.path or "(root)", str(r.steps), str(r.adds), r.kind, gamma_text(r), shape_text(r), r.storage, kept


def _copies(r: RegionReport) -> str:
    size = "" if r.all_copied_bytes is None else f" ({r.all_copied_bytes:,} bytes)"
    return f"{r.name} keeps copies of what is overwritten after the chain has read it{size}: {', '.join(r.all_copied)}"


def _refusal_row(alike: list[Refusal]) -> tuple[str, ...]:
    """The row of refusals with the same explanation, under the path of the first."""
    first, more = alike[0], f" and {len(alike) - 1} more" * (len(alike) > 1)
    return f"{first.path or '(root)'}{more}", first.node, first.code, first.explanation
