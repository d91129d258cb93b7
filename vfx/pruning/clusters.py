"""Clusters of a group's channels and their merger by role (model folding, Wang et al., ICLR 2025, §3).

k-means over the channels' *outgoing* filters, side by side for all layers that make the feature; a layer and the
BatchNorm behind it count as one: rows are scaled by γ/σ and the shift is a coordinate of its own. A cluster becomes its
first channel: weights that make the feature (``out``) and those that scale it (``elementwise``) are averaged, those
that read it (``in``) summed.

Averaging shrinks the variance. Data-free repair (fold-AR, §4): outputs of rows wᵢ with deviations σᵢ are taken to
correlate as the rows do, cᵢⱼ = cos(wᵢ, wⱼ), so that the mean has variance (1/N²) Σ σᵢσⱼcᵢⱼ. A BatchNorm gets it as its
running variance; rows without a BatchNorm are rescaled to the mean of their norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, fx

from vfx.analyse.groups import Group, Member
from vfx.analyse.layer_view import (
    NORM_TENSORS,
    STATISTICS,
    BatchNorm,
    LayerView,
    layer_views,
    not_alone,
    statistics_channels,
)
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.operators import output_axis
from vfx.program import Goal, Program, Weights, readers_of

STARTS = 4  # k-means runs, the best of which counts


class Averaged(Protocol):
    """What knows which channels one stands for, and with which shares: (size, size)."""

    @property
    def average(self) -> Tensor: ...


@dataclass(frozen=True)
class Clusters:
    """The cluster (size,) of each channel of a group, and the channel that stands for each cluster, ascending."""

    label: Index
    kept: Index

    @property
    def average(self) -> Tensor:
        """(size, size) float64: row r is the mean of r's cluster where r stands for one, else the channel itself."""
        matrix = torch.eye(len(self.label), dtype=torch.float64)
        for channel in self.kept.tolist():
            members = self.label == self.label[channel]
            matrix[channel] = torch.from_numpy(members / members.sum())
        return matrix


def cluster(vectors: Tensor, count: int, seed: int) -> Clusters:
    """``count`` clusters of channels (size, features) by k-means; never fewer, equal channels or not."""
    points = vectors.float().cpu().numpy()
    if count >= len(points):
        return Clusters(np.arange(len(points)), np.arange(len(points)))
    distinct = len(np.unique(points, axis=0))
    label = KMeans(min(count, distinct), n_init=STARTS, random_state=seed).fit_predict(points).astype(np.int64)
    for new in range(len(np.unique(label)), count):  # clusters of equal channels are split to reach the count
        largest = np.bincount(label).argmax()
        label[np.flatnonzero(label == largest)[-1]] = new
    kept = np.sort(np.unique(label, return_index=True)[1])
    return Clusters(label, kept)


# layers and the BatchNorms behind them ------------------------------------------------------------------------------


def pairs(program: Program) -> list[LayerView]:
    """Layers with a BatchNorm of their own behind them; shared weights are left out."""
    readers = readers_of(program.graph)
    return [view for view in layer_views(program).values() if _is_pair(view, readers)]


def _is_pair(view: LayerView, readers: Mapping[str, list[fx.Node]]) -> bool:
    norm = view.norm
    if norm is None or not norm.is_fixed or output_axis(view.node):
        return False
    return not (not_alone(view.node, ("weight", "bias"), readers) or not_alone(norm.node, NORM_TENSORS, readers))


def scaled_rows(weights: Weights, found: list[LayerView]) -> dict[str, Tensor]:
    """The same function with each pair's scale γ/σ in the layer's rows, so that rows of several channels compare."""
    result = dict(weights)
    for weight, bias, norm in _parts(found):
        if "weight" not in norm.names:
            continue
        gain, mean, var = (norm.names[role] for role in ("weight", *STATISTICS))
        w, g = result[weight], result[gain].double()
        factor = g / (result[var].double() + norm.eps).sqrt()
        result[weight] = (w.double() * factor.reshape(-1, *[1] * (w.ndim - 1))).to(w)
        result[mean] = (result[mean].double() * factor).to(w)
        scaled = (g.square() - norm.eps).clamp_min(0)
        result[var] = scaled.to(w)
        result[gain] = (scaled + norm.eps).sqrt().to(w)
        if bias is not None:
            result[bias] = (result[bias].double() * factor).to(w)
    return result


def _parts(views: list[LayerView]) -> Iterator[tuple[str, str | None, BatchNorm]]:
    """The weight, the bias and the BatchNorm of each pair."""
    for view in views:
        assert view.weight is not None
        assert view.norm is not None
        yield view.weight, view.bias, view.norm


def channel_vectors(group: Group, program: Program, weights: Weights, found: list[LayerView]) -> Tensor:
    """What k-means compares (size, features): outgoing rows, and shifts of layers and BatchNorms."""
    shifts = {norm.names.get("bias") for _, _, norm in _parts(found)}
    members = [m for m in group.members if program.is_parameter(m.fqn)]
    chosen = [m for m in members if m.role == "out" or m.fqn in shifts] or members
    return torch.cat([rows_of(m, weights[m.fqn]).reshape(group.size, -1).float().cpu() for m in chosen], 1)


def rows_of(member: Member, tensor: Tensor) -> Tensor:
    """A tensor's slices at a member's positions: (size, copies, everything else…)."""
    index = torch.from_numpy(member.position).to(tensor.device)
    return tensor.detach().movedim(member.dim, 0)[index]


# merging ------------------------------------------------------------------------------------------------------------


def merged(
    facts: Symmetry, weights: Weights, found: list[LayerView], chosen: Mapping[int, Clusters], repair: bool
) -> dict[str, Tensor]:
    """The weight set at full size in which the channel that stands for a cluster does what the cluster did."""
    result = dict(weights)
    for index, clusters in chosen.items():
        average = clusters.average
        total = average * torch.from_numpy(np.bincount(clusters.label)[clusters.label].astype(float))[:, None]
        total[np.setdiff1d(np.arange(len(clusters.label)), clusters.kept)] = 0
        for member in facts.groups[index].members:
            mix = total if member.role == "in" else average
            result[member.fqn] = mixed(result[member.fqn], member, mix)
        if repair:
            result |= _repaired(facts.groups[index], weights, result, found, clusters)
    return result


def mixed(tensor: Tensor, member: Member, mix: Tensor) -> Tensor:
    """Channels replaced by combinations of channels."""
    if not tensor.is_floating_point():
        return tensor
    rows = rows_of(member, tensor)
    new = torch.einsum("ij,jx->ix", mix.to(rows.device), rows.reshape(len(rows), -1).double()).reshape(rows.shape)
    moved = tensor.detach().clone().movedim(member.dim, 0)
    moved[torch.from_numpy(member.position).to(tensor.device)] = new.to(tensor)
    return moved.movedim(0, member.dim).contiguous()


def _repaired(
    group: Group, before: Weights, after: Weights, views: list[LayerView], clusters: Clusters
) -> dict[str, Tensor]:
    """Variances of the averaged outputs, without data."""
    variance = {weight: norm.names["running_var"] for weight, _, norm in _parts(views)}
    result: dict[str, Tensor] = {}
    for member in group.members:
        tensor = before[member.fqn]
        if member.role != "out" or tensor.ndim < 2 or member.position.shape[1] != 1:
            continue
        rows = rows_of(member, tensor).reshape(group.size, -1).double()
        norm = rows.norm(dim=1)
        cosine = (rows / norm.clamp_min(1e-30)[:, None]) @ (rows / norm.clamp_min(1e-30)[:, None]).T
        mix = clusters.average.to(rows.device)
        place = torch.from_numpy(member.position[:, 0]).to(rows.device)
        if member.fqn in variance:
            name = variance[member.fqn]
            sigma = before[name].double()[place].clamp_min(0).sqrt()
            new = after[name].clone()
            new[place] = torch.einsum("ri,i,ij,j,rj->r", mix, sigma, cosine, sigma, mix).to(new)
            result[name] = new
        else:
            shrunk = torch.einsum("ri,i,ij,j,rj->r", mix, norm, cosine, norm, mix).clamp_min(0).sqrt()
            factor = torch.where(shrunk > 1e-12, (mix @ norm) / shrunk.clamp_min(1e-12), 1.0)
            moved = result.get(member.fqn, after[member.fqn]).clone().movedim(member.dim, 0)
            moved[place] = (moved[place].double() * factor.reshape(-1, *[1] * (moved.ndim - 1))).to(moved)
            result[member.fqn] = moved.movedim(0, member.dim).contiguous()
    return result


def merged_goals(program: Program, facts: Symmetry, chosen: Mapping[int, Averaged]) -> dict[str, Goal]:
    """Goal statistics of merged channels: the means of their clusters' (REPAIR)."""
    channel = statistics_channels(program)
    result = {}
    for name, goal in program.goals.items():
        mean, std = goal.mean.clone(), goal.std.clone()
        for group, position in facts.positions(program.nodes[name], channel[name]).items():
            if group in chosen:
                place = torch.from_numpy(position).to(mean.device)
                mix = chosen[group].average.to(mean)
                for values in (mean, std):
                    values[:, place] = torch.einsum("ij,ejc->eic", mix, values[:, place])
        result[name] = Goal(mean, std)
    return result
