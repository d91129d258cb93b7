"""What a pruning did, layer by layer and in all, for people and for machines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx

from vfx.analyse.cost import cost
from vfx.analyse.layer_view import layer_views
from vfx.program import Program
from vfx.pruning.targets import Target, find_targets
from vfx.report import Report
from vfx.statistics.data import Batches
from vfx.statistics.frontier import ValueReader, advance_together, moments_of
from vfx.statistics.moments import Moments
from vfx.terminal import largest, titled


@dataclass(frozen=True)
class PrunedLayer:
    """One weight: how much of it is left, its FLOPs, and its output's statistics against the unpruned network's.

    ``variance`` is Σ variances over the channels, as a multiple of the unpruned network's; ``shift`` is the distance of
    the means in units of its standard deviations, ‖μ − μ₀‖/‖σ₀‖; each before and after the repair, behind the layer's
    norm where it has one. None where nothing was repaired.
    """

    name: str
    shape: tuple[int, ...]
    protected: bool
    params: int
    nonzeros: int
    flops_before: int
    flops_after: int
    variance_before: float | None = None
    variance_after: float | None = None
    shift_before: float | None = None
    shift_after: float | None = None

    @property
    def sparsity(self) -> float:
        return 1 - self.nonzeros / max(self.params, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneReport(Report):
    """The weights layer by layer and in all beside what all reports say.

    ``params`` and ``flops`` are those of the unpruned network; ``nonzeros`` counts the parameters without the zeros of
    prunable weights, ``flops_after`` the FLOPs without the products with them (a dense kernel still computes them).
    """

    layers: tuple[PrunedLayer, ...]

    @property
    def params(self) -> int:
        return self.given_profile.params

    @property
    def flops(self) -> int:
        return self.given_profile.flops

    @property
    def flops_after(self) -> int:
        return self.flops - sum(row.flops_before - row.flops_after for row in self.layers)

    @property
    def nonzeros(self) -> int:
        return self.params - sum(row.params - row.nonzeros for row in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights that were not protected."""
        rows = [row for row in self.layers if not row.protected]
        return 1 - sum(row.nonzeros for row in rows) / max(sum(row.params for row in rows), 1)

    def _figures(self) -> dict[str, Any]:
        return {
            "sparsity_reached": self.sparsity,
            "params": self.params,
            "nonzeros": self.nonzeros,
            "flops": self.flops,
            "flops_after": self.flops_after,
            "layers": [{**asdict(row), "sparsity": row.sparsity} for row in self.layers],
        }

    def _tables(self) -> list[Any]:
        return [self._layer_table()]

    def _layer_table(self) -> Table:
        repaired = any(row.variance_after is not None for row in self.layers)
        shown = largest(self.layers, lambda row: row.params)
        table = Table(title=titled("pruned layers", len(shown), len(self.layers)))
        table.add_column("weight", overflow="fold")
        for column in ("sparsity", "not zero", "FLOPs left", *(("variance", "mean shift") if repaired else ())):
            table.add_column(column, justify="right", no_wrap=True)
        for row in shown:
            left = f"{row.flops_after / max(row.flops_before, 1):.1%}"
            moved = [_arrow(row.variance_before, row.variance_after), _arrow(row.shift_before, row.shift_after)]
            cells = [row.name, f"{row.sparsity:.1%}", f"{row.nonzeros:,}", left]
            table.add_row(*cells, *(moved if repaired else ()))
        return table

    def _costs(self) -> Iterator[tuple[str, str]]:
        yield "sparsity", f"{self.sparsity:.4%} of the weights that were not protected"
        yield "parameters", f"{self.params:,}, {self.nonzeros:,} of them not zero"
        yield "FLOPs", f"{self.flops:,} → {self.flops_after:,} without products with zero"


def _arrow(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.2f} → {after:.2f}"


Moved = Mapping[str, tuple[float | None, float | None]]  # variance and shift by layer node


def layer_rows(
    dense: Program, pruned: Program, chosen: Iterable[str], before: Moved | None = None, after: Moved | None = None
) -> tuple[PrunedLayer, ...]:
    """A row for each prunable weight; ``before`` and ``after`` are ``moved_statistics`` around the repair."""
    targets, _ = find_targets(dense)
    pruning = set(chosen)
    profile = {row.name: row for row in cost(dense).rows}
    return tuple(_row(target, pruned, target.name not in pruning, profile, before, after) for target in targets)


def _row(
    target: Target, pruned: Program, protected: bool, profile: Mapping[str, Any], before: Moved | None, after: Any
) -> PrunedLayer:
    nonzeros = int(torch.count_nonzero(pruned.weights[0][target.name]))
    calls = [profile[node.name] for node in target.nodes]
    flops, macs = sum(row.flops for row in calls), sum(row.macs for row in calls)
    left = flops - round(macs * (1 - nonzeros / max(target.numel, 1)))
    node = target.nodes[0].name
    first, last = ((moments or {}).get(node, (None, None)) for moments in (before, after))
    return PrunedLayer(
        target.name, target.shape, protected, target.numel, nonzeros, flops, left, first[0], last[0], first[1], last[1]
    )


def moved_statistics(network: Program, goals: Mapping[str, Moments], batches: Batches) -> Moved:
    """Variance ratio and mean shift of each layer's output against ``goals`` (another network's)."""
    moments = output_moments(network, batches)
    return {name: _compared(moments[name], goal) for name, goal in goals.items() if name in moments}


def output_moments(network: Program, batches: Batches) -> dict[str, Moments]:
    """Moments of every layer's output, behind its norm or inserted affine where it has one, by the layer's node."""
    moments_of_layer: dict[str, Moments] = {}
    readers: dict[fx.Node, ValueReader] = {}
    for name, view in layer_views(network).items():
        norm = view.norm
        node = view.output if norm is None else norm.node

        def read(values: list[Tensor], name: str = name, channel: int = view.layer.channel) -> None:
            moments_of_layer[name] = moments_of(values, channel)

        readers[node] = read
    advance_together(network, dict(network.weights[0]), batches, readers, progress=False)
    return moments_of_layer


def _compared(moments: Moments, goal: Moments) -> tuple[float | None, float | None]:
    scale = float(goal.std.square().sum())
    if not scale:
        return None, None
    shift = float(torch.linalg.vector_norm(moments.mean - goal.mean))
    return float(moments.std.square().sum()) / scale, shift / math.sqrt(scale)
