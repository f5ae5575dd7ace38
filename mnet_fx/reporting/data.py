"""Findings as data for other programs. `report.schema.json` beside this file says what every field means."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

from .findings import Findings, RegionReport
from .text import Row, rows

__all__ = ["VERSION", "schema", "to_csv", "to_dict", "to_json"]

SCHEMA = "mnet_fx.report"
VERSION = 1  # raised when a field goes or changes its meaning; not when one is added
CSV_COLUMNS = ("index", "path", "node", "rewritten", "region", "step", "code", "explanation", "hint")


def to_dict(findings: Findings) -> dict[str, Any]:
    """The findings as numbers, strings, lists and dictionaries."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "residual_adds": findings.residual_adds,
        "rewritten_adds": findings.rewritten_adds,
        "saved_bytes": findings.saved,
        "kept_bytes": findings.kept,
        "kept_outside_bytes": findings.kept_outside,
        "rest": findings.rest,
        "heads": list(findings.heads),
        "again": list(findings.again),
        "regions": [_region(region) for region in findings.regions],
        "adds": [_add(i, add) for i, add in enumerate(findings.adds)],
        "refusals": [asdict(refusal) for refusal in findings.refusals],
        "captured": [asdict(part) for part in findings.captured],
        "parts": [_part(row) for row in rows(findings)],
        "stretches": [_stretch(asdict(stretch)) for stretch in findings.stretches],
    }


def _region(region: RegionReport) -> dict[str, Any]:
    low, high = (region.gamma, region.gamma) if isinstance(region.gamma, float) else region.gamma
    shape = None if region.shape is None else [None if size < 0 else size for size in region.shape]
    found = {k: v for k, v in asdict(region).items() if k not in ("gamma", "copied_later")}
    found |= {"state_bytes": region.state_bytes, "copied": list(region.all_copied), "copied_bytes": region.all_copied_bytes}
    return {**found, "shape": shape, "gamma_min": low, "gamma_max": high}


def _add(index: int, add: Any) -> dict[str, Any]:
    found = {key: value if value != "" or key in ("path", "node") else None for key, value in asdict(add).items()}
    return {"index": index, "rewritten": add.rewritten, **found}


def _part(row: Row) -> dict[str, Any]:
    return _in_bytes(asdict(row))


def _stretch(found: dict[str, Any]) -> dict[str, Any]:
    return _in_bytes(found | {"adds": len(found["adds"]), "region": found["region"] or None, "reads": list(found["reads"])})


def _in_bytes(found: dict[str, Any]) -> dict[str, Any]:
    """With the unit in the names of sizes."""
    return {f"{key}_bytes" if key in ("saved", "kept") else key: value for key, value in found.items()}


def to_json(findings: Findings, indent: int | None = 2) -> str:
    """The findings as JSON."""
    return json.dumps(to_dict(findings), indent=indent, allow_nan=False)


def to_csv(findings: Findings) -> str:
    """One line for each residual-looking add, under a header; lines end as RFC 4180 wants."""
    written = io.StringIO()
    writer = csv.DictWriter(written, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(to_dict(findings)["adds"])
    return written.getvalue()


@cache
def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `to_dict`."""
    return dict(json.loads((resources.files(__package__) / "report.schema.json").read_text()))
