"""Names that users give, held against those that are known."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from vfx.errors import ArgumentError


def check_known(owner: str, function: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise ArgumentError for a name that is no keyword of ``function``, and say which it is like."""
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(str(unknown), known, 1) or known
        raise ArgumentError(f"{owner}: {function} takes no {unknown!r}, it takes {', '.join(close)}")
