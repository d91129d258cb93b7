"""What was removed of a network's channels, and how the values of the dense network come to those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfx.pruning.clusters import Clusters
from vfx.pruning.depth import RemovedBlock
from vfx.reconstruct.references import Carry
from vfx.resize.weights import Kept


@dataclass(frozen=True, eq=False)
class Removed:
    """``sizes`` and ``kept`` channels by group index; ``carry`` brings values of the dense network to the smaller one.

    ``error`` is the relative error of the proof, None without one; ``clusters`` says what was merged (model folding),
    ``blocks`` which residual blocks went, in this order.
    """

    sizes: Mapping[int, int]
    kept: Kept
    carry: Carry
    error: float | None
    clusters: Mapping[int, Clusters] = field(default_factory=dict)
    blocks: tuple[RemovedBlock, ...] = ()
