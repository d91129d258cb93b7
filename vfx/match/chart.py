"""Charts: real parameters for the elements of one group, and what a loss asks of them.

A chart starts at the element that moves nothing and covers what its group's class adds to that:

- maps that mix channels are T = exp(X), X being a free matrix A projected onto the Lie algebra of the class (skew
  matrices for orthogonal maps, those that send 1 to 0 too where LayerNorm fixes the vector of ones, turned and scaled
  planes for rotations, all matrices for invertible maps): whatever A is, T is in the class up to rounding;
- permutations are the best assignment of a table Z of scores, straight through: P forward, Z ← dL/dP backward (Bengio
  et al. 2013; *Git Re-Basin*, Ainsworth et al. 2022, §3.3);
- positive scales are exp(λ) for the free scales λ of the class; signs are those of σ, straight through as well.

**The derivative needs no second action.** In front of a weight W' that an element has moved already stands 1 + E, and
1 − Eᵀ where the place carries the dual map. With G = dL/dW', both as rows (channels, everything else) of one place, the
loss has the derivative G W'ᵀ by E, or −W' Gᵀ; places add. With T = (1 + E) T₀ that by T is (dL/dE) T₀⁻ᵀ. A permutation
is its own dual, so all its places count as G W'ᵀ.

Inside the blocks of another group there is a map for each block: parameters belong to the blocks as they were before
the other group moved them, so they keep their meaning when it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vfx.analyse.classes import Maps, contragredient
from vfx.analyse.groups import Group
from vfx.analyse.places import Index
from vfx.analyse.scales import restrained
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element
from vfx.elements.parts import parts, rows_of
from vfx.match.class_descent import sign_vectors
from vfx.match.matcher import assign
from vfx.program import Weights

Powers = Mapping[int, Mapping[int, float]]  # by side, then by free scale


def tangent(kind: Maps, free: Tensor) -> Tensor:
    """The nearest elements of the Lie algebra of a class that mixes channels to matrices (…, n, n)."""
    if kind is Maps.LINEAR:
        return free
    if kind is Maps.ROTATIONS:
        planes = torch.eye(free.shape[-1] // 2, dtype=free.dtype)
        quarter = torch.kron(planes, torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=free.dtype))
        return torch.kron(planes, torch.ones(2, 2, dtype=free.dtype)) * (free + quarter @ free @ quarter.T) / 2
    if kind is Maps.ORTHOGONAL_ONES:
        free = free - free.mean(-1, keepdim=True)
        free = free - free.mean(-2, keepdim=True)
    return (free - free.mT) / 2


class Chart:
    """The elements of one group: of its full class, or permutations alone.

    Parameters are float64 and start at the element that moves nothing. ``table`` (blocks, size, size): A where the
    class mixes channels, else Z; ``logs`` and ``flips``, by free scale or sign (blocks, size): λ and σ. ``places`` are
    the parameters' axes that the group stands on.
    """

    def __init__(self, symmetry: Symmetry, group: Group, full: bool = True):
        its_class = symmetry.classes[group.index]
        self.group = group
        self.places = [
            (member.fqn, member.dim, part)
            for member in group.members
            if symmetry.program.is_parameter(member.fqn)
            for part in parts(symmetry, group, member)
        ]
        mixes = full and its_class.scales is None and its_class.kind.mixes
        self.kind = its_class.kind if mixes else Maps.PERMUTATION
        self.blocks, size = (1 if group.parent is None else group.outer), group.size
        still = torch.zeros(size, size) if self.kind.mixes else torch.eye(size)
        self.table = still.double().repeat(self.blocks, 1, 1).requires_grad_()
        self.powers: Powers = {}
        self.signs: Mapping[int, frozenset[int]] = {}
        if full and its_class.scales is not None:
            powers = restrained(its_class.scales.magnitudes, its_class.running)
            self.powers = {side: {x: float(c) for x, c in vector.items()} for side, vector in powers.items() if vector}
            self.signs = {side: free for side, free in sign_vectors(symmetry, group).items() if free}
        shape = self.blocks, size
        free = {x for vector in self.powers.values() for x in vector}
        self.logs = {x: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for x in sorted(free)}
        free = {x for vector in self.signs.values() for x in vector}
        self.flips = {x: torch.ones(shape, dtype=torch.float64, requires_grad=True) for x in sorted(free)}

    # elements ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def element(self, blocks: Index | None) -> Element:
        """What the parameters stand for; ``blocks`` (n,): the old block of each new one, where the group has blocks."""
        old = np.arange(self.blocks) if blocks is None else blocks
        if self.kind.mixes:
            return Element(matrix=self._shaped(self._map().numpy()[old]))
        order = np.stack([assign(table)[0] for table in self.table])[old]
        scales = {side: scale[old[:, None], order] for side, scale in self._scales().items()}
        return Element(self._shaped(order), scales={side: self._shaped(scale) for side, scale in scales.items()})

    def _map(self) -> Tensor:
        return torch.linalg.matrix_exp(tangent(self.kind, self.table))

    def _scales(self) -> dict[int, np.ndarray]:
        """By side, for every old channel of every old block."""
        scales = {}
        for side in {**self.powers, **self.signs}:
            scale = torch.ones(self.blocks, self.group.size, dtype=torch.float64)
            for x, power in self.powers.get(side, {}).items():
                scale = scale * (power * self.logs[x]).exp()
            for x in self.signs.get(side, ()):
                scale = scale * torch.where(self.flips[x] < 0, -1.0, 1.0)
            scales[side] = scale.numpy()
        return scales

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values if self.group.parent is not None else values[0]

    # derivatives ------------------------------------------------------------------------------------------------------

    def differentiate(self, element: Element, blocks: Index | None, moved: Weights, gradient: Weights) -> None:
        """Fills the parameters' ``grad``: from the weights behind the ``element``, the loss's ``gradient`` by them."""
        old = torch.arange(self.blocks) if blocks is None else torch.from_numpy(blocks)
        if self.kind.mixes:
            change = self._changes(moved, gradient)
            assert element.matrix is not None
            by_map = torch.zeros_like(self.table)
            by_map[old] = change @ torch.from_numpy(contragredient(element.matrix)).reshape(change.shape)
            with torch.enable_grad():
                (self.table.grad,) = torch.autograd.grad(self._map(), self.table, by_map)
            return
        assert element.index is not None
        order = torch.from_numpy(element.index).reshape(self.blocks, -1)
        total = torch.zeros_like(self.table)
        for parameter in (*self.logs.values(), *self.flips.values()):
            parameter.grad = torch.zeros_like(parameter)
        for block, side, dual, product in self._products(moved, gradient):
            total[block] += product
            self._by_scales(int(old[block]), side, dual, product.diagonal(), order[block])
        self.table.grad = torch.zeros_like(self.table)
        by_order = torch.zeros_like(total).scatter_(-1, order[:, None].expand_as(total), total)
        self.table.grad[old] = by_order

    def _by_scales(self, block: int, side: int, dual: bool, change: Tensor, order: Tensor) -> None:
        """What one place asks of the scales of its side: d log s, the dual the other way; signs are their own dual."""
        for x, power in self.powers.get(side, {}).items():
            self.logs[x].grad[block, order] += (-power if dual else power) * change  # type: ignore[index]
        for x in self.signs.get(side, ()):
            flip = self.flips[x]
            flip.grad[block, order] += torch.where(flip.detach() < 0, -1.0, 1.0)[block, order] * change  # type: ignore[index]

    def _changes(self, moved: Weights, gradient: Weights) -> Tensor:
        """dL/dE for each new block."""
        total = torch.zeros_like(self.table)
        for block, _, dual, product in self._products(moved, gradient):
            total[block] += -product.T if dual else product
        return total

    def _products(self, moved: Weights, gradient: Weights) -> Iterator[tuple[int, int, bool, Tensor]]:
        """G W'ᵀ of each place, with its block, side, and whether it carries the dual map."""
        for name, dim, part in self.places:
            if name in gradient:
                product = rows_of(gradient[name], dim, part) @ rows_of(moved[name], dim, part).T
                yield part.block, part.side, part.dual, product


class Charts:
    """A chart for every group, for one edge."""

    def __init__(self, symmetry: Symmetry, full: bool = True):
        moving = symmetry.moving if full else symmetry.groups
        self.charts = {group.index: Chart(symmetry, group, full) for group in moving}
        self.names = list(dict.fromkeys(name for chart in self.charts.values() for name, _, _ in chart.places))

    def elements(self) -> dict[int, Element]:
        """The element that all parameters stand for; groups stand behind those whose blocks they are in."""
        elements: dict[int, Element] = {}
        for index, chart in sorted(self.charts.items(), key=lambda item: item[1].group.parent is not None):
            elements[index] = chart.element(self._blocks(chart.group, elements))
        return elements

    def differentiate(self, elements: Mapping[int, Element], moved: Weights, gradient: Weights) -> None:
        """Fills ``grad`` of all parameters; arguments as of ``Chart.differentiate``."""
        for index, chart in self.charts.items():
            chart.differentiate(elements[index], self._blocks(chart.group, elements), moved, gradient)

    @staticmethod
    def _blocks(group: Group, elements: Mapping[int, Element]) -> Index | None:
        return None if group.parent is None else elements[group.parent].index

    def maps(self) -> list[Tensor]:
        """The parameters of maps that mix channels."""
        return [chart.table for chart in self.charts.values() if chart.kind.mixes]

    def orders(self) -> list[Tensor]:
        """The scores of permutations."""
        return [chart.table for chart in self.charts.values() if not chart.kind.mixes]

    def sizes(self) -> list[Tensor]:
        """The parameters of scales and signs."""
        charts = self.charts.values()
        return [tensor for chart in charts for tensor in (*chart.logs.values(), *chart.flips.values())]
