"""ToFirstWidth: edges of one architecture whose numbers of channels differ, carried to the first one's shapes.

Each edge is captured on its own. The graphs must agree in operators and wiring; groups correspond by their members. One
pass over the data reads the features of all edges side by side (``vfx.match.reading``), a matching carries each edge to
the first one's shapes (``vfx.match.rectangular``, ``vfx.match.carry``), and from there on merging goes as ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import symmetry
from vfx.arguments import checked
from vfx.elements import identity
from vfx.errors import listed
from vfx.match.alike import check_alike
from vfx.match.carry import AcrossWidths, Carriage, Crossing, Pairing
from vfx.match.counted import counts_channels
from vfx.match.matcher import Matching
from vfx.match.reading import WidthReader
from vfx.match.rectangular import deviation
from vfx.program import Program
from vfx.proof import PRESERVED
from vfx.reconstruct.references import Reference
from vfx.rewrite import Pass, PassResult
from vfx.statistics.collect import Statistics

NAMED = 3  # nodes that a note names


@dataclass(frozen=True, eq=False)
class Crossed:
    """What carried the edges: the ``matching``, the ``statistics`` of the carried layers, ``edges`` at their widths."""

    matching: Matching
    statistics: Statistics | None
    edges: tuple[Program, ...]
    carriages: tuple[Carriage, ...]

    def references(self, shares: Sequence[float]) -> list[Reference]:
        """Every edge at its own width, with what brings its channels to the first one's."""
        references = [Reference(self.edges[0], shares[0])]
        for edge, carriage in enumerate(self.carriages, start=1):

            def along(node: str, dim: int, edge: int = edge, carriage: Carriage = carriage) -> Tensor | None:
                return carriage.matrix(self.edges[0].nodes[node], self.edges[edge].nodes[node], dim)

            references.append(Reference(self.edges[edge], shares[edge], along))
        return references


class ToFirstWidth(Pass[Crossed]):
    """Add ``others``, edges of one weight set each at widths of their own, in the shapes of the one it acts on.

    ``matcher`` finds the maps, ``layers`` asks for the statistics of the layers (REPAIR, RESCALE); either may read
    ``data``. Notes say of each edge whether its function is kept, and by how much it changes if not. The record of
    ``run`` is a ``Crossed``. Raises ArchitectureError where networks differ in more than the numbers of channels.
    """

    weight_sets = "one"
    needs = (symmetry, number_layers)

    @checked
    def __init__(
        self,
        others: Sequence[Program],
        matcher: AcrossWidths,
        data: Any = None,
        *,
        layers: bool = False,
        seed: int = 0,
        max_samples: int | None = None,
        device: Any = None,
        progress: bool = True,
    ):
        self.others, self.matcher, self.data, self.layers, self.seed = others, matcher, data, layers, seed
        self.max_samples, self.device, self.progress = max_samples, device, progress

    @torch.no_grad()
    def apply(self, program: Program) -> PassResult[Crossed]:
        start = time.perf_counter()
        edges = (program, *self.others)
        for edge, network in enumerate(self.others, start=1):
            check_alike(program, network, f"edge {edge}")
        facts = symmetry(program)
        pairings = [Pairing(facts, symmetry(network), f"edge {edge}") for edge, network in enumerate(edges)]
        reader = WidthReader(edges, pairings, "features" in self.matcher.needs, self.layers)
        if self.matcher.needs or self.layers:
            reader.read(self.data, self.max_samples, self.device, self.progress)
        first = program.weights[0]
        carriages, objective, weights, notes = [], [], [first], []
        for edge, network in enumerate(self.others, start=1):
            crossing = Crossing(pairings[edge], edge, first, network.weights[0], reader.readings(edge), self.seed)
            carriage, value = self.matcher.carry(crossing)
            carriages.append(carriage)
            objective.append(value)
            weights.append(carriage.weights(first, network.weights[0]))
            notes.append(_kept(crossing, carriage))
        result = program.with_weights(weights, f"ToFirstWidth({type(self.matcher).__name__})")
        statistics, unknown = reader.statistics(result, carriages) if self.layers else (None, ())
        seconds = time.perf_counter() - start
        matching = Matching((identity(facts),) * len(edges), objective=tuple(objective), seconds=seconds)
        return PassResult(result.with_notes((*notes, *unknown)), Crossed(matching, statistics, edges, tuple(carriages)))


def _kept(crossing: Crossing, carriage: Carriage) -> str:
    """What became of an edge's function."""
    error, name = deviation(crossing.pairing, carriage, crossing), crossing.pairing.name
    if error <= PRESERVED:
        return f"{name} keeps its function at edge 0's widths (relative error {error:.1e} in float64)"
    why = "; ".join(_causes(crossing.pairing))
    return f"{name} does not keep its function at edge 0's widths (relative error {error:.1e} in float64): {why}"


def _causes(pairing: Pairing) -> Iterator[str]:
    """What may keep an edge from being embedded."""
    sizes = [(g.size, pairing.other.groups[pairing.twin[g.index]].size) for g in pairing.one.groups]
    fewer = sum(first < second for first, second in sizes)
    counting = counts_channels(pairing)
    if fewer:
        yield f"{fewer} of {len(sizes)} groups have fewer channels there"
    if counting:
        added = listed(counting, NAMED)
        yield f"means or norms run over the added channels of {added} (prepare='lift' helps behind LayerNorms)"
    if not fewer and not counting:
        yield "its channels are not only added to"
