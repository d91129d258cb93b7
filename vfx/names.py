"""Names that users give, held against those that are known."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from vfx.errors import ArgumentError

T = TypeVar("T")


def check_known(owner: str, function: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise ArgumentError for a name that is no keyword of ``function``, and say which it is like."""
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(str(unknown), known, 1) or known
        raise ArgumentError(f"{owner}: {function} takes no {unknown!r}, it takes {', '.join(close)}")


def made(
    option: str, table: Mapping[str, Callable[..., T]], name: Any, first: str = "", last: str = "", /, **options: Any
) -> T:
    """What a table makes of a name and its own options; ``first`` and ``last`` say what else the option takes.

    Raises ArgumentError for a name or options that the table does not have.
    """
    if not isinstance(name, str) or name not in table:
        raise ArgumentError(f"{option}={name!r} is unknown; choose one of {first}{', '.join(table)}{last}")
    try:
        return table[name](**options)
    except TypeError as error:
        raise ArgumentError(f"{option}={name!r} takes no such options: {error}") from error
