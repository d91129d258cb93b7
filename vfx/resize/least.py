"""How many units an operator needs: a deviation two values, the k-th value k of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx

from vfx.analyse.axis import Axis, Opaque
from vfx.analyse.places import Index
from vfx.analyse.rules.rule import dims_of, normal
from vfx.analyse.shapes import Digit, Shape
from vfx.analyse.symmetry import Symmetry
from vfx.operators import arguments, operator_of
from vfx.resize.bundle import Bundle
from vfx.resize.layout import Layout

Multiplicity = Callable[[list[int]], Index]  # how often each slot stands, given the units of each bundle


def least_units(facts: Symmetry, bundles: Sequence[Bundle], multiplicity: Multiplicity) -> list[int]:
    """The smallest number of units of each bundle with which every operator is defined."""
    least = [bundle.units if bundle.fixed else 1 for bundle in bundles]
    owner = np.full(facts.leaves.count + 1, -1)
    for index, bundle in enumerate(bundles):
        owner[bundle.slots] = index
    for axes, needed in _needs(facts):
        standing = sorted(set().union(*(_standing(facts, owner, axis) for axis in axes)))
        while _count(Layout(facts, multiplicity(least)), axes) < needed:
            grown = [k for k in standing if least[k] < bundles[k].units]
            if not grown:
                break
            least[max(grown, key=lambda k: bundles[k].units - least[k])] += 1
    return least


def _needs(facts: Symmetry) -> Iterator[tuple[list[Axis | Digit], int]]:
    """The axes that an operator takes together, and how many positions it needs there."""
    for node in facts.terms.shapes:
        least = operator_of(node).least
        if not least:
            continue
        x, a = facts.terms.shapes[node.all_input_nodes[0]], arguments(node)
        if not isinstance(x, Shape) or not x.axes:
            continue
        if least == "k":
            yield [x.axes[normal(int(a["dim"]), len(x.axes))]], int(a["k"])
        else:
            yield [x.axes[d] for d in dims_of(a.get("dim"), len(x.axes))], int(_correction(node, a)) + 1


def _correction(node: fx.Node, a: dict[str, Any]) -> float:
    """What is taken off the number of values: 1 unless said otherwise."""
    if "correction" in a:
        return 1 if a["correction"] is None else float(a["correction"])
    return float(a.get("unbiased", True))


def _standing(facts: Symmetry, owner: Index, axis: Axis | Digit) -> set[int]:
    """The bundles on an axis."""
    rows = [axis.block.flat] if isinstance(axis, Digit) else [f for f in axis.factors if not isinstance(f, Opaque)]
    return {k for labels in rows for k in np.unique(owner[facts.leaves.resolve(labels)[:, 1:]]).tolist() if k >= 0}


def _count(layout: Layout, axes: list[Axis | Digit]) -> int:
    return int(np.prod([layout.size(axis) for axis in axes], dtype=float))
