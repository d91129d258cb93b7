"""Biases that are removed: which they are, and a weight set without them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from vfx.analyse.layers import number_layers
from vfx.operators import weight_name
from vfx.program import Program, Weights

Direction = Literal["backward", "forward"]


def removed_biases(program: Program, count: int | None, direction: Direction) -> set[str]:
    """The biases of ``count`` layers (None: all) from the end (backward) or the start, those of branches left out."""
    layers = number_layers(program)
    number = {layer.node: layer.number for layer in layers}
    removed = set()
    for node in program.graph.nodes:
        if node.name not in number:
            continue
        depth = number[node.name]
        chosen = count is None or (depth > len(layers) - count if direction == "backward" else depth <= count)
        name = weight_name(node, "bias")
        if chosen and name is not None and name not in program.private:
            removed.add(name)
    return removed


def without(weights: Weights, names: Collection[str]) -> dict[str, Tensor]:
    """A weight set with some tensors set to zero."""
    return {name: torch.zeros_like(tensor) if name in names else tensor for name, tensor in weights.items()}
