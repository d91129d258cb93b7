"""Channels and positions: what a group's elements are to the network, told by how its layers use them.

A layer sums over channels with a weight for each; along positions (tokens, latents, queries) it does the same at every
one. Positions may be permuted like channels, but the network has as many as its task asks for: they are not removed.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from vfx.analyse.layers import descendants
from vfx.analyse.rules.spaces import Spaces
from vfx.analyse.symmetry import Symmetry
from vfx.operators import operator_of


def positions(facts: Symmetry) -> dict[int, str]:
    """The groups that layers carry along and no weight sums over, each with the node of such a layer."""
    spaces = Spaces(facts.terms)
    computed = descendants([node for node in facts.program.graph.nodes if node.op == "placeholder"])
    summed: set[int] = set()
    carried: dict[int, str] = {}
    for node in facts.terms.shapes:
        if not operator_of(node).contracts or not operator_of(node).is_known:
            continue
        values = [a for a in node.all_input_nodes if a in computed or a.op == "placeholder"]
        weights = [a for a in node.all_input_nodes if a not in values and len(facts.terms.sizes(a)) > 1]
        if not values or not weights:
            continue
        data, read_by, result = (leaves_on(spaces, nodes) for nodes in (values, weights, [node]))
        summed |= (data & read_by) - result
        carried |= {leaf: node.name for leaf in (data & result) - read_by if leaf not in carried}
    read = {g.index for g in facts.groups if any(m.role in ("in", "tied") for m in g.members)}
    names = {facts.group_of[leaf]: name for leaf, name in carried.items() if leaf in facts.group_of}
    named = {facts.group_of[leaf] for leaf in summed if leaf in facts.group_of}
    return {group: name for group, name in names.items() if group not in read | named}


def leaves_on(spaces: Spaces, nodes: Iterable[fx.Node]) -> frozenset[int]:
    """The leaves that stand on some axis of these values."""
    shapes = [shape for shape in map(spaces.shape, nodes) if shape is not None]
    return frozenset().union(*(spaces.leaves(axis) for shape in shapes for axis in shape.axes))
