"""Pages as Jupyter notebooks: prose and code in turn; what the page shows as printed is left to the run."""

from __future__ import annotations

import json
import re

__all__ = ["notebook"]

FENCE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?!http)[^)]+\)")  # to another page, which does not lie beside a notebook


def notebook(markdown: str) -> str:
    """The JSON of a notebook (nbformat 4.5) whose code cells are the blocks of Python of a page."""
    cells, end = [], 0
    for block in FENCE.finditer(markdown):
        cells += [("markdown", markdown[end : block.start()]), ("code", block[1])]
        end = block.end()
    cells.append(("markdown", markdown[end:]))
    cells = [(kind, LINK.sub(r"\1", text) if kind == "markdown" else text) for kind, text in cells]
    found = [_cell(i, kind, text.strip("\n")) for i, (kind, text) in enumerate(cells) if text.strip()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": found}, indent=1)


def _cell(i: int, kind: str, text: str) -> dict[str, object]:
    code = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text.splitlines(keepends=True), **code}
