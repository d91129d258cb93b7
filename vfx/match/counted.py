"""What counts channels, and what makes up for those that another width adds.

Attention divides by √d for heads of d channels: queries and keys are multiplied by the square root of what the scale
lacks. RMSNorm divides by √(Σ x²/n): behind an embedding into n₀ channels it sees n₀/n₁ times too small a mean, unless
what it reads is multiplied by √(n₀/n₁); then it gives the same, ε included. A gain behind it takes the factor off
again, and so do the layers that read the stream as it is. Where orthogonal maps that fix the vector of ones pass
(LayerNorm without gain), the embedding keeps the mean, and the same factor the variance. Where channels are left out,
the factor is right if those said nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import fx

from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element, Elements
from vfx.match.carry import Carrier, Pairing
from vfx.match.frame import embedding
from vfx.operators import arguments, operator_of
from vfx.program import BATCH, Value


def attention_factors(own: Symmetry, there: Symmetry) -> Carrier | None:
    """What multiplies an edge's queries and keys before it goes to other widths; None where no scale differs."""
    factors: dict[int, float] = {}
    for node in own.program.graph.nodes:
        if not operator_of(node).is_attention:
            continue
        ratio = _scale(node) / _scale(there.program.nodes[node.name])
        query, key, value = (own.classes.groups_on(arguments(node)[x]) for x in ("query", "key", "value"))
        if abs(ratio - 1) > 1e-12 and ratio > 0:
            factors |= dict.fromkeys((query & key) - value, math.sqrt(ratio))
    if not factors:
        return None
    carrier = Carrier(Pairing(own, own))
    for group in own.groups:
        carrier.found[group.index] = embedding(factors.get(group.index, 1.0) * np.eye(group.size))
    return carrier


def _scale(node: fx.Node) -> float:
    scale = arguments(node).get("scale")
    return float(scale) if scale is not None else 1 / math.sqrt(_sizes(arguments(node)["query"])[-1])


def norm_scales(own: Symmetry, there: Symmetry) -> Elements:
    """The scales of the sides of an edge on which norms will count more or fewer channels."""
    given: dict[int, dict[int, float]] = {}
    for x, dim in _counted(own):
        ratio = _sizes(there.program.nodes[x.name])[dim] / _sizes(x)[dim]
        for group, side in _standing(own, x, dim) if ratio != 1 else ():
            given.setdefault(group.index, {})[side] = math.sqrt(ratio)
    solved = {index: own.classes.scaled(own.groups[index], sides) for index, sides in given.items()}
    return {
        index: Element(scales={side: np.full(own.groups[index].size, scale) for side, scale in sides.items()})
        for index, sides in solved.items()
    }


def counts_channels(pairing: Pairing) -> list[str]:
    """Nodes whose values depend on how many channels there are, where there are more than in the other edge."""
    theirs = pairing.other.program.nodes
    wider = [x.name for x, dim in _counted(pairing.one) if _sizes(x)[dim] > _sizes(theirs[x.name])[dim]]
    return list(dict.fromkeys(wider))


def _counted(facts: Symmetry) -> Iterator[tuple[fx.Node, int]]:
    """Values whose mean, or mean square, is taken over channels, and the axis."""
    for node in facts.program.graph.nodes:
        entry = operator_of(node)
        if entry.is_vector_norm and len(arguments(node)["normalized_shape"]) == 1:
            dims = [-1]
        elif entry.norm == "group":
            dims = [1]
        elif entry.divides_by_count:
            dims = arguments(node).get("dim") or []
            dims = [dims] if isinstance(dims, int) else dims
        else:
            continue
        x = _behind(node.args[0])  # type: ignore[arg-type]
        for dim in dims:
            axis = dim % len(_sizes(x))
            if _groups(facts, x, axis):
                yield x, axis


def _behind(node: fx.Node) -> fx.Node:
    """What was squared, or cast, before its mean is taken."""
    while (operator_of(node).is_magnitude or operator_of(node).is_cast) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _sizes(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    assert isinstance(value, Value)
    return value.sizes(BATCH)


def _groups(facts: Symmetry, node: fx.Node, dim: int) -> list[int]:
    return list(facts.positions(node, dim % len(_sizes(node))))


def _standing(facts: Symmetry, node: fx.Node, dim: int) -> Iterator[tuple[Group, int]]:
    """The groups whose channels alone stand along an axis, and their sides."""
    labels = facts.labels(node, dim)
    for groups, _, position in facts.features(labels) if labels is not None else ():
        group = facts.groups[groups[0]]
        slots = facts.classes.slots(node, dim, group, position) if len(groups) == 1 else None
        for side in set(slots[0].tolist()) if slots is not None else ():
            yield group, side
