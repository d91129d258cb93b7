"""LeastSquares: layer-wise least squares on calibration data (PLeaS, Nasery et al. 2025, §4.2).

For each conv and linear layer in the order of the graph, with X the merged network's own input to it, all layers before
it solved already, and Y = Σ αᵢ yᵢ the mean of the aligned edges' outputs on the same samples:

    W = argmin ‖X W − Y‖² + λ ‖W − W̄‖²,

W̄ the averaged weights, λ a share (``ridge``) of X's mean square. Only XᵀX and XᵀY are kept, in float64; the merged
network and the edges advance together from layer to layer, so the price is one forward pass of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vfx.alphas import edge_weights
from vfx.analyse.layers import number_layers
from vfx.errors import ArgumentError
from vfx.operators import LINEARS, TRANSPOSED, arguments, is_layer, is_product, layer_arguments, operator, weight_name
from vfx.program import Execution, Program, schedule
from vfx.progress import track
from vfx.rewrite import Pass, require_edges
from vfx.statistics.data import Batches

MAX_ROWS = 65_536  # positions of a convolution that are read; more only cost time
SINGULAR = 1e-7  # ratio of the Cholesky factor's pivots below which inputs count as dependent
Outputs = Callable[[str, int, int], Tensor | None]


class LeastSquares(Pass):
    """Solve every layer of a merged network for the mean of the ``edges``' outputs.

    ``edges``: the Program of the aligned edges. ``outputs(node, dim, edge)`` is the matrix that brings an edge's output
    channels to the merged network's, or None.
    """

    def __init__(
        self,
        edges: Program,
        data: Any,
        *,
        weights: float | Sequence[float] | None = None,
        ridge: float = 1e-4,
        outputs: Outputs | None = None,
        max_samples: int | None = None,
        device: Any = None,
        progress: bool = True,
    ):
        if not ridge >= 0:
            raise ArgumentError(f"ridge must be 0 or more, got {ridge:g}")
        self.edges, self.data, self.ridge = edges, data, ridge
        self.shares = edge_weights(weights, edges.edges)
        self.outputs = outputs or (lambda node, dim, edge: None)
        self.max_samples, self.device, self.progress = max_samples, device, progress

    def requires(self, program: Program) -> None:
        require_edges(program, single=True, name=self.name)

    @torch.no_grad()
    def apply(self, program: Program) -> Program:
        weights = dict(program.weights[0])
        channel = {layer.node: layer.channel for layer in number_layers(program)}
        chosen, notes = self._chosen(program)
        batches = list(Batches(program, self.data, self.max_samples, self.device))
        plan, own_plan = schedule(program.graph), schedule(self.edges.graph)
        merged = [Execution(program.graph, weights, batch, plan) for batch in batches]
        edges = [[Execution(self.edges.graph, own, batch, own_plan) for own in self.edges.weights] for batch in batches]
        last = max((k for k, step in enumerate(plan) if step.node in chosen), default=-1)
        for step in track(plan[: last + 1], "least squares", last + 1, self.progress):
            node = step.node
            if node in chosen:
                system = _System(node, weights, sum(batch[0].shape[0] for batch in batches))
                for run, others in zip(merged, edges):
                    x = run.value(layer_arguments(node)["input"])
                    system.add(x, self._goal(node.name, channel[node.name], others))
                weights |= system.solve(self.ridge)
            for run in merged:
                run.step()
        result = program.with_weights([weights], f"LeastSquares({len(chosen)} layers)")
        return replace(result, notes=(*result.notes, *notes))

    def _goal(self, node: str, dim: int, runs: Sequence[Execution]) -> Tensor:
        """Σ αᵢ yᵢ on one batch; the edges' runs are taken up to the layer."""
        total: Any = 0.0
        for edge, (share, run) in enumerate(zip(self.shares, runs)):
            y = _advance(run, node)
            matrix = self.outputs(node, dim, edge)
            if matrix is not None:
                y = torch.tensordot(y, matrix.to(y), ([dim], [1])).movedim(-1, dim)
            total = total + share * y
        return total  # type: ignore[no-any-return]

    def _chosen(self, program: Program) -> tuple[set[fx.Node], tuple[str, ...]]:
        """Layers whose own weight and bias nothing else reads, and which the edges have."""
        known = {node.name for node in self.edges.graph.nodes}
        readers: dict[str, int] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
        chosen, notes = set(), []
        for node in program.graph.nodes:
            if not is_layer(node) or node.name not in known:
                continue
            names = [weight_name(node), weight_name(node, "bias")]
            computed = names[0] is None or (layer_arguments(node).get("bias") is not None and names[1] is None)
            if computed or operator(node) in TRANSPOSED or any(readers[n] > 1 for n in names if n is not None):
                notes.append(f"least squares: {node.name} keeps its averaged weights (transposed, shared or computed)")
            else:
                chosen.add(node)
        return chosen, tuple(notes)


def _advance(run: Execution, name: str) -> Any:
    while True:
        node, value = run.step()
        if node.name == name:
            return value


class _System:
    """Normal equations of one layer, for each of its groups."""

    def __init__(self, node: fx.Node, weights: dict[str, Tensor], samples: int):
        self.node, self.options = node, arguments(node)
        self.names = str(weight_name(node)), weight_name(node, "bias")
        self.turned = is_product(node)  # (in, out) instead of (out, in)
        self.weight = weights[self.names[0]].mT if self.turned else weights[self.names[0]]
        self.bias = None if self.names[1] is None else weights[self.names[1]]
        self.groups = int(self.options.get("groups", 1))
        self.linear = operator(node) in LINEARS or self.turned
        self.samples = samples
        self.gram: Tensor | Any = 0.0
        self.cross: Tensor | Any = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """A batch: inputs and wanted outputs of the layer."""
        rows, goals = (x, y) if self.linear else (patches(self.node, self.weight, x), y.movedim(1, -1))
        if not self.linear and rows.shape[1:-1].numel() * self.samples > MAX_ROWS:
            rows, goals = self._thinned(rows, goals)
        rows = rows.reshape(-1, self.groups, rows.shape[-1] // self.groups).double().transpose(0, 1)
        goals = goals.reshape(-1, self.groups, goals.shape[-1] // self.groups).double().transpose(0, 1)
        if self.bias is not None:
            rows = F.pad(rows, (0, 1), value=1.0)
        self.gram = self.gram + rows.mT @ rows
        self.cross = self.cross + rows.mT @ goals

    def _thinned(self, rows: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        """The same random positions of every sample: neighbours tell little that is new."""
        positions = rows.shape[1:-1].numel()
        count = max(1, MAX_ROWS // self.samples)
        chosen = torch.randperm(positions, generator=torch.Generator().manual_seed(0))[:count].to(rows.device)
        return rows.flatten(1, -2)[:, chosen], goals.flatten(1, -2)[:, chosen]

    def solve(self, ridge: float) -> dict[str, Tensor]:
        """The layer's weight and bias."""
        before = self.weight.double().reshape(self.groups, len(self.weight) // self.groups, -1).mT
        if self.bias is not None:
            before = torch.cat([before, self.bias.double().reshape(self.groups, 1, -1)], 1)
        strength = ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        # The correction to the averaged weights: what no input tells stays as it was.
        missing = self.cross - self.gram @ before
        eye = torch.eye(self.gram.shape[1], dtype=torch.float64, device=self.gram.device)
        found = before + _solved(self.gram + strength * eye, missing)
        weight = found[:, : found.shape[1] - (self.bias is not None)].mT.reshape(self.weight.shape)
        result = {self.names[0]: (weight.mT if self.turned else weight).to(self.weight).contiguous()}
        if self.bias is not None:
            result[str(self.names[1])] = found[:, -1].reshape(-1).to(self.bias).contiguous()
        return result


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """The least solution of symmetric positive systems that may be singular."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2)
    if not failed.any() and bool((pivots.amin(1) > SINGULAR * pivots.amax(1)).all()):
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ right


def patches(node: fx.Node, weight: Tensor, x: Tensor) -> Tensor:
    """What a convolution of any rank reads at each position: (samples, positions…, C_in · window)."""
    options, rank = arguments(node), weight.ndim - 2
    stride, dilation = (_per_axis(options[name], rank) for name in ("stride", "dilation"))
    x = F.pad(x, _padding(options["padding"], weight.shape[2:], dilation))
    for dim in range(rank):
        span = dilation[dim] * (weight.shape[2 + dim] - 1) + 1
        x = x.unfold(2 + dim, span, stride[dim])[..., :: dilation[dim]]
    # (samples, C, positions…, window…): a weight's rows are ordered as (C, window…)
    return x.movedim(1, 1 + rank).flatten(1 + rank)


def _per_axis(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _padding(padding: Any, window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """F.pad's list, last axis first."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, window)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in _per_axis(0 if padding == "valid" else padding, len(window))]
    return [p for pair in reversed(pairs) for p in pair]
