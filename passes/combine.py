"""Combine: N weight sets of one frame become one by a method of ``vfx.combine``, such as TIES or RegMean.

The parameters are the method's; all else is averaged as ``Interpolate`` does: buffers and layer statistics, while whole
numbers come from the first edge and private tensors (preserved layers, heads) stay each edge's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vfx.alphas import edge_weights
from vfx.arguments import checked
from vfx.combine.base import base_weights
from vfx.combine.catalogue import check_needs, combiner, name_of
from vfx.combine.combiner import Combination, Combiner
from vfx.errors import PassError
from vfx.program import Program
from vfx.rewrite import Pass, PassResult
from vfx.rewrite.averaging import averaged


class Combine(Pass[None]):
    """Combine the weight sets by ``combine``, a Combiner or its name.

    ``base``: what all edges were fine-tuned from (a network, its state dict or the path of a checkpoint), for methods
    that read task vectors. ``weights``: one for each edge, summing to 1. ``data``: calibration batches, for methods
    that run the edges. ``edges``: the edges as they are, where the Program's layers are kept for each edge by now.
    Raises ArgumentError, ArchitectureError, WeightError, DataError.

    Example: ``Combine("ties", base=pretrained)(vfx.trace(models, example_inputs))``.
    """

    weight_sets = "several"

    @checked
    def __init__(
        self,
        combine: str | Combiner,
        *,
        base: Any = None,
        weights: float | Sequence[float] | None = None,
        data: Any = None,
        edges: Program | None = None,
        max_samples: int | None = None,
        device: Any = None,
        seed: int = 0,
        progress: bool = True,
    ):
        self.combiner = combiner(combine)
        self.base, self.weights, self.data, self.edges = base, weights, data, edges
        self.seed, self.reading = seed, {"max_samples": max_samples, "device": device, "progress": progress}

    @torch.no_grad()
    def apply(self, program: Program) -> PassResult[None]:
        alphas = edge_weights(self.weights, program.edges)
        name = "average" if self.combiner is None else name_of(self.combiner)
        merged = averaged(program, alphas, f"Combine({name})")
        if self.combiner is None:
            return PassResult(merged)
        combination = self._combination(program, alphas)
        combined = self.combiner(combination)
        first = program.weights[0]
        tensors = {key: tensor.to(first[key]).contiguous() for key, tensor in combined.items()}
        result = merged.with_weights([{**merged.weights[0], **tensors}])
        return PassResult(result.with_notes(_foreign(combination)))

    def _combination(self, program: Program, alphas: Sequence[float]) -> Combination:
        """What the method is given. Raises ArgumentError for what it lacks."""
        assert self.combiner is not None
        check_needs(self.combiner, self.base, self.data)
        if self.edges is None and program.private:
            raise PassError(f"{self.name} runs the edges as they were; give them as edges=")
        base: Mapping[str, Tensor] | None = None
        if "base" in self.combiner.needs:
            base = base_weights(self.base, program)
        edges = program if self.edges is None else self.edges
        return Combination(program, edges, tuple(alphas), base, self.data, self.seed, self.reading)


def _foreign(combination: Combination) -> list[str]:
    """Notes on edges that cannot have been fine-tuned from the base."""
    notes = []
    for edge, weights in enumerate(combination.program.weights if combination.base is not None else ()):
        changed = sum(float(combination.change(name, edge).square().sum()) for name in combination.names)
        if changed > sum(float(weights[name].double().square().sum()) for name in combination.names):
            notes.append(f"edge {edge} differs from base= by more than its own size: it was not fine-tuned from it")
    return notes
