"""What long work shows on stderr: bars on a terminal; for the command line in a pipe a line a stage; else nothing.

A library says nothing where nobody looks, so the lines are for those who ask for them (``show``), as the command line
does. ``progress=False`` silences bars and lines alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

T = TypeVar("T")
Way = Literal["bars", "lines", "nothing"]

EVERY = 10.0  # seconds between the lines of one long loop

_state: dict[str, Way] = {"way": "bars"}
_start: dict[str, float] = {}


def show(way: Way) -> None:
    """From now on show "bars" (on a terminal), "lines" (a stage each) or "nothing"."""
    _state["way"] = way
    _start["at"] = time.monotonic()


def stage(name: str) -> None:
    """Say that a stage begins, where lines are shown."""
    if _state["way"] == "lines":
        print(f"[{time.monotonic() - _start['at']:6.1f} s] {name}", file=sys.stderr, flush=True)


def track(items: Iterable[T], description: str, total: int = 0, progress: bool = True) -> Iterator[T]:
    """``items`` behind a bar on stderr; no bar without a terminal or with ``progress=False``."""
    if progress and _state["way"] == "lines":
        yield from _in_lines(items, description, total)
    elif progress and _state["way"] == "bars" and sys.stderr.isatty():
        # Imported here: nothing else needs them, and the command line begins without.
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description, total=total or None, console=Console(stderr=True), transient=True)
    else:
        yield from items


def _in_lines(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A line now and then, none for loops that end before."""
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            stage(f"{description}: {number}{f' of {total}' if total else ''}")
        yield item
