"""One pass over the data: all edges advance together, every tap is read as soon as its value exists."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from vfx.analyse.layer_view import statistics_channels
from vfx.analyse.symmetry import Symmetry
from vfx.errors import DataError
from vfx.processes import count, shared
from vfx.program import Execution, Goal, Program, Weights, digest
from vfx.progress import track
from vfx.statistics.across import cross_across, moments_across, number_across
from vfx.statistics.data import Batches
from vfx.statistics.moments import CrossMoments, Moments, Workspace, batch_moments, channel_rows
from vfx.statistics.taps import Tap, feature_taps

READS = ("features", "layers", "within", "activations")  # what can be asked for


@dataclass(frozen=True)
class Statistics:
    """What one pass over the data saw of every edge.

    ``features`` holds, by tap, moments and cross products of the groups' features; ``layers`` the moments of each conv
    and linear output (and, if asked for, of the activations behind them) by node name, one for each edge,
    ``covariances`` those outputs' (C, C) covariance in each edge. All are in the edges' own channel order; ``reads``
    says what was asked for (a network without free channels has no features to read): "features", "layers",
    "activations", and "within" for second moments inside each edge.
    """

    samples: int
    taps: tuple[Tap, ...]
    features: Mapping[str, CrossMoments]
    layers: Mapping[str, list[Moments]]
    fingerprint: tuple[str, ...]
    reads: frozenset[str] = frozenset({"features", "layers"})
    covariances: Mapping[str, list[Tensor]] = field(default_factory=dict)

    def check(self, program: Program) -> None:
        """Raise DataError unless these statistics belong to exactly this graph and these weights."""
        if self.fingerprint != fingerprint(program):
            raise DataError("these statistics were collected for another graph or other weights; collect them again")

    def goals(self) -> dict[str, Goal]:
        """Mean and standard deviation of each layer's output, (edges, channels)."""
        return {
            node: Goal(torch.stack([m.mean for m in moments]), torch.stack([m.std for m in moments]))
            for node, moments in self.layers.items()
        }


@torch.no_grad()
def collect(
    program: Program,
    symmetry: Symmetry | None,
    data: Any,
    *,
    max_samples: int | None = None,
    features: bool = True,
    layers: bool = True,
    within: bool = False,
    activations: bool = False,
    device: Any = None,
    progress: bool = True,
) -> Statistics:
    """Read all edges' activations in one pass over ``data``.

    ``features`` asks for the groups' features (activation matching), ``layers`` for the conv and linear outputs
    (REPAIR, RESCALE; they need no symmetry), ``activations`` for those of their activation functions too
    (post-activation REPAIR), ``within`` for the second moments of all of them inside each edge (ZipIt!, CCA). Totals
    are float64; the result is the same for any partition into batches.
    """
    if device is not None:
        program = program.to(device)
    channels = statistics_channels(program, activations) if layers or activations else {}
    collector = _Collector(program, feature_taps(symmetry) if features and symmetry else [], channels, within)
    asked = {"features": features, "layers": layers or activations, "activations": activations, "within": within}
    batches = Batches(program, data, max_samples, device)
    for batch in track(shared(batches, list), "statistics", len(batches) // count(), progress):
        collector.add(batch, batches.size(batch))
    collector.add_up()
    return Statistics(
        samples=collector.samples,
        taps=tuple(collector.taps),
        features=collector.features,
        layers=collector.layers,
        fingerprint=fingerprint(program),
        reads=frozenset(name for name, wanted in asked.items() if wanted),
        covariances=collector.covariances(),
    )


class _Collector:
    """Accumulators of every tap, fed batch by batch."""

    def __init__(self, program: Program, taps: list[Tap], channels: Mapping[str, int], within: bool):
        self.program, self.taps, self.samples, self.within = program, taps, 0, within
        self.plan = program.plan
        self.features: dict[str, CrossMoments] = {}
        self.layers: dict[str, list[Moments]] = {}
        self._spread: dict[str, CrossMoments] = {}  # the layers' moments with their covariances
        self._workspace = Workspace()
        self._taps_at: dict[str, list[Tap]] = {}
        for tap in taps:
            self._taps_at.setdefault(tap.node, []).append(tap)
        self._channel = channels

    def add(self, batch: list[Any], samples: int) -> None:
        runs = [Execution(self.program.graph, weights, batch, self.plan) for weights in self.program.weights]
        self.samples += samples
        for _ in self.plan:
            node, values = _step(runs)
            if node.name in self._channel:
                self._read_layer(node.name, self._channel[node.name], values)
            for tap in self._taps_at.get(node.name, ()):
                self._read_features(tap, values)

    def add_up(self) -> None:
        """Take in what other processes saw of their shares of the data."""
        self.features = cross_across(self.features, within=self.within)
        self._spread = cross_across(self._spread, within=True, between=False)
        self.layers = moments_across(self.layers) | {name: cross.moments for name, cross in self._spread.items()}
        self.samples = number_across(self.samples)

    def covariances(self) -> dict[str, list[Tensor]]:
        """Covariance (C, C) of each layer's output, one for each edge."""
        edges = range(self.program.edges)
        return {name: [cross.covariance(i, i) for i in edges] for name, cross in self._spread.items()}

    def _read_layer(self, name: str, channel: int, values: list[Tensor]) -> None:
        if len({x.shape[channel] for x in values}) > 1:  # heads of networks with other classes: never merged
            return
        if self.within:
            if name not in self._spread:
                size, device = values[0].shape[channel], values[0].device
                self._spread[name] = CrossMoments(len(values), size, device, within=True, between=False)
                self.layers[name] = self._spread[name].moments
            self._spread[name].read(values, channel, self._workspace)
            return
        if name not in self.layers:
            self.layers[name] = [Moments(x.shape[channel], x.device) for x in values]
        for moments, x in zip(self.layers[name], values):
            moments.update(*batch_moments(x, channel))

    def _read_features(self, tap: Tap, values: list[Tensor]) -> None:
        if tap.key not in self.features:
            self.features[tap.key] = CrossMoments(len(values), tap.size, values[0].device, within=self.within)
        if tap.whole:
            self.features[tap.key].read(values, tap.dim, self._workspace)
        else:
            self.features[tap.key].update([features(tap, x) for x in values])


def _step(runs: list[Execution]) -> tuple[fx.Node, list[Any]]:
    """The same node in every edge."""
    results = [run.step() for run in runs]
    return results[0][0], [value for _, value in results]


def features(tap: Tap, x: Tensor) -> Tensor:
    """A tap's features of one batch as a fresh matrix (channels, samples); copies count as samples."""
    if tap.whole:
        return channel_rows(x, tap.dim)
    index = torch.from_numpy(tap.position.reshape(-1)).to(x.device)
    return channel_rows(x.index_select(tap.dim, index), tap.dim).reshape(tap.size, -1)


def fingerprint(program: Program) -> tuple[str, ...]:
    """Digest of the graph and of each edge's weights."""
    names = program.names()
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return (digest(program.graph), *pool.map(lambda weights: _weights_digest(names, weights), program.weights))


def _weights_digest(names: list[str], weights: Weights) -> str:
    hasher = hashlib.sha256()  # processors have instructions for it
    for name in names:
        tensor = weights[name].detach().cpu().contiguous()
        hasher.update(name.encode())
        if tensor.numel():
            hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
