"""BalanceScales: the positive scales that a network leaves free, brought to one canonical form.

ReLU(d x) = d ReLU(x) for d > 0: what writes a channel may be scaled by d and what reads it by 1/d. Of all networks
that differ by such scales, this pass takes the one whose weights have the smallest sum of squares (Stock et al.,
*Equi-normalization of Neural Networks*, 2019, §3; ``vfx.analyse.balance``): what writes a channel, biases among it, has
the norm of what reads it. Which scales are free the symmetry classes say (``vfx.analyse.classes``): residual streams
share one among all writers and readers, gates, BatchNorms and products keep what they need. Two networks that differ by
scales alone become equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vfx.analyse.balance import rewritten
from vfx.analyse.classes import Maps
from vfx.analyse.groups import Group, Side
from vfx.analyse.scales import Scales
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.arguments import checked
from vfx.errors import listed
from vfx.program import Program
from vfx.rewrite import Pass, PassResult

NAMED = 3  # features without a free scale that a note names


class BalanceScales(Pass[None]):
    """Rescale channels so that what writes them weighs as much as what reads them, in every weight set."""

    needs = (symmetry,)
    preserves_function = True
    changes_values = True

    @checked
    def __init__(self, verify: bool = True):
        self.verify = verify

    def apply(self, program: Program) -> PassResult[None]:
        facts = symmetry(program)
        scales = Scales(facts, mixed=True)
        sets = [rewritten(facts, weights, scales) for weights in program.weights]
        result = program.with_weights(sets, f"BalanceScales({len(scales.places)} features)")
        return PassResult(result.with_notes(_notes(facts, scales)))


def _notes(facts: Symmetry, scales: Scales) -> list[str]:
    """Which features have no free scale, and why."""
    free = _scaled(facts, scales)
    outer = {group.parent for group in facts.groups}
    kept = [next(_kept(facts, scales, group, free), "") for group in facts.groups if group.index not in outer]
    named = [text for text in kept if text]
    return [f"scales left as they are: {listed(named, NAMED)}"] if named else []


def _scaled(facts: Symmetry, scales: Scales) -> dict[tuple[str, int], set[int]]:
    """The positions of each parameter axis that have a free scale: heads that hold them need none of their own."""
    scaled: dict[tuple[str, int], set[int]] = {}
    for group in facts.groups:
        for member in group.members if scales.vectors[group.index] else ():
            sides = facts.classes[group.index].slots[member.fqn, member.dim][0]
            on_sides = np.isin(sides, list(scales.vectors[group.index]))
            scaled.setdefault((member.fqn, member.dim), set()).update(member.position[:, on_sides].ravel().tolist())
    return scaled


def _kept(facts: Symmetry, scales: Scales, group: Group, free: Mapping[tuple[str, int], set[int]]) -> Iterator[str]:
    """The parameters that write a feature and have no free scale, each with the reason."""
    group_class = facts.classes[group.index]
    sides = {side.index: side for side in group_class.sides}
    for member in group.members:
        writes = member.role == "out" and not free.get((member.fqn, member.dim), set()).issuperset(
            member.position.ravel().tolist()
        )
        for index in dict.fromkeys(group_class.slots[member.fqn, member.dim][0].tolist()) if writes else ():
            if index not in scales.vectors[group.index]:
                reason = _statistic(facts, sides[index]) or sides[index].refusal(Maps.POSITIVE_MONOMIAL)
                yield f"{member.fqn} ({reason})"


def _statistic(facts: Symmetry, side: Side) -> str:
    """What is not a weight and stands on a side that would have scales."""
    buffers = [fqn for fqn, _, _ in side.members if fqn in facts.program.buffers]
    return f"{buffers[0]} is kept" if buffers and side.kind & Maps.POSITIVE_MONOMIAL else ""
