"""What is shown on a terminal while something takes long; nothing where the output goes elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["shown_progress", "working"]


def shown_progress() -> bool:
    """Whether there is somebody to show progress to."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class _Said(threading.local):
    """What a thread is doing, the last entry being shown; None while nothing of it is."""

    entries: list[str] | None = None


_SAID = _Said()


@contextmanager
def working(what: str, delay: float = 2.0) -> Iterator[Callable[[str], None]]:
    """Shows, on a terminal, for how long something has been going on, once that is over `delay` seconds; within another one, as its part.

    Yields:
        A function that says what is being done now, in place of `what`.
    """
    if not shown_progress():
        yield lambda part: None
    elif _SAID.entries is not None:
        before = _SAID.entries[-1]
        _SAID.entries.append(what)
        try:
            yield _SAID.entries.append
        finally:
            _SAID.entries.append(before)
    else:
        _SAID.entries = [what]
        try:
            with _shown(_SAID.entries, delay):
                yield _SAID.entries.append
        finally:
            _SAID.entries = None


@contextmanager
def _shown(said: list[str], delay: float) -> Iterator[None]:
    from tqdm import tqdm

    done = threading.Event()

    def show() -> None:
        if done.wait(delay):
            return
        with tqdm(desc=said[-1], bar_format="{desc} ... {elapsed}", leave=False, initial=0) as bar:
            bar.start_t = time.time() - delay
            while not done.wait(0.25):
                bar.set_description_str(said[-1])

    watcher = threading.Thread(target=show, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
