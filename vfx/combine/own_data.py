"""Methods that run each edge on data of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vfx.combine.combiner import Combination, Combiner
from vfx.errors import ArgumentError
from vfx.statistics.data import Batches, reusable


class OwnData(Combiner):
    """A combiner with ``data`` of each edge, in their order; None stands for the data of the merge, for all of them."""

    needs = frozenset({"data"})

    def __init__(self, data: Sequence[Any] | None):
        self.data = None if data is None else [reusable(source) for source in data]

    @property
    def brings_data(self) -> bool:
        return self.data is not None

    def batches(self, combination: Combination) -> list[Batches]:
        """The batches of each edge. Raises ArgumentError unless there are those of all."""
        edges, reading = combination.edges, combination.reading
        if self.data is not None and len(self.data) != edges.edges:
            raise ArgumentError(f"data of {len(self.data)} tasks for {edges.edges} edges; give those of each")
        sources = [combination.data] * edges.edges if self.data is None else self.data
        return [Batches(edges, source, reading.get("max_samples"), reading.get("device")) for source in sources]
