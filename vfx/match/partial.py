"""PLeaS (Nasery et al. 2025), its matching: channels without a good partner stay apart.

Channels are matched by their activations (or weights); of each group the pairs that agree least stay apart, as many as
its share says, and the group grows. The layers' weights are then found by least squares (``vfx.passes.reconstruct``).
A group keeps channels apart if a linear map can go through it (``vfx.match.maps.mappable``), and if no norm is taken
over its channels: that norm would see other channels than it does in any edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import check_fields
from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.maps import mappable
from vfx.match.matcher import Matching, Problem
from vfx.match.weight import WeightMatching
from vfx.operators import operator_of

Apart = float | Mapping[str, float]


@dataclass
class PartialMatching:
    """PLeaS: ``apart`` is the share of each group's channels that stay apart, 0…1, or a share by group name.

    A group of C channels becomes one of C + (N − 1)·round(apart·C). ``ridge`` draws the least squares to the averaged
    weights, relative to the mean square of their inputs. ``by`` is the matching that finds the pairs.
    """

    apart: Apart = 0.0
    ridge: float = 1e-4
    by: Literal["activation", "weight"] = "activation"
    needs: frozenset[str] = field(default=frozenset({"features", "data"}), init=False)
    exact: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_fields(self)
        self.exact = self.apart == 0.0  # else BatchNorms of a wider network would have to be put together from parts
        shares = self.apart.values() if isinstance(self.apart, Mapping) else [self.apart]
        if not all(0 <= share <= 1 for share in shares):
            raise ArgumentError(f"apart must lie between 0 and 1, got {self.apart}")
        if not self.ridge >= 0 or self.by not in ("activation", "weight"):
            raise ArgumentError(f"ridge={self.ridge}, by={self.by!r}: ridge must be 0 or more, by a known matching")

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        matching = (
            ActivationMatching(classes="permutation")
            if self.by == "activation"
            else WeightMatching(classes="permutation")
        )(problem)
        if isinstance(self.apart, Mapping):
            unknown = set(self.apart) - {group.name for group in problem.symmetry.groups}
            if unknown:
                raise ArgumentError(f"apart names {unknown.pop()!r}, which is no group; see vfx.symmetry(...)")
        channels, notes = {}, []
        for group in problem.symmetry.groups:
            count = round(self._share(group) * group.size)
            reason = fixed(problem.symmetry, group) if count else ""
            if count and not reason:
                channels[group.index] = worst(problem, matching, group, count)
            elif count:
                notes.append(f"{group.name} keeps no channels apart: {reason}")
        return replace(matching, apart=channels, ridge=self.ridge, notes=tuple(notes))

    def _share(self, group: Group) -> float:
        return self.apart.get(group.name, 0.0) if isinstance(self.apart, Mapping) else self.apart


def fixed(symmetry: Symmetry, group: Group) -> str:
    """Why channels of a group may not stand apart; empty if they may."""
    if group.parent is not None:
        return "it lies inside blocks"
    if not mappable(symmetry, group):
        return "no linear map goes through it"
    norm = _normalised(symmetry, group)
    return f"{norm} normalises over its channels" if norm else ""


def _normalised(symmetry: Symmetry, group: Group) -> str:
    """The first norm that would see other channels than it does in any edge."""
    for node in symmetry.program.graph.nodes:
        if operator_of(node).is_norm and not operator_of(node).is_batch_norm:
            x = node.all_input_nodes[0]
            if any(group.index in symmetry.positions(x, dim) for dim in range(len(x.meta["val"].shape))):
                return node.name
    return ""


def worst(problem: Problem, found: Matching, group: Group, count: int) -> Index:
    """The ``count`` channels of the first edge that agree least with their partners, in order."""
    statistics = problem.statistics
    assert statistics is not None
    quality, taps = np.zeros(group.size), [t for t in statistics.taps if t.groups == (group.index,)]
    for tap in taps:
        channel = tap.digits[:, 0]
        for edge in range(1, problem.program.edges):
            correlation = statistics.features[tap.key].correlation(0, edge).cpu().numpy()
            row = np.argsort(channel)
            partner = row[found.elements[edge][group.index].index]
            quality += correlation[row, partner]
    return np.sort(np.argsort(quality, kind="stable")[:count])
