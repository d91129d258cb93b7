"""Matching over the full symmetry classes: a network against itself moved by its whole group, and each solver alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import vfx
from tests.conftest import close, edges
from vfx.analyse.balance import _balanced_where_used, balance
from vfx.analyse.classes import Maps, draw
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import randomise
from vfx.elements import act, compose, inverse, random_element
from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.c2m3 import C2M3
from vfx.match.catalogue import CLASSED
from vfx.match.class_descent import ClassDescent, beyond_permutations, in_matrices
from vfx.match.learned import LearnedMatching
from vfx.match.matcher import Matching, Problem
from vfx.match.solve import assign_signed, procrustes
from vfx.match.weight import WeightMatching
from vfx.models import vit_tiny
from vfx.program import Program
from vfx.proof import in_double

DOUBLE = torch.float64


class RMSNet(nn.Module):
    """A residual stream read through RMSNorms without gain: orthogonal maps pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(9, 12), nn.Linear(12, 4)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.norms = nn.ModuleList(nn.RMSNorm(12, elementwise_affine=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norms[0](x))))
        return self.out(self.norms[1](x))


class Residual(nn.Module):
    """Convolutions with BatchNorm and ReLU, one block with a shortcut: positive scales pass once they are folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, o, 3, s, 1) for i, o, s in ((1, 6, 4), (6, 8, 2), (8, 6, 1)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (6, 8, 6))
        self.up, self.out = nn.Upsample(scale_factor=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        x = x + self.up(self.norms[2](self.b(self.norms[1](self.a(x)).relu())))
        return self.out(x.relu().mean((2, 3)))


class GroupedQueries(nn.Module):
    """Two heads of keys and values, each read by three heads of queries, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(24, 24), nn.Linear(24, 16), nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (6, 4)).transpose(1, 2)
        k, v = (y.unflatten(2, (2, 4)).transpose(1, 2)[:, :, None] for y in self.kv(x).chunk(2, 2))
        k, v = (y.expand(-1, -1, 3, -1, -1).flatten(1, 2) for y in (k, v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)


class GroupedTanh(nn.Module):
    """Odd functions between grouped convolutions: signs pass inside the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Conv2d(3, 12, 4, 4), nn.Conv2d(12, 15, 3, 2, groups=3)
        self.b, self.out = nn.Conv2d(15, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(self.first(x).tanh()).tanh()).tanh().mean((2, 3)))


def _tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 11), nn.Tanh(), nn.Linear(11, 4))


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(6, 7))


def _vectors() -> Tensor:
    return torch.randn(96, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def _sequences() -> Tensor:
    return torch.randn(24, 6, 24, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def _images(channels: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(24, channels, 32, 32, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def _lift(program: Program) -> Program:
    return vfx.CenterStream()(vfx.FoldGain()(program))


def _fold(program: Program) -> Program:
    return vfx.FoldNormalization(batch_norm=True)(program)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[Program], Program]]
CASES: dict[str, Case] = {
    "tanh": (_tanh, _vectors, lambda p: p),
    "linear": (_linear, _vectors, lambda p: p),
    "rms": (RMSNet, _vectors, lambda p: p),
    "vit": (lambda: vit_tiny(width=1 / 8, in_channels=1, patch=8, depth=2), _images(1), lambda p: p),
    "vit_lifted": (lambda: vit_tiny(width=1 / 8, in_channels=1, patch=8, depth=2), _images(1), _lift),
    "grouped": (GroupedQueries, _sequences, lambda p: p),
    "grouped_tanh": (GroupedTanh, _images(3), lambda p: p),
    "residual": (Residual, _images(1), _fold),
}
_known: dict[str, tuple[Program, Symmetry, Tensor]] = {}


def _pair(name: str) -> tuple[Program, Symmetry, Tensor]:
    """A and g(A), g of the full classes."""
    if name not in _known:
        build, inputs, form = CASES[name]
        torch.manual_seed(0)
        x = inputs()
        program = in_double(vfx.trace(build().double().eval(), x[:2]))
        weights = randomise(program, [x], torch.Generator().manual_seed(0))
        program = form(program.with_weights([weights]))
        facts = vfx.symmetry(program)
        moved = act(facts, random_element(facts, np.random.default_rng(3)), program.weights[0])
        pair = program.with_weights([program.weights[0], moved])
        _known[name] = pair, vfx.symmetry(pair), x
    return _known[name]


def _matching(match: str, classes: str, program: Program, facts: Symmetry, x: Tensor) -> Matching:
    if match == "weight":
        return WeightMatching(classes=classes)(Problem(program, facts))
    if match == "c2m3":
        return C2M3(iterations=2, classes=classes)(Problem(program, facts))
    statistics = vfx.collect(program, data=x, progress=False)
    if match == "activation":
        return ActivationMatching(classes=classes)(Problem(program, facts, statistics))
    return LearnedMatching(epochs=1, classes=classes)(Problem(program, facts, statistics, data=x.split(8)))


def _midpoint(program: Program, facts: Symmetry, matching: Matching) -> Program:
    aligned = [matching.aligned(facts, own, edge) for edge, own in enumerate(program.weights)]
    return vfx.Interpolate(0.5)(program.with_weights(aligned))


@pytest.mark.parametrize("match", sorted(CLASSED))
@pytest.mark.parametrize("name", CASES)
def test_a_network_moved_by_its_whole_group_comes_back(name: str, match: str) -> None:
    program, facts, x = _pair(name)
    assert beyond_permutations(facts)
    wanted = program.select(0)(x)
    spread = float((wanted - wanted.mean(0)).abs().max())
    found = _matching(match, "full", program, facts, x)
    close(program.with_weights([found.aligned(facts, program.weights[1], 1)])(x), wanted, 1e-9 * spread)
    close(_midpoint(program, facts, found)(x), wanted, 1e-6 * spread)
    control = _matching(match, "permutation", program, facts, x)
    assert float((_midpoint(program, facts, control)(x) - wanted).abs().max()) > 1e-3 * spread


@pytest.mark.parametrize("name", ["rms", "vit_lifted", "tanh"])
def test_never_below_permutations_by_its_own_objective(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the descent over the classes gets stuck at once; without the permutations it stays below them."""
    build, inputs, form = CASES[name]
    x = inputs()
    program = form(in_double(vfx.trace(edges(build, x), x[:2])))
    facts = vfx.symmetry(program)
    problem = Problem(program, facts)
    (orders,) = WeightMatching(classes="permutation")(problem).elements[1:]
    frames = [balance(facts, weights, leaning=True) for weights in program.weights]
    descent = ClassDescent(facts, act(facts, frames[0], program.weights[0]), program.weights[1], frames[1])
    reached = descent.value(in_matrices(facts, orders))
    assert WeightMatching()(problem).objective[0] >= reached * (1 - 1e-12)
    run = ClassDescent.run

    def stuck(self: ClassDescent, generator: Any, start: Any = None, known: Any = None) -> Any:
        return ({}, self.value({}), 1) if start is None else run(self, generator, start, known)

    monkeypatch.setattr(ClassDescent, "run", stuck)
    assert WeightMatching()(problem).objective[0] >= reached * (1 - 1e-12)
    monkeypatch.setattr("vfx.match.weight.Balanced._at_least_permutations", lambda self, descent, run, other: run)
    assert WeightMatching()(problem).objective[0] < reached * (1 - 1e-3), "control"


def test_merge_matches_the_full_classes_by_default() -> None:
    program, _, x = _pair("rms")
    options: dict[str, Any] = {"match": "weight", "normalize": None, "progress": False}
    close(vfx.merge(program, **options).module(x), program.select(0)(x), 1e-6)
    control = vfx.merge(program, classes="permutation", **options).module(x)
    assert float((control - program.select(0)(x)).detach().abs().max()) > 1e-2
    with pytest.raises(ArgumentError, match="full, permutation"):
        vfx.merge(program, classes="signed", **options)


@pytest.mark.parametrize("normalize", ["repair", "rescale"])
def test_goals_go_through_the_maps(normalize: str) -> None:
    """REPAIR and RESCALE behind orthogonal and invertible maps: A with g(A) is A, whatever is normalized."""
    for name in ("rms", "linear", "tanh"):
        program, _, x = _pair(name)
        merged = vfx.merge(program, data=x, normalize=normalize, progress=False).module(x)
        close(merged, program.select(0)(x), 1e-6)


def test_statistics_without_covariances_leave_mixed_layers_alone() -> None:
    program, _, x = _pair("rms")
    statistics = vfx.collect(program, data=x, progress=False)
    align = vfx.Align("activation", statistics=statistics, progress=False)
    result = align(program)
    assert "linear" not in result.goals  # its channels are the stream's
    assert any("within=True" in note for note in result.notes)
    known = vfx.collect(program, data=x, within=True, progress=False)
    assert "linear" in vfx.Align("activation", statistics=known, progress=False)(program).goals


def test_layers_behind_several_maps_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose output does not go through one map is noted, and the merge goes on."""
    program, _, x = _pair("tanh")
    statistics = vfx.collect(program, data=x, progress=False)
    aligned = vfx.Align("activation", statistics=statistics, progress=False)
    assert {"linear", "linear_1", "linear_2"} <= set(aligned(program).goals)
    monkeypatch.setattr("vfx.analyse.kinds.Classes.slots", lambda *_: None)
    result = aligned(program)
    assert set(result.goals) == {"linear_2"}
    assert any(note.startswith("linear, linear_1: not normalized") for note in result.notes)


def test_a_lifted_transformer_comes_back_in_its_own_class() -> None:
    torch.manual_seed(0)
    models = [vit_tiny(width=1 / 8, in_channels=1, patch=8, depth=2).eval() for _ in range(2)]
    x = _images(1)().float()
    plain = vfx.merge(models, x[:2], data=x, normalize=None, progress=False)
    lifted = vfx.merge(models, x[:2], data=x, normalize=None, prepare="lift", progress=False)
    assert {"FoldGain", "CenterStream"} <= {name.split("(")[0] for name in lifted.report.passes}
    assert lifted.report.own_class, lifted.report.notes
    assert isinstance(lifted.module, type(models[0]))
    assert float((plain.module(x) - lifted.module(x)).detach().abs().max()) > 1e-3
    edge = vfx.merge(models, x[:2], data=x, normalize=None, prepare="lift", weights=0.0, progress=False)
    close(edge.module(x), models[0](x), 1e-4)


# elements -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rms", "vit", "residual", "tanh"])
def test_elements_compose_and_undo(name: str) -> None:
    program, facts, _ = _pair(name)
    one, two = (random_element(facts, np.random.default_rng(seed)) for seed in (1, 2))
    weights = program.weights[0]
    there = act(facts, two, act(facts, one, weights))
    at_once = act(facts, compose(facts, one, two), weights)
    back = act(facts, inverse(facts, one), act(facts, one, weights))
    for fqn, tensor in weights.items():
        close(at_once[fqn], there[fqn], 1e-11)
        close(back[fqn], tensor, 1e-11)
    swapped = act(facts, compose(facts, two, one), weights)
    assert max(float((swapped[n] - there[n]).abs().max()) for n in weights) > 1e-3  # the order matters


@pytest.mark.parametrize("name", CASES)
def test_balanced_forms_differ_by_compact_maps(name: str) -> None:
    """Norms of balanced weights are those of the orbit, and the function stays."""
    program, facts, x = _pair(name)
    forms = [act(facts, balance(facts, own), own) for own in program.weights]
    for fqn, tensor in forms[0].items():
        if tensor.is_floating_point():
            assert float(tensor.norm()) == pytest.approx(float(forms[1][fqn].norm()), rel=1e-6, abs=1e-9), fqn
    total = [sum(float(own[name].square().sum()) for name in forms[0]) for own in (program.weights[0], forms[0])]
    assert total[1] <= total[0] * (1 + 1e-12)
    close(program.with_weights([forms[0]])(x), program.select(0)(x), 1e-8)


def test_heads_wider_than_what_they_hold_are_balanced_where_they_hold_it() -> None:
    """X = A x and Y = B y of rank 3 in 5 channels: both sides of the pair have one Gram matrix, their product stays."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=DOUBLE)  # noqa: E731
    x, y = draw(5, 3) @ draw(3, 9), draw(5, 3) @ draw(3, 7)
    found = _balanced_where_used(x, y)
    assert found is not None
    T = torch.from_numpy(found)
    left, right = T @ x, torch.linalg.inv(T).T @ y
    close(left.T @ right, x.T @ y, 1e-10)
    close(left @ left.T, right @ right.T, 1e-9)
    close(torch.linalg.svdvals(left)[:3].square(), torch.linalg.svdvals(x.T @ y)[:3], 1e-9)
    assert _balanced_where_used(torch.zeros(5, 9, dtype=DOUBLE), y) is None
    assert (x @ x.T - y @ y.T).abs().max() > 0.1, "negative control: it was not so before"


def test_heads_of_low_rank_keep_their_precision() -> None:
    """Queries and keys whose product has a direction of 1e-9: single precision still holds the aligned network."""
    torch.manual_seed(0)
    models = [vit_tiny(width=1 / 8, in_channels=1, patch=8, depth=2) for _ in range(2)]
    with torch.no_grad():
        for model in models:
            for block in model.blocks:
                block.attention.qkv.weight[0] *= 1e-9
                block.attention.qkv.bias[0] *= 1e-9
    x = _images(1)().float()
    merged = vfx.merge([m.eval() for m in models], x[:2], match="weight", normalize=None, weights=1.0, progress=False)
    close(merged.module(x), models[1](x), 1e-4)
    assert any(own.matrix is not None for own in merged.report.matching.elements[1].values())  # type: ignore[union-attr]


def test_each_step_raises_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    program, facts, _ = _pair("vit_lifted")
    rng = np.random.default_rng(0)
    other = {n: t + 0.3 * t.std() * torch.randn(t.shape, dtype=DOUBLE) for n, t in program.weights[1].items()}
    forms = [act(facts, balance(facts, own), own) for own in (program.weights[0], other)]
    descent, values = ClassDescent(facts, *forms), []
    improve = ClassDescent._improve

    def watched(self: ClassDescent, unit: Any, settled: Any, sweep: int) -> None:
        improve(self, unit, settled, sweep)
        if settled is None:
            values.append(self.objective)

    monkeypatch.setattr(ClassDescent, "_improve", watched)
    _, objective, _ = descent.run(rng)
    assert len(values) > 3
    assert (np.diff(values) >= -1e-9 * abs(values[-1])).all()
    assert objective == pytest.approx(values[-1], rel=1e-12)


@pytest.mark.parametrize("shared", [False, True])
def test_heads_that_saw_all_are_matched_once(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys share no weight with values; where groups inside blocks did (control), they take turns."""
    program, facts, _ = _pair("vit")
    forms = [act(facts, balance(facts, own), own) for own in program.weights]
    descent, steps = ClassDescent(facts, *forms), []
    best, separate = ClassDescent._best_in_blocks, ClassDescent._separate

    def counted(self: ClassDescent, unit: Any, *options: Any) -> dict[int, Any]:
        steps.append(unit.outer.index)
        return best(self, unit, *options)

    monkeypatch.setattr(ClassDescent, "_best_in_blocks", counted)
    monkeypatch.setattr(ClassDescent, "_separate", lambda *options: not shared and separate(*options))
    _, objective, sweeps = descent.run(np.random.default_rng(0))
    whole = sum(float(form.square().sum()) for name, form in forms[0].items() if name in descent.target)
    assert objective == pytest.approx(whole, rel=1e-9)
    assert sweeps == 2
    assert len(steps) == (2 if shared else 1) * len(set(steps)) > 0


# solvers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Maps.ORTHOGONAL, Maps.ORTHOGONAL_ONES])
def test_procrustes_is_the_best_of_its_class(kind: Maps) -> None:
    rng = np.random.default_rng(0)
    gain = rng.standard_normal((3, 6, 6))
    found, value = procrustes(gain, kind)
    np.testing.assert_allclose(found @ found.swapaxes(1, 2), np.broadcast_to(np.eye(6), (3, 6, 6)), atol=1e-12)
    if kind is Maps.ORTHOGONAL_ONES:
        np.testing.assert_allclose(found.sum(2), 1, atol=1e-8)
    for _ in range(300):
        assert ((draw(kind, 6, rng) * gain).sum((1, 2)) <= value + 1e-9).all()
    np.testing.assert_allclose(procrustes(np.zeros((6, 6)))[0], np.eye(6), atol=1e-12)  # nothing seen, nothing moved


def test_signed_assignment_is_the_best_of_all() -> None:
    """Two free signs, three kinds of sides, against all permutations and signs."""
    rng = np.random.default_rng(0)
    gains = {frozenset(own): rng.standard_normal((4, 4)) for own in ((), (0,), (0, 1))}
    permutation, signs = assign_signed(gains)

    def value(p: Any, s: Any) -> float:
        rows = np.arange(4)
        return sum(float((np.prod([s[x] for x in own], axis=0) * g[rows, p]).sum()) for own, g in gains.items())

    every = list(itertools.product((1.0, -1.0), repeat=4))
    best = max(
        value(np.array(p), {0: np.array(a), 1: np.array(b)})
        for p in itertools.permutations(range(4))
        for a in every
        for b in every
    )
    assert value(permutation, signs) == pytest.approx(best, rel=1e-12)


def test_signs_that_no_side_shares_are_found_apart() -> None:
    """Twelve free signs, two of which stand on one side together, against all of them at once for each pair."""
    rng = np.random.default_rng(0)
    keys = [*({x} for x in range(10)), set(), {10}, {11}, {10, 11}]
    gains = {frozenset(key): rng.standard_normal((5, 5)) for key in keys}
    permutation, signs = assign_signed(gains)
    every = np.array(list(itertools.product((1.0, -1.0), repeat=12)))
    factors = {side: every[:, sorted(side)].prod(1) for side in gains}
    best = sum(factors[side][:, None, None] * gain for side, gain in gains.items()).max(0)
    assert (permutation == linear_sum_assignment(best, maximize=True)[1]).all()
    rows = np.arange(5)
    reached = sum(np.prod([signs[x] for x in side], axis=0) * gain[rows, permutation] for side, gain in gains.items())
    np.testing.assert_allclose(reached, best[rows, permutation], rtol=1e-12)
    wrong = {x: sign if x != 4 else -sign for x, sign in signs.items()}
    assert sum(np.prod([wrong[x] for x in side], axis=0) * g[rows, permutation] for side, g in gains.items()).sum() < (
        best[rows, permutation].sum() - 1e-3
    )
