"""ResetBatchNorm: running statistics recomputed on the merged network (RESET; REPAIR §3, *Vanishing Feature* alg. 1).

Each BatchNorm gets the exact mean and unbiased variance of its input over all the data, behind BatchNorms that are
reset already, in one forward pass. Preserved branches keep their own statistics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vfx.errors import PassError
from vfx.normalization import reset_readers
from vfx.operators import BATCH_NORMS, operator
from vfx.program import Program
from vfx.rewrite import Pass, require_edges
from vfx.statistics.data import Batches
from vfx.statistics.frontier import advance_together


class ResetBatchNorm(Pass):
    """Recompute the running mean and variance of every merged BatchNorm on ``data``."""

    def __init__(self, data: Any, *, max_samples: int | None = None, device: Any = None, progress: bool = True):
        self.data, self.max_samples, self.device, self.progress = data, max_samples, device, progress

    def requires(self, program: Program) -> None:
        require_edges(program, single=True, name=self.name)
        if not any(operator(node) in BATCH_NORMS for node in program.graph.nodes):
            raise PassError("RESET needs BatchNorm layers and this network has none; use 'rescale' or 'repair'")

    def apply(self, program: Program) -> Program:
        weights, notes = dict(program.weights[0]), list(program.notes)
        readers = reset_readers(program, weights, notes)
        batches = Batches(program, self.data, self.max_samples, self.device)
        advance_together(program, weights, batches, readers, self.progress)
        return replace(program.with_weights([weights], f"ResetBatchNorm({len(readers)} layers)"), notes=tuple(notes))
