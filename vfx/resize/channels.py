"""Where a dense network's values stand in a smaller one's: kept channels, or means of the channels that became one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.store import Rows
from vfx.analyse.symmetry import Symmetry
from vfx.match.maps import apply_along, places
from vfx.resize.program import Resized


class KeptChannels:
    """Called with a node's name and an axis: the old position of each new one (new,), or with ``averages`` (by group, a
    row for each channel that stands for others) a matrix (new, old); None where nothing changes."""

    def __init__(self, resized: Resized, facts: Symmetry, averages: Mapping[int, Tensor] | None = None):
        self.resized, self.facts, self.averages = resized, facts, dict(averages or {})
        self._known: dict[tuple[str, int], Tensor | None] = {}

    def __call__(self, node: str, dim: int) -> Tensor | None:
        if (node, dim) not in self._known:
            self._known[node, dim] = self._along(self._nodes[node], dim)
        return self._known[node, dim]

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.facts.program.graph.nodes}

    def _along(self, node: fx.Node, dim: int) -> Tensor | None:
        labels, changes = self.facts.labels(node, dim), self.resized.changes(node, dim)
        if labels is None:
            return torch.from_numpy(self.resized.gather(node, dim)) if changes else None
        order = self.resized.gather(node, dim)
        matrix = self._averaged(labels)
        if matrix is not None:
            return matrix[torch.from_numpy(order)]
        same = not changes and bool((order == np.arange(len(order))).all())
        return None if same else torch.from_numpy(order)

    def _averaged(self, labels: Rows) -> Tensor | None:
        """The means over an axis of what became one, (old, old); None where nothing did."""
        matrix: Tensor | None = None
        for group, average in self.averages.items():
            where = places(self.facts, labels, self.facts.groups[group])
            if where is not None:
                matrix = torch.eye(len(labels), dtype=torch.float64) if matrix is None else matrix
                matrix = apply_along(matrix, 0, where, average)
        return matrix
