"""The picture of what `compare.py` measured: for each work, the peak of each way against its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

Row = dict[str, Any]
LOOKS = {  # colours of Okabe and Ito, which the colour-blind tell apart; a mark for each family
    "plain": ("#000000", "o"),
    "checkpoint": ("#0072B2", "s"),
    "selective": ("#56B4E9", "s"),
    "inductor": ("#009E73", "D"),
    "rockmate": ("#F0E442", "D"),
    "momentumnet": ("#CC79A7", "v"),
    "revlib": ("#E69F00", "<"),
    "memcnn": ("#E69F00", ">"),
    "RevTorch": ("#E69F00", "v"),
    "mnet_fx": ("#D55E00", "^"),
}
COLUMNS = 4


def draw(rows: dict[tuple[str, str], Row], path: Path) -> bool:
    """Draws one field for each work, peak against time, wrong gradients hollow; False without matplotlib, or without rows."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found: dict[str, list[Row]] = {}
    for row in rows.values():
        if "peak" in row:
            found.setdefault(row["work"], []).append(row)
    if not found:
        return False
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "mnet_fx", "font.size": 9}
    lines = -(-len(found) // COLUMNS)
    figure, fields = plt.subplots(lines, COLUMNS, figsize=(3.2 * COLUMNS, 2.6 * lines + 0.8), layout="constrained", squeeze=False)
    for field, (work, of_work) in zip(fields.flat, found.items(), strict=False):
        _field(field, work, of_work)
    for field in fields.flat[len(found) :]:
        field.set_visible(False)
    handles = {label: handle for field in fields.flat for handle, label in zip(*field.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=6, frameon=False)
    figure.supxlabel("time of a step / plain")
    figure.supylabel("peak MiB of a step")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def _field(field: Any, work: str, rows: list[Row]) -> None:
    for row in rows:
        family = next(name for name in LOOKS if row["way"].startswith(name))
        colour, mark = LOOKS[family]
        is_right = row["gradient"]["result"] == "right"
        field.plot(row["ratio"], row["peak"], mark, color=colour, fillstyle="full" if is_right else "none", label=family)
    field.set_yscale("log")
    field.yaxis.set_major_formatter("{x:g}")
    field.yaxis.set_minor_formatter("{x:g}")
    field.tick_params(which="both", labelsize=7)
    field.set_title(work, fontsize=9)
    field.spines[["top", "right"]].set_visible(False)
