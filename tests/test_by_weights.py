"""Activation matching where features tell nothing: hidden tokens beside channels, and channels that hardly any sample
makes active."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vfx
from tests.conftest import close
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import randomise
from vfx.elements import act, random_element
from vfx.match.activation import ActivationMatching
from vfx.match.iterated import IteratedMatching
from vfx.match.matcher import Matcher, Matching, Problem
from vfx.program import Program
from vfx.proof import in_double
from vfx.statistics.collect import collect
from vfx.statistics.taps import feature_taps

DOUBLE = torch.float64
WIDTH, TOKENS, HIDDEN = 6, 5, 7


class Mixer(nn.Module):
    """A layer over tokens, applied to each channel, on a stream of channels (Tolstikhin et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Linear(TOKENS, HIDDEN), nn.Linear(HIDDEN, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.out(x + self.down(nn.functional.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2))


def _silent() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


def _program(build: Callable[[], nn.Module], x: Tensor) -> Program:
    torch.manual_seed(0)
    program = in_double(vfx.trace(build().double().eval(), x))
    return program.with_weights([randomise(program, [x], torch.Generator().manual_seed(0))])


def _moved(program: Program, classes: str, noise: float = 0.0) -> tuple[Program, Symmetry]:
    """A and g(A + noise)."""
    facts, generator = vfx.symmetry(program), torch.Generator().manual_seed(1)
    near = {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, dtype=DOUBLE, generator=generator)
        for name, tensor in program.weights[0].items()
    }
    moved = act(facts, random_element(facts, np.random.default_rng(2), classes), near)
    pair = program.with_weights([program.weights[0], moved])
    return pair, vfx.symmetry(pair)


def _problem(program: Program, facts: Symmetry, x: Tensor) -> Problem:
    return Problem(program, facts, statistics=collect(program, facts, [x], progress=False), data=[x], progress=False)


def _midpoint(program: Program, facts: Symmetry, matching: Matching) -> Program:
    aligned = [matching.aligned(facts, weights, edge) for edge, weights in enumerate(program.weights)]
    return vfx.Interpolate(0.5)(program.with_weights(aligned))


def _tokens() -> Tensor:
    return torch.randn(64, TOKENS, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def _few() -> Tensor:
    return torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def test_taps_say_which_groups_stand_beside_them() -> None:
    program = _program(Mixer, _tokens())
    facts = vfx.symmetry(program)
    hidden = next(group.index for group in facts.groups if group.size == HIDDEN)
    stream = next(group.index for group in facts.groups if group.size == WIDTH)
    beside = {tap.groups: tap.beside for tap in feature_taps(facts) if hidden in tap.groups}
    assert beside == {(hidden,): {stream}}
    assert any(tap.groups == (stream,) and not tap.beside for tap in feature_taps(facts))


@pytest.mark.parametrize("matcher", [ActivationMatching(), ActivationMatching("permutation"), IteratedMatching()])
def test_weights_match_what_stands_beside_other_channels(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _tokens()
    program, facts = _moved(_program(Mixer, x), "permutation", noise=0.02)  # no copy: all norms differ
    hidden = next(group for group in facts.groups if group.size == HIDDEN)
    order = matcher(_problem(program, facts, x)).permutations[1][hidden.index]
    placed = program.weights[1]["up.weight"][torch.from_numpy(order)]
    close(placed, program.weights[0]["up.weight"], 0.1 * float(placed.abs().max()))
    monkeypatch.setattr("vfx.match.activation.untold", lambda problem, statistics: frozenset())
    control = matcher(_problem(program, facts, x)).permutations[1][hidden.index]
    assert (control == np.arange(HIDDEN)).all()
    assert (order != control).any()


@pytest.mark.parametrize("classes", ["full", "permutation"])
@pytest.mark.parametrize(("build", "inputs"), [(Mixer, _tokens), (_silent, _few)])
def test_a_copy_comes_back_whole(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], classes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, unseen = inputs(), torch.randn(32, *inputs().shape[1:], dtype=DOUBLE)
    program, facts = _moved(_program(build, x), classes)
    wanted, problem = program.select(0)(unseen), _problem(program, facts, x)
    size = float(wanted.abs().max())
    matching = ActivationMatching(classes)(problem)
    close(_midpoint(program, facts, matching)(unseen), wanted, 1e-9 * size)
    monkeypatch.setattr("vfx.match.by_weights.weigh_alike", lambda *_: False)
    monkeypatch.setattr("vfx.match.activation.untold", lambda problem, statistics: frozenset())
    control = _midpoint(program, facts, ActivationMatching(classes)(problem))
    assert float((control(unseen) - wanted).abs().max()) > 1e-3 * size
