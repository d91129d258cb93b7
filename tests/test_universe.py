"""Permutation methods for N edges against literal forms of their formulas; cycles close; channel order is no matter.

Group elements, relaxed points and gradients are built here by hand: dense permutation matrices on flattened weights,
explicit sums over pairs, central differences, a dense grid for the line search.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network
from micro_models import conv, net
from scipy.optimize import linear_sum_assignment
from test_matching import SMALL, Attention, Case, concatenated, grouped, residual, resnext_block
from torch import Tensor, nn
from vfx.passes.align import Align

import vfx
from vfx.analyse.symmetry import Symmetry
from vfx.api import collect, merge, symmetry, trace
from vfx.elements import (
    act,
    compose_permutations,
    identity,
    permutations_of,
    permuted,
    random_permutations,
    still_permutations,
)
from vfx.errors import ArgumentError, DataError
from vfx.match.activation import ActivationMatching
from vfx.match.c2m3 import C2M3, JointObjective, best_step, frank_wolfe
from vfx.match.catalogue import MATCHERS
from vfx.match.iterated import IteratedMatching
from vfx.match.matcher import Matching, Problem
from vfx.match.midpoint import Midpoint, batch_statistics
from vfx.match.relaxation import best_vertex, blend
from vfx.match.straight_through import StraightThrough
from vfx.match.universe import cycle_error, mean_weights, pair_objective, pairwise, to_first
from vfx.match.weight import WeightMatching
from vfx.models import linear_net, vit_tiny
from vfx.program import Program, Weights, run
from vfx.statistics.data import Batches

DOUBLE = torch.float64


def mlp() -> nn.Module:
    return linear_net(3, 6, 3 * 64, 4)


def small_vit() -> nn.Module:
    return vit_tiny(width=1 / 12, size=8, depth=1)


@cache
def problem(build: Callable[[], nn.Module], count: int = 3) -> tuple[Program, Symmetry]:
    """Independent edges of a small network in float64, and their groups."""
    x = images(32, 8, dtype=DOUBLE)
    program = trace(edges(build, x, count), x[:2])
    return program, symmetry(program)


def random_points(objective: JointObjective, rng: np.random.Generator) -> list[Any]:
    """Mixtures of random elements and the centre, one for each edge."""
    points = []
    for _ in objective.weights:
        point = objective.vertex(random_permutations(objective.symmetry.groups, rng))
        point = blend(
            point, objective.vertex(random_permutations(objective.symmetry.groups, rng)), float(rng.uniform(0.2, 0.8))
        )
        points.append(blend(point, objective.centre(), 0.3))
    return points


# relaxed elements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_matrices_of_a_permutation_move_weights_as_the_permutation_does(case: Case) -> None:
    program, facts = problem(case.build, 2)
    objective = JointObjective(facts, program.weights)
    assert objective.left_out == []
    element = random_permutations(facts.groups, np.random.default_rng(0))
    point, moved = objective.vertex(element), act(facts, permuted(element), program.weights[0])
    assert {relaxed.piece.fqn for relaxed in objective.pieces} == {
        m.fqn for g in facts.groups for m in g.members
    } - program.buffers
    for relaxed in objective.pieces:
        before, after = (relaxed.piece.read(w[relaxed.piece.fqn].double()) for w in (program.weights[0], moved))
        torch.testing.assert_close(relaxed.move(before, point), after, rtol=0, atol=1e-12)
    found = best_vertex(facts, point)
    assert all((found[g] == element[g]).all() for g in element)


def test_every_matrix_of_a_relaxed_point_is_doubly_stochastic() -> None:
    for build in (residual, Attention, resnext_block):
        program, facts = problem(build, 2)
        objective = JointObjective(facts, program.weights)
        points, _ = frank_wolfe(objective, random_points(objective, np.random.default_rng(1)), 5, 0.0, False)
        for point, group in itertools.product(points, facts.groups):
            matrix = point[group.index]
            assert (matrix >= 0).all()
            if group.parent is None:
                sums = [matrix.sum(0), matrix.sum(1)]
                goals: list[Any] = [torch.ones_like(x) for x in sums]
            else:  # Y[i, j] has the sums O[i, j]
                sums = [matrix.sum(2), matrix.sum(3)]
                goals = [point[group.parent][:, :, None].expand_as(x) for x in sums]
            for total, goal in zip(sums, goals):
                torch.testing.assert_close(total, goal, rtol=0, atol=1e-12)


# C²M³: objective, gradient, line search ---------------------------------------------------------------------------


def dense_mlp(facts: Symmetry, point: Any, weights: Any) -> dict[str, Tensor]:
    """P_out W P_inᵀ for each linear layer, written with dense matrices."""
    moved = {}
    for name in weights:
        tensor = weights[name]
        for group in facts.groups:
            for member in group.members:
                if member.fqn == name:
                    matrix = point[group.index]
                    tensor = matrix @ tensor if member.dim == 0 else tensor @ matrix.T
        moved[name] = tensor
    return moved


@pytest.mark.parametrize("count", [2, 3, 5])
def test_objective_and_gradient_are_those_of_the_explicit_sum(count: int) -> None:
    program, facts = problem(mlp, count)
    objective = JointObjective(facts, program.weights)
    points = random_points(objective, np.random.default_rng(0))
    leaves = [{g: m.clone().requires_grad_() for g, m in point.items()} for point in points]
    moved = [dense_mlp(facts, leaf, w) for leaf, w in zip(leaves, objective.weights)]
    total = sum((moved[p][n] * moved[q][n]).sum() for p in range(count) for q in range(p + 1, count) for n in moved[p])
    assert isinstance(total, Tensor)
    total.backward()
    value, gradients = objective.value_and_gradient(points)
    assert value == pytest.approx(total.item(), rel=1e-12)
    for leaf, gradient in zip(leaves, gradients):
        for g, matrix in leaf.items():
            close(gradient[g], matrix.grad, 1e-10)


@pytest.mark.parametrize("build", [residual, concatenated, grouped, resnext_block, Attention])
def test_the_gradient_is_that_of_central_differences(build: Callable[[], nn.Module]) -> None:
    program, facts = problem(build, 3)
    objective = JointObjective(facts, program.weights)
    rng = np.random.default_rng(0)
    points, target = random_points(objective, rng), random_points(objective, rng)
    _, gradients = objective.value_and_gradient(points)
    slope = sum(float((g[k] * (t[k] - p[k])).sum()) for g, t, p in zip(gradients, target, points) for k in g)
    step = 1e-5
    around = [objective.value_and_gradient([blend(p, t, s) for p, t in zip(points, target)])[0] for s in (step, -step)]
    assert (around[0] - around[1]) / (2 * step) == pytest.approx(slope, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("build", [mlp, residual, grouped, resnext_block, Attention])
def test_the_line_search_finds_the_best_point_of_a_dense_grid(build: Callable[[], nn.Module]) -> None:
    program, facts = problem(build, 3)
    objective = JointObjective(facts, program.weights)
    rng = np.random.default_rng(2)
    points, targets = (random_points(objective, rng) for _ in range(2))
    polynomial = objective.along(points, targets)

    def value(t: float) -> float:
        return objective.value_and_gradient([blend(p, q, t) for p, q in zip(points, targets)])[0]

    scale = max(abs(value(0.0)), abs(value(1.0)))
    for t in np.linspace(0, 1, 8):
        assert float(polynomial(t)) == pytest.approx(value(float(t)), abs=1e-9 * scale)
    step, reached = best_step(polynomial)
    grid = np.linspace(0, 1, 20001)
    assert 0 <= step <= 1
    assert reached == pytest.approx(value(step), abs=1e-9 * scale)
    assert reached >= polynomial(grid).max() - 1e-12 * scale


def test_the_best_step_of_known_polynomials() -> None:
    from numpy.polynomial import Polynomial

    assert best_step(Polynomial([0, 1, -1]))[0] == pytest.approx(0.5)
    assert best_step(Polynomial([0, 1]))[0] == 1
    assert best_step(Polynomial([0, -1]))[0] == 0
    assert best_step(Polynomial([3.0]))[0] == 0
    assert best_step(Polynomial([0, 1, 0, -1]))[0] == pytest.approx(3**-0.5)


@pytest.mark.parametrize("build", [residual, grouped, Attention])
def test_frank_wolfe_and_descent_never_lower_the_objective(build: Callable[[], nn.Module]) -> None:
    program, facts = problem(build, 3)
    objective = JointObjective(facts, program.weights)
    points = random_points(objective, np.random.default_rng(3))
    values = [objective.value_and_gradient(points)[0]]
    for _ in range(6):
        points, _ = frank_wolfe(objective, points, 1, 0.0, False)
        values.append(objective.value_and_gradient(points)[0])
    assert (np.diff(values) >= -1e-10 * abs(values[-1])).all()
    assert values[-1] > values[0]
    found = C2M3(iterations=3)(Problem(program, facts))
    assert found.objective[0] >= found.details["frank_wolfe_objective"] - 1e-9 * abs(found.objective[0])
    plain = C2M3(iterations=3, polish=False)(Problem(program, facts))
    without = [found.details[key] for key in ("frank_wolfe_objective", "initial_objective")]
    assert plain.objective[0] == pytest.approx(max(without), rel=1e-12)


@pytest.mark.parametrize(("count", "depth"), [(2, 3), (3, 2)])
def test_c2m3_finds_the_best_of_all_permutations_of_a_tiny_network(count: int, depth: int) -> None:
    """Exhaustive: 3 hidden units in each hidden layer, 3!^((depth − 1)(N − 1)) relative elements."""
    program, facts = problem(partial(linear_net, depth, 3, 3 * 64, 4), count)
    choices = [
        dict(zip([g.index for g in facts.groups], map(np.array, own)))
        for own in itertools.product(itertools.permutations(range(3)), repeat=len(facts.groups))
    ]
    best = max(
        pair_objective(facts, program.weights, [identity(facts), *map(permuted, others)])
        for others in itertools.product(choices, repeat=count - 1)
    )
    found = C2M3(iterations=20, restarts=4, classes="permutation")(Problem(program, facts))
    assert found.objective[0] == pytest.approx(best, rel=1e-12)


# the universe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "count"), [(residual, 5), (Attention, 3)])
def test_cycles_close_exactly(build: Callable[[], nn.Module], count: int) -> None:
    program, facts = problem(build, count)
    found = C2M3(iterations=1, classes="permutation")(Problem(program, facts))
    assert cycle_error(facts, found.elements) == 0
    assert all((found.permutations[0][g] == p).all() for g, p in still_permutations(facts.groups).items())
    for i, j, k in itertools.product(range(count), repeat=3):
        there = act(facts, pairwise(facts, found.elements, j, k), program.weights[k])
        around = act(facts, pairwise(facts, found.elements, i, j), there)
        straight = act(facts, pairwise(facts, found.elements, i, k), program.weights[k])
        assert all(torch.equal(around[name], straight[name]) for name in straight)


def test_independent_pairwise_matchings_do_not_close() -> None:
    """Negative control: weight matching of each pair by itself, as the paper's figure 1."""
    program, facts = problem(residual, 3)

    def between(i: int, j: int) -> Any:
        pair = program.with_weights([program.weights[i], program.weights[j]])
        return WeightMatching(classes="permutation")(Problem(pair, facts)).permutations[1]

    around = compose_permutations(
        facts.groups, compose_permutations(facts.groups, between(1, 0), between(2, 1)), between(0, 2)
    )
    assert any((around[g] != p).any() for g, p in still_permutations(facts.groups).items())


def test_averaging_in_the_universe_is_the_same_function() -> None:
    program, facts = problem(residual, 3)
    rng = np.random.default_rng(0)
    elements = [permuted(random_permutations(facts.groups, rng)) for _ in range(3)]
    x = images(4, 8, dtype=DOUBLE)
    outputs = []
    for frame in (elements, to_first(facts, elements)):
        moved = [act(facts, e, w) for w, e in zip(program.weights, frame)]
        outputs.append(run(program.graph, mean_weights(moved, [1 / 3] * 3), [x]))
    close(outputs[1], outputs[0], 1e-12)


def test_the_pair_objective_counts_every_pair_of_aligned_weights_once() -> None:
    program, facts = problem(concatenated, 3)
    rng = np.random.default_rng(0)
    elements = [permuted(random_permutations(facts.groups, rng)) for _ in range(3)]
    moved = [act(facts, e, w) for w, e in zip(program.weights, elements)]
    names = {m.fqn for g in facts.groups for m in g.members} - program.buffers
    expected = sum(
        float((moved[p][n] * moved[q][n]).sum()) for p, q in itertools.combinations(range(3), 2) for n in names
    )
    assert pair_objective(facts, program.weights, elements) == pytest.approx(expected, rel=1e-12)


# every method: permuted copies, permuted edges, N edges ---------------------------------------------------------------

METHODS: dict[str, Callable[[], Any]] = {
    "weight": WeightMatching,
    "activation": ActivationMatching,
    "c2m3": lambda: C2M3(iterations=4),
    "iterated": lambda: IteratedMatching(iterations=2),
    "ste": lambda: StraightThrough(epochs=1),
}
NETWORKS = [mlp, residual, small_vit]


def normed() -> nn.Module:
    return net(
        lambda self, x: self.fc(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3))),
        a=conv(3, 6),
        norm=nn.BatchNorm2d(6),
        b=conv(6, 5),
        fc=nn.Linear(5, 4),
    )


def data_of(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(x)) % 4
    return list(zip(x.split(16), labels.split(16)))


def test_every_permutation_method_is_in_the_catalogue() -> None:
    assert set(METHODS) <= set(MATCHERS)
    assert {name: type(MATCHERS[name]()) for name in METHODS} == {name: type(m()) for name, m in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", NETWORKS)
def test_copies_that_were_permuted_come_back(build: Callable[[], nn.Module], method: str) -> None:
    """match(A, π(A), π'(A)) = A, A, A, bit for bit."""
    x = images(32, 8, dtype=DOUBLE)
    program, facts = problem(build)
    first, rng = program.weights[0], np.random.default_rng(1)
    copies = program.with_weights(
        [first, *(act(facts, permuted(random_permutations(facts.groups, rng)), first) for _ in range(2))]
    )
    assert not all(torch.equal(copies.weights[1][n], t) for n, t in first.items())
    aligned = Align(METHODS[method](), data_of(x), verify=False, progress=False)(copies)
    for edge in (1, 2):
        for name, tensor in aligned.weights[edge].items():
            assert torch.equal(tensor, first[name]), (edge, name)


def merged_function(program: Program, facts: Symmetry, matcher: Any, x: Tensor) -> Tensor:
    aligned = Align(matcher, data_of(x), progress=False).run(program)
    merged = vfx.Interpolate()(aligned.program)
    assert aligned.record.error < 1e-9
    return merged(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", NETWORKS)
def test_the_order_of_an_edges_channels_is_no_matter(build: Callable[[], nn.Module], method: str) -> None:
    """Permuting edges beforehand does not change the merged function."""
    x = images(32, 8, dtype=DOUBLE)
    program, facts = problem(build)
    first, *others = program.weights
    rng = np.random.default_rng(5)
    other = program.with_weights(
        [first, *(act(facts, permuted(random_permutations(facts.groups, rng)), w) for w in others)]
    )
    found = [merged_function(p, facts, METHODS[method](), x) for p in (program, other)]
    close(found[1], found[0], 1e-5)
    unmatched = [merged_function(p, facts, None, x) for p in (program, other)]
    assert float((unmatched[0] - unmatched[1]).abs().max()) > 1e-2 * float(unmatched[0].abs().max())  # it can fail


@pytest.mark.parametrize(("method", "count"), [*((name, 3) for name in METHODS), ("c2m3", 5), ("activation", 5)])
def test_many_edges_merge_with_weights_cuts_and_normalization(method: str, count: int) -> None:
    x = images(32, 8, dtype=DOUBLE)
    program, _ = problem(normed, count)
    shares = list(np.arange(1, count + 1) / np.arange(1, count + 1).sum())
    options: dict[str, Any] = {"data": data_of(x), "weights": shares, "progress": False}
    whole = merge(program, match=METHODS[method](), normalize="reset", **options)
    assert whole.report.own_class
    assert len(whole.report.matching.permutations) == count  # type: ignore[union-attr]
    cut = merge(program, match=METHODS[method](), normalize="rescale", preserve=1, **options)
    with torch.no_grad():
        assert cut.module(x).isfinite().all()


def test_everything_preserved_gives_the_weighted_ensemble_of_many() -> None:
    x = images(8, 8, dtype=DOUBLE)
    program, _ = problem(residual, 5)
    shares = list(np.arange(1, 6) / 15)
    merged = merge(program, match="c2m3", weights=shares, normalize=None, preserve=len(vfx.layers(program)))
    with torch.no_grad():
        close(merged.module(x), sum(s * program(x, edge=k) for k, s in enumerate(shares)), 1e-10)


# best of restarts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (residual, lambda k: WeightMatching(k, classes="permutation")),
        (normed, lambda k: C2M3(iterations=2, restarts=k, classes="permutation")),
        (residual, lambda k: StraightThrough(epochs=1, restarts=k)),
    ],
    ids=["weight", "c2m3", "ste"],
)
def test_the_best_restart_by_the_methods_own_objective_wins(build: Any, method: Callable[[int], Any]) -> None:
    x = images(32, 8, dtype=DOUBLE)
    program, facts = problem(build)
    once, thrice = (method(k)(Problem(program, facts, data=data_of(x), seed=3)) for k in (0, 2))
    assert len(once.attempts) == 1
    assert len(thrice.attempts) == 3
    assert thrice.attempts[0] == pytest.approx(once.attempts[0], rel=1e-12)
    assert len({tuple(a) for a in thrice.attempts}) > 1, "restarts differ"
    assert thrice.objective == tuple(max(values) for values in zip(*thrice.attempts))
    again = method(2)(Problem(program, facts, data=data_of(x), seed=3))
    assert again.attempts == thrice.attempts
    assert all((a[g] == b[g]).all() for a, b in zip(again.permutations, thrice.permutations) for g in a)


def test_merge_takes_restarts_for_methods_that_have_them() -> None:
    x = images(8, 8, dtype=DOUBLE)
    program, _ = problem(residual)
    for match in ("weight", "activation"):
        result = merge(program, data=x, match=match, restarts=2, normalize=None, progress=False)
        assert len(result.report.to_dict()["match_attempts"]) == 3
    for match in ("zipit", WeightMatching(), None):
        with pytest.raises(ArgumentError, match="restarts=2"):
            merge(program, data=x, match=match, restarts=2, progress=False)


# straight-through estimator -------------------------------------------------------------------------------------------


def literal_ste(program: Program, facts: Symmetry, batches: Sequence[Any], epochs: int, lr: float) -> Any:
    """Algorithm 3 for two edges with one hidden layer: one assignment projects, autograd runs through a sum."""
    first, second = program.weights
    (w, v), b, c = (["layers.0.weight", "layers.1.weight"], "layers.0.bias", "layers.1.bias")

    def project(target: Any) -> Any:
        gain = target[w] @ second[w].T + torch.outer(target[b], second[b]) + target[v].T @ second[v]
        return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])

    def moved(p: Tensor) -> dict[str, Tensor]:
        return {w: second[w][p], b: second[b][p], v: second[v][:, p], c: second[c]}

    def loss_at(weights: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((x.flatten(1) @ weights[w].T + weights[b]) @ weights[v].T + weights[c], y)

    @torch.no_grad()
    def total(p: Tensor) -> float:
        middle = {n: (first[n] + t) / 2 for n, t in moved(p).items()}
        return sum(len(x) * float(loss_at(middle, x, y)) for x, y in batches) / sum(len(x) for x, _ in batches)

    copy = {n: first[n].clone().requires_grad_() for n in (w, b, v)}
    adam = torch.optim.Adam(copy.values(), lr)
    best, kept = total(project(first)), project(first)
    for _ in range(epochs):
        for x, y in batches:
            own = moved(project({n: t.detach() for n, t in copy.items()}))
            through = {n: t + (copy[n] - copy[n].detach() if n in copy else 0) for n, t in own.items()}
            adam.zero_grad()
            loss_at({n: (first[n] + t) / 2 for n, t in through.items()}, x, y).backward()
            adam.step()
        found = project({n: t.detach() for n, t in copy.items()})
        if total(found) < best:
            best, kept = total(found), found
    return kept.numpy(), best


def test_straight_through_is_the_literal_algorithm() -> None:
    x = images(48, 8, dtype=DOUBLE)
    program = trace(edges(lambda: linear_net(2, 12, 3 * 64, 4), x), x[:2])
    facts = symmetry(program)
    kept, best = literal_ste(program, facts, data_of(x), epochs=4, lr=0.02)
    found = StraightThrough(4, 0.02)(Problem(program, facts, data=data_of(x)))
    (start,) = WeightMatching(classes="permutation")(Problem(program, facts)).permutations[1].values()
    assert (kept != start).any(), "nothing was learnt: the test shows nothing"
    (ours,) = found.permutations[1].values()
    assert (ours == kept).all()
    assert found.details["loss"] == pytest.approx(best, rel=1e-8)
    assert found.details["loss"] < found.details["initial_loss"]


def test_distillation_is_the_divergence_from_the_mean_of_the_edges_outputs() -> None:
    x = images(16, 8, dtype=DOUBLE)
    program, facts = problem(residual)
    task = Midpoint(program, facts, Batches(program, x), "auto", [1 / 3] * 3)
    elements = [random_permutations(facts.groups, np.random.default_rng(k)) for k in range(2)]
    moved = [program.weights[0], *(act(facts, permuted(e), w) for w, e in zip(program.weights[1:], elements))]
    with torch.no_grad():
        graph = batch_statistics(program.graph)
        teacher = (sum(run(graph, weights, [x]) for weights in program.weights) / 3).softmax(1)
        student = run(graph, mean_weights(moved, [1 / 3] * 3), [x]).log_softmax(1)
        expected = (teacher * (teacher.log() - student)).sum(1).mean()
        assert task.loss_of([*map(permuted, elements)]) == pytest.approx(float(expected), rel=1e-10)


def test_copies_of_one_network_have_nothing_to_learn() -> None:
    """Behind the right matching they agree with their mean on every batch, whatever its statistics."""
    x = images(16, 8, dtype=DOUBLE)
    program, facts = problem(residual, 2)

    def loss(other: Weights) -> float:
        copies = program.with_weights([program.weights[0], other])
        return Midpoint(copies, facts, Batches(copies, x), "auto", [0.5, 0.5]).loss_of([identity(facts)])

    assert loss(program.weights[0]) < 1e-14
    assert loss(program.weights[1]) > 1e-6  # negative control


def test_the_midpoint_reads_batch_statistics_and_leaves_the_running_ones_alone() -> None:
    x = images(16, 8, dtype=DOUBLE)
    model = network(residual, x)
    program = trace(model, x[:2])
    before = {n: t.clone() for n, t in program.weights[0].items()}
    found = run(batch_statistics(program.graph), program.weights[0], [x])
    assert all(torch.equal(t, before[n]) for n, t in program.weights[0].items())
    with torch.no_grad():
        close(found, model.train()(x), 1e-12)


def test_the_loss_must_fit_the_batches() -> None:
    x = images(8, 8, dtype=DOUBLE)
    program, facts = problem(residual, 2)
    with pytest.raises(DataError, match="integer class labels"):
        StraightThrough(loss="labels")(Problem(program, facts, data=x))
    with pytest.raises(DataError, match="fit none of the outputs"):
        StraightThrough(loss="labels")(Problem(program, facts, data=[(x, torch.zeros(8, 3, 5).long())]))
    for wrong in ({"loss": "hinge"}, {"lr": 0.0}, {"epochs": -1}):
        with pytest.raises(ArgumentError):
            StraightThrough(**wrong)  # type: ignore[arg-type]
    seen = []

    def squares(outputs: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return outputs.square().mean()

    found = StraightThrough(1, loss=squares)(Problem(program, facts, data=x))
    assert found.details["loss"] > 0
    assert seen
    assert all(labels is None for labels in seen)


# iterated activation matching -----------------------------------------------------------------------------------------


def correlation_sum(program: Program, facts: Symmetry, merged: Any, elements: Sequence[Any], x: Tensor) -> float:
    """J written out: hidden features of the merged and of each permuted network, numpy's correlation."""
    from vfx.statistics.taps import feature_taps

    def features(weights: Any) -> dict[str, Any]:
        found = {}
        taps = {tap.node: tap for tap in feature_taps(facts)}
        interpreter = run_all(program, weights, x)
        for name, tap in taps.items():
            found[name] = interpreter[name].movedim(tap.dim, 0).flatten(1).numpy()
        return found

    total, ours = 0.0, features(merged)
    for weights, element in zip(program.weights, elements):
        own = features(act(facts, permuted(element), weights))
        for name, rows in ours.items():
            for a, b in zip(rows, own[name]):
                if a.std() > 0 and b.std() > 0:
                    total += float(np.corrcoef(a, b)[0, 1])
    return total


def run_all(program: Program, weights: Any, x: Tensor) -> dict[str, Tensor]:
    """Every value of the graph by its node's name."""
    values: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = x
        elif node.op == "get_attr":
            values[node.name] = weights[node.target]
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            values[node.name] = node.target(*args, **kwargs)
    return values


def deep() -> nn.Module:
    return linear_net(4, 10, 3 * 64, 4)


def plain_residual() -> nn.Module:
    return linear_net(5, 8, 3 * 64, 4, residual=True)


@pytest.mark.parametrize("build", [deep, plain_residual])
def test_iterated_matching_is_the_literal_iteration(build: Callable[[], nn.Module]) -> None:
    x = images(64, 8, dtype=DOUBLE)
    program, facts = problem(build)
    statistics = collect(program, data=x, progress=False)
    matcher = IteratedMatching(6, normalize=None)
    found = matcher(Problem(program, facts, statistics, data=x))
    elements: Sequence[Any] = ActivationMatching(classes="permutation")(
        Problem(program, facts, statistics)
    ).permutations
    values, kept = [], elements
    for _ in range(7):
        merged = mean_weights([act(facts, permuted(e), w) for w, e in zip(program.weights, elements)], [1 / 3] * 3)
        values.append(correlation_sum(program, facts, merged, elements, x))
        if len(values) > 1 and values[-1] <= max(values[:-1]) * (1 + 1e-9):
            break
        kept = elements
        both = [program.with_weights([merged, w]) for w in program.weights]
        seen = [collect(p, data=x, progress=False) for p in both]
        elements = [
            ActivationMatching(classes="permutation")(Problem(p, facts, s)).permutations[1] for p, s in zip(both, seen)
        ]
    assert [value for (value,) in found.attempts] == pytest.approx(values, rel=1e-8)
    assert found.objective[0] == pytest.approx(max(values), rel=1e-8)
    if build is deep:
        assert max(values) > values[0], "iterating gained nothing: the test shows nothing"
    expected = [*map(permutations_of, to_first(facts, [*map(permuted, kept)]))]
    assert all((expected[e][g] == p).all() for e, own in enumerate(found.permutations) for g, p in own.items())


def test_the_merged_network_may_be_repaired_between_iterations() -> None:
    x = images(32, 8, dtype=DOUBLE)
    program, facts = problem(mlp)
    passes = [vfx.InsertNormalization(), vfx.CalibrateNormalization("repair", x, progress=False)]
    statistics = collect(program, data=x, progress=False)
    found = IteratedMatching(3, passes)(Problem(program, facts, statistics, data=x))
    assert found.objective[0] >= found.details["pairwise_objective"]
    plain = IteratedMatching(3, None)(Problem(program, facts, statistics, data=x))
    assert plain.attempts[0] != pytest.approx(found.attempts[0], rel=1e-9), "REPAIR changed what is read"


# the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ste", "iterated"])
def test_methods_that_run_networks_ask_for_data(method: str) -> None:
    x = images(8, 8, dtype=DOUBLE)
    program, _ = problem(residual, 2)
    statistics = collect(program, data=x, progress=False)
    for known in (None, statistics):
        with pytest.raises(ArgumentError, match="needs data="):
            merge(program, match=method, statistics=known)
    with pytest.raises(ArgumentError, match="give data="):
        Align(method, statistics=statistics)(program)


class Reading:
    """A user's matcher that runs the networks itself."""

    needs = frozenset({"data"})
    exact = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, problem: Problem) -> Matching:
        self.seen = list(Batches(problem.program, problem.data).labelled())
        return Matching((identity(problem.symmetry),) * problem.program.edges)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_matcher_gets_the_batches_with_their_labels(as_dict: bool) -> None:
    x, y = images(10, 8, dtype=DOUBLE), torch.arange(10)
    program, _ = problem(residual, 2)
    name = program.signature.inputs[0].name
    data: Any = [{name: a, "labels": b} if as_dict else (a, b) for a, b in zip(x.split(4), y.split(4))]
    matcher = Reading()
    merge(program, data=data, match=matcher, normalize=None, max_samples=6, progress=False)
    assert [len(inputs[0]) for inputs, _ in matcher.seen] == [4, 2]
    assert torch.equal(torch.cat([labels for _, labels in matcher.seen]), y[:6])
    matcher = Reading()
    merge(program, data=x, match=matcher, normalize=None, progress=False)
    assert all(labels is None for _, labels in matcher.seen)


def fixed() -> nn.Module:
    return net(lambda self, x: self.fc(x.flatten(1)), fc=nn.Linear(3 * 64, 4))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_symmetry_is_merged_as_it_is(method: str) -> None:
    x = images(32, 8, dtype=DOUBLE)
    program, facts = problem(fixed, 2)
    assert facts.groups == ()
    close(merged_function(program, facts, METHODS[method](), x), (program(x, edge=0) + program(x, edge=1)) / 2, 1e-12)


def test_frank_wolfe_may_start_at_the_identity_as_in_the_paper() -> None:
    program, facts = problem(residual)
    found = C2M3(initial="identity", iterations=3, classes="permutation")(Problem(program, facts))
    assert found.objective[0] > pair_objective(facts, program.weights, [identity(facts)] * 3)
    assert found.objective[0] == pytest.approx(pair_objective(facts, program.weights, found.elements), rel=1e-9), (
        "the first edge's frame changes nothing"
    )


def test_wrong_options_of_the_methods_are_refused() -> None:
    for wrong in ({"initial": "zero"}, {"softness": 1.0}, {"restarts": -1}):
        with pytest.raises(ArgumentError):
            C2M3(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        IteratedMatching(0)
    with pytest.raises(ArgumentError):
        IteratedMatching(normalize="repair")
