"""The catalogue of matchers: one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfx.analyse.symmetry import Symmetry
from vfx.elements import check_classes
from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.c2m3 import C2M3
from vfx.match.cca import CCAMerging
from vfx.match.class_descent import mixing
from vfx.match.iterated import IteratedMatching
from vfx.match.learned import LearnedMatching
from vfx.match.matcher import Matcher
from vfx.match.partial import PartialMatching
from vfx.match.straight_through import StraightThrough
from vfx.match.transport import OptimalTransport
from vfx.match.weight import WeightMatching
from vfx.match.zipit import ZipIt
from vfx.names import made

MATCHERS: dict[str, Callable[..., Matcher]] = {
    "weight": WeightMatching,
    "activation": ActivationMatching,
    "c2m3": C2M3,
    "iterated": IteratedMatching,
    "ste": StraightThrough,
    "learned": LearnedMatching,
    "zipit": ZipIt,
    "cca": CCAMerging,
    "ot": OptimalTransport,
    "pleas": PartialMatching,
}

RESTARTED = {"weight", "activation", "c2m3", "ste"}  # the best of several runs from random permutations
CLASSED = {"weight", "activation", "c2m3", "learned"}  # match each group's full class of maps, or permutations alone


def matcher(match: str | Matcher | None, restarts: int = 0, classes: str = "full") -> Matcher | None:
    """A matcher by name; a Matcher or None is returned as it is.

    ``restarts`` further runs from random permutations, the best by the method's own objective, where it has such runs.
    ``classes`` is "full" or "permutation"; all other exact methods find permutations.
    """
    check_classes(classes)
    if restarts and (not isinstance(match, str) or (match in MATCHERS and match not in RESTARTED)):
        name = match if isinstance(match, str) else type(match).__name__
        raise ArgumentError(f"restarts={restarts}: {name} takes none here; {', '.join(sorted(RESTARTED))} do (by name)")
    if not isinstance(match, str):
        return match
    options: dict[str, Any] = {"restarts": restarts} if restarts else {}
    if match in CLASSED:
        options["classes"] = classes
    return made("match", MATCHERS, match, "", ", None or a Matcher", **options)


def matcher_named(name: str, **options: Any) -> Matcher:
    """A matcher by name with its own options, as ``MATCHERS`` has them. Raises ArgumentError."""
    return made("match", MATCHERS, name, **options)


def maps_layers(finder: Matcher, symmetry: Symmetry) -> bool:
    """Whether a matcher may mix the channels of layers' outputs, so that their variances take covariances."""
    return getattr(finder, "classes", None) == "full" and mixing(symmetry)


def name_of(finder: Matcher) -> str:
    """The name a matcher has here, else its class's."""
    return next((name for name, kind in MATCHERS.items() if type(finder) is kind), type(finder).__name__)
