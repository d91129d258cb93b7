"""The one action: what an element does to the weights of a network, and to an axis of an activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vfx.analyse.groups import Group, Member
from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements.axes import ActedAxis, Ordered, acted, unresized
from vfx.elements.element import Element, Elements, undone
from vfx.elements.parts import Part, mapped, parts, parts_by_role, standing
from vfx.elements.permutations import Permutations
from vfx.operators import is_layer, output_axis, weight_name
from vfx.program import BATCH, Weights


def act(
    symmetry: Symmetry, elements: Elements, weights: Weights, without: tuple[Member, ...] = ()
) -> dict[str, Tensor]:
    """A weight set (or a part of one) moved by elements; tensors that do not move are shared.

    ``without`` leaves parameter axes out (a negative control). Whether the elements are in their groups' classes is not
    asked: see ``check_elements``.
    """
    result = _ordered(symmetry, elements, weights, without)
    for index, element in elements.items():
        if element.matrix is None and not element.scales:
            continue
        group, dual = symmetry.group(index), element.contragredient()
        for member in group.members:
            if member in without or member.fqn not in result:
                continue
            for part in parts(symmetry, group, member) if element.is_exact else parts_by_role(symmetry, group, member):
                result[member.fqn] = mapped(result[member.fqn], member.dim, part, element, dual)
    return result


def _ordered(
    symmetry: Symmetry, elements: Elements, weights: Weights, without: tuple[Member, ...]
) -> dict[str, Tensor]:
    """The weights in their new order; where a matrix stands in its place on an axis, the index is left out."""
    index = {group: own.index for group, own in elements.items() if own.index is not None}
    skipped = {(m.fqn, m.dim, group.index) for group in symmetry.groups for m in group.members if m in without}
    for group in symmetry.groups:
        if group.index in index and elements[group.index].mixes:
            skipped |= {(m.fqn, m.dim, group.index) for m in group.members if m.role in ("out", "in")}
    axes: dict[str, dict[int, ActedAxis]] = {}
    for (fqn, dim), labels in symmetry.rows.items():
        if fqn in weights and labels.shape[1] > 1:
            left = {group for group in index if (fqn, dim, group) in skipped} if skipped else ()
            chosen = {group: own for group, own in index.items() if group not in left} if left else index
            axes.setdefault(fqn, {})[dim] = Ordered(symmetry, labels, chosen, unresized(symmetry, labels))
    return dict(weights) | {fqn: acted(weights[fqn], own) for fqn, own in axes.items()}


# activations ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OnAxis:
    """What an element does to n positions along an axis of an activation.

    ``order`` (n,): the old position of each new one; None where all stay. ``behind`` is what stands behind that: a
    matrix (n, n) where channels are mixed, a vector (n,) where they are scaled, None where neither.
    """

    order: Index | None
    behind: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Values (n, …) along the axis, moved."""
        if self.order is not None:
            x = x[torch.from_numpy(self.order).to(x.device)]
        if self.behind is None:
            return x
        behind = self.behind.to(x)
        if behind.ndim == 1:
            return behind.reshape(-1, *[1] * (x.ndim - 1)) * x
        return behind @ x if x.ndim < 3 else (behind @ x.flatten(1)).reshape(x.shape)


def act_on(symmetry: Symmetry, elements: Elements, node: fx.Node, dim: int) -> OnAxis:
    """What an element does to an axis of an activation, along which a feature is as the layer that makes it gives it.

    Raises ArchitectureError where the axis goes through several maps (the rest of the tensor says which).
    """
    index = {group: own.index for group, own in elements.items() if own.index is not None and not own.mixes}
    order = order_on(symmetry, index, node, dim)
    return OnAxis(order, _behind(symmetry, elements, node, dim))


def order_on(symmetry: Symmetry, index: Permutations, node: fx.Node, dim: int) -> Index | None:
    """The old position of each new one along an axis of an activation; None where all stay."""
    labels = symmetry.labels(node, dim)
    return None if labels is None else Ordered(symmetry, labels, index, unresized(symmetry, labels)).sources()


def _behind(symmetry: Symmetry, elements: Elements, node: fx.Node, dim: int) -> Tensor | None:
    labels = symmetry.labels(node, dim)
    size = 0 if labels is None else len(labels)
    result: Tensor | None = None
    for features in symmetry.features(labels) if labels is not None else ():
        for index in features[0]:
            element = elements.get(index, Element())
            if element.matrix is None and not element.scales:
                continue
            for part in standing(symmetry, node, dim, symmetry.groups[index], features, not element.is_exact):
                result = _onto(result, size, part, element)
    for group in symmetry.rotations if any(index >= len(symmetry.groups) for index in elements) else ():
        for part in _turned(symmetry, elements, group, node):
            result = _onto(result, node.meta["val"].sizes(BATCH)[dim], part, elements[group.index])
    return result


def _turned(symmetry: Symmetry, elements: Elements, group: Group, node: fx.Node) -> list[Part]:
    """The parts of rotary planes on the output of the layer that makes them."""
    if group.index not in elements or not is_layer(node):
        return []
    own = [m for m in group.members if (m.fqn, m.dim) == (weight_name(node), output_axis(node))]
    return [part for member in own for part in parts(symmetry, group, member)]


def _onto(result: Tensor | None, size: int, part: Part, element: Element) -> Tensor | None:
    """A map of one part put in front of what an axis goes through already."""
    if result is None:
        result = torch.ones(size, dtype=torch.float64)
    if element.matrix is not None and result.ndim == 1:
        result = torch.diag(result)
    return mapped(result, 0, part, element, element.contragredient())


@dataclass(frozen=True, eq=False)
class Pending:
    """Linear maps that are still to go into the edges' weights: the ``elements`` of each edge, and whose groups."""

    symmetry: Symmetry
    elements: tuple[Elements, ...]

    def on(self, edge: int, node: fx.Node, dim: int, back: bool = False) -> Tensor | None:
        """The matrix that maps an axis of an activation, or leads ``back`` from the common space; None where none."""
        elements = undone(self.elements[edge]) if back else self.elements[edge]
        return act_on(self.symmetry, elements, node, dim).behind
