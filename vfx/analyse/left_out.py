"""Positions that every cut leaves out: a table of positions that is longer than the inputs the network was traced with.

No value depends on them, so that any map of them would be a symmetry of the graph, yet not of the network: its module
may read them from other inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from vfx.analyse.program_terms import ProgramTerms
from vfx.analyse.rules.spaces import Spaces
from vfx.analyse.shapes import Shape
from vfx.operators import operator_of

LEFT_OUT = "left out with these inputs"


def pin_left_out(terms: ProgramTerms) -> None:
    """Pin the leaves that no operator reads: wherever one of them ends, a cut has left it out."""
    standing = _Standing(terms)
    cuts = {leaf: node for node, leaf in standing.ends(cut=True)}
    if not cuts:
        return
    read = {leaf for _, leaf in standing.ends(cut=False)}
    for leaf in cuts.keys() - read:
        terms.leaves.context = cuts[leaf].name
        terms.leaves.pin(terms.leaves.elements_as_rows(terms.leaves.elements(leaf)), LEFT_OUT)


class _Standing:
    """The leaves that stand on each value of a finished inference."""

    def __init__(self, terms: ProgramTerms):
        self._terms, self._spaces = terms, Spaces(terms)

    def ends(self, cut: bool) -> Iterator[tuple[fx.Node, int]]:
        """The leaves that stand on an operand and no longer on the result, where values are only moved or elsewhere."""
        for node in self._terms.shapes:
            if node.op != "call_function" or operator_of(node).ties == "sizes" or _only_moves(node) is not cut:
                continue
            kept = self._on(self._terms.shapes[node]) if node.users else frozenset()
            for operand in node.all_input_nodes:
                for leaf in self._on(self._terms.shapes.get(operand)) - kept:
                    yield node, leaf

    def _on(self, shape: Any) -> frozenset[int]:
        if isinstance(shape, Shape):
            return frozenset().union(*map(self._spaces.leaves, shape.axes))
        items = shape if isinstance(shape, (list, tuple)) else ()
        return frozenset().union(*map(self._on, items))


def _only_moves(node: fx.Node) -> bool:
    """Whether a call computes nothing; what has several results has read its operands, taken or not."""
    if operator_of(node).ties == "item":
        return _only_moves(node.all_input_nodes[0])
    return operator_of(node).moves
