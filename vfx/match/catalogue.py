"""The catalogue of matchers: one line each."""

from __future__ import annotations

from collections.abc import Callable

from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.c2m3 import C2M3
from vfx.match.iterated import IteratedMatching
from vfx.match.matcher import Matcher
from vfx.match.straight_through import StraightThrough
from vfx.match.weight import WeightMatching

MATCHERS: dict[str, Callable[[], Matcher]] = {
    "weight": WeightMatching,
    "activation": ActivationMatching,
    "c2m3": C2M3,
    "iterated": IteratedMatching,
    "ste": StraightThrough,
}


def matcher(match: str | Matcher | None) -> Matcher | None:
    """A matcher by name; a Matcher or None is returned as it is."""
    if not isinstance(match, str):
        return match
    if match not in MATCHERS:
        raise ArgumentError(f"match={match!r} is unknown; choose one of {', '.join(MATCHERS)}, None or a Matcher")
    return MATCHERS[match]()
