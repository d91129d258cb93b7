"""The whole data flow at a glance: trace → analyse → match → passes → emit.

``merge`` composes it; ``compile`` runs an explicit list of passes; ``repair`` solves or normalizes, ``prune`` removes
weights or channels. Nothing here mutates the user's models. Of all of ``vfx`` this package alone imports ``passes``.
"""

from vfx.api.comparing import compare
from vfx.api.elastic import WidthFamily
from vfx.api.merging import compile, merge
from vfx.api.pruning import prune, prune_structured
from vfx.api.repairing import repair
from vfx.api.results import Result
from vfx.api.tracing import collect, layers, profile, record, recorded, symmetry, trace
from vfx.api.transferring import transfer

__all__ = [
    "Result",
    "WidthFamily",
    "collect",
    "compare",
    "compile",
    "layers",
    "merge",
    "profile",
    "prune",
    "prune_structured",
    "record",
    "recorded",
    "repair",
    "symmetry",
    "trace",
    "transfer",
]
