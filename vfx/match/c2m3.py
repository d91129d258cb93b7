"""C²M³: N edges matched together, cycle consistent by construction (Crisostomi et al. 2024, §3, algorithm 1).

Every edge p has one group element P_p into a common space, the universe. The objective is weight matching's, summed
over all pairs, F = Σ_{p<q} Σ ⟨P_p W_p, P_q W_q⟩ over the parameters that groups move, each moved on all its axes
(P_out W P_inᵀ). It is maximised over doubly stochastic matrices (``vfx.match.relaxation``) by Frank-Wolfe:

1. the gradient at P_p is that of ⟨P_p W_p, Σ_{q≠p} P_q W_q⟩, each weight counting for all the groups on it;
2. the vertex that maximises it is a linear assignment for each unit of groups, for all edges at once;
3. the step t ∈ [0, 1] is exact: a weight moved by (1 − t) P + t S is a polynomial in t of as many degrees as groups act
   on it (two for most), so F is one of twice that degree, whose coefficients are inner products;
4. when no step gains any more, the nearest vertex is taken (linear assignment), and coordinate descent over edges and
   units goes on from there: each step is kept only if it raises F (not in the paper, which stops at the vertex).

The paper starts at identities, a start that depends on how each edge happens to be ordered. The default start is that
of ``initial="matched"``: pairwise weight matching to the first edge, drawn half-way to the mean of all permutations, so
that permuting an edge beforehand changes nothing. ``restarts`` begin from random elements. F never ends below what the
matched start has, as it is and behind coordinate descent. The result is given in the first edge's frame, its own
element undone: averaging there or in the universe is the same function.

**Over the full classes** every edge goes into the first one's balanced form first (``vfx.match.weight``), where only
compact maps are left, so that F has a maximum: signed permutations and orthogonal maps. Frank-Wolfe goes over the
permutations among them; the descent projects each group of each edge on its class against the sum of the other edges
(assignment, signed assignment, Procrustes). With g_i for what takes edge i to the universe, g_i⁻¹ g_j takes edge j to
edge i: cycles close whatever was found.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from vfx.analyse.balance import balance
from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.elements import (
    Element,
    Elements,
    Permutations,
    act,
    check_classes,
    compose,
    identity,
    permutations_of,
    permuted,
    random_permutations,
    still_permutations,
)
from vfx.errors import ArgumentError
from vfx.match.class_descent import ClassDescent, between, beyond_permutations, in_matrices, settled
from vfx.match.descent import CHUNK, Descent, inner_product
from vfx.match.matcher import Gain, Matching, Problem
from vfx.match.relaxation import Point, RelaxedPiece, barycentre, best_vertex, blend, pieces, vertex
from vfx.match.universe import check_one_shape, cycle_error, pair_objective, scored_names, to_first
from vfx.match.weight import WeightMatching
from vfx.program import Weights
from vfx.progress import track

STILL = 1e-12  # of F, up to which a round over all edges has gained nothing
SETTLED = 1e-5  # the same for maps that come nearer to their best without end


class C2M3:
    """Frank-Wolfe on all edges' permutations at once, then coordinate descent; see the module's text.

    ``classes``: "full" or "permutation".
    """

    needs: frozenset[str] = frozenset()
    exact = True

    @checked
    def __init__(
        self,
        iterations: int = 100,
        tolerance: float = 1e-5,
        restarts: int = 0,
        initial: Literal["matched", "identity"] = "matched",
        softness: float = 0.5,
        polish: bool = True,
        classes: str = "full",
    ):
        if initial not in ("matched", "identity"):
            raise ArgumentError(f"initial must be 'matched' or 'identity', got {initial!r}")
        if iterations < 0 or restarts < 0 or not 0 <= softness < 1:
            raise ArgumentError("iterations and restarts must be at least 0, softness in [0, 1)")
        self.iterations, self.tolerance, self.restarts = iterations, tolerance, restarts
        self.initial, self.softness, self.polish = initial, softness, polish
        self.classes = check_classes(classes)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        begin = time.perf_counter()
        check_one_shape(problem.program.weights)
        symmetry, generator = problem.symmetry, np.random.default_rng(problem.seed)
        full = self.classes == "full" and beyond_permutations(symmetry)
        frame, begun = self._balanced(problem) if full else ({}, [identity(symmetry)] * problem.program.edges)
        weights = _moved(symmetry, frame, begun, problem.program.weights) if full else problem.program.weights
        objective = JointObjective(symmetry, weights, full)
        runs = [self._run(objective, attempt, generator, problem.progress) for attempt in range(1 + self.restarts)]
        best = max(runs, key=lambda run: run.value)
        assert full or cycle_error(symmetry, best.elements) == 0
        return Matching(
            elements=_as_they_are(symmetry, frame, begun, best.elements) if full else to_first(symmetry, best.elements),
            objective=(best.value,),
            sweeps=(best.steps,),
            seconds=time.perf_counter() - begin,
            details={
                "frank_wolfe_objective": best.rounded,
                "initial_objective": best.initial,
                "left_out": float(len(objective.left_out)),
            },
            attempts=tuple((run.value,) for run in runs),
        )

    def _balanced(self, problem: Problem) -> tuple[Elements, list[Elements]]:
        """What balances the first edge, and what brings each to it: weight matching, or only its balanced form."""
        symmetry, (first, *others) = problem.symmetry, problem.program.weights
        frame = balance(symmetry, first, problem.apart, leaning=True)
        if self.initial == "matched":
            return frame, [*WeightMatching(classes="full")(problem).elements]
        own = (balance(symmetry, weights, problem.apart, leaning=True) for weights in others)
        return frame, [identity(symmetry), *(between(symmetry, frame, balanced, {}) for balanced in own)]

    def _run(self, objective: JointObjective, attempt: int, generator: np.random.Generator, progress: bool) -> _Run:
        start = self._start(objective, attempt, generator)
        points = [objective.vertex(element) for element in start]
        if not attempt and self.initial == "matched":
            points = [blend(point, objective.centre(), self.softness) for point in points]
        points, steps = frank_wolfe(objective, points, self.iterations, self.tolerance, progress)
        begun = [*map(objective.element, start)]
        elements = [objective.element(best_vertex(objective.symmetry, point)) for point in points]
        initial, rounded = map(objective.discrete, (begun, elements))
        if objective.full and rounded <= initial:  # a descent over maps is long: from the better of both alone
            elements = begun
        elements = descend(objective, elements, generator) if self.polish else elements
        value = objective.discrete(elements)
        if value <= initial * (1 + STILL) if initial > 0 else value <= initial:
            elements = descend(objective, begun, generator) if self.polish else begun
            value = objective.discrete(elements)
        return _Run(elements, value, rounded, initial, steps)

    def _start(self, objective: JointObjective, attempt: int, generator: np.random.Generator) -> list[Permutations]:
        symmetry, edges = objective.symmetry, len(objective.weights)
        if attempt:
            return [random_permutations(symmetry.groups, generator) for _ in range(edges)]
        still: Permutations = still_permutations(symmetry.groups)
        if self.initial == "identity" or objective.full:  # the full classes' frames are matched already
            return [still] * edges
        first, *others = objective.weights
        return [still, *(Descent(symmetry, first, weights).run(generator)[0] for weights in others)]


def _moved(symmetry: Symmetry, frame: Elements, begun: Sequence[Elements], weights: Sequence[Weights]) -> list[Weights]:
    """The edges' scored parameters in float64, brought to the first edge and behind its frame."""
    doubles = ({name: own[name].double() for name in scored_names(symmetry)} for own in weights)
    moved = (compose(symmetry, in_matrices(symmetry, element), frame) for element in begun)
    return [act(symmetry, element, own) for element, own in zip(moved, doubles)]


def _as_they_are(
    symmetry: Symmetry, frame: Elements, begun: Sequence[Elements], elements: Sequence[Elements]
) -> tuple[dict[int, Element], ...]:
    """What takes each edge to the first as they are, from what takes their balanced forms to the universe."""
    behind = [settled(symmetry, between(symmetry, frame, frame, own)) for own in to_first(symmetry, elements)[1:]]
    moved = (compose(symmetry, *map(partial(in_matrices, symmetry), pair)) for pair in zip(begun[1:], behind))
    return identity(symmetry), *(settled(symmetry, element) for element in moved)


class _Run(NamedTuple):
    """Elements into the universe, F of them, before coordinate descent and of the start, Frank-Wolfe steps."""

    elements: list[Elements]
    value: float
    rounded: float
    initial: float
    steps: int


class JointObjective:
    """F = Σ_{p<q} Σ ⟨P_p W_p, P_q W_q⟩ of relaxed elements, its gradient, and F along a segment.

    Works in float64 where a weight is float64, else in float32; sums are float64. Parameters whose action is no product
    of matrices (``left_out``) count in the discrete objective alone. ``full``: elements are those of the full classes,
    and the weights are balanced.
    """

    def __init__(self, symmetry: Symmetry, weights: Sequence[Weights], full: bool = False):
        self.symmetry, self.full = symmetry, full
        names = scored_names(symmetry)
        wide = any(weights[0][name].dtype == torch.float64 for name in names)
        self.dtype = torch.float64 if wide else torch.float32
        self.weights = [{name: w[name].to(self.dtype) for name in names} for w in weights]
        self.device = next((w.device for w in self.weights[0].values()), torch.device("cpu"))
        self.pieces, self.left_out = pieces(symmetry)

    def vertex(self, element: Permutations) -> Point:
        return vertex(self.symmetry, element, self.dtype, self.device)

    def centre(self) -> Point:
        return barycentre(self.symmetry, self.dtype, self.device)

    def discrete(self, elements: Sequence[Elements]) -> float:
        """F of group elements, over every parameter they move."""
        return pair_objective(self.symmetry, self.weights, elements)

    def element(self, permutations: Permutations) -> Elements:
        """The group element of permutations, by matrices where the full class of a group mixes channels."""
        return in_matrices(self.symmetry, permuted(permutations)) if self.full else permuted(permutations)

    def matched(self, target: Weights, edge: int, element: Elements, generator: np.random.Generator) -> Elements:
        """An edge's element behind coordinate descent towards a target, from where it stands."""
        pair = target, self.weights[edge]
        if not self.full:
            return permuted(Descent(self.symmetry, *pair).run(generator, permutations_of(element))[0])
        return in_matrices(self.symmetry, ClassDescent(self.symmetry, *pair).run(generator, element)[0])

    def value_and_gradient(self, points: Sequence[Point]) -> tuple[float, list[Point]]:
        """F, and its gradient by every matrix of every edge."""
        leaves = [{g: m.detach().clone().requires_grad_() for g, m in point.items()} for point in points]
        total = 0.0
        for piece in self.pieces:
            with torch.enable_grad():
                moved = [piece.move(x, point) for x, point in zip(self._read(piece), leaves)]
            whole = torch.stack([m.detach() for m in moved]).sum(0)
            for tensor in moved:
                others = whole - tensor.detach()  # what F is linear in, but for this edge's own matrices
                total += 0.5 * inner_product(tensor.detach(), others)
                tensor.backward(others)
        zero = torch.zeros_like
        return total, [{g: zero(m) if m.grad is None else m.grad for g, m in leaf.items()} for leaf in leaves]

    def along(self, points: Sequence[Point], vertices: Sequence[Point]) -> Polynomial:
        """F((1 − t) · points + t · vertices) as a polynomial in t."""
        coefficients = np.zeros(1 + 2 * max((piece.degree for piece in self.pieces), default=0))
        for piece in self.pieces:
            coefficients_of_pair = _pair_coefficients(piece, self._read(piece), points, vertices)
            for a, b in np.ndindex(coefficients_of_pair.shape):
                coefficients[a + b] += coefficients_of_pair[a, b]
        return Polynomial(coefficients)

    def _read(self, relaxed: RelaxedPiece) -> list[Tensor]:
        return [relaxed.piece.read(w[relaxed.piece.fqn]) for w in self.weights]


def _pair_coefficients(
    piece: RelaxedPiece, values: Sequence[Tensor], points: Sequence[Point], vertices: Sequence[Point]
) -> Gain:
    """Σ_{p<q} ⟨a-th coefficient of edge p's moved piece, b-th of edge q's⟩ (degree + 1, degree + 1), symmetrised.

    A polynomial's coefficients are linear in its values at as many points as it has coefficients.
    """
    nodes = np.linspace(0, 1, piece.degree + 1)
    groups = {g for action in piece.actions for g in (action.group, *(g for g, _ in action.inner))}
    rows = [
        piece.move(x, {g: torch.lerp(point[g], target[g], float(t)) for g in groups}).reshape(-1)
        for x, point, target in zip(values, points, vertices)
        for t in nodes
    ]
    gram = _gram(torch.stack(rows)).reshape(len(values), len(nodes), len(values), len(nodes))
    pairs = gram.sum((0, 2)) - np.einsum("papb->ab", gram)
    inverse = np.linalg.inv(np.vander(nodes, increasing=True))
    return 0.5 * inverse @ pairs @ inverse.T


def _gram(rows: Tensor) -> Gain:
    """Inner products of rows, summed in float64."""
    blocks = (block @ block.T for block in rows.split(CHUNK, 1))
    return sum((block.double() for block in blocks), start=rows.new_zeros((), dtype=torch.float64)).cpu().numpy()


def best_step(polynomial: Polynomial) -> tuple[float, float]:
    """The t in [0, 1] where a polynomial is largest, and its value there."""
    roots = polynomial.deriv().roots() if polynomial.degree() > 1 else np.empty(0)
    inside = [float(r.real) for r in np.atleast_1d(roots) if abs(r.imag) < 1e-6 and 0 < r.real < 1]
    values = {t: float(polynomial(t)) for t in (0.0, 1.0, *inside)}
    step = max(values, key=lambda t: values[t])
    return step, values[step]


def frank_wolfe(
    objective: JointObjective, points: list[Point], iterations: int, tolerance: float, progress: bool = True
) -> tuple[list[Point], int]:
    """Points reached from ``points``, F never falling, and the number of steps taken.

    Ends at a stationary point (the Frank-Wolfe gap is at most ``tolerance`` times F) or with a step that gains less.
    """
    for step in track(range(iterations), "Frank-Wolfe", iterations, progress):
        value, gradients = objective.value_and_gradient(points)
        targets = [objective.vertex(best_vertex(objective.symmetry, gradient)) for gradient in gradients]
        gap = sum(inner_product(gradient[g], target[g] - point[g])
                  for gradient, target, point in zip(gradients, targets, points) for g in point)  # fmt: skip
        share, reached = best_step(objective.along(points, targets))
        if gap <= tolerance * abs(value) or reached - value <= tolerance * abs(value):
            return points, step
        points = [blend(point, target, share) for point, target in zip(points, targets)]
    return points, iterations


def descend(objective: JointObjective, elements: list[Elements], generator: np.random.Generator) -> list[Elements]:
    """Coordinate descent over edges: each is matched to the sum of the others, from where it stands, until F stays."""
    symmetry, weights = objective.symmetry, objective.weights
    if len(weights) == 2:  # the first edge's move would undo the second's
        target = act(symmetry, elements[0], weights[0])
        return [elements[0], objective.matched(target, 1, elements[1], generator)]
    value = objective.discrete(elements)
    while True:
        moved = list(elements)
        for edge in generator.permutation(len(weights)):
            target = _sum_of_others(symmetry, weights, moved, int(edge))
            moved[edge] = objective.matched(target, edge, moved[edge], generator)
        after = objective.discrete(moved)
        if after <= value + (SETTLED if objective.full else STILL) * abs(value):
            return moved if after > value else elements
        elements, value = moved, after


def _sum_of_others(
    symmetry: Symmetry, weights: Sequence[Weights], elements: Sequence[Elements], edge: int
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for index, (w, element) in enumerate(zip(weights, elements)):
        if index != edge:
            moved = act(symmetry, element, w)
            total = {name: total[name] + moved[name] for name in moved} if total else moved
    return total
