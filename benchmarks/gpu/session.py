"""What the parts of a run share: the device, the clock, and the JSON, which is written anew after each row."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

__all__ = ["GIB", "Session", "failure"]

GIB = 2.0**30


class Session:
    """One run.

    Args:
        device: "cuda", or "cpu", where times and bytes mean little: to see that everything runs.
        tiny: models of a few thousand parameters.
        out: the JSON.
        seconds: after so many, what is left is skipped.
        compiler: what stands for inductor.

    A row that is changed after `add` is written by the next `save`; a run that is cut off keeps all rows so far.
    """

    def __init__(self, device: str, tiny: bool, out: Path, seconds: float, compiler: str = "inductor") -> None:
        self.device, self.tiny, self.out, self.seconds, self.compiler = device, tiny, out, seconds, compiler
        self.cuda, self.reserve = device == "cuda", 0.0
        self.begin = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.parts: dict[str, float | None] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def left(self) -> float:
        """Seconds until this run is to end, without those that are kept for later parts."""
        return self.seconds - self.reserve - (time.monotonic() - self.begin)

    def add(self, part: str, **values: Any) -> dict[str, Any]:
        """Adds a row, writes the JSON, and prints the row."""
        self.rows.append(row := {"part": part, **values})
        self.save()
        self.say(**row)
        return row

    def say(self, **row: Any) -> None:
        """Prints a row with the time that it came at."""
        shown = ", ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items() if value is not None
        )
        print(f"[{time.monotonic() - self.begin:5.1f} s] {shown}", flush=True)

    def save(self) -> None:
        """Writes the JSON, all or nothing."""
        data = {"machine": machine(self.cuda), "tiny": self.tiny, "compiler": self.compiler, "parts": self.parts, "rows": self.rows}
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(part, self.out)

    def clear(self) -> None:
        """Gives back the device's memory that nobody holds any more."""
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def machine(cuda: bool) -> dict[str, Any]:
    """What ran, and when."""
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if cuda else None
    return {"device": device, "memory_gib": memory, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def failure(error: BaseException) -> str:
    """The first line of an error, which then holds no tensors any more."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
