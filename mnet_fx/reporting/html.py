"""Findings as a page for a browser: one file, without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from html import escape

from .findings import AddReport, Findings, RegionReport
from .svg import COLOURS, road
from .text import gamma_text, of_a_preview, rows, shape_text, size_text, summary

__all__ = ["fragment", "page"]

_STYLE = """
.mnet-fx { font: 14px/1.5 system-ui, sans-serif; color: #1c2126; background: #fff; max-width: 1080px; }
.mnet-fx h1 { font-size: 20px; margin: 0 0 4px; } .mnet-fx h2 { font-size: 15px; margin: 24px 0 8px; }
.mnet-fx .figures { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 16px 0; }
.mnet-fx .figures div { display: flex; flex-direction: column-reverse; }
.mnet-fx .figures b { font-size: 22px; font-weight: 600; } .mnet-fx .figures span, .mnet-fx .note { color: #5a646e; }
.mnet-fx table { border-collapse: collapse; width: 100%; margin: 0; } .mnet-fx .wide { overflow-x: auto; }
.mnet-fx th { text-align: left; font-weight: 600; border-bottom: 2px solid #1c2126; padding: 4px 14px 4px 0; white-space: nowrap; }
.mnet-fx td { text-align: left; border-bottom: 1px solid #dde2e6; padding: 4px 14px 4px 0; vertical-align: top; background: none; }
.mnet-fx td.number, .mnet-fx th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.mnet-fx tr.all td { font-weight: 600; border-bottom: none; border-top: 2px solid #1c2126; }
.mnet-fx code { font: 12.5px ui-monospace, monospace; background: none; color: inherit; }
.mnet-fx .mark { display: inline-block; width: 11px; height: 11px; margin-right: 7px; border-radius: 2px; }
.mnet-fx summary { cursor: pointer; margin: 24px 0 8px; font-weight: 600; font-size: 15px; }
"""


def page(findings: Findings, title: str = "mnet_fx report") -> str:
    """A whole HTML document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = f'<body style="margin: 32px; background: #fff">\n{fragment(findings, closed=False, title=title)}\n</body>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n{body}\n</html>\n'


def fragment(findings: Findings, closed: bool = True, title: str = "") -> str:
    """A part of a document, as notebooks show it.

    Args:
        findings: what to show.
        closed: whether the list of all adds is folded away.
        title: stands above all.
    """
    colour = {region.name: COLOURS[i % len(COLOURS)] for i, region in enumerate(r for r in findings.regions if r.storage != "nested")}
    parts = [
        f'<p class="note">{escape(title)}</p>' if title else "",
        f"<h1>{escape(summary(findings))}</h1>",
        _figures(findings),
        road(findings, colour),
        _notes(findings),
        _parts(findings, colour),
        _regions(findings, colour),
        _left(findings),
        _adds(findings, colour, closed),
    ]
    return f'<div class="mnet-fx"><style>{_STYLE}</style>\n' + "\n".join(part for part in parts if part) + "\n</div>"


def _figures(findings: Findings) -> str:
    saved, kept = findings.saved, findings.kept
    if saved is None or kept is None:
        return ""
    ratio = f"{kept / saved:.0%}" if saved else "-"
    shown = {"saved by autograd, original": size_text(saved), "kept after the rewrite": size_text(kept), "of the original": ratio}
    if findings.kept_outside is not None:
        shown["of that, outside of chains"] = size_text(findings.kept_outside)
    return '<div class="figures">' + "".join(f"<div><span>{name}</span><b>{text}</b></div>" for name, text in shown.items()) + "</div>"


def _notes(findings: Findings) -> str:
    notes = []
    if of_a_preview(findings):
        notes.append(f"A preview, read without inputs: bytes are not known. {of_a_preview(findings)}")
    elif findings.saved is None:
        notes.append("Bytes are not known: the model was not captured as a graph with sizes.")
    else:
        notes.append(
            "Bytes that autograd saves between forward and backward, parameters and inputs apart, for the inputs of the capture; "
            "those of regions by theory."
        )
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _table(headers: dict[str, bool], lines: list[list[str]], last: str = "") -> str:
    """A table; headers say whether a column holds numbers, cells are HTML, and `last` is the class of the last row."""
    kinds = [' class="number"' if number else "" for number in headers.values()]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(headers, kinds, strict=True))
    body = "\n".join(
        f'<tr class="{last if last and i == len(lines) - 1 else ""}">'.replace(' class=""', "")
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(line, kinds, strict=True))
        + "</tr>"
        for i, line in enumerate(lines)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _named(name: str, colour: dict[str, str]) -> str:
    mark = f'<span class="mark" style="background:{colour[name]}"></span>' if name in colour else ""
    return f"{mark}<code>{escape(name)}</code>" if name != "outside" else "outside"


def _code(path: str) -> str:
    return f"<code>{escape(path or '(root)')}</code>"


def _parts(findings: Findings, colour: dict[str, str]) -> str:
    lines = [
        [_named(r.name, colour), _code(r.modules), str(r.adds), escape(r.becomes), size_text(r.saved), size_text(r.kept)]
        for r in rows(findings)
    ]
    if not lines:
        return ""
    total = [f"{findings.rewritten_adds} rewritten", size_text(findings.saved), size_text(findings.kept)]
    lines.append(["all", "", str(findings.residual_adds), *total])
    headers = {"part": False, "modules": False, "adds": True, "becomes": False, "saved by autograd": True, "kept after": True}
    return "<h2>From input to output</h2>" + _table(headers, lines, "all")


def _regions(findings: Findings, colour: dict[str, str]) -> str:
    if not findings.regions:
        return ""
    headers = {"region": False, "path": False, "steps": True, "adds": True, "kind": False, "gamma": True, "shape": False, "storage": False}
    return "<h2>Regions</h2>" + _table(headers | {"bytes/element": True}, [_region(r, colour) for r in findings.regions])


def _region(r: RegionReport, colour: dict[str, str]) -> list[str]:
    kept = "-" if r.state_bytes_per_element is None else f"{r.state_bytes_per_element:g}"
    known = [_named(r.name, colour), _code(r.path), str(r.steps), str(r.adds), r.kind, gamma_text(r), shape_text(r)]
    return [*known, r.storage, kept]


def _left(findings: Findings) -> str:
    """Why adds and modules were left, by reason."""
    hints = {r.code: r.hint for r in findings.refusals} | {add.code: add.hint for add in findings.adds if add.code}
    codes = [add.code for add in findings.adds if add.code]
    lines = [[_code(code), str(codes.count(code)) if code in codes else "-", escape(hint)] for code, hint in hints.items()]
    return "<h2>Left as it is</h2>" + _table({"reason": False, "adds": True, "what to do": False}, lines) if lines else ""


def _adds(findings: Findings, colour: dict[str, str], closed: bool) -> str:
    if not findings.adds:
        return ""
    headers = {"#": True, "module": False, "node": False, "becomes": False}
    lines = [[str(i), _code(add.path), escape(add.node), _fate(add, colour)] for i, add in enumerate(findings.adds)]
    name = f"Every residual-looking add, in the order in which the model runs ({len(lines)})"
    return f"<details{'' if closed else ' open'}><summary>{name}</summary>" + _table(headers, lines) + "</details>"


def _fate(add: AddReport, colour: dict[str, str]) -> str:
    if add.rewritten:
        return f"{_named(add.region, colour)}, step {add.step}"
    return f"left, {_code(add.code)}: {escape(add.explanation)}"
