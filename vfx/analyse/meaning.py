"""What tensors of integers say of an axis whose positions they name."""

from __future__ import annotations

from dataclasses import dataclass

from vfx.analyse.axis import Axis

NUMBERS, COUNTS, ENDS, PLACES, BACK = "numbers", "counts", "ends", "places", "back"


@dataclass(frozen=True, eq=False)
class Order:
    """Rows sorted by the numbers of an axis; ``source`` stands for the numbers, whatever their order."""

    axis: Axis
    source: object


@dataclass(frozen=True)
class Meaning:
    """What the values of a tensor of integers say of an axis.

    ``numbers`` are positions along it, ``counts`` how many numbers name each, ``ends`` their running total. ``places``
    say where each row of an ``order`` stood before, ``back`` where each row stands in it.
    """

    kind: str
    axis: Axis
    source: object
    order: Order | None = None
