"""Merged BatchNorms, and the readers that reset their statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, fx

from vfx.analyse.layer_view import batch_norms
from vfx.operators import is_layer, weight_name
from vfx.program import Program
from vfx.statistics.frontier import ChannelMoments, Reader


def merged_norms(program: Program, layers: Collection[str] | None = None) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The BatchNorms with running statistics that are not one edge's own, each with the node it reads.

    With ``layers`` (node names) only those behind one of these layers.
    """
    for node in batch_norms(program):
        name = weight_name(node, "running_mean")
        if name is None or name in program.private:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if layers is None or _layer_before(source) in layers:
            yield node, source


def _layer_before(node: fx.Node) -> str:
    """The layer whose output this is, normalised or not; "" where there is none."""
    while not is_layer(node):
        operands = [a for a in node.all_input_nodes if a.op == "call_function"]
        if len(operands) != 1:
            return ""
        node = operands[0]
    return node.name


def reset_readers(
    program: Program, notes: list[str], layers: Collection[str] | None = None
) -> dict[fx.Node, list[Reader]]:
    """For each merged BatchNorm a reader of its input that writes its running statistics."""
    readers: dict[fx.Node, list[Reader]] = {}
    seen: set[str] = set()
    for node, source in merged_norms(program, layers):
        name = str(weight_name(node, "running_mean"))
        if name in seen:
            notes.append(f"reset: {name} serves several calls; its statistics are those of the last one")
        seen.add(name)
        readers.setdefault(source, []).append(_reset(node))
    return readers


def _reset(node: fx.Node) -> Reader:
    mean, var = str(weight_name(node, "running_mean")), str(weight_name(node, "running_var"))

    def write(observed: ChannelMoments, weights: dict[str, Tensor]) -> str:
        weights[mean] = observed.mean.to(weights[mean])
        weights[var] = observed.unbiased.to(weights[var])
        dead = int(observed.constant.sum())
        return f"reset: {dead} constant channels in {node.name}" if dead else ""

    return Reader(1, write)
