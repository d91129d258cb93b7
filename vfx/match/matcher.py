"""What a matcher is, and the assignment problem that all of them solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vfx.analyse.places import Index
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element, Elements, Permutations, act, exact_part, permutations_of
from vfx.errors import ArgumentError
from vfx.match.auction import Gain, costs
from vfx.program import Program, Weights
from vfx.statistics.collect import Statistics

Run = tuple[dict[int, Any], float, int]  # what an edge goes through, the objective and the number of sweeps


@dataclass(frozen=True)
class Problem:
    """What there is to match: a Program's edges, its symmetry, what is known of their activations, and the choices.

    ``weights`` are the edges' shares in the merge (equal if empty); ``data`` is the user's loader, for matchers that
    run the networks themselves. ``apart`` names parameters that are not merged, since each edge keeps its own: what is
    merged is not scaled by them. Of these the ``heads`` do not tell either which channels belong together.
    """

    program: Program
    symmetry: Symmetry
    statistics: Statistics | None = None
    weights: tuple[float, ...] = ()
    data: Any = None
    seed: int = 0
    progress: bool = False
    apart: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each edge."""
        return self.weights or (1 / self.program.edges,) * self.program.edges


@dataclass(frozen=True)
class Matching:
    """What each edge goes through, an element for every group (the first edge's is the identity), and the objective.

    Elements of the groups' classes keep an edge's function; linear maps that do not have a ``dual`` of their own, and
    the permutation nearest to them as ``index``. ``objective`` is one figure for each edge but the first, or one
    for all where they are matched together; ``attempts`` holds the same for each start (``restarts``) or iteration, of
    which the best was kept. ``apart`` names, by group, aligned channels that are not to be merged; where ``ridge`` is
    given, the merged layers are solved by least squares with it (PLeaS). ``notes`` says what was not done, and why.
    """

    elements: tuple[Elements, ...]
    apart: Mapping[int, Index] = field(default_factory=dict)
    ridge: float | None = None
    objective: tuple[float, ...] = ()
    sweeps: tuple[int, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict)
    attempts: tuple[tuple[float, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = next((e for elements in self.elements for e in elements.values() if not isinstance(e, Element)), None)
        if wrong is not None:
            raise ArgumentError(
                f"a Matching holds an Element for each group and edge, not {type(wrong).__name__}: give a permutation "
                "as vfx.elements.Element(index)"
            )

    @property
    def permutations(self) -> tuple[Permutations, ...]:
        """How the elements order the channels."""
        return tuple(permutations_of(elements) for elements in self.elements)

    @property
    def is_exact(self) -> bool:
        """Whether every edge keeps its function."""
        return all(element.is_exact for elements in self.elements for element in elements.values())

    def aligned(self, symmetry: Symmetry, weights: Weights, edge: int) -> dict[str, Tensor]:
        """An edge's weights in the first edge's channels, as far as it keeps its function."""
        return act(symmetry, exact_part(self.elements[edge]), weights)


@dataclass(frozen=True)
class Alignment:
    """What an alignment found (None where edges were left as they are), and the relative error of its proof.

    ``error`` is None where nothing was to be proved.
    """

    matching: Matching | None = None
    error: float | None = None


@runtime_checkable
class Matcher(Protocol):
    """Finds, for each edge, what brings it closest to the first edge.

    ``needs`` names what it reads of the data: "features" (the groups' cross moments between edges), "within" (their
    second moments inside each edge too), "data" (it runs the networks itself). An ``exact`` matcher finds group
    elements alone, which keep each edge's function; others find linear maps too.
    """

    needs: frozenset[str]
    exact: bool

    def __call__(self, problem: Problem) -> Matching: ...


@dataclass
class Known:
    """A matcher that gives a matching found before: by other means, on other data, or for many merges."""

    matching: Matching
    needs: frozenset[str] = frozenset()
    exact: bool = True

    def __call__(self, problem: Problem) -> Matching:
        return self.matching


def assign(gain: Tensor | Gain) -> tuple[Index, float]:
    """p maximising Σ_c gain[c, p[c]], and that sum; of large gains that several p maximise, none if all may stay."""
    matrix = gain.cpu().numpy() if isinstance(gain, Tensor) else gain
    cost = costs(matrix)
    rows, columns = linear_sum_assignment(matrix, maximize=True) if cost is None else linear_sum_assignment(cost)
    value = float(matrix[rows, columns].sum())
    if cost is not None and float(matrix[rows, rows].sum()) >= value:
        return rows, value
    return columns.astype(np.int64), value


def best_over_blocks(gains: Gain) -> Gain:
    """Gain (size, size) between channels that stand for blocks, from those of their elements (size, size, b, b).

    Each pair of blocks counts what its own best assignment of elements gives: the value for any order inside.
    """
    size = len(gains)
    return np.array([[assign(gains[i, j])[1] for j in range(size)] for i in range(size)]).reshape(size, size)
