"""Networks of one architecture whose numbers of channels differ: their graphs agree in operators and wiring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from vfx.errors import ArchitectureError
from vfx.operators import operator
from vfx.program import Program

_SCALES = frozenset({"scale"})  # of attention: it follows from the width of a head


def check_alike(one: Program, other: Program, name: str) -> None:
    """Raise ArchitectureError at the first node in which two graphs differ by more than sizes."""
    ours, theirs = list(one.graph.nodes), list(other.graph.nodes)
    for node, twin in zip(ours, theirs):
        if (node.name, node.op, node.target) != (twin.name, twin.op, twin.target) or not _same(
            (node.args, node.kwargs), (twin.args, twin.kwargs)
        ):
            raise ArchitectureError(
                f"{name} is another network: edge 0 runs {_text(node)} where it runs {_text(twin)}; edges of different "
                "widths may differ in the numbers of their channels alone"
            )
    if len(ours) != len(theirs):
        raise ArchitectureError(f"{name} is another network: its graph has {len(theirs)} nodes, edge 0's {len(ours)}")


def _same(one: Any, other: Any, key: str = "") -> bool:
    """Arguments that agree, whatever the sizes in them."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k], k) for k in one)
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return one.name == other.name
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int) and isinstance(other, int):
        return True
    return bool(one == other) or (key in _SCALES and isinstance(one, float) and isinstance(other, float))


def _text(node: fx.Node) -> str:
    return f"{operator(node) or node.op} (node {node.name}, {node.format_node()})"
