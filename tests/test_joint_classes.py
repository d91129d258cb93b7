"""C²M³ over the full classes: F against its literal formula, monotone, cycles that close, copies that come back."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import close, edges
from test_class_matching import CASES
from torch import Tensor, nn

import vfx
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import randomise
from vfx.api import trace
from vfx.elements import Elements, act, compose, inverse, random_element
from vfx.match.c2m3 import C2M3, JointObjective, descend
from vfx.match.class_descent import in_matrices
from vfx.match.matcher import Problem
from vfx.match.universe import cycle_error, difference, pair_objective, pairwise
from vfx.match.weight import WeightMatching
from vfx.program import Program
from vfx.proof import in_double

COUNT = 3


class NormedBlock(nn.Module):
    """Convolutions with BatchNorm and a shortcut, taken as they are: running statistics stand between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 6, 3, 4, 1), nn.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(8, 6, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (6, 8, 6))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        x = (x + self.norms[2](self.b(self.norms[1](self.a(x)).relu()))).relu()
        return self.out(x.mean((2, 3)))


class SmallMLP(nn.Sequential):
    """Two hidden layers with tanh: signed permutations."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


NETWORKS = {name: CASES[name] for name in ("tanh", "rms", "residual")}
NETWORKS["batch_norm"] = (NormedBlock, CASES["residual"][1], lambda program: program)
NETWORKS["small"] = (SmallMLP, CASES["tanh"][1], lambda program: program)


@cache
def _trained_apart(name: str) -> tuple[Program, Symmetry]:
    """Networks of their own."""
    build, inputs, form = NETWORKS[name]
    x = inputs()
    program = in_double(trace(edges(build, x, COUNT), x[:2]))
    drawn = [randomise(program.select(edge), [x], torch.Generator().manual_seed(edge)) for edge in range(COUNT)]
    program = form(program.with_weights(drawn))
    return program, symmetry(program)


@cache
def _copies(name: str, count: int = COUNT) -> tuple[Program, Symmetry, Tensor]:
    """One network and the same behind random elements of its full classes."""
    program, facts = _trained_apart(name)
    first, rng = program.weights[0], np.random.default_rng(3)
    moved = [act(facts, random_element(facts, rng), first) for _ in range(count - 1)]
    copies = program.with_weights([first, *moved])
    return copies, symmetry(copies), NETWORKS[name][1]()


def _literal(weights: Any, maps: Any) -> float:
    """Σ_{p<q} ⟨g_p w_p, g_q w_q⟩ of the small network, with dense signed maps A and B of its hidden layers."""
    moved = []
    for own, (a, b) in zip(weights, maps):
        w = {name: tensor.numpy() for name, tensor in own.items()}
        moved.append(
            [a @ w["0.weight"], a @ w["0.bias"], b @ w["2.weight"] @ a.T, b @ w["2.bias"], w["4.weight"] @ b.T]
        )
    return sum(float((x * y).sum()) for p, q in itertools.combinations(moved, 2) for x, y in zip(p, q))


def _signed(size: int) -> list[Any]:
    signs = itertools.product((1.0, -1.0), repeat=size)
    return [
        np.diag(s) @ np.eye(size)[list(p)] for s, p in itertools.product(signs, itertools.permutations(range(size)))
    ]


def _dense(facts: Symmetry, element: Elements) -> list[Any]:
    tables = []
    for group in facts.groups:
        member = element[group.index]
        (signs,) = set(map(tuple, member.scales.values())) or {(1.0,) * group.size}
        tables.append(np.diag(signs) @ np.eye(group.size)[member.index])
    return tables


def test_the_objective_of_signed_elements_is_the_literal_sum() -> None:
    program, facts = _trained_apart("small")
    rng = np.random.default_rng(0)
    elements = [random_element(facts, rng) for _ in range(COUNT)]
    maps = [_dense(facts, element) for element in elements]
    found = pair_objective(facts, program.weights, elements)
    assert found == pytest.approx(_literal(program.weights, maps), rel=1e-12)
    unsigned = [[np.abs(table) for table in own] for own in maps]
    assert found != pytest.approx(_literal(program.weights, unsigned), rel=1e-3), "control: signs count"


def test_each_edge_ends_at_its_best_signed_map_for_the_others() -> None:
    """Exhaustive: no signed permutation of one layer of one edge (5! · 2⁵, 4! · 2⁴) raises the literal sum."""
    program, facts = _trained_apart("small")
    found = C2M3(iterations=10)(Problem(program, facts))
    maps = [_dense(facts, element) for element in found.elements]
    reached = _literal(program.weights, maps)
    assert found.objective[0] == pytest.approx(reached, rel=1e-9)
    started = _literal(program.weights, [[np.eye(5), np.eye(4)]] * COUNT)
    assert reached > started + 1e-3 * abs(started)
    for edge, layer in itertools.product(range(COUNT), range(2)):
        for table in _signed(len(maps[edge][layer])):
            tried = [list(own) for own in maps]
            tried[edge][layer] = table
            assert _literal(program.weights, tried) <= reached + 1e-9 * abs(reached)


@pytest.mark.parametrize("name", NETWORKS)
def test_descent_over_the_classes_never_lowers_the_objective(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, facts = _trained_apart(name)
    values: list[float] = []
    discrete = JointObjective.discrete

    def watched(self: JointObjective, elements: Any) -> float:
        values.append(discrete(self, elements))
        return values[-1]

    matched, after = JointObjective.matched, []

    def moved(self: JointObjective, target: Any, edge: int, element: Any, generator: Any) -> Any:
        result = matched(self, target, edge, element, generator)
        pair = [act(self.symmetry, own, self.weights[edge]) for own in (element, result)]
        after.append(sum(float((target[n] * (pair[1][n] - pair[0][n])).sum()) for n in target))
        return result

    monkeypatch.setattr(JointObjective, "discrete", watched)
    monkeypatch.setattr(JointObjective, "matched", moved)
    found = C2M3(iterations=5)(Problem(program, facts))
    scale = max(map(abs, values))
    assert after
    assert min(after) >= -1e-9 * scale, "no step of one edge lowers F"
    assert max(after) > 1e-6 * scale
    assert (
        found.objective[0]
        >= max(found.details[key] for key in ("frank_wolfe_objective", "initial_objective")) - 1e-12 * scale
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_joint_objective_is_at_least_that_of_matching_each_edge_to_the_first(name: str) -> None:
    program, facts = _trained_apart(name)
    joint, pairwise_matching = C2M3(iterations=5)(Problem(program, facts)), WeightMatching()(Problem(program, facts))
    frame = C2M3()._balanced(Problem(program, facts))[0]

    def value(elements: Any) -> float:
        moved = [compose(facts, in_matrices(facts, own), frame) for own in elements]
        balanced = [act(facts, own, w) for own, w in zip(moved, program.weights)]
        return pair_objective(facts, balanced, [{}] * COUNT)

    reached, start = value(joint.elements), value(pairwise_matching.elements)
    assert reached == pytest.approx(joint.objective[0], rel=1e-5)  # entries that differ by rounding are snapped
    assert reached > start + 1e-6 * abs(start), "joint matching gained something"


@pytest.mark.parametrize("name", NETWORKS)
def test_cycles_close_and_independent_matchings_do_not(name: str) -> None:
    program, facts = _trained_apart(name)
    found = C2M3(iterations=2)(Problem(program, facts)).elements
    largest = max((float(np.abs(e.matrix).max()) for own in found for e in own.values() if e.mixes), default=1.0)
    assert cycle_error(facts, found) <= 1e-12 * largest
    around = compose(
        facts, compose(facts, pairwise(facts, found, 1, 0), pairwise(facts, found, 2, 1)), pairwise(facts, found, 0, 2)
    )
    assert difference(facts, around, {}) <= 1e-12 * largest

    def between(i: int, j: int) -> Elements:
        pair = program.with_weights([program.weights[i], program.weights[j]])
        return WeightMatching()(Problem(pair, facts)).elements[1]

    control = compose(facts, compose(facts, between(1, 0), between(2, 1)), between(0, 2))
    assert difference(facts, control, {}) > 0.1


@pytest.mark.parametrize(("name", "count"), [*((name, COUNT) for name in NETWORKS if name != "small"), ("tanh", 5)])
def test_copies_behind_random_elements_come_back(name: str, count: int) -> None:
    program, facts, x = _copies(name, count)
    found = C2M3(iterations=2)(Problem(program, facts))
    wanted = program.select(0)(x)
    spread = float((wanted - wanted.mean(0)).abs().max())
    aligned = [found.aligned(facts, own, edge) for edge, own in enumerate(program.weights)]
    close(vfx.Interpolate([1 / count] * count)(program.with_weights(aligned))(x), wanted, 1e-9 * spread)
    control = C2M3(iterations=2, classes="permutation")(Problem(program, facts))
    if name != "batch_norm":  # there permutations are what is left between statistics measured anew
        aligned = [control.aligned(facts, own, edge) for edge, own in enumerate(program.weights)]
        middle = vfx.Interpolate([1 / count] * count)(program.with_weights(aligned))(x)
        assert float((middle - wanted).abs().max()) > 1e-3 * spread


@pytest.mark.parametrize("polish", [False, True])
def test_two_edges_keep_their_functions_wherever_frank_wolfe_ends(polish: bool) -> None:
    program, facts = _trained_apart("rms")
    pair = program.with_weights(program.weights[:2])
    found = C2M3(iterations=5, restarts=1, polish=polish)(Problem(pair, facts))
    x = NETWORKS["rms"][1]()
    close(pair.with_weights([found.aligned(facts, pair.weights[1], 1)])(x), pair.select(1)(x), 1e-9)


def test_the_descent_alone_finds_orthogonal_maps_of_all_edges() -> None:
    """From planted turns of one network's copies, nothing else: every edge is matched to the sum of the others."""
    program, facts, _ = _copies("rms")
    first = program.weights[0]
    frame = C2M3()._balanced(Problem(program.with_weights([first, first]), facts))[0]
    balanced = act(facts, frame, first)
    mixing = {g.index for g in facts.groups if facts.classes[g.index].kind.mixes}
    planted = [
        {index: own for index, own in random_element(facts, np.random.default_rng(seed)).items() if index in mixing}
        for seed in range(COUNT)
    ]
    assert mixing
    weights = [act(facts, inverse(facts, element), balanced) for element in planted]
    objective = JointObjective(facts, weights, full=True)
    before = objective.discrete([{}] * COUNT)
    elements: list[Elements] = [{}] * COUNT
    for seed in range(6):
        elements = descend(objective, elements, np.random.default_rng(seed))
    reached = objective.discrete(elements)
    best = COUNT * (COUNT - 1) / 2 * sum(float(balanced[name].square().sum()) for name in objective.weights[0])
    assert reached == pytest.approx(best, rel=1e-9)
    assert before < 0.9 * best
