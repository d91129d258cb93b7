"""The catalogue of what combines edges: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vfx.combine.combiner import Combiner
from vfx.combine.dare import Dare
from vfx.combine.iso import IsoC
from vfx.combine.own_outputs import OwnOutputs
from vfx.combine.regmean import RegMean
from vfx.combine.regmean_plus import RegMeanPlus
from vfx.combine.task_arithmetic import TaskArithmetic
from vfx.combine.ties import Ties
from vfx.errors import ArgumentError
from vfx.names import made

COMBINERS: dict[str, Callable[..., Combiner]] = {
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "iso_c": IsoC,
    "regmean": RegMean,
    "regmean++": RegMeanPlus,
    "own_outputs": OwnOutputs,
}
AVERAGE = "average"  # Σ αᵢ θᵢ: no combiner


def combiner(combine: str | Combiner) -> Combiner | None:
    """A combiner by name; a Combiner is returned as it is, None stands for the average. Raises ArgumentError."""
    if isinstance(combine, Combiner):
        return combine
    if combine == AVERAGE:
        return None
    return combiner_named(combine)


def combiner_named(name: Any, **options: Any) -> Combiner:
    """A combiner by name with its own options, as ``COMBINERS`` has them. Raises ArgumentError.

    ``by``, the method that another one hands over to, may be a name as well, or a table of its name and options.
    """
    by = options.get("by")
    if isinstance(by, str):
        options["by"] = combiner_named(by)
    elif isinstance(by, Mapping):
        table = dict(by)
        options["by"] = combiner_named(table.pop("name", None), **table)
    return made("combine", COMBINERS, name, f"{AVERAGE}, ", **options)


def name_of(own: Combiner) -> str:
    """The name a combiner has here, else its class's."""
    return next((name for name, kind in COMBINERS.items() if type(own) is kind), type(own).__name__)


def check_needs(own: Combiner, base: Any, data: Any) -> None:
    """Raise ArgumentError where a combiner is not given what it reads."""
    if "base" in own.needs and base is None:
        raise ArgumentError(
            f"combine={name_of(own)!r} adds the edges' changes to what they were fine-tuned from; give base="
        )
    if "data" in own.needs and data is None and not own.brings_data:
        raise ArgumentError(f"combine={name_of(own)!r} runs the edges; give data=, or the data of each edge to it")
