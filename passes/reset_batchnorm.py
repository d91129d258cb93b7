"""ResetBatchNorm: running statistics recomputed on the merged network (RESET; REPAIR §3, *Vanishing Feature* alg. 1).

Each BatchNorm gets the exact mean and unbiased variance of its input over all the data, behind BatchNorms that are
reset already, in one forward pass; ``sweep`` takes them as the public code does instead (``vfx.statistics.frontier``).
Preserved branches keep their own statistics.
"""

from __future__ import annotations

from typing import Any

from vfx.analyse.layer_view import batch_norms
from vfx.analyse.layers import Choice, number_layers
from vfx.arguments import checked
from vfx.errors import PassError
from vfx.normalize.batch_norms import reset_readers
from vfx.program import Program
from vfx.rewrite import Pass, PassResult
from vfx.statistics.data import Batches
from vfx.statistics.frontier import Sweep, sweep


class ResetBatchNorm(Pass[None]):
    """Recompute the running mean and variance of every merged BatchNorm on ``data``, or of those behind ``layers``."""

    weight_sets = "one"

    @checked
    def __init__(
        self,
        data: Any,
        *,
        layers: Choice = None,
        sweep: Sweep = "exact",
        memory_limit: int | None = None,
        max_samples: int | None = None,
        device: Any = None,
        progress: bool = True,
    ):
        self.data, self.layers, self.sweep, self.memory_limit = data, layers, sweep, memory_limit
        self.max_samples, self.device, self.progress = max_samples, device, progress

    def requires(self, program: Program) -> None:
        if not batch_norms(program):
            raise PassError("RESET needs BatchNorm layers and this network has none; use 'rescale' or 'repair'")

    def apply(self, program: Program) -> PassResult[None]:
        weights, notes = dict(program.weights[0]), list[str]()
        chosen = None
        if self.layers is not None:
            chosen = {layer.node for layer in number_layers(program).select(self.layers)}
        readers = reset_readers(program, notes, chosen)
        batches = Batches(program, self.data, self.max_samples, self.device)
        options: dict[str, Any] = {"memory_limit": self.memory_limit, "progress": self.progress}
        notes += sweep(program, weights, batches, readers, kind=self.sweep, **options)
        how = "" if self.sweep == "exact" else f", {self.sweep}"
        result = program.with_weights([weights], f"ResetBatchNorm({len(readers)} layers{how})")
        return PassResult(result.with_notes(notes))
