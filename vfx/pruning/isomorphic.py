"""Structures of the same kind, whose channels are ranked with each other (Isomorphic Pruning, Fang et al., ECCV 2024).

Scores of a residual stream and of a hidden layer say different things, whatever they are divided by. Two groups are
isomorphic where as many parameters stand at the same axes of the same operators, in the same roles; sizes do not count.
A channel's quantile among the channels of its kind takes the place of its score, so the same share goes of each kind,
those with the lowest scores wherever they are in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vfx.analyse.symmetry import Symmetry
from vfx.operators import operator_of
from vfx.resize.bundle import Bundle

Structure: TypeAlias = tuple[frozenset[tuple[object, int]], ...]


def structures(facts: Symmetry) -> Mapping[int, frozenset[tuple[object, int]]]:
    """What each group is made of: how many parameters stand where, in which role; equal for isomorphic groups."""
    readers: defaultdict[str, set[str]] = defaultdict(set)
    for node in facts.program.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] |= {operator_of(user).name for user in node.users}
    return {
        group.index: frozenset(
            Counter(
                (member.role, member.dim, group.parent is not None, *sorted(readers[member.fqn]))
                for member in group.members
            ).items()
        )
        for group in facts.groups
    }


def quantiles(
    facts: Symmetry, bundles: Sequence[Bundle], scores: Sequence[NDArray[np.float64]], channels: Sequence[int]
) -> list[NDArray[np.float64]]:
    """For each unit's score the share of the channels of its kind that go before and with it.

    ``scores`` (of each bundle the units that may go, ascending), ``channels``: those of one unit of each bundle.
    """
    known = structures(facts)
    kinds: defaultdict[Structure, list[int]] = defaultdict(list)
    for index, bundle in enumerate(bundles):
        kinds[tuple(sorted((known[g] for g in bundle.groups), key=repr))].append(index)
    result = [np.zeros(len(part)) for part in scores]
    for members in kinds.values():
        owner = np.repeat(members, [len(scores[k]) for k in members])
        order = np.argsort(np.concatenate([scores[k] for k in members]), kind="stable")
        weight = np.array([channels[k] for k in owner[order]], float)
        share = np.cumsum(weight) / sum(channels[k] * bundles[k].units for k in members)
        for k in members:
            result[k] = share[owner[order] == k]
    return result
