"""What is known of edges of different widths: one pass over the data reads all of them side by side.

The statistics that REPAIR brings the merged network to are those of the carried features T y: mean T μ and variances on
the diagonal of T Σ Tᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vfx.analyse.layers import number_layers
from vfx.errors import ArchitectureError, ArgumentError
from vfx.match.carry import Carriage, Pairing, Reading
from vfx.processes import count, shared
from vfx.program import Execution, Program
from vfx.progress import track
from vfx.statistics.across import cross_across, number_across
from vfx.statistics.collect import Statistics, features, fingerprint
from vfx.statistics.data import Batches
from vfx.statistics.moments import CrossMoments, Moments, Workspace
from vfx.statistics.taps import Tap, feature_taps


class WidthReader:
    """Moments of features and layers in networks of different widths, in one pass over the data.

    The first network gives the places; ``pairings`` hold it beside each of them.
    """

    def __init__(self, programs: Sequence[Program], pairings: Sequence[Pairing], features: bool, layers: bool):
        self.programs, self.samples = programs, 0
        self.taps = _paired_taps(pairings) if features else []
        self.channel = {layer.node: layer.channel for layer in number_layers(programs[0])} if layers else {}
        self.features: dict[int, CrossMoments] = {}
        self.layers: dict[str, CrossMoments] = {}
        self._workspace = Workspace()

    def read(self, data: Any, max_samples: int | None, device: Any, progress: bool) -> None:
        if data is None:
            raise ArgumentError("matching on activations, REPAIR and RESCALE need data=")
        plans = [program.plan for program in self.programs]
        taps_at: dict[str, list[int]] = {}
        for index, taps in enumerate(self.taps):
            taps_at.setdefault(taps[0].node, []).append(index)
        batches = Batches(self.programs[0], data, max_samples, device)
        for batch in track(shared(batches, list), "statistics", len(batches) // count(), progress):
            self.samples += batches.size(batch)
            runs = [Execution(p.graph, p.weights[0], batch, plan) for p, plan in zip(self.programs, plans)]
            for step in plans[0]:
                values = [run.step()[1] for run in runs]
                self._read_node(step.node.name, values, taps_at.get(step.node.name, ()))
        self.features = cross_across(self.features, within=False)
        self.layers = cross_across(self.layers, within=True, between=False)
        self.samples = number_across(self.samples)

    def _read_node(self, name: str, values: list[Tensor], taps: Sequence[int]) -> None:
        if name in self.channel:
            channel = self.channel[name]
            if name not in self.layers:
                sizes = [x.shape[channel] for x in values]
                self.layers[name] = CrossMoments(len(values), sizes, values[0].device, within=True, between=False)
            self.layers[name].read(values, channel, self._workspace)
        for index in taps:
            node_taps = self.taps[index]
            if index not in self.features:
                self.features[index] = CrossMoments(len(values), [tap.size for tap in node_taps], values[0].device)
            self.features[index].update([features(tap, x) for tap, x in zip(node_taps, values)])

    def readings(self, edge: int) -> list[Reading]:
        """What is known of the features of the first edge and of another."""
        return [(taps[0], taps[edge], self.features[index]) for index, taps in enumerate(self.taps)]

    def statistics(self, program: Program, carriages: Sequence[Carriage]) -> tuple[Statistics, tuple[str, ...]]:
        """The layers' statistics of the carried edges, and a note on those that are not known."""
        layers: dict[str, list[Moments]] = {}
        covariances: dict[str, list[Tensor]] = {}
        unknown = []
        for name, moments in self.layers.items():
            moments_of = [(moments.moments[0], moments.covariance(0, 0))]
            try:
                for edge, carriage in enumerate(carriages, start=1):
                    ours, theirs = self.programs[0].nodes[name], self.programs[edge].nodes[name]
                    matrix = carriage.matrix(ours, theirs, self.channel[name])
                    moments_of.append(_carried(moments.moments[edge], moments.covariance(edge, edge), matrix))
            except ArchitectureError:
                unknown.append(name)
                continue
            layers[name], covariances[name] = map(list, zip(*moments_of))
        statistics = Statistics(
            samples=self.samples,
            taps=(),
            features={},
            layers=layers,
            fingerprint=fingerprint(program),
            reads=frozenset({"layers"}),
            covariances=covariances,
        )
        return statistics, _unknown(unknown)


def _unknown(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"{', '.join(names)}: not normalized, since the channels of these layers go through several maps",)


def _carried(moments: Moments, spread: Tensor, matrix: Tensor | None) -> tuple[Moments, Tensor]:
    """Moments and covariance of T y."""
    if matrix is None:
        return moments, spread
    matrix = matrix.to(spread)
    result = Moments(len(matrix), spread.device)
    result.count, result.mean = moments.count, matrix @ moments.mean
    spread = matrix @ spread @ matrix.T
    result.m2 = spread.diagonal().clamp_min(0) * moments.count
    return result, spread


def _paired_taps(pairings: Sequence[Pairing]) -> list[list[Tap]]:
    """The taps of the first edge, each with those of the other edges at the same place.

    Where other groups' channels are the samples, networks of different widths have different numbers of these.
    """
    paired = [[tap] for tap in feature_taps(pairings[0].one) if not tap.beside]
    for pairing in pairings[1:]:
        theirs = {tap.place(): tap for tap in feature_taps(pairing.other)}
        for taps in paired:
            key = taps[0].place(pairing.twin)
            if key not in theirs or theirs[key].position.shape[1] != taps[0].position.shape[1]:
                raise ArchitectureError(
                    f"the features of node {taps[0].node} do not stand in {pairing.name} as they do in edge 0"
                )
            taps.append(theirs[key])
    return paired
