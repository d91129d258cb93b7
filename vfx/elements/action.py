"""The one action: what an element does to the weights of a network, and to an axis of an activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vfx.analyse.classes import Matrix
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
    moved = Acting(symmetry, elements, without)
    return {name: moved(name, tensor) for name, tensor in weights.items()}


class Acting:
    """What elements do to a network's weights, one tensor at a time; arguments as of ``act``."""

    def __init__(self, symmetry: Symmetry, elements: Elements, without: tuple[Member, ...] = ()):
        self.symmetry = symmetry
        self.index = {group: element.index for group, element in elements.items() if element.index is not None}
        # where a matrix stands in its place on an axis, the index is left out
        everywhere = symmetry.groups if without else ()
        self._skipped = {(m.fqn, m.dim, g.index) for g in everywhere for m in g.members if m in without}
        for number in self.index:
            if elements[number].mixes:
                members = symmetry.groups[number].members
                self._skipped |= {(m.fqn, m.dim, number) for m in members if m.role in ("out", "in")}
        self._behind: dict[str, list[tuple[Group, Member, Element, Matrix | None]]] = {}
        for number, element in elements.items():
            if element.matrix is None and not element.scales:
                continue
            group, dual = symmetry.group(number), element.contragredient()
            for member in group.members:
                if member not in without:
                    self._behind.setdefault(member.fqn, []).append((group, member, element, dual))

    def rounds(self, name: str) -> bool:
        """Whether a tensor is multiplied, and not put into another order alone: then its precision counts."""
        return name in self._behind

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of a name, moved; the same object where nothing moves it."""
        moved = self._ordered(name, tensor)
        for group, member, element, dual in self._behind.get(name, ()):
            parts_of = parts if element.is_exact else parts_by_role
            for part in parts_of(self.symmetry, group, member):
                moved = mapped(moved, member.dim, part, element, dual, in_place=moved is not tensor)
        return moved

    def _ordered(self, name: str, tensor: Tensor) -> Tensor:
        axes: dict[int, ActedAxis] = {}
        for dim, labels in self.symmetry.axes_of(name) if self.index else ():
            if labels.shape[1] > 1:
                chosen = {g: index for g, index in self.index.items() if (name, dim, g) not in self._skipped}
                axes[dim] = Ordered(self.symmetry, labels, chosen, unresized(self.symmetry, labels))
        return acted(tensor, axes) if axes else tensor


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
    index = {
        group: element.index for group, element in elements.items() if element.index is not None and not element.mixes
    }
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
    members = [m for m in group.members if (m.fqn, m.dim) == (weight_name(node), output_axis(node))]
    return [part for member in members for part in parts(symmetry, group, member)]


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
