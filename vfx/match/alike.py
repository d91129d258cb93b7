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


def _same(left: Any, right: Any, key: str = "") -> bool:
    """Arguments that agree, whatever the sizes in them."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[k], right[k], k) for k in left)
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return left.name == right.name
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int) and isinstance(right, int):
        return True
    return bool(left == right) or (key in _SCALES and isinstance(left, float) and isinstance(right, float))


def _text(node: fx.Node) -> str:
    return f"{operator(node) or node.op} (node {node.name}, {node.format_node()})"
