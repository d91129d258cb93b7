"""RemoveBias: b ← 0 in the last k layers (backward) or the first k (forward) of a merged network.

*Vanishing Feature* §5.2 and Figure 13; k = 5 or 6 is best on VGG16.
"""

from __future__ import annotations

from typing import Literal

import torch

from vfx.analyse.layers import number_layers
from vfx.errors import ArgumentError
from vfx.operators import weight_name
from vfx.program import Program
from vfx.rewrite import Pass, require_edges

DEFAULT_LAYERS = 5


class RemoveBias(Pass):
    """Zero the biases of ``count`` conv and linear layers from one end; private (branch) biases stay."""

    def __init__(self, count: int = DEFAULT_LAYERS, direction: Literal["backward", "forward"] = "backward"):
        if direction not in ("backward", "forward"):
            raise ArgumentError(f"direction must be 'backward' or 'forward', got {direction!r}")
        if count < 0:
            raise ArgumentError(f"count must not be negative, got {count}")
        self.count, self.direction = count, direction

    def requires(self, program: Program) -> None:
        require_edges(program, single=True, name=self.name)

    def apply(self, program: Program) -> Program:
        layers = number_layers(program)
        number = {layer.node: layer.number for layer in layers}
        total = len(layers)
        weights = dict(program.weights[0])
        for node in program.graph.nodes:
            if node.name not in number:
                continue
            depth = number[node.name]
            chosen = depth > total - self.count if self.direction == "backward" else depth <= self.count
            name = weight_name(node, "bias")
            if chosen and name is not None and name not in program.private:
                weights[name] = torch.zeros_like(weights[name])
        return program.with_weights([weights], f"RemoveBias({self.direction}, {self.count})")
