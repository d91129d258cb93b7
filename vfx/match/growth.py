"""Channels of aligned edges kept apart: the network grows, and each edge's weights take their place in it.

Of a group's C channels some are merged and some stay apart, one for each edge. Each edge has channels of the merged
kind and its own apart; its weights enter so that Σ αᵢ (edge i) is right for both: rows that make a channel apart are
scaled by 1/αᵢ and are zero in other edges, columns that read it are zero in other edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.layers import number_layers
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.elements import Element
from vfx.errors import ArgumentError, PassError
from vfx.match.carry import Carrier, Pairing
from vfx.program import Goal, Program
from vfx.resize import resize


@dataclass(frozen=True, eq=False)
class Growth:
    """A network whose groups have grown: the ``program`` of all edges in it, and what carries each edge there."""

    program: Program
    facts: Symmetry
    carriers: tuple[Carrier, ...]

    def output(self, node: str, dim: int, edge: int) -> Tensor | None:
        """(M, C): what brings a value's channels to the grown network's; None where they are the same."""
        carrier = self.carriers[edge]
        return carrier.matrix(self.facts.program.nodes[node], carrier.pairing.other.program.nodes[node], dim)


def grow(program: Program, facts: Symmetry, apart: Mapping[int, Index], shares: Sequence[float]) -> Growth:
    """Keep the channels ``apart`` of aligned edges apart. Raises PassError where a group cannot grow."""
    if min(shares) <= 0:
        raise ArgumentError(f"channels are kept apart for edges with positive weights, got {list(shares)}")
    edges = program.edges
    kept = {g: np.concatenate([np.arange(facts.groups[g].size), *[extra] * (edges - 1)]) for g, extra in apart.items()}
    try:
        grown = resize(program, facts, kept).program
    except PassError as error:
        names = ", ".join(facts.groups[g].name for g in apart)
        raise PassError(f"{error}; keep no channels of these groups apart: {names}") from error
    new = symmetry(grown)
    carriers = []
    for edge in range(edges):
        carrier = Carrier(Pairing(new, facts, f"edge {edge}"))
        for group, twin in carrier.pairing.twin.items():
            size = facts.groups[twin].size
            if new.groups[group].parent is None:
                placed = _placed(size, apart.get(twin), edge, shares)
            else:
                placed = Element(np.arange(size))
            carrier.found[group] = placed
        carriers.append(carrier)
    weights = [c.weights(grown.weights[e], program.weights[e]) for e, c in enumerate(carriers)]
    goals = _goals(program, grown, carriers)
    return Growth(replace(grown, weights=tuple(weights), goals=goals), new, tuple(carriers))


def _placed(size: int, apart: Index | None, edge: int, shares: Sequence[float]) -> Element:
    """The first edge's channels apart stand where they stood, the others' behind all channels, edge after edge."""
    if apart is None:
        apart = np.zeros(0, np.int64)
    index = np.concatenate([np.arange(size), *[apart] * (len(shares) - 1)])
    owner = np.concatenate([np.full(size, -1), *(np.full(len(apart), e) for e in range(1, len(shares)))])
    owner[apart] = 0
    selection = np.asarray((owner < 0) | (owner == edge), float)[:, None] * (index[:, None] == np.arange(size))
    scale = np.where(owner < 0, 1.0, 1 / shares[edge])[:, None]
    return Element(matrix=selection * scale, dual=selection)


def _goals(program: Program, grown: Program, carriers: Sequence[Carrier]) -> dict[str, Goal]:
    """Statistics of the channels where they stand now; those of other edges count nothing."""
    goals = {}
    for layer in number_layers(grown):
        goal = program.goals.get(layer.node)
        if goal is None:
            continue
        rows = []
        for edge, carrier in enumerate(carriers):
            matrix = carrier.matrix(grown.nodes[layer.node], program.nodes[layer.node], layer.channel)
            mean, std = goal.mean[edge], goal.std[edge]
            rows.append((mean, std) if matrix is None else (matrix.to(mean) @ mean, matrix.to(std) @ std))
        goals[layer.node] = Goal(*(torch.stack(column) for column in zip(*rows)))
    return goals
