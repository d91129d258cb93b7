"""CalibrateNormalization: set the inserted affines so that each layer's statistics reach the edges' (REPAIR, RESCALE).

μ_α, σ_α are those of the merged network with all earlier layers already corrected, taken exactly, layer by layer, in
one forward pass (*Rethinking Model Re-Basin*, Table 9, "SEQ"); ``sweep`` takes them as the public code does instead
(``vfx.statistics.frontier``). Goals are μ̄ = Σ αᵢ μᵢ and σ̄ = Σ αᵢ σᵢ. Merged BatchNorms are reset in the same sweep.

===============  ===========================  ==========================================================
repair           (x − μ_α)/σ_α · σ̄ + μ̄        eq. 1 (Jordan et al. 2022)
rescale          x/σ_α · σ̄                    *Vanishing Feature* §5.3
rescale_average  x/σ_α · mean_j σ̄_j           RESCALE*, one goal for a layer (*Rethinking Model Re-Basin* Table 4)
reshift          x − μ_α + μ̄                  ablation in the same table; it ruins the papers' networks
===============  ===========================  ==========================================================
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vfx.analyse.affines import Affine, affines
from vfx.analyse.layer_view import statistics_channels
from vfx.analyse.layers import number_layers
from vfx.arguments import checked
from vfx.errors import PassError
from vfx.normalize.batch_norms import reset_readers
from vfx.program import Goal, Program
from vfx.rewrite import Pass, PassResult
from vfx.statistics.data import Batches
from vfx.statistics.frontier import ChannelMoments, Reader, Sweep, sweep

Kind = Literal["repair", "rescale", "rescale_average", "reshift"]
CONSTANT = 1e-7  # a channel whose std is below this share of its layer's largest only varies by float32 rounding


class CalibrateNormalization(Pass[None]):
    """Calibrate every inserted affine with ``kind`` on ``data``; goals come from the edges' statistics.

    ``sweep``: "exact", "train" or "uncorrected". ``memory_limit``: bytes of activations kept in memory by the exact
    sweep, the rest waits on disk.
    """

    needs = (number_layers,)
    weight_sets = "one"

    @checked
    def __init__(
        self,
        kind: Kind,
        data: Any,
        *,
        sweep: Sweep = "exact",
        memory_limit: int | None = None,
        max_samples: int | None = None,
        device: Any = None,
        progress: bool = True,
    ):
        self.kind, self.data, self.sweep, self.memory_limit = kind, data, sweep, memory_limit
        self.max_samples, self.device, self.progress = max_samples, device, progress

    def requires(self, program: Program) -> None:
        if not program.goals and any(True for _ in affines(program)):
            raise PassError("no goal statistics: give Align data or statistics of the edges' layers")

    def apply(self, program: Program) -> PassResult[None]:
        weights, notes = dict(program.weights[0]), list[str]()
        channels = statistics_channels(program)
        readers = reset_readers(program, notes)
        for affine in affines(program):
            goal = program.goals[affine.layer.name]
            readers.setdefault(affine.layer, []).append(self._reader(affine, goal, channels[affine.layer.name]))
        batches = Batches(program, self.data, self.max_samples, self.device)
        options: dict[str, Any] = {"memory_limit": self.memory_limit, "progress": self.progress}
        notes += sweep(program, weights, batches, readers, kind=self.sweep, **options)
        how = "" if self.sweep == "exact" else f", {self.sweep}"
        result = program.with_weights([weights], f"CalibrateNormalization({self.kind}{how})")
        return PassResult(result.with_notes(notes))

    def _reader(self, affine: Affine, goal: Goal, channel: int) -> Reader:
        def write(observed: ChannelMoments, weights: dict[str, Tensor]) -> str:
            scale, shift, constant = affine_to_goal(self.kind, observed, goal)
            for name, value in ((affine.scale, scale), (affine.shift, shift)):
                weights[name] = value.to(weights[name]).reshape(weights[name].shape)
            if not constant or self.kind == "reshift":
                return ""
            return f"{self.kind}: {constant} constant channels in {affine.layer.name} are not rescaled"

        return Reader(channel, write)


def affine_to_goal(kind: Kind, observed: ChannelMoments, goal: Goal) -> tuple[Tensor, Tensor, int]:
    """Scale and shift (C,) in float64 that bring a layer's statistics to their goal, and its constant channels.

    A constant channel cannot be rescaled: it keeps its scale, and REPAIR moves its mean.
    """
    std, mean = observed.std, observed.mean
    wanted_mean, wanted_std = goal.mean[0].to(std), goal.std[0].to(std)
    constant = observed.constant | (std <= CONSTANT * std.max())
    if kind == "reshift":
        return torch.ones_like(std), wanted_mean - mean, int(constant.sum())
    if kind == "rescale_average":
        wanted_std = wanted_std.mean().expand_as(std)
    scale = torch.where(constant, 1.0, wanted_std / torch.where(constant, 1.0, std))
    shift = wanted_mean - mean * scale if kind == "repair" else torch.zeros_like(scale)
    return scale, shift, int(constant.sum())
