"""A merged network and its edges read in one pass: what ``diagnose`` reports and held-out checks judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vfx.diagnosis.observe import Observer, observe
from vfx.diagnosis.rows import LayerRow, layer_rows
from vfx.diagnosis.taps import Key, layer_taps, preserved
from vfx.errors import ArchitectureError
from vfx.program import Program
from vfx.progress import track
from vfx.statistics.data import Batches
from vfx.statistics.moments import Moments


@dataclass(frozen=True)
class EdgeComparison:
    """Rows, and the moments of the merged network's and each edge's outputs (None where they are no tensor)."""

    rows: tuple[LayerRow, ...]
    samples: int
    outputs: Moments | None
    edge_outputs: tuple[Moments | None, ...]


@torch.no_grad()
def compare(
    network: Program,
    edges: Program,
    data: Any,
    *,
    max_samples: int | None = None,
    device: Any = None,
    reference: list[Tensor] | None = None,
    units: bool = True,
    progress: bool = True,
) -> EdgeComparison:
    """Read ``network`` and every weight set of ``edges`` on ``data``; ``units`` counts those that merging silences.

    ``reference`` is the input that stands for 0, one tensor for each placeholder.

    Raises ArchitectureError if no layer of one has the name of a layer of the other, DataError.
    """
    edge_taps = layer_taps(edges)
    taps = layer_taps(network, edge_taps)
    kept = preserved(taps, network)
    if not set(taps) & set(edge_taps) and not kept & {name for name, _ in edge_taps}:
        raise ArchitectureError(
            f"no layer of the merged network has the name of one of its references: {_some(taps)} against "
            f"{_some(edge_taps)}; diagnose compares networks whose modules have the same names"
        )
    observer = Observer(network, 0, {key: tap for key, tap in taps.items() if key in edge_taps}, reference)
    others = [Observer(edges, edge, edge_taps, reference) for edge in range(edges.edges)]
    batches = _Counted(Batches(edges, data, max_samples, device), progress)
    pairs = observe(observer, others, batches)
    rows = layer_rows(observer, others, pairs if units else [], kept)
    return EdgeComparison(rows, batches.samples, observer.outputs, tuple(edge.outputs for edge in others))


class _Counted:
    """Batches with their sizes, behind a progress bar; knows afterwards how many samples there were."""

    def __init__(self, batches: Batches, progress: bool):
        self.batches, self.progress, self.samples = batches, progress, 0

    def __iter__(self) -> Iterator[tuple[list[Tensor], int]]:
        for batch in track(self.batches, "diagnosis", len(self.batches), self.progress):
            size = self.batches.size(batch)
            self.samples += size
            yield batch, size


def _some(taps: Iterable[Key]) -> str:
    return ", ".join(name for name, _ in list(taps)[:3]) + " …"
