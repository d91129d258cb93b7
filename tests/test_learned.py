"""Learned matching: its derivatives against differences and autograd, what gradients alone find, what it promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images
from test_class_matching import CASES, GroupedQueries, RMSNet
from test_rotary import INPUTS, TOKENS, Attention
from torch import Tensor, nn

import vfx
from vfx.analyse.classes import Maps, contains
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import preserved, randomise
from vfx.api import trace
from vfx.elements import act, check_elements, compose, identity, inverse, random_element
from vfx.errors import ArgumentError, DataError
from vfx.match.chart import Charts, tangent
from vfx.match.learned import LearnedMatching, _Split
from vfx.match.matcher import Problem
from vfx.match.midpoint import Midpoint
from vfx.match.polar import PolarSteps, polar
from vfx.models import linear_net
from vfx.program import Program
from vfx.proof import PRESERVED, in_double
from vfx.statistics.data import Batches

DOUBLE = torch.float64
MIXING = [Maps.ORTHOGONAL, Maps.ORTHOGONAL_ONES, Maps.LINEAR, Maps.ROTATIONS]


def _vectors(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=DOUBLE, generator=torch.Generator().manual_seed(7))


SUBJECTS = {n: own for n, own in CASES.items() if "tanh" not in n} | {
    "rotary": (Attention, lambda: _vectors(8, TOKENS, INPUTS), lambda program: program)
}


def _subject(name: str) -> tuple[Program, Symmetry]:
    build, inputs, form = SUBJECTS[name]
    torch.manual_seed(0)
    x = inputs()
    program = in_double(trace(build().double().eval(), x[:2]))
    program = form(program.with_weights([randomise(program, [x], torch.Generator().manual_seed(0))]))
    return program, symmetry(program)


@pytest.mark.parametrize("kind", MIXING, ids=lambda kind: kind.title)
def test_exponentials_of_the_tangent_lie_in_the_class(kind: Maps) -> None:
    free = 0.7 * _vectors(6, 6)
    projected = tangent(kind, free)
    close(tangent(kind, projected), projected, 1e-14)  # a projection
    assert contains(kind, torch.linalg.matrix_exp(projected).numpy(), 1e-12)
    if kind is not Maps.LINEAR:
        assert not contains(kind, torch.linalg.matrix_exp(free).numpy(), 1e-3)


def test_polar_factors_stay_in_the_tangent_space() -> None:
    """Orthogonal where all directions count; skew, in planes, and without the vector of ones where the class is so."""
    free = _vectors(3, 6, 6)
    close(polar(free).mT @ polar(free), torch.eye(6, dtype=DOUBLE).expand(3, 6, 6), 1e-12)
    close(polar(free) @ (polar(free).mT @ free), free, 1e-12)
    close(polar(free).mT @ free, (polar(free).mT @ free).mT, 1e-12)  # the rest is symmetric
    for kind in MIXING:
        step = polar(tangent(kind, free))
        close(tangent(kind, step), step, 1e-12)
        assert float((torch.linalg.matrix_norm(step, 2) - 1).abs().max()) < 1e-12
    assert torch.equal(polar(torch.zeros(2, 5, 5, dtype=DOUBLE)), torch.zeros(2, 5, 5, dtype=DOUBLE))
    narrow = _vectors(5, 2) @ _vectors(5, 2).T
    assert int(torch.linalg.matrix_rank(polar(narrow))) == 2, "directions that no gradient names stay"


def test_polar_steps_are_those_of_the_running_sum() -> None:
    start, gradients = _vectors(4, 4), _vectors(3, 4, 4).clone()
    parameter = start.clone().requires_grad_()
    steps = PolarSteps([parameter], lr=0.1, momentum=0.5)
    total, wanted = torch.zeros_like(start), start
    for gradient in gradients:
        parameter.grad = gradient.clone()
        steps.step()
        total = 0.5 * total + gradient
        left, _, right = torch.linalg.svd(gradient + 0.5 * total)
        wanted = wanted - 0.1 * left @ right
        close(parameter, wanted, 1e-12)


# derivatives ----------------------------------------------------------------------------------------------------------


def _loss(moved: Any, targets: Any, names: Sequence[str]) -> Tensor:
    return sum(((moved[n] - targets[n]).square() * targets[n].cos()).sum() for n in names)  # type: ignore[return-value]


@pytest.mark.parametrize("name", SUBJECTS)
def test_derivatives_are_those_of_differences(name: str) -> None:
    """By every kind of continuous parameter, away from the start; permutations and signs have no differences."""
    program, facts = _subject(name)
    charts = Charts(facts)
    weights = {name: program.weights[0][name] for name in charts.names}
    generator = torch.Generator().manual_seed(2)
    smooth = []
    for chart in charts.charts.values():
        smooth += [chart.table] if chart.kind.mixes else []
        smooth += chart.logs.values()
    assert smooth
    with torch.no_grad():
        for tensor in smooth:
            tensor += 0.2 * torch.randn(tensor.shape, dtype=DOUBLE, generator=generator)
        for chart in charts.charts.values():  # in another order, with other signs
            if not chart.kind.mixes:
                chart.table.copy_(torch.randn(chart.table.shape, dtype=DOUBLE, generator=generator))
            for flip in chart.flips.values():
                flip.copy_(torch.randn(flip.shape, dtype=DOUBLE, generator=generator))
    targets = {n: torch.randn(w.shape, dtype=DOUBLE, generator=generator) for n, w in weights.items()}

    def value() -> float:
        return float(_loss(act(facts, charts.elements(), weights), targets, charts.names))

    elements = charts.elements()
    check_elements(facts, elements)
    moved = {n: t.clone().requires_grad_() for n, t in act(facts, elements, weights).items()}
    found = torch.autograd.grad(_loss(moved, targets, charts.names), [moved[n] for n in charts.names])
    with torch.no_grad():
        charts.differentiate(elements, {n: t.detach() for n, t in moved.items()}, dict(zip(charts.names, found)))
        for tensor in smooth:
            direction, step = torch.randn(tensor.shape, dtype=DOUBLE, generator=generator), 1e-5
            ends = []
            for sign in (1, -2, 1):
                tensor += sign * step * direction
                ends.append(value())
            difference = (ends[0] - ends[1]) / (2 * step)
            assert tensor.grad is not None
            exact = float((tensor.grad * direction).sum())
            assert exact == pytest.approx(difference, rel=1e-5, abs=1e-5)
            assert exact != pytest.approx(-difference, rel=1e-2, abs=1e-5)


def test_straight_through_is_the_gradient_by_a_dense_permutation() -> None:
    """dL/dP by hand, of a midpoint with one hidden layer: P W on the rows, V Pᵀ on the columns."""
    x = images(16, 8, dtype=DOUBLE)
    program = trace(edges(lambda: linear_net(2, 12, 3 * 64, 4), x), x[:2])
    facts, labels = symmetry(program), torch.arange(16) % 4
    first, second = program.weights
    charts = Charts(facts, full=False)
    (chart,) = charts.charts.values()
    order = np.random.default_rng(0).permutation(12)
    with torch.no_grad():
        chart.table.copy_(torch.from_numpy(np.eye(12)[order]))
    task = Midpoint(program, facts, Batches(program, x), "labels", [0.5, 0.5])
    elements = charts.elements()
    assert (elements[chart.group.index].index == order).all()
    with torch.no_grad():
        moved = act(facts, elements, second)
        gradient = task.gradient([moved], [0.5, 0.5], [x], labels)
        charts.differentiate(elements, moved, {n: 0.5 * g for n, g in gradient.items()})
    p = torch.from_numpy(np.eye(12)[order]).requires_grad_()
    (w, v), b, c = (["layers.0.weight", "layers.1.weight"], "layers.0.bias", "layers.1.bias")
    hidden = x.flatten(1) @ ((first[w] + p @ second[w]) / 2).T + (first[b] + p @ second[b]) / 2
    output = hidden @ ((first[v] + second[v] @ p.T) / 2).T + (first[c] + second[c]) / 2
    (wanted,) = torch.autograd.grad(F.cross_entropy(output, labels), p)
    assert chart.table.grad is not None
    close(chart.table.grad[0], wanted, 1e-12)
    assert float((chart.table.grad[0] - wanted[:, order]).abs().max()) > 1e-2 * float(wanted.abs().max())


def test_signs_are_straight_through_too() -> None:
    """dL/dσ by hand behind tanh: the sign stands on the rows of one layer and on the columns of the next."""
    x = _vectors(16, 9)
    program = trace(nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)).double().eval(), x[:2])
    facts = symmetry(program)
    charts, weights = Charts(facts), program.weights[0]
    (chart,) = charts.charts.values()
    (flip,) = chart.flips.values()
    order, signs = np.random.default_rng(0).permutation(7), torch.tensor([1.0, -1, 1, -1, -1, 1, 1], dtype=DOUBLE)
    with torch.no_grad():
        chart.table.copy_(torch.from_numpy(np.eye(7)[order]))
        flip.copy_(signs[None])
    a, b, c, d = (f"{layer}.{own}" for layer in (0, 2) for own in ("weight", "bias"))

    def loss(s: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        moved = act(facts, charts.elements(), weights)
        if s is not None:  # by hand
            moved = {a: (s[:, None] * weights[a])[order], b: (s * weights[b])[order], c: (s * weights[c])[:, order]}
            moved[d] = weights[d]
        leaves = [moved[name] if s is not None else moved[name].requires_grad_() for name in (a, b, c)]
        hidden = (x @ leaves[0].T + leaves[1]).tanh() ** 2  # even, so that the signs of both layers count
        return ((hidden @ leaves[2].T + moved[d]).tanh() ** 3).sum(), leaves

    by_hand = signs.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(by_hand)[0], by_hand)
    value, leaves = loss()
    close(value, loss(signs)[0], 1e-12)
    gradient = dict(zip((a, b, c), torch.autograd.grad(value, leaves)))
    with torch.no_grad():
        charts.differentiate(charts.elements(), dict(zip((a, b, c), map(torch.clone, leaves))), gradient)
    assert flip.grad is not None
    close(flip.grad[0], wanted, 1e-12)
    assert float((flip.grad[0] - wanted[order]).abs().max()) > 1e-2 * float(wanted.abs().max())


# what gradients alone find --------------------------------------------------------------------------------------------


def _planted(build: Any, x: Tensor, far: float, groups: Any) -> tuple[Program, Symmetry]:
    """A network and the same behind maps exp(X) of some groups."""
    torch.manual_seed(0)
    program = in_double(trace(build().double().eval(), x[:2]))
    facts = symmetry(program)
    charts = Charts(facts)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for chart in charts.charts.values():
            if chart.kind is groups:
                chart.table += far * torch.randn(chart.table.shape, dtype=DOUBLE, generator=generator)
    moved = act(facts, charts.elements(), program.weights[0])
    pair = program.with_weights([program.weights[0], moved])
    return pair, symmetry(pair)


class _FromNothing(LearnedMatching):
    """Learns from the networks as they are, so that what it finds is the gradients'."""

    def _starts(self, problem: Problem) -> Any:
        return {"none": [identity(problem.symmetry)] * (problem.program.edges - 1)}


PLANTED = {
    "orthogonal": (RMSNet, (96, 9), Maps.ORTHOGONAL),
    "linear": (GroupedQueries, (48, 6, 24), Maps.LINEAR),
}


@pytest.mark.parametrize("name", PLANTED)
def test_gradients_alone_find_planted_maps(name: str) -> None:
    build, sizes, kind = PLANTED[name]
    x = _vectors(*sizes)
    program, facts = _planted(build, x, 0.3, kind)
    problem = Problem(program, facts, data=x.split(len(x) // 6))
    found = _FromNothing(epochs=20, lr=0.05)(problem)
    assert found.details["loss"] < 1e-2 * found.details["initial_loss"]
    control = _FromNothing(epochs=20, lr=0.05, classes="permutation")(problem)
    assert control.details["loss"] > 0.2 * control.details["initial_loss"]
    first, second = program.weights

    def distance(weights: Any) -> float:
        return sum(float((weights[fqn] - tensor).norm()) for fqn, tensor in first.items())

    assert distance(found.aligned(facts, second, 1)) < 0.5 * distance(
        second
    )  # some directions hardly count in the loss
    assert distance(control.aligned(facts, second, 1)) > 0.9 * distance(second)


# promises -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rate", [0.01, 5.0])
def test_never_worse_than_where_it_started_and_in_its_class(rate: float, count: int) -> None:
    """Also with a rate at which steps lead nowhere."""
    x = _vectors(60, 9)
    program = trace(edges(RMSNet, x, count), x[:2])
    facts = symmetry(program)
    statistics = vfx.collect(program, data=x, progress=False)
    data = x.split(10)
    found = LearnedMatching(epochs=3, lr=rate)(Problem(program, facts, statistics, data=data))
    starts = [value for name, value in found.details.items() if name.startswith("loss_from_")]
    assert len(starts) == 3
    assert found.details["initial_loss"] == min(starts)
    assert found.details["loss"] <= min(starts)
    assert found.objective == (max(value for (value,) in found.attempts),) == (-found.details["loss"],)
    if rate < 1:
        assert found.details["loss"] < min(starts), "nothing was learnt: the test shows nothing"
        assert found.sweeps == (15,)  # three epochs over the five batches that are not held out
    task = Midpoint(program, facts, Batches(program, data), "auto", [1 / count] * count)
    again = task.loss_of(found.elements[1:], _Split(task.batches).held_out())
    assert again == pytest.approx(found.details["loss"], rel=1e-9)
    for edge, own in enumerate(found.elements):
        check_elements(facts, own)
        assert preserved(facts, program.weights[edge], own) <= PRESERVED


def test_a_map_on_the_first_edge_adds_nothing() -> None:
    """The function of ½ g₀θ₀ + ½ g₁θ₁ is that of ½ θ₀ + ½ g₀⁻¹g₁θ₁: the action is linear."""
    x = _vectors(12, 6, 24)
    program = in_double(trace(edges(GroupedQueries, x), x[:2]))
    facts = symmetry(program)
    one, other = (random_element(facts, np.random.default_rng(seed)) for seed in (1, 2))
    first, second = program.weights

    def middle(a: Any, b: Any) -> Tensor:
        return program.with_weights([{n: (t + b[n]) / 2 for n, t in a.items()}])(x)

    both = middle(act(facts, one, first), act(facts, other, second))
    relative = compose(facts, other, inverse(facts, one))
    close(both, middle(first, act(facts, relative, second)), 1e-9)
    wrong = middle(first, act(facts, other, second))
    assert float((both - wrong).abs().max()) > 1e-2 * float(both.abs().max())


def test_batches_are_held_out() -> None:
    x = _vectors(60, 9)
    program = trace(RMSNet().double().eval(), x[:2])

    def sizes(*counts: int) -> tuple[list[int], list[int]]:
        split = _Split(Batches(program, list(x[: sum(counts)].split(list(counts)))))
        learnt, held = ([len(own[0]) for own, _ in part] for part in (split.to_learn(), split.held_out()))
        assert len(learnt) == split.learnt_from
        return learnt, held

    assert sizes(1, 2, 3, 4, 5, 6, 7) == ([1, 2, 3, 4, 6, 7], [5])
    assert sizes(1, 2, 3) == ([1, 2], [3])
    assert sizes(4) == ([4], [4])


def test_what_does_not_fit_is_refused() -> None:
    x = _vectors(8, 9)
    program = trace(edges(lambda: nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)), x), x[:2])
    for wrong in ({"loss": "hinge"}, {"lr": 0.0}, {"epochs": -1}, {"spread": 0.7}, {"classes": "signed"}):
        with pytest.raises(ArgumentError):
            LearnedMatching(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="data="):
        LearnedMatching()(Problem(program, symmetry(program)))
    still = LearnedMatching(epochs=0)(Problem(program, symmetry(program), data=x))
    assert still.details["loss"] == still.details["initial_loss"]
    assert any("one batch" in note for note in still.notes)


def test_losses_that_are_no_finite_number_are_refused() -> None:
    x = _vectors(8, 9)
    program = trace(edges(lambda: nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)), x), x[:2])
    problem = Problem(program, symmetry(program), data=x)
    for loss, error, words in (
        (lambda output, labels: output.sum() * torch.nan, DataError, "nan, whatever the matching"),
        (lambda output, labels: output, ArgumentError, r"one number.*shape \(8, 3\)"),
        (lambda output, labels: 1.0, ArgumentError, "one number.*float"),
        (lambda output, labels: torch.tensor(1.0), ArgumentError, "does not depend"),
    ):
        with pytest.raises(error, match=words):
            LearnedMatching(epochs=1, loss=loss)(problem)
    assert LearnedMatching(epochs=1, loss=lambda output, labels: output.square().mean())(problem).sweeps == (1,)


def test_a_batch_of_padding_has_no_labels() -> None:
    x = _vectors(8, 9)
    program = trace(edges(lambda: nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)), x), x[:2])
    padded = Problem(program, symmetry(program), data=[(x, torch.full((8,), -100))])
    without = Problem(program, symmetry(program), data=x)
    classes = Problem(program, symmetry(program), data=[(x, torch.zeros(8, dtype=torch.long))])
    found, bare, other = (LearnedMatching(epochs=0)(problem).details["loss"] for problem in (padded, without, classes))
    assert found == bare != other
    with pytest.raises(DataError, match="integer class labels"):
        LearnedMatching(epochs=0, loss="labels")(padded)
