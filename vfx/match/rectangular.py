"""Semi-permutations and semi-orthogonal maps: one edge carried to another width by what a square matching finds.

The edge goes to its balanced form S₁ (at its own width), into the frame of both widths (``vfx.match.frame``), through
the square element g found there, back to the first edge's width and to the first one's own scales:

    T = S₀⁻¹ E₀ᵀ g E₁ S₁.

Into a wider network that is an embedding, TᵀT = 1 but for the scales: weights of added channels are zero. Into a
narrower one it selects channels, or projects them, and that loses what the others say. What counts channels sees the
added ones (``vfx.match.counted``); what makes up for them comes first, if it brings the function closer to the edge's.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain, combinations

import torch
from torch import Tensor, fx

from vfx.analyse.balance import balance
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Elements, act, act_on, inverse
from vfx.match.carry import Carriage, Carrier, Crossing, Pairing, fitted
from vfx.match.class_ascent import basis
from vfx.match.class_descent import beyond_permutations
from vfx.match.counted import attention_factors, norm_scales
from vfx.match.frame import Frame, moved_into
from vfx.program import Weights, run
from vfx.proof import function_error, in_double
from vfx.statistics.collect import Statistics


class Bridge:
    """What a square matching in the frame needs, and ``carriage`` to make a carriage of what it finds."""

    def __init__(self, crossing: Crossing, full: bool):
        self.crossing, self.frame = crossing, Frame(crossing.pairing)
        self.facts = self.frame.facts
        self.full = full and beyond_permutations(self.facts)
        self.own = crossing.pairing.one, crossing.pairing.other
        self.corrections = corrections(crossing, self.frame)
        second = crossing.other
        for step in self.corrections:
            second = step.weights(second)
        self.given = crossing.first, second
        self.balances = tuple(balance(f, w) if self.full else {} for f, w in zip(self.own, self.given))

    @cached_property
    def weights(self) -> tuple[Weights, Weights]:
        """Both balanced weight sets in the frame."""
        given = zip(self.own, self.given, self.balances, self.frame.into)
        first, second = (moved_into(into, act(f, s, w)) for f, w, s, into in given)
        return first, second

    def statistics(self) -> Statistics:
        """The features of both edges in the frame, as their balanced forms have them."""
        first, second = zip(self.own, self.balances)
        bases = (lambda tap: basis(first[0], tap, first[1])), (lambda tap: basis(second[0], tap, second[1]))
        return self.frame.statistics(self.crossing.readings, self.crossing.edge, bases)

    def carriage(self, found: Elements) -> Steps:
        """The way of the edge through an element of the frame."""
        way = (
            *self.corrections,
            _Moved(self.own[1], self.balances[1]),
            _Resized(self.frame.into[1]),
            _Moved(self.facts, found),
            _Resized(self.frame.back),
            _Moved(self.own[0], inverse(self.own[0], self.balances[0])),
        )
        return Steps(self.crossing.pairing, way)


class Steps:
    """A carriage made of several steps."""

    def __init__(self, pairing: Pairing, steps: tuple[Step, ...]):
        self.pairing, self.steps = pairing, steps

    def weights(self, first: Weights, other: Weights) -> dict[str, Tensor]:
        carried = other
        for step in self.steps:
            carried = step.weights(carried)
        return fitted(self.pairing, first, other, carried)

    def matrix(self, node: fx.Node, other: fx.Node, dim: int) -> Tensor | None:
        labels = self.pairing.other.labels(other, dim)
        if labels is None or self.pairing.one.labels(node, dim) is None:
            return None
        total = torch.eye(len(labels), dtype=torch.float64)
        for step in self.steps:
            total = step.along(node.name, dim, total)
        return total


class _Moved:
    """An element of a network's own symmetries."""

    def __init__(self, facts: Symmetry, element: Elements):
        self.facts, self.element = facts, element
        self.nodes = facts.program.nodes

    def weights(self, weights: Weights) -> Weights:
        return act(self.facts, self.element, weights)

    def along(self, node: str, dim: int, total: Tensor) -> Tensor:
        return act_on(self.facts, self.element, self.nodes[node], dim)(total)


class _Resized:
    """From one width to another."""

    def __init__(self, carrier: Carrier):
        self.carrier = carrier
        self.nodes = [facts.program.nodes for facts in (carrier.pairing.one, carrier.pairing.other)]

    def weights(self, weights: Weights) -> Weights:
        return moved_into(self.carrier, weights)

    def along(self, node: str, dim: int, total: Tensor) -> Tensor:
        matrix = self.carrier.matrix(self.nodes[0][node], self.nodes[1][node], dim)
        return total if matrix is None else matrix @ total


def corrections(crossing: Crossing, frame: Frame) -> tuple[Step, ...]:
    """What makes up for channels that are counted, as far as the function comes closer to the edge's own.

    That is seen where channels are added; into a narrower network it is what undoes it on the way back.
    """
    pairing = crossing.pairing
    steps = _counted(pairing.other, pairing.one)
    if not steps:
        return ()
    if frame.facts is pairing.other and frame.facts is not pairing.one:
        pairing = Pairing(pairing.other, pairing.one, "edge 0")
        crossing, frame = Crossing(pairing, 0, crossing.other, crossing.first), Frame(pairing)
    tried = _counted(pairing.other, pairing.one)
    subsets = [*chain.from_iterable(combinations(range(len(steps)), k) for k in range(len(steps), -1, -1))]
    across = _Resized(frame.into[1]), _Resized(frame.back)
    ways = [Steps(pairing, (*(tried[k] for k in subset), *across)) for subset in subsets]
    errors = [deviation(pairing, way, crossing) for way in ways]
    return tuple(steps[k] for k in subsets[errors.index(min(errors))])


def _counted(facts: Symmetry, there: Symmetry) -> list[Step]:
    factors, scales = attention_factors(facts, there), norm_scales(facts, there)
    steps: list[Step] = [] if factors is None else [_Resized(factors)]
    return [*steps, _Moved(facts, scales)] if scales else steps


Step = _Moved | _Resized


@torch.no_grad()
def deviation(pairing: Pairing, carriage: Carriage, crossing: Crossing) -> float:
    """max |f − f_T| on random inputs, relative to the spread of f over them: an edge's network and itself carried.

    In float64; 0 up to rounding where the carriage keeps the function.
    """
    first, second = (
        in_double(facts.program.with_weights([weights]))
        for facts, weights in ((pairing.one, crossing.first), (pairing.other, crossing.other))
    )
    carried = carriage.weights(first.weights[0], second.weights[0])
    return function_error(second, lambda inputs: run(first.graph, carried, inputs))
