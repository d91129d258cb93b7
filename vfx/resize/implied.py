"""Views that operators take of their operands without a node of their own; they tie slots like any other view."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.rules.rule import normal
from vfx.analyse.shapes import Block, Shape
from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
from vfx.operators import arguments, operator_of
from vfx.operators.calls import recurrent_cells


def implied_blocks(facts: Symmetry) -> Iterator[Block]:
    """Labels of all such views."""
    for node, shape in facts.terms.shapes.items():
        ties = operator_of(node).ties
        if ties == "channel shuffle" and isinstance(shape, Shape):
            rows = facts.labels(node.all_input_nodes[0], 1)
            if rows is not None:
                groups = int(arguments(node)["groups"])
                yield Block(rows, (groups, len(rows) // groups))
        elif ties == "recurrent layers":
            yield from map(_stacked, _cells(facts, arguments(node)))


def whole_axes(facts: Symmetry, numbered: bool = True) -> Iterator[Rows]:
    """Labels of axes that cannot lose positions, though they may be permuted: what is sorted or ``numbered``."""
    if numbered:
        yield from numbered_axes(facts)
    for node in facts.terms.shapes:
        if operator_of(node).ties == "sorted" and not operator_of(node).least:
            x = node.all_input_nodes[0]
            rows = facts.labels(x, normal(int(arguments(node).get("dim", 0)), len(x.meta["val"].shape)))
            if rows is not None:
                yield rows


def numbered_axes(facts: Symmetry) -> Iterator[Rows]:
    """Labels of the axes whose positions are read as numbers: the experts that a router chooses from."""
    numbered = (facts.terms.rows(axis) for axis in facts.terms.numbered)
    yield from (facts.leaves.resolve(rows) for rows in numbered if rows is not None)


def _cells(facts: Symmetry, a: dict[str, Any]) -> Iterable[list[Rows]]:
    """The features of all cells of a recurrent call, which are of one size; with projections their memories, too."""
    cells = recurrent_cells(a)
    columns = [[cell[1] for cell in cells]]
    if len(cells[0]) > 2 + 2 * a["has_biases"]:
        columns.append([cell[-1] for cell in cells])
    labels = [[facts.labels(parameter, 1) for parameter in column] for column in columns]
    return [[rows for rows in column if rows is not None] for column in labels]


def _stacked(rows: list[Rows]) -> Block:
    width = max(row.shape[1] for row in rows)
    wide = [np.pad(row, ((0, 0), (0, width - row.shape[1])), constant_values=-1) for row in rows]
    return Block(np.concatenate(wide), (len(wide), len(wide[0])))


def recurrent_width(a: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    """Parameters of a recurrent call whose second axes are the features and the memory of a cell."""
    projected = len(a["params"]) > (2 + 2 * a["has_biases"]) * (2 if a["bidirectional"] else 1) * a["num_layers"]
    return a["params"][1], a["params"][-1] if projected else a["params"][1]
