"""What normalization passes share: the affine x · scale + shift behind a layer, and readers that reset BatchNorms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from vfx.operators import BATCH_NORMS, operator, weight_name
from vfx.program import Program
from vfx.statistics.frontier import Reader, moments_of

PREFIX = "normalization"
SCALE, SHIFT = "scale", "shift"


@dataclass(frozen=True)
class Affine:
    """One inserted affine: its layer's node, its two nodes and the FQNs of its parameters."""

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


def reset_readers(program: Program, weights: dict[str, Tensor], notes: list[str]) -> dict[fx.Node, Reader]:
    """For each merged BatchNorm a reader of its input that writes exact running statistics into ``weights``."""
    readers: dict[fx.Node, Reader] = {}
    seen: set[str] = set()
    for node in program.graph.nodes:
        name = weight_name(node, "running_mean") if operator(node) in BATCH_NORMS else None
        if name is None or name in program.private:
            continue
        if name in seen:
            notes.append(f"reset: {name} serves several calls; its statistics are those of the last one")
        seen.add(name)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        readers[source] = chained(readers.get(source), _reset(node, weights))
    return readers


def chained(first: Reader | None, second: Reader) -> Reader:
    """Two readers of one node, one after the other."""

    def read(values: list[Tensor]) -> None:
        if first is not None:
            first(values)
        second(values)

    return read


def _reset(node: fx.Node, weights: dict[str, Tensor]) -> Reader:
    mean, var = weight_name(node, "running_mean"), weight_name(node, "running_var")

    def read(values: list[Tensor]) -> None:
        moments = moments_of(values, 1)
        weights[str(mean)] = moments.mean.to(weights[str(mean)])
        weights[str(var)] = (moments.m2 / max(moments.count - 1, 1)).to(weights[str(var)])

    return read
