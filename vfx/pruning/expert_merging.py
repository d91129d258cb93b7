"""Experts merged instead of removed: each that goes is averaged into the one left that does most nearly the same.

Where there are data, expert r goes to the kept expert k with the least Σ ‖g_r(x) (f_k(x) − f_r(x))‖² over the tokens x
that the router sends to r: what its layer's output changes by with the tensors of k in the place of r's. Without data
it goes to the nearest by weights. Hidden channels inside r are put into the order in which its tensors are nearest to
those of k (weight matching inside each expert: the groups that vfx finds there, one after the other), and both are
averaged with the numbers of tokens that the router sends them (equally without data).

The router's rows are averaged alike. What a softmax would need for the whole mass of both is log(exp l_k + exp l_r) of
the logits, which no row gives: the mean row with shares p is its largest bound Σ p l + H(p) from below that a router
has a row for, without the constant H(p). So mass is lost to other experts where the logits of both are far apart, and
which tokens go to the merged expert is not exactly which went to either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vfx.analyse.groups import Group, Member
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import act, permuted, still_permutations
from vfx.program import Program, Weights
from vfx.pruning.clusters import mixed, rows_of
from vfx.pruning.experts import ExpertLayer, changed_by, expert_layers, expert_totals
from vfx.resize.weights import Kept

ROUNDS = 20  # over the groups inside an expert, which mostly are one


@dataclass(frozen=True, eq=False)
class ExpertClusters:
    """Where the experts of a layer went: ``label`` (size,) is the kept expert of each, ``load`` (size,) its weight."""

    label: Index
    load: Tensor

    @property
    def average(self) -> Tensor:
        """(size, size) float64: row k has the shares of what went to a kept expert k, others stand for themselves."""
        matrix = torch.eye(len(self.label), dtype=torch.float64)
        for expert in np.unique(self.label).tolist():
            members = torch.from_numpy(self.label == expert)
            matrix[expert] = members * self.load / self.load[members].sum()
        return matrix


def merged_experts(
    program: Program, facts: Symmetry, kept: Kept, batches: Iterable[list[Tensor]] | None
) -> tuple[dict[str, Tensor], dict[int, ExpertClusters]]:
    """A weight set at full size whose kept experts stand for all, and the clusters by group. Raises PassError."""
    layers = [x for x in expert_layers(program, facts) if len(kept[x.group.index]) < x.group.size]
    held = None if batches is None else list(batches)
    _, tokens = expert_totals(program, layers, held or [])
    weights, clusters = dict(program.weights[0]), {}
    for layer in layers:
        index = layer.group.index
        off = _distances(facts, layer, weights, kept[index]) if held is None else _losses(program, layer, kept, held)
        label = kept[index][off.argmin(1).numpy()]
        label[kept[index]] = kept[index]
        clusters[index] = ExpertClusters(label, _loads(label, tokens[index]))
        weights |= aligned(facts, layer, weights, label)
        for member in layer.group.members:
            weights[member.fqn] = mixed(weights[member.fqn], member, clusters[index].average)
    return weights, clusters


def _loads(label: Index, tokens: Tensor) -> Tensor:
    """Numbers of tokens; equal ones where no expert of a cluster has any."""
    load = tokens.clone()
    for expert in np.unique(label).tolist():
        members = torch.from_numpy(label == expert)
        if not load[members].any():
            load[members] = 1
    return load


# which expert is nearest ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _losses(program: Program, layer: ExpertLayer, kept: Kept, batches: Iterable[list[Tensor]]) -> Tensor:
    """(size, kept) float64: Σ ‖g_r (f_k − f_r)‖² over tokens; zero in the rows of kept experts, which stay."""
    left = kept[layer.group.index]
    gone = np.setdiff1d(np.arange(layer.group.size), left)
    off = torch.zeros(layer.group.size, len(left), dtype=torch.float64)
    pairs = [(r, column, k) for r in gone.tolist() for column, k in enumerate(left.tolist())]
    weights = program.weights[0]
    for batch in batches:
        changes = changed_by(program, layer, batch, (_instead(weights, layer, r, k) for r, _, k in pairs))
        for (r, column, _), change in zip(pairs, changes):
            off[r, column] += change.square().sum()
    return off


def _instead(weights: Weights, layer: ExpertLayer, gone: int, left: int) -> dict[str, Tensor]:
    """The tensors of a layer with those of one expert in the place of another's."""
    changed: dict[str, Tensor] = {}
    for member in layer.members:
        tensor = changed.get(member.fqn, weights[member.fqn])
        to, source = (torch.from_numpy(member.position[e].reshape(-1)).to(tensor.device) for e in (gone, left))
        changed[member.fqn] = tensor.index_copy(member.dim, to, tensor.index_select(member.dim, source))
    return changed


def _distances(facts: Symmetry, layer: ExpertLayer, weights: Weights, left: Index) -> Tensor:
    """(size, kept) float64: squared distances of the experts' tensors, hidden channels in their nearest order."""
    columns = []
    for expert in left.tolist():
        label = np.full(layer.group.size, expert)
        label[left] = left
        moved = aligned(facts, layer, weights, label)
        each = [rows_of(m, moved[m.fqn]).flatten(1).double().cpu() for m in layer.members]
        columns.append(sum(((rows - rows[expert]).square().sum(1) for rows in each), torch.zeros(layer.group.size)))
    return torch.stack(columns, 1)


# hidden channels ------------------------------------------------------------------------------------------------------


def aligned(facts: Symmetry, layer: ExpertLayer, weights: Weights, label: Index) -> dict[str, Tensor]:
    """The tensors of a layer with the hidden channels of each expert in the order nearest to those of its ``label``.

    The permutations are of groups inside the experts, so that the network computes what it did.
    """
    tensors = {member.fqn: weights[member.fqn] for member in layer.members}
    inside = [g for g in facts.groups if g.parent == layer.group.index and _apart(g, layer)]
    for _ in range(ROUNDS):
        still = True
        for group in inside:
            order = _order(group, layer, tensors, label)
            if (order != np.arange(group.size)).any():
                still = False
                tensors = act(facts, permuted(still_permutations(facts.groups) | {group.index: order}), tensors)
        if still:
            break
    return tensors


def _apart(group: Group, layer: ExpertLayer) -> bool:
    """Whether a group's channels stand on other axes than the experts, in the experts' tensors alone."""
    axes = {member.fqn: member.dim for member in layer.members}
    return all(axes.get(member.fqn, member.dim) != member.dim for member in group.members)


def _order(group: Group, layer: ExpertLayer, tensors: Mapping[str, Tensor], label: Index) -> Index:
    """The order (experts, size) of a group's channels in which each expert correlates most with its ``label``."""
    order = np.tile(np.arange(group.size), (layer.group.size, 1))
    for expert in np.flatnonzero(label != np.arange(len(label))).tolist():
        alike = np.zeros((group.size, group.size))
        for member in group.members:
            wanted, given = (_channels(member, layer, tensors, e) for e in (int(label[expert]), expert))
            alike += (wanted @ given.T).numpy()
        best = linear_sum_assignment(alike, maximize=True)[1]
        if alike[np.arange(group.size), best].sum() > np.trace(alike) * (1 + 1e-12):
            order[expert] = best
    return order


def _channels(member: Member, layer: ExpertLayer, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
    """What one expert has at each channel of a group inside: (size, everything else), float64."""
    (axis,) = (m for m in layer.members if m.fqn == member.fqn)
    tensor = tensors[member.fqn]
    places = torch.from_numpy(axis.position[expert].reshape(-1)).to(tensor.device)
    return rows_of(member, tensor.index_select(axis.dim, places)).flatten(1).double().cpu()
