"""Edges of different widths: networks of one architecture whose numbers of channels differ.

Each edge is captured on its own. The graphs must agree in operators and wiring; groups correspond by their members. One
pass over the data reads the features of all edges side by side, a matching carries each edge to the first one's shapes
(``vfx.match.rectangular``, ``vfx.match.carry``), and from there on merging goes as ever. The statistics that REPAIR
brings the merged network to are those of the carried features T y: mean T μ and variances on the diagonal of T Σ Tᵀ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfx.analyse.layers import number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.elements import identity
from vfx.errors import ArchitectureError, ArgumentError, listed
from vfx.match.carry import AcrossWidths, Carriage, Crossing, Pairing
from vfx.match.counted import counts_channels
from vfx.match.matcher import Matching
from vfx.match.rectangular import deviation
from vfx.operators import operator
from vfx.program import Execution, Program
from vfx.progress import track
from vfx.proof import PRESERVED
from vfx.reconstruct.references import Reference
from vfx.statistics.collect import Statistics, features, fingerprint
from vfx.statistics.data import Batches
from vfx.statistics.moments import CrossMoments, Moments, Workspace
from vfx.statistics.taps import Tap, feature_taps

NAMED = 3  # nodes that a note names
_SCALES = frozenset({"scale"})  # of attention: it follows from the width of a head


def differ_in_width(models: Any) -> bool:
    """Whether models have the same tensors but not the same shapes."""
    if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
        return False
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    return any(own.keys() == shapes[0].keys() and own != shapes[0] for own in shapes[1:])


@dataclass(frozen=True, eq=False)
class Carried:
    """All edges in the first one's shapes: the ``program``, the ``statistics`` of its layers, and the ``matching``.

    ``captured`` is the first edge before it was prepared; ``programs`` are the edges at their own widths.
    """

    program: Program
    statistics: Statistics | None
    matching: Matching
    captured: Program
    programs: tuple[Program, ...] = ()
    carriages: tuple[Carriage, ...] = ()

    def references(self, shares: Sequence[float]) -> list[Reference]:
        """Every edge at its own width, with what brings its channels to the first one's."""
        nodes = [{node.name: node for node in program.graph.nodes} for program in self.programs]
        found = [Reference(self.programs[0], shares[0])]
        for edge, carriage in enumerate(self.carriages, start=1):

            def along(node: str, dim: int, edge: int = edge, carriage: Carriage = carriage) -> Tensor | None:
                return carriage.matrix(nodes[0][node], nodes[edge][node], dim)

            found.append(Reference(self.programs[edge], shares[edge], along))
        return found


@torch.no_grad()
def to_first_width(
    programs: Sequence[Program],
    facts: Sequence[Symmetry],
    matcher: AcrossWidths,
    data: Any = None,
    *,
    layers: bool = False,
    seed: int = 0,
    max_samples: int | None = None,
    device: Any = None,
    progress: bool = True,
) -> Carried:
    """Carry every edge (a Program of one weight set each) to the first one's shapes.

    ``layers`` asks for the statistics of the layers (REPAIR, RESCALE). The result's notes say of each edge whether its
    function is kept, and by how much it changes if not. Raises ArchitectureError where the networks differ in more than
    the numbers of channels.
    """
    start = time.perf_counter()
    for edge, program in enumerate(programs[1:], start=1):
        check_alike(programs[0], program, f"edge {edge}")
    pairings = [Pairing(facts[0], own, f"edge {edge}") for edge, own in enumerate(facts)]
    reader = _Reader(programs, pairings, "features" in matcher.needs, layers)
    if matcher.needs or layers:
        reader.read(data, max_samples, device, progress)
    first = programs[0].weights[0]
    carriages, objective, weights, notes = [], [], [first], []
    for edge in range(1, len(programs)):
        own = programs[edge].weights[0]
        crossing = Crossing(pairings[edge], edge, first, own, reader.readings(edge), seed)
        carriage, value = matcher.carry(crossing)
        carriages.append(carriage)
        objective.append(value)
        weights.append(carriage.weights(first, own))
        notes.append(_kept(crossing, carriage))
    note = f"ToFirstWidth({type(matcher).__name__})"
    program = programs[0].with_weights(weights, note)
    statistics, unknown = reader.statistics(program, carriages) if layers else (None, ())
    program = program.with_notes((*notes, *unknown))
    matching = Matching(
        elements=(identity(facts[0]),) * len(programs),
        objective=tuple(objective),
        seconds=time.perf_counter() - start,
    )
    return Carried(program, statistics, matching, programs[0], tuple(programs), tuple(carriages))


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
    fewer = sum(one < other for one, other in sizes)
    counting = counts_channels(pairing)
    if fewer:
        yield f"{fewer} of {len(sizes)} groups have fewer channels there"
    if counting:
        added = listed(counting, NAMED)
        yield f"means or norms run over the added channels of {added} (prepare='lift' helps behind LayerNorms)"
    if not fewer and not counting:
        yield "its channels are not only added to"


# graphs ---------------------------------------------------------------------------------------------------------------


def check_alike(one: Program, other: Program, name: str) -> None:
    """Raise ArchitectureError at the first node in which two graphs differ by more than sizes."""
    ours, theirs = list(one.graph.nodes), list(other.graph.nodes)
    for node, twin in zip(ours, theirs):
        if (node.name, node.op, node.target) != (twin.name, twin.op, twin.target) or not _same(
            (node.args, node.kwargs), (twin.args, twin.kwargs)
        ):
            raise ArchitectureError(
                f"{name} is another network: edge 0 runs {_text(node)} where it runs {_text(twin)}; edges of different "
                "widths may differ in the numbers of their channels alone"
            )
    if len(ours) != len(theirs):
        raise ArchitectureError(f"{name} is another network: its graph has {len(theirs)} nodes, edge 0's {len(ours)}")


def _same(one: Any, other: Any, key: str = "") -> bool:
    """Arguments that agree, whatever the sizes in them."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k], k) for k in one)
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return one.name == other.name
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int) and isinstance(other, int):
        return True
    return bool(one == other) or (key in _SCALES and isinstance(one, float) and isinstance(other, float))


def _text(node: fx.Node) -> str:
    return f"{operator(node) or node.op} (node {node.name}, {node.format_node()})"


# statistics -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Moments of features and layers in networks of different widths, in one pass over the data."""

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
        for batch in track(batches, "statistics", len(batches), progress):
            self.samples += batches.size(batch)
            runs = [Execution(p.graph, p.weights[0], batch, plan) for p, plan in zip(self.programs, plans)]
            for step in plans[0]:
                values = [run.step()[1] for run in runs]
                self._read_node(step.node.name, values, taps_at.get(step.node.name, ()))

    def _read_node(self, name: str, values: list[Tensor], taps: Sequence[int]) -> None:
        if name in self.channel:
            channel = self.channel[name]
            if name not in self.layers:
                sizes = [x.shape[channel] for x in values]
                self.layers[name] = CrossMoments(len(values), sizes, values[0].device, within=True, between=False)
            self.layers[name].read(values, channel, self._workspace)
        for index in taps:
            own = self.taps[index]
            if index not in self.features:
                self.features[index] = CrossMoments(len(values), [tap.size for tap in own], values[0].device)
            self.features[index].update([features(tap, x) for tap, x in zip(own, values)])

    def readings(self, edge: int) -> list[tuple[Tap, Tap, CrossMoments]]:
        """What is known of the features of the first edge and of another."""
        return [(taps[0], taps[edge], self.features[index]) for index, taps in enumerate(self.taps)]

    def statistics(self, program: Program, carriages: Sequence[Carriage]) -> tuple[Statistics, tuple[str, ...]]:
        """The layers' statistics of the carried edges, and a note on those that are not known."""
        nodes = [{node.name: node for node in own.graph.nodes} for own in self.programs]
        layers: dict[str, list[Moments]] = {}
        covariances: dict[str, list[Tensor]] = {}
        unknown = []
        for name, moments in self.layers.items():
            found = [(moments.moments[0], moments.covariance(0, 0))]
            try:
                for edge, carriage in enumerate(carriages, start=1):
                    matrix = carriage.matrix(nodes[0][name], nodes[edge][name], self.channel[name])
                    found.append(_carried(moments.moments[edge], moments.covariance(edge, edge), matrix))
            except ArchitectureError:
                unknown.append(name)
                continue
            layers[name], covariances[name] = map(list, zip(*found))
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


def _carried(own: Moments, spread: Tensor, matrix: Tensor | None) -> tuple[Moments, Tensor]:
    """Moments and covariance of T y."""
    if matrix is None:
        return own, spread
    matrix = matrix.to(spread)
    result = Moments(len(matrix), spread.device)
    result.count, result.mean = own.count, matrix @ own.mean
    spread = matrix @ spread @ matrix.T
    result.m2 = spread.diagonal().clamp_min(0) * own.count
    return result, spread


def _paired_taps(pairings: Sequence[Pairing]) -> list[list[Tap]]:
    """The taps of the first edge, each with those of the other edges at the same place."""
    found = [[tap] for tap in feature_taps(pairings[0].one)]
    for pairing in pairings[1:]:
        theirs = {(tap.node, tap.dim, frozenset(tap.groups), tap.part): tap for tap in feature_taps(pairing.other)}
        for own in found:
            key = own[0].node, own[0].dim, frozenset(pairing.twin[g] for g in own[0].groups), own[0].part
            if key not in theirs or theirs[key].position.shape[1] != own[0].position.shape[1]:
                raise ArchitectureError(
                    f"the features of node {own[0].node} do not stand in {pairing.name} as they do in edge 0"
                )
            own.append(theirs[key])
    return found
