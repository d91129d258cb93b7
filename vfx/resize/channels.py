"""Where a dense network's values stand in a smaller one's: kept channels, or means of the channels that became one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element, act_on
from vfx.resize.program import Resized


class KeptChannels:
    """Called with a node's name and an axis: the old position of each new one (new,), or with ``averages`` (by group, a
    row for each channel that stands for others) a matrix (new, old); None where nothing changes."""

    def __init__(self, resized: Resized, facts: Symmetry, averages: Mapping[int, Tensor] | None = None):
        self.resized, self.facts = resized, facts
        tables = {group: average.numpy() for group, average in (averages or {}).items()}
        self.averages = {group: Element(matrix=table, dual=table) for group, table in tables.items()}
        self._known: dict[tuple[str, int], Tensor | None] = {}

    def __call__(self, node: str, dim: int) -> Tensor | None:
        if (node, dim) not in self._known:
            self._known[node, dim] = self._along(self.facts.program.nodes[node], dim)
        return self._known[node, dim]

    def _along(self, node: fx.Node, dim: int) -> Tensor | None:
        changes = self.resized.changes(node, dim)
        if self.facts.labels(node, dim) is None:
            return torch.from_numpy(self.resized.gather(node, dim)) if changes else None
        order = self.resized.gather(node, dim)
        matrix = act_on(self.facts, self.averages, node, dim).behind
        if matrix is not None:
            return matrix[torch.from_numpy(order)]
        same = not changes and bool((order == np.arange(len(order))).all())
        return None if same else torch.from_numpy(order)
