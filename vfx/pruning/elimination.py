"""The order in which channels of a group can be spared, each time with what is left making up for it.

What the layers that read a group lose without the channels S, if their weights on the others are solved anew, is
tr(R_SS ((M⁻¹)_SS)⁻¹): M = E[x xᵀ] of the features and R the sum of w wᵀ over all outputs and taps of the readers. The
channels go by it, cheapest first, and M⁻¹ and the weights inside R are brought up to date behind each step (Optimal
Brain Surgeon, Hassibi & Stork 1993; by channels as in ZipLM, Kurtić et al. 2023, §3). Neighbours under a kernel count
as independent. Queries and keys, which no weight reads, stand for each other: R is E[q qᵀ] and M is E[k kᵀ] of each
head, so that the sum is the squared error of the logits between all pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vfx.analyse.groups import Group
from vfx.analyse.symmetry import Symmetry
from vfx.pruning.places import features_along
from vfx.pruning.second_moments import SecondMoments

DAMPING = 0.01  # of the mean of M's diagonal, as in SparseGPT
STEP = 0.02  # of a block's channels left that go at once
WIDEST = 4608  # features: their elimination takes a few times n³ operations


def elimination_scores(
    facts: Symmetry, group: Group, weights: Mapping[str, Tensor], moments: SecondMoments
) -> NDArray[np.float64] | None:
    """For each channel (size,), or (blocks, size), the root of the largest loss of a step up to its own.

    None where the group's features are not known as a whole, or are more than ``WIDEST``.
    """
    if np.prod(group.blocks) > WIDEST:
        return None
    problem = error_form(facts, group, weights, moments)
    if problem is None:
        return None
    moment, readers = problem
    if group.index in moments.unread:  # what a reconstruction solves are the queries, whose keys stay
        moment, readers = readers, moment
    block = torch.arange(len(moment)) // group.size
    return eliminate(moment, readers, block).sqrt().numpy().reshape(group.shape)


def eliminate(moment: Tensor, readers: Tensor, block: Tensor) -> Tensor:
    """The loss of each step (n,), never falling, at which a feature goes; each ``block`` (n,) loses as many.

    ``moment`` and ``readers`` are M and R (n, n), float64.
    """
    damping = DAMPING * moment.diagonal().mean()
    inverse = torch.linalg.inv(moment + torch.eye(len(moment), dtype=moment.dtype) * (damping if damping > 0 else 1.0))
    gram, losses, left, reached = readers, torch.zeros(len(moment), dtype=moment.dtype), torch.arange(len(moment)), 0.0
    while len(left):
        each = gram.diagonal() / inverse.diagonal()
        going = _cheapest(each, block[left])
        for place in going[each[going].argsort(stable=True)].tolist():
            reached = max(reached, float(each[place]))
            losses[left[place]] = reached
        staying = torch.ones(len(left), dtype=torch.bool)
        staying[going] = False
        gram, inverse, left = *_without(gram, inverse, going, staying.nonzero().flatten()), left[staying]
    return losses


def _cheapest(each: Tensor, block: Tensor) -> Tensor:
    """The places that go in one step: the cheapest of each block."""
    going = []
    for number in block.unique().tolist():
        inside = (block == number).nonzero().flatten()
        count = max(1, int(STEP * len(inside)))
        going.append(inside[each[inside].argsort(stable=True)[:count]])
    return torch.cat(going)


def _without(gram: Tensor, inverse: Tensor, going: Tensor, staying: Tensor) -> tuple[Tensor, Tensor]:
    """R and M⁻¹ of the features that stay, which take over the weights of those that go."""
    coupling = inverse[staying][:, going]
    share = torch.linalg.solve(inverse[going][:, going], coupling.T)  # (going, staying): what each takes over
    crossing = gram[staying][:, going] @ share
    inside = share.T @ (gram[going][:, going] @ share)
    return gram[staying][:, staying] - crossing - crossing.T + inside, inverse[staying][:, staying] - coupling @ share


def error_form(
    facts: Symmetry, group: Group, weights: Mapping[str, Tensor], moments: SecondMoments
) -> tuple[Tensor, Tensor] | None:
    """M and R of a group, (n, n) float64, features ordered by block and channel; None where they are not known.

    What is lost of features x that become x̂ is tr(R E[(x − x̂)(x − x̂)ᵀ]). x carries a group's map T, what R stands for
    its dual T⁻ᵀ.
    """
    return _product(group, moments) if group.index in moments.unread else _layer(facts, group, weights, moments)


def _layer(
    facts: Symmetry, group: Group, weights: Mapping[str, Tensor], moments: SecondMoments
) -> tuple[Tensor, Tensor] | None:
    moment = moments.of(group)
    if moment is None:
        return None
    n = len(moment)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for member in group.members:
        if member.role == "in" and member.fqn in weights:
            weight = weights[member.fqn].detach().double().cpu()
            for features, rows in features_along(facts, group, member.fqn, member.dim, weight):
                gram[features[:, None], features] += rows @ rows.T
    return moment, gram


def _product(group: Group, moments: SecondMoments) -> tuple[Tensor, Tensor] | None:
    # features that multiply each other in every block; the second is the one with the dual map
    factors = moments.factors(group)
    if len(factors) != 2:
        return None
    block = torch.arange(len(factors[0])) // group.size
    alike = block[:, None] == block
    first, dual = (torch.where(alike, factor, 0.0) for factor in factors)
    return first, dual
