"""Balanced scales: of every channel whose scale is free those at which the sum of all squares is least.

λ ← λ + ¼ log(N/P), channel by channel, with P and N the sums of squares of what carries e^λ and e^−λ (Stock et al.,
*Equi-normalization of Neural Networks*, 2019, §3). The sum is convex in all λ, so what the sweeps come to is unique.

Sides on which a running statistic stands keep their scale, unless asked for: statistics that are measured anew are
those of the layer as it is. A scale that only makes or only reads has no minimum and stays; where the other side is
there but stays apart (the heads of each edge), what is left gets rows of norm one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import linalg

from vfx.analyse.classes import Maps, Matrix
from vfx.analyse.groups import Group
from vfx.analyse.slots import Vector, nullspace
from vfx.analyse.symmetry import Symmetry
from vfx.elements import Element
from vfx.elements.parts import Part, parts
from vfx.program import Weights

TOLERANCE = 1e-10  # of λ, in one sweep over all channels
ROUNDED = 1e-5  # the same for weights of single precision
SWEEPS = 2000  # at most
NEWTON, RIDGE = 20, 1e-12  # steps at most, and what is added to the second derivatives, a share of the largest
NEAR, PLAIN, SLOWEST = 0.1, 6, 0.99  # changes of λ from which on the rate is read off, in how many sweeps; its cap

Variable = tuple[int, int]  # group, free scale
Alive = NDArray[np.bool_]  # whether a feature's channels, block after block, have a scale to be found


@dataclass(eq=False)
class Place:
    """Where a free scale stands in a tensor: ``parts`` (one for each block) and the power it has there."""

    fqn: str
    dim: int
    exponent: float
    parts: tuple[Part, ...]

    @cached_property
    def whole(self) -> bool:
        """Whether the channels are the axis itself, in order."""
        position = self.parts[0].position
        alone = len(self.parts) == 1 and self.parts[0].elsewhere is None and position.shape[1] == 1
        return alone and bool((position[:, 0] == np.arange(len(position))).all())


class Scales:
    """The positive scales of every group that has them; called with weights it gives those that balance them.

    With ``mixed`` those of groups of class LINEAR too, whose invertible maps hold them, with ``running`` those of sides
    on which a running statistic stands. Parameters that stay ``apart``
    do not count: a feature that they alone read (or make) gets a given sum of squares from what is left.
    """

    def __init__(self, symmetry: Symmetry, mixed: bool = False, apart: Collection[str] = (), running: bool = False):
        self.symmetry = symmetry
        self.vectors = {g.index: _vectors(symmetry, g, mixed, running) for g in symmetry.groups}
        self.places: dict[Variable, list[Place]] = {}
        for group in symmetry.groups:
            for variable, place in _places(symmetry, group, self.vectors[group.index]):
                self.places.setdefault(variable, []).append(place)
        two_sided = {v: places for v, places in self.places.items() if _two_sided(places)}
        counted = {v: [p for p in places if p.fqn not in apart] for v, places in two_sided.items()}
        self.places = {v: places for v, places in counted.items() if places}
        self.shares = _shares(self.places)

    def __call__(self, weights: Weights, sweeps: int = SWEEPS) -> dict[int, Element]:
        minimum = _minimum(weights, self.places, self.shares, self.symmetry, sweeps)
        elements = {}
        for index in dict.fromkeys(group for group, _ in minimum):
            logs = {x: log for (group, x), log in minimum.items() if group == index}
            scales = {
                side: np.exp(sum(float(c) * logs[x] for x, c in vector.items() if x in logs))
                for side, vector in self.vectors[index].items()
                if any(x in logs for x in vector)
            }
            elements[index] = Element(scales=scales)
        return elements


def _vectors(symmetry: Symmetry, group: Group, mixed: bool, running: bool) -> dict[int, Vector]:
    """The log-scale of each side in terms of free ones."""
    group_class = symmetry.classes[group.index]
    if group_class.scales is None:
        return (
            {side.index: {side.index: 1} for side in group_class.sides}
            if mixed and group_class.kind is Maps.LINEAR
            else {}
        )
    vectors = restrained(group_class.scales.magnitudes, () if running else group_class.running)
    return {side: vector for side, vector in vectors.items() if vector}


def restrained(vectors: Mapping[int, Vector], running: Iterable[int], modulus: int = 0) -> dict[int, Vector]:
    """Scales (or signs, modulo 2) of sides in terms of free ones, those of some sides being neutral."""
    free = {x for vector in vectors.values() for x in vector}
    solved = nullspace(free, [vectors[side] for side in running if vectors.get(side)], modulus)
    left_over: dict[int, Vector] = {}
    for side, vector in vectors.items():
        total: Vector = {}
        for x, c in vector.items():
            for y, share in solved[x].items():
                total[y] = total.get(y, 0) + c * share
        left_over[side] = {y: c for y, c in total.items() if (c % modulus if modulus else c)}
    return left_over


def _places(symmetry: Symmetry, group: Group, vectors: Mapping[int, Vector]) -> Iterator[tuple[Variable, Place]]:
    for member in group.members if vectors else ():
        alike: dict[tuple[int, bool], list[Part]] = {}
        for part in parts(symmetry, group, member):
            alike.setdefault((part.side, part.dual), []).append(part)
        for (side, dual), blocks in alike.items():
            for x, power in vectors.get(side, {}).items():
                exponent = -float(power) if dual else float(power)
                yield (group.index, x), Place(member.fqn, member.dim, exponent, tuple(blocks))


def _two_sided(places: list[Place]) -> bool:
    """Whether a feature is made and read: else its scale has no minimum."""
    return min(p.exponent for p in places) < 0 < max(p.exponent for p in places)


def _shares(places: Mapping[Variable, list[Place]]) -> dict[Variable, float]:
    """The sums of squares that features of one side get.

    Where layers stand between features that are only made and others that are only read, scaling all of them alike
    changes nothing: both kinds have to get the same sum in total.
    """
    tensors = nx.Graph([(v, p.fqn) for v, places_of in places.items() for p in places_of])
    weight_of: dict[Variable, float] = {}
    for part in nx.connected_components(tensors):
        one_sided = [v for v in places if v in part and not _two_sided(places[v])]
        for variable in one_sided:
            alike = [v for v in one_sided if places[v][0].exponent * places[variable][0].exponent > 0]
            weight_of[variable] = 1 / len(alike)
    return weight_of


def _minimum(
    weights: Weights,
    places: Mapping[Variable, list[Place]],
    shares: Mapping[Variable, float],
    symmetry: Symmetry,
    sweeps: int,
) -> dict[Variable, np.ndarray]:
    """λ of every variable, (size,) or (blocks, size)."""
    squares, tolerance = _squares(weights, places), tolerance_of(weights)
    held = {v: [p for p in places_of if p.fqn in squares] for v, places_of in places.items()}
    held = {v: places_of for v, places_of in held.items() if places_of}
    alive = {v: _alive(squares, held[v], symmetry.groups[v[0]], shares.get(v)) for v in held}
    whole = _Whole(squares, held, alive, shares)
    shapes = {v: symmetry.groups[v[0]].shape for v in places}
    logs = {v: np.zeros(math.prod(shape)) for v, shape in shapes.items()}
    changes = [float("inf")]
    for _ in range(sweeps):
        for variable, shift in whole.steps():
            logs[variable] += shift * alive[variable]
            for place in held[variable]:
                squares[place.fqn].scale(place, shift * alive[variable])
        over, largest = relaxation(changes), 0.0
        for variable, places_of in held.items():
            group, share = symmetry.groups[variable[0]], shares.get(variable)
            step = over * _step(squares, places_of, group, share, alive[variable])
            logs[variable] += step
            for place in places_of:
                squares[place.fqn].scale(place, step)
            largest = max(largest, float(np.abs(step).max()))
        changes.append(largest)
        if largest <= tolerance:
            break
    return {v: log.reshape(shapes[v]) for v, log in logs.items()}


def _alive(squares: Mapping[str, _Squares], places: list[Place], group: Group, share: float | None) -> Alive:
    """The channels that something makes and something reads; where one side stays apart, those that the other holds.

    All others keep their scale: it has no minimum, and what is left of them would be made ever smaller.
    """
    sums = np.stack([squares[place.fqn].sums(place, group) for place in places])
    if share is not None:
        return sums.sum(0) > 0
    exponents = np.array([place.exponent for place in places])
    return (sums[exponents > 0].sum(0) > 0) & (sums[exponents < 0].sum(0) > 0)


def tolerance_of(weights: Weights) -> float:
    """What the weights' precision can tell: an error ε of a scale moves a midpoint by ε²."""
    exact = any(tensor.dtype == torch.float64 for tensor in weights.values())
    return TOLERANCE if exact else ROUNDED


def relaxation(changes: list[float]) -> float:
    """Steps are made longer where sweeps converge slowly: 2/(1 + √(1 − ρ)) for a rate ρ (Young 1971, §6.2).

    Only close to the minimum, where the function is nearly quadratic, and never where sweeps diverge.
    """
    plain = [c for c in changes if c <= NEAR][:PLAIN]
    if len(plain) < PLAIN or changes[-1] > plain[-1]:
        return 1.0
    rate = min((plain[-1] / plain[0]) ** (1 / (PLAIN - 1)), SLOWEST)
    return 2 / (1 + math.sqrt(1 - rate))


class _Squares:
    """The squares of one tensor, summed over the axes that no scale moves, and what its axes are multiplied by."""

    def __init__(self, values: Matrix, axes: list[int]):
        self.values, self.axes = values, axes
        self.factors: list[Matrix] = [np.ones(size) for size in values.shape]

    def sums(self, place: Place, group: Group) -> Matrix:
        """Of each channel (blocks · size,)."""
        axis = self.axes.index(place.dim)
        if place.whole and len(self.factors[axis]) == group.size:
            return self._line([axis])
        total = np.zeros((group.outer if group.parent is not None else 1, group.size))
        lines: dict[int, Matrix] = {}
        for part in place.parts:
            across = -1 if part.elsewhere is None else self.axes.index(part.elsewhere[0])
            if across not in lines:
                lines[across] = self._line([axis] if across < 0 else [across, axis])
            line = lines[across]
            if part.elsewhere is not None:
                line = line[part.elsewhere[1]].sum(0)
            total[part.block] += line[part.position].sum(1)
        return total.reshape(-1)

    def _line(self, kept: list[int]) -> Matrix:
        """Summed over all axes but those kept, in their order."""
        line, left = self.values, list(range(self.values.ndim))
        for d in [d for d in left if d not in kept]:
            line = np.moveaxis(line, left.index(d), -1) @ self.factors[d].astype(self.values.dtype, copy=False)
            left.remove(d)
        line = line.transpose([left.index(d) for d in kept])
        for k, d in enumerate(kept):
            line = line * _shaped(self.factors[d], k, line.ndim)
        return line

    def total(self, kinds: list[Matrix]) -> Matrix:
        """The sums over positions of each kind, (kinds of the first axis, of the second, …)."""
        total = self.values
        for factor, chosen in zip(self.factors, kinds):  # the first axis goes, its kinds come last
            total = np.tensordot(total, chosen * factor, (0, 1))
        return total

    def scale(self, place: Place, step: Matrix) -> None:
        axis = self.axes.index(place.dim)
        factors = np.exp(2 * place.exponent * step)
        if place.whole and len(self.factors[axis]) == len(factors):
            self.factors[axis] = self.factors[axis] * factors
            return
        factors = factors.reshape(-1, len(place.parts[0].position))
        for part in place.parts:
            if part.elsewhere is None:
                self.factors[axis][part.position] *= factors[part.block][:, None]
                continue
            factor = np.ones_like(self.factors[axis])
            factor[part.position] = factors[part.block][:, None]
            across = self.axes.index(part.elsewhere[0])
            rows = (slice(None),) * across + (part.elsewhere[1],)
            self.values[rows] *= _shaped(factor, axis, self.values.ndim)


class _Whole:
    """The minimum over one number for each feature, by which all of its channels are scaled alike.

    From layer to layer scales spread no faster than one layer a sweep, so that a network of depth L would take some L
    sweeps; but what spreads so far differs little from channel to channel (a two-level method: Brandt 1977). Newton's
    steps on Σ S e^{2 E c}, S being the sums of squares of parts of tensors that scale alike and E their powers, cost
    little more than L. Features that stand in some blocks of a tensor's other axis alone are left as they are.
    """

    def __init__(
        self,
        squares: Mapping[str, _Squares],
        places: Mapping[Variable, list[Place]],
        alive: Mapping[Variable, Alive],
        shares: Mapping[Variable, float],
    ):
        self.squares = squares
        self.variables = [
            v
            for v, places_of in places.items()
            if all(part.elsewhere is None for place in places_of for part in place.parts)
        ]
        column = {v: k for k, v in enumerate(self.variables)}
        on_axis: dict[tuple[str, int], list[tuple[int, Place, Alive]]] = {}
        for variable in self.variables:
            for place in places[variable]:
                on_axis.setdefault((place.fqn, place.dim), []).append((column[variable], place, alive[variable]))
        self.kinds: dict[str, list[Matrix]] = {}  # of each tensor, by axis: which positions scale alike (kinds, size)
        rows: list[sparse.csr_matrix] = []
        for name, square in squares.items():
            kinds_and_powers = [
                _alike(on_axis.get((name, dim), []), square.values.shape[k]) for k, dim in enumerate(square.axes)
            ]
            self.kinds[name] = [kinds for kinds, _ in kinds_and_powers]
            rows.append(_combined([powers for _, powers in kinds_and_powers], len(self.variables)))
        self.powers = sparse.vstack(rows).tocsr() if rows else sparse.csr_matrix((0, len(self.variables)))
        sign = {v: math.copysign(1.0, places[v][0].exponent) for v in self.variables}
        self.slope = np.array([sign[v] * shares.get(v, 0.0) for v in self.variables])

    def steps(self) -> Iterator[tuple[Variable, float]]:
        """By how much λ of all channels of each feature changes."""
        if len(self.variables) < 2:
            return
        sums = np.concatenate([square.total(self.kinds[name]).reshape(-1) for name, square in self.squares.items()])
        logs = np.zeros(len(self.variables))
        for _ in range(NEWTON):
            terms = sums.astype(np.float64) * np.exp(2 * (self.powers @ logs))
            bend = 2 * (self.powers.T @ self.powers.multiply(terms[:, None])).tocsc()
            ridge = RIDGE * max(float(bend.diagonal().max()), np.finfo(float).tiny)
            rise = self.powers.T @ terms - self.slope
            step = -linalg.spsolve(bend + ridge * sparse.eye(len(logs), format="csc"), rise)
            step = step.clip(-1, 1)
            logs += step
            if np.abs(step).max() <= TOLERANCE:
                break
        yield from zip(self.variables, logs.tolist())


def _alike(places: list[tuple[int, Place, Alive]], size: int) -> tuple[Matrix, list[dict[int, float]]]:
    """Which positions of an axis scale alike, (kinds, size), and the power of each feature on those of a kind."""
    columns = list(dict.fromkeys(column for column, _, _ in places))
    powers = np.zeros((size, len(columns)))
    for column, place, alive in places:
        for part in place.parts:
            living = alive.reshape(-1, len(part.position))[part.block]
            powers[part.position[living].reshape(-1), columns.index(column)] += place.exponent
    kinds, inverse = np.unique(powers, axis=0, return_inverse=True)
    chosen = (inverse.reshape(-1) == np.arange(len(kinds))[:, None]).astype(np.float64)
    return chosen, [{c: float(x) for c, x in zip(columns, row) if x} for row in kinds]


def _combined(axes: list[list[dict[int, float]]], width: int) -> sparse.csr_matrix:
    """The powers of each feature on what is of one kind on every axis, in row-major order."""
    rows, columns, values, count = [], [], [], 0
    for combination in itertools.product(*axes):
        for powers in combination:
            for column, power in powers.items():
                rows.append(count)
                columns.append(column)
                values.append(power)
        count += 1
    return sparse.csr_matrix((values, (rows, columns)), shape=(count, width))


def _shaped(vector: Matrix, axis: int, rank: int) -> Matrix:
    return vector.reshape([-1 if d == axis else 1 for d in range(rank)])


def _squares(weights: Weights, places: Mapping[Variable, list[Place]]) -> dict[str, _Squares]:
    dims: dict[str, set[int]] = {}
    for places_of in places.values():
        for place in places_of:
            dims_of = dims.setdefault(place.fqn, set())
            dims_of.add(place.dim)
            dims_of.update(part.elsewhere[0] for part in place.parts if part.elsewhere is not None)
    result = {}
    for name, kept in dims.items():
        if name in weights:
            tensor = weights[name].detach().cpu()  # in their own precision, up to which they are balanced
            tensor = (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()).square()
            rest = [d for d in range(tensor.ndim) if d not in kept]
            result[name] = _Squares((tensor.sum(rest) if rest else tensor).numpy(), sorted(kept))
    return result


def _step(
    squares: Mapping[str, _Squares], places: list[Place], group: Group, share: float | None, alive: Alive
) -> Matrix:
    """By how much λ changes for each channel of one feature: the minimum if all else stays.

    Where a tensor holds the feature on several axes
    (it reads the stream that it writes) channels do not change alone: a step is divided by their number, and the
    average of steps on one axis each does not increase a convex function.
    """
    exponents = np.array([place.exponent for place in places])
    sums = np.stack([squares[place.fqn].sums(place, group) for place in places])
    sums = np.where(alive, sums, 1.0)
    step = _balancing(exponents, sums) if share is None else _norming(exponents, sums, share / max(int(alive.sum()), 1))
    axes: dict[str, set[int]] = {}
    for place in places:
        axes.setdefault(place.fqn, set()).add(place.dim)
    return np.where(alive, step, 0.0) / max(len(places_of) for places_of in axes.values())


def _balancing(exponents: Matrix, sums: Matrix) -> Matrix:
    """The step at which the sum over both sides is least."""
    up, down = sums[exponents > 0].sum(0), sums[exponents < 0].sum(0)
    size = float(np.abs(exponents).max())
    alike = float(np.abs(exponents).min()) == size
    return np.log(down / up) / (4 * size) if alike else newton(exponents, sums)


def _norming(exponents: Matrix, sums: Matrix, target: float) -> Matrix:
    """The same where the other side stays apart: of each channel what is left gets a sum of squares of ``target``."""
    if bool((exponents == exponents[0]).all()):
        power = float(exponents[0])
        return np.log(target / (abs(power) * sums.sum(0))) / (2 * power)
    return newton(exponents, sums, float(np.sign(exponents[0])) * target)


def newton(exponents: Matrix, sums: Matrix, slope: float = 0.0) -> Matrix:
    """The minimum over λ of Σ sums e^{2 e λ} − 2 · slope · λ, for exponents that are not all ±1."""
    step = np.zeros(sums.shape[1], exponents.dtype)
    for _ in range(50):
        terms = sums * np.exp(2 * exponents[:, None] * step)
        rise, bend = (exponents[:, None] * terms).sum(0) - slope, (2 * exponents[:, None] ** 2 * terms).sum(0)
        step -= (rise / bend.clip(1e-300)).clip(-1, 1)
    return step
