"""Copies moved by elements of the whole class that weights find again: sizes in front of running statistics, maps whose
two sides have different ranks, signs of several sides inside blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from tests.conftest import close
from vfx.analyse import scales as scales_module
from vfx.analyse.balance import FEW_SWEEPS, _leaning, _leaning_on, balance
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import randomise
from vfx.api import merge
from vfx.elements import act, random_element
from vfx.match.activation import ActivationMatching
from vfx.match.matcher import Matcher, Matching, Problem
from vfx.match.weight import WeightMatching
from vfx.program import Program
from vfx.proof import in_double
from vfx.statistics.collect import collect

DOUBLE = torch.float64


class Measured(nn.Module):
    """BatchNorms behind convolutions, one of them on a stream that two layers write."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, o, 3, 1, 1) for i, o in ((2, 6), (6, 8), (8, 6)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (6, 8, 6))
        self.out = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        x = x + self.b(self.norms[1](self.a(x)).relu())
        return self.out(self.norms[2](x).relu().mean((2, 3)))


class Gains(nn.Module):
    """Blocks of 4 channels, in which a gain stands between sides that have signs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, 1, 1), nn.Conv2d(8, 8, 1, groups=8)
        self.second, self.third = nn.Conv2d(8, 12, 3, 1, 1, groups=2), nn.Conv2d(12, 12, 1, groups=12)
        self.out = nn.Conv2d(12, 15, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).tanh()).tanh()
        return self.out(self.third(self.second(x).tanh()).tanh()).mean((2, 3))


def _sequential(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def _vectors() -> Tensor:
    return torch.randn(32, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def _images() -> Tensor:
    return torch.randn(8, 2, 6, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "running statistics": (Measured, _images),
    "signs in blocks": (Gains, _images),
    "read by fewer": (lambda: _sequential(9, 6, 3), _vectors),
    "made from fewer": (lambda: nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 8, False), nn.Linear(8, 11)), _vectors),
    "both": (lambda: nn.Sequential(nn.Linear(9, 5, False), nn.Tanh(), nn.Linear(5, 12), nn.Linear(12, 3)), _vectors),
    "several": (lambda: _sequential(9, 8, 7, 8, 3), _vectors),
}  # fmt: skip


def _pair(name: str, independent: bool = False) -> tuple[Program, Symmetry, Tensor]:
    """A and g(A), g of the full classes; or A and another network."""
    build, inputs = CASES[name]
    torch.manual_seed(0)
    x = inputs()
    program = in_double(vfx.trace(build().double().eval(), x[:2]))
    weights = [randomise(program, [x], torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    if not independent:
        facts = vfx.symmetry(program)
        weights[1] = act(facts, random_element(facts, np.random.default_rng(3)), weights[0])
    pair = program.with_weights(weights)
    return pair, vfx.symmetry(pair), x


def _midpoint(program: Program, facts: Symmetry, matching: Matching) -> Program:
    aligned = [matching.aligned(facts, own, edge) for edge, own in enumerate(program.weights)]
    return vfx.Interpolate(0.5)(program.with_weights(aligned))


@pytest.mark.parametrize("name", CASES)
def test_a_copy_moved_by_its_whole_class_comes_back(name: str) -> None:
    program, facts, x = _pair(name)
    wanted = program.select(0)(x)
    spread = float((wanted - wanted.mean(0)).abs().max())
    found = WeightMatching()(Problem(program, facts))
    close(program.with_weights([found.aligned(facts, program.weights[1], 1)])(x), wanted, 1e-9 * spread)
    close(_midpoint(program, facts, found)(x), wanted, 1e-6 * spread)
    control = WeightMatching(classes="permutation")(Problem(program, facts))
    assert float((_midpoint(program, facts, control)(x) - wanted).abs().max()) > 1e-3 * spread


def test_activations_bring_a_copy_back_behind_running_statistics() -> None:
    program, facts, x = _pair("running statistics")
    problem = Problem(program, facts, statistics=collect(program, facts, [x], progress=False))
    wanted = program.select(0)(x)
    spread = float((wanted - wanted.mean(0)).abs().max())
    close(_midpoint(program, facts, ActivationMatching()(problem))(x), wanted, 1e-6 * spread)
    control = ActivationMatching("permutation")(problem)
    assert float((_midpoint(program, facts, control)(x) - wanted).abs().max()) > 1e-3 * spread


@pytest.mark.parametrize("matcher", [WeightMatching(), ActivationMatching()])
def test_independent_networks_keep_their_sizes_in_front_of_running_statistics(matcher: Matcher) -> None:
    def sizes(independent: bool) -> float:
        program, facts, x = _pair("running statistics", independent)
        statistics = collect(program, facts, [x], progress=False)
        (element,) = matcher(Problem(program, facts, statistics=statistics)).elements[1:]
        found = [0.0]
        for index, own in element.items():
            running = facts.classes[index].running
            found += [float(np.abs(np.abs(s) - 1).max()) for side, s in own.scales.items() if side in running]
        return max(found)

    assert sizes(independent=True) == 0.0
    assert sizes(independent=False) > 0.1, "control: a copy's sizes are found"


def test_a_permuted_copy_behind_running_statistics_comes_back_bit_for_bit() -> None:
    program, facts, _ = _pair("running statistics")
    moved = act(facts, random_element(facts, np.random.default_rng(5), "permutation"), program.weights[0])
    pair = program.with_weights([program.weights[0], moved])
    found = WeightMatching()(Problem(pair, facts)).aligned(facts, moved, 1)
    assert all(torch.equal(found[name], tensor) for name, tensor in program.weights[0].items())
    assert any(not torch.equal(moved[name], tensor) for name, tensor in program.weights[0].items())


def test_the_form_of_sides_of_different_ranks_is_the_least_of_its_orbit() -> None:
    """T X Xᵀ Tᵀ − T⁻ᵀ Y Yᵀ T⁻¹ = c 1 where the sum has its minimum; from any point of the orbit it is the same one."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=DOUBLE)  # noqa: E731
    x, y, moved = draw(5, 9), draw(5, 3), draw(5, 5)

    def gram(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        T = torch.from_numpy(_leaning_on(x, y))
        left, right = T @ x, torch.linalg.inv(T).T @ y
        close(left @ left.T - right @ right.T, torch.eye(5, dtype=DOUBLE) / 5, 1e-9)
        return left.T @ left, right.T @ right

    for one, two in zip(gram(x, y), gram(moved @ x, torch.linalg.inv(moved).T @ y)):
        close(one, two, 1e-9)
    assert float((x.T @ x - (moved @ x).T @ (moved @ x)).abs().max()) > 0.1, "negative control"


@pytest.mark.parametrize("ranks", [(4, 2), (2, 4), (3, 3)])
def test_sides_of_low_ranks_have_a_form(ranks: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=DOUBLE)  # noqa: E731
    x, y, moved = draw(5, ranks[0]) @ draw(ranks[0], 9), draw(5, ranks[1]) @ draw(ranks[1], 7), draw(5, 5)
    grams = []
    for one, two in ((x, y), (moved @ x, torch.linalg.inv(moved).T @ y)):
        found = _leaning(one, two)
        assert found is not None
        T = torch.from_numpy(found)
        left, right = T @ one, torch.linalg.inv(T).T @ two
        close(left.T @ right, x.T @ y, 1e-8)
        grams.append((left.T @ left, right.T @ right))
    for one, two in zip(*grams):
        close(one, two, 1e-7)
    assert _leaning(torch.zeros_like(x), y) is None


def test_forms_of_one_orbit_weigh_the_same() -> None:
    program, facts, _ = _pair("several")
    forms = [act(facts, balance(facts, own, leaning=True), own) for own in program.weights]
    norms = [[float(form[name].norm()) for name in program.weights[0]] for form in forms]
    np.testing.assert_allclose(*norms, rtol=1e-7)
    plain = [[float(own[name].norm()) for name in own] for own in program.weights]
    assert np.abs(np.log(plain[0]) - np.log(plain[1])).max() > 0.01, "control: moved ones do not"


@pytest.mark.parametrize(("dead", "preserve"), [(False, 2), (True, 1)])
def test_scales_that_do_not_settle_end_soon(dead: bool, preserve: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dead channel in front of running statistics the balanced form may not exist."""
    rounds: list[int] = []
    steps = scales_module._Whole.steps

    def counted(self: Any) -> Any:
        rounds.append(1)
        return steps(self)

    monkeypatch.setattr(scales_module._Whole, "steps", counted)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
        rest = [nn.Conv2d(6, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
        models.append(nn.Sequential(*first, *rest).eval())
        with torch.no_grad():
            for norm in (first[1], first[4]) if dead else ():
                norm.bias.normal_()
            for parameter in (first[3].weight, first[3].bias) if dead else ():
                parameter[2] = 0
    options: dict[str, Any] = {"normalize": None, "solve": None, "progress": False}
    merge(models, torch.randn(2, 1, 8, 8), match="weight", preserve=preserve, **options)
    assert 2 * FEW_SWEEPS < len(rounds) < 4 * FEW_SWEEPS + 100 if dead else len(rounds) < FEW_SWEEPS
