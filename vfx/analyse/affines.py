"""Inserted affines x · scale + shift: how ``InsertNormalization`` writes them, and where a graph has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from vfx.operators import operator
from vfx.program import Program

PREFIX = "normalization"
SCALE, SHIFT = "scale", "shift"


@dataclass(frozen=True)
class Affine:
    """One inserted affine: the value it acts on (a layer's or its activation's), its nodes and parameters."""

    layer: fx.Node
    multiply: fx.Node
    add: fx.Node

    @property
    def scale(self) -> str:
        return name(self.layer.name, SCALE)

    @property
    def shift(self) -> str:
        return name(self.layer.name, SHIFT)


def name(layer: str, parameter: str) -> str:
    """FQN of an inserted parameter."""
    return f"{PREFIX}.{layer}.{parameter}"


def affines(program: Program) -> Iterator[Affine]:
    """The inserted affines in graph order."""
    for node in program.graph.nodes:
        if operator(node) != "aten.mul" or len(node.args) != 2:
            continue
        layer, scale = node.args
        if isinstance(scale, fx.Node) and isinstance(layer, fx.Node) and scale.target == name(layer.name, SCALE):
            yield Affine(layer, node, next(iter(node.users)))
