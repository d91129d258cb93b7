"""CalibrateNormalization: set the inserted affines so that each layer's statistics reach the edges' (REPAIR, RESCALE).

μ_α, σ_α are those of the merged network with all earlier layers already corrected, taken exactly, layer by layer, in
one forward pass (*Rethinking Model Re-Basin*, Table 9, "SEQ"). Goals are μ̄ = Σ αᵢ μᵢ and σ̄ = Σ αᵢ σᵢ. Merged
BatchNorms are reset in the same sweep.

=======  ===========================  ==========================
REPAIR   (x − μ_α)/σ_α · σ̄ + μ̄        eq. 1 (Jordan et al. 2022)
RESCALE  x/σ_α · σ̄                    *Vanishing Feature* §5.3
=======  ===========================  ==========================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from vfx.analyse.layers import number_layers
from vfx.errors import ArgumentError, PassError
from vfx.normalization import Affine, affines, chained, reset_readers
from vfx.program import Goal, Program
from vfx.rewrite import Pass, require_edges
from vfx.statistics.data import Batches
from vfx.statistics.frontier import advance_together, moments_of
from vfx.statistics.moments import Moments

Kind = Literal["repair", "rescale"]
CONSTANT = 1e-7  # a channel whose std is below this share of its layer's largest only varies by float32 rounding


class CalibrateNormalization(Pass):
    """Calibrate every inserted affine with ``kind`` on ``data``; goals come from the edges' statistics."""

    def __init__(
        self, kind: Kind, data: Any, *, max_samples: int | None = None, device: Any = None, progress: bool = True
    ):
        if kind not in ("repair", "rescale"):
            raise ArgumentError(f"kind must be 'repair' or 'rescale', got {kind!r}")
        self.kind, self.data, self.max_samples = kind, data, max_samples
        self.device, self.progress = device, progress

    def requires(self, program: Program) -> None:
        require_edges(program, single=True, name=self.name)
        if not program.goals and any(True for _ in affines(program)):
            raise PassError("no goal statistics: give Align data or statistics of the edges' layers")

    def apply(self, program: Program) -> Program:
        weights = dict(program.weights[0])
        channel = {layer.node: layer.channel for layer in number_layers(program)}
        dead: list[str] = []
        readers = reset_readers(program, weights, dead)
        for affine in affines(program):
            reader = self._reader(affine, program.goals[affine.layer.name], channel, weights, dead)
            readers[affine.layer] = chained(readers.get(affine.layer), reader)
        batches = Batches(program, self.data, self.max_samples, self.device)
        advance_together(program, weights, batches, readers, self.progress)
        notes = (*program.notes, *(f"{self.kind}: {text}" for text in dead))
        return replace(program.with_weights([weights], f"CalibrateNormalization({self.kind})"), notes=notes)

    def _reader(
        self, affine: Affine, goal: Goal, channel: dict[str, int], weights: dict[str, Tensor], dead: list[str]
    ) -> Callable[[list[Tensor]], None]:
        def read(values: list[Tensor]) -> None:
            moments = moments_of(values, channel[affine.layer.name])
            scale, shift, constant = affine_to_goal(self.kind, moments, goal)
            if constant:
                dead.append(f"{constant} constant channels in {affine.layer.name} are not rescaled")
            for name, value in ((affine.scale, scale), (affine.shift, shift)):
                weights[name] = value.to(weights[name]).reshape(weights[name].shape)

        return read


def affine_to_goal(kind: Kind, moments: Moments, goal: Goal) -> tuple[Tensor, Tensor, int]:
    """Scale and shift (C,) in float64 that bring a layer's statistics to their goal, and its constant channels.

    A constant channel cannot be rescaled: it keeps its scale, and REPAIR moves its mean.
    """
    std, mean = moments.std, moments.mean
    constant = moments.constant | (std <= CONSTANT * std.max())
    ratio = goal.std[0].to(std.device) / torch.where(constant, 1.0, std)
    scale = torch.where(constant, 1.0, ratio)
    shift = goal.mean[0].to(std.device) - mean * scale if kind == "repair" else torch.zeros_like(scale)
    return scale, shift, int(constant.sum())
