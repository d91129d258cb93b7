"""FirstLayers: align only what the first l layers produce (*Vanishing Feature*, Figure 4 left).

A matcher runs as always; the elements of groups whose channels first appear in a later layer are then replaced by
the identity. A residual stream belongs to the layer that starts it. The result is a symmetry like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vfx.analyse.groups import Group
from vfx.analyse.layers import number_layers
from vfx.arguments import checked
from vfx.elements import identity
from vfx.errors import ArgumentError
from vfx.match.catalogue import matcher as find_matcher
from vfx.match.matcher import Matcher, Matching, Problem
from vfx.operators import weight_name
from vfx.program import Program


class FirstLayers:
    """``matcher`` (a name or a Matcher), its result kept for the first ``count`` layers alone."""

    @checked
    def __init__(self, matcher: str | Matcher, count: int):
        matcher_found = find_matcher(matcher)
        if matcher_found is None:
            raise ArgumentError("FirstLayers needs a matcher, e.g. FirstLayers('activation', 3)")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ArgumentError(f"count is a number of layers, got {count!r}")
        self.matcher, self.count = matcher_found, count
        self.needs, self.exact = matcher_found.needs, matcher_found.exact

    def __call__(self, problem: Problem) -> Matching:
        matching = self.matcher(problem)
        symmetry = problem.symmetry
        moved = {index for elements in matching.elements for index in elements}
        first = first_layer_of_groups(problem.program, [symmetry.group(index) for index in sorted(moved)])
        still = identity(symmetry)
        kept = tuple(
            still | {index: element for index, element in elements.items() if first[index] <= self.count}
            for elements in matching.elements
        )
        return replace(matching, elements=kept)


def first_layer_of_groups(program: Program, groups: Sequence[Group]) -> dict[int, int]:
    """The number of the first layer that produces each group's channels; 1 where none does (embeddings)."""
    number: dict[str, int] = {}
    for layer in number_layers(program):
        weight = weight_name(program.nodes[layer.node])
        if weight is not None:
            number.setdefault(weight, layer.number)
    return {
        group.index: min((number[m.fqn] for m in group.members if m.role == "out" and m.fqn in number), default=1)
        for group in groups
    }
