"""Copies that a descent leaves apart are searched again, and maps without a balanced form are solved for together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from benchmarks.generated import moved_copy
from benchmarks.grammar import network
from tests.conftest import close
from vfx.analyse.symmetry import Symmetry
from vfx.elements import act, random_element
from vfx.match import isomorphism as isomorphism_module
from vfx.match import weight as weight_module
from vfx.match.copies import TRIES, again, are_copies
from vfx.match.descent import Descent
from vfx.match.isomorphism import isomorphism
from vfx.match.matcher import Matching, Problem
from vfx.match.weight import WeightMatching
from vfx.program import Program, Weights

DOUBLE = torch.float64


class Joined(nn.Module):
    """Two streams that one tensor reads: what is left of their maps is a product of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both = nn.Linear(9, 4), nn.Linear(9, 3), nn.Bilinear(4, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(self.a(x), self.b(x))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 4), nn.Linear(4, 5)),
    "without full rank": lambda: nn.Sequential(nn.Linear(9, 2, False), nn.Linear(2, 5, False), nn.Linear(5, 2)),
    "product of two": Joined,
}


def _facts(build: Callable[[], nn.Module]) -> Symmetry:
    torch.manual_seed(0)
    return vfx.symmetry(build().double(), torch.randn(4, 9, dtype=DOUBLE))


def _drawn(weights: Weights) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(own.shape, dtype=own.dtype, generator=rng) for name, own in weights.items()}


def _apart(one: Weights, two: Weights) -> float:
    return max(float((one[name] - two[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize("build", BUILDS.values(), ids=list(BUILDS))
def test_all_maps_are_solved_for_at_once(build: Callable[[], nn.Module]) -> None:
    facts = _facts(build)
    weights = facts.program.weights[0]
    moved = act(facts, random_element(facts, np.random.default_rng(0)), weights)
    assert _apart(weights, moved) > 0.1
    assert _apart(weights, act(facts, isomorphism(facts, weights, moved), moved)) < 1e-11
    others = _drawn(weights)
    assert _apart(weights, act(facts, isomorphism(facts, weights, others), others)) > 0.1  # no map makes them one


def test_too_many_unknowns_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _facts(BUILDS["square"])
    weights = facts.program.weights[0]
    assert isomorphism(facts, weights, weights)
    monkeypatch.setattr(isomorphism_module, "UNKNOWNS", 2 * 4 * 4 - 1)
    assert isomorphism(facts, weights, weights) == {}


# the search -----------------------------------------------------------------------------------------------------------


def _copy(seed: int, classes: str) -> tuple[Program, Symmetry, Tensor]:
    """A random network and a copy of it."""
    model, x = network(seed)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    program = vfx.trace([model, moved_copy(model, x, seed, classes)], x)
    return program, vfx.symmetry(program), x


def _halfway(program: Program, facts: Symmetry, found: Matching, x: Tensor) -> Tensor:
    aligned = [found.aligned(facts, own, edge) for edge, own in enumerate(program.weights)]
    return vfx.Interpolate(0.5)(program.with_weights(aligned))(x)


def _once(descent: Descent, run: Any, generator: np.random.Generator) -> Any:
    return run


@pytest.mark.parametrize(("seed", "classes"), [(989, "permutation"), (241, "full")])
def test_a_copy_that_a_descent_leaves_apart_is_found(seed: int, classes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, facts, x = _copy(seed, classes)
    wanted = program.select(0)(x)
    size = float(wanted.abs().max())
    found = WeightMatching()(Problem(program, facts))
    close(_halfway(program, facts, found, x), wanted, 1e-8 * size)
    monkeypatch.setattr(weight_module, "again", _once)
    control = WeightMatching()(Problem(program, facts))
    assert float((_halfway(program, facts, control, x) - wanted).abs().max()) > 1e-3 * size


def _equally_long(weights: Weights, others: Weights) -> dict[str, Tensor]:
    return {name: own * (weights[name].norm() / own.norm()) for name, own in others.items()}


@pytest.mark.parametrize("same_norms", [False, True])
@pytest.mark.parametrize("classes", ["permutation", "full"])
def test_networks_of_their_own_are_matched_as_by_one_descent(
    classes: str, same_norms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different norms are not searched at all; where norms are equal by chance, nothing is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    program = vfx.trace(model, torch.randn(4, 9, dtype=DOUBLE))
    weights = program.weights[0]
    others = _equally_long(weights, _drawn(weights)) if same_norms else _drawn(weights)
    program = program.with_weights([weights, others])
    facts = vfx.symmetry(program)
    runs, run = [], Descent.run
    monkeypatch.setattr(Descent, "run", lambda self, *own, **named: runs.append(self) or run(self, *own, **named))
    found = WeightMatching(classes=classes, restarts=1)(Problem(program, facts))
    plain = [descent for descent in runs if type(descent) is Descent] if classes == "full" else []
    assert len(plain) == (classes == "full")  # what permutations alone come to is asked once
    assert len(runs) - len(plain) == (2 * (1 + TRIES) if same_norms else 2)
    assert are_copies(runs[0]) == same_norms
    monkeypatch.setattr(weight_module, "again", _once)
    alone = WeightMatching(classes=classes, restarts=1)(Problem(program, facts))
    assert found.objective == alone.objective
    assert found.attempts == alone.attempts
    for name, own in found.aligned(facts, others, 1).items():
        assert torch.equal(own, alone.aligned(facts, others, 1)[name])


def test_rounded_copies_are_not_searched_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    facts = vfx.symmetry(model, torch.randn(4, 9, dtype=DOUBLE))
    weights = facts.program.weights[0]
    rounded = {name: own.to(torch.bfloat16).double() for name, own in weights.items()}
    descent = Descent(facts, weights, rounded)
    run = descent.run(np.random.default_rng(0))
    assert again(descent, run, np.random.default_rng(0)) is run


def test_new_biases_do_not_tell_copies() -> None:
    """All that no invertible map moves is a bias: of zeros it is the same in any new network."""
    widths = nn.Linear(9, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 5)
    facts = _facts(lambda: nn.Sequential(*widths))
    weights = facts.program.weights[0]
    (bias,) = (name for name in weights if name.endswith("1.bias"))
    for values, told in ((torch.zeros(4), False), (torch.arange(4.0), True)):
        pair = [{**own, bias: values.double()} for own in (weights, _drawn(weights))]
        descent = Descent(facts, *pair)
        descent.run(np.random.default_rng(0))
        assert are_copies(descent) == told
