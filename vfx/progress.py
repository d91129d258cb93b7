"""Progress bars on long work, silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int = 0, progress: bool = True) -> Iterator[T]:
    """``items`` behind a bar on stderr; no bar without a terminal or with ``progress=False``."""
    if not (progress and sys.stderr.isatty()):
        yield from items
        return
    yield from rich_track(items, description, total=total or None, console=Console(stderr=True), transient=True)
