"""Activation matching where features tell nothing: hidden tokens beside channels, and channels that hardly any sample
makes active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.up, self.down = nn.Linear(TOKENS, hidden), nn.Linear(hidden, TOKENS)

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
    monkeypatch.setattr("vfx.match.activation.untold", lambda symmetry, statistics: frozenset())
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
    monkeypatch.setattr("vfx.match.activation.untold", lambda symmetry, statistics: frozenset())
    control = _midpoint(program, facts, ActivationMatching(classes)(problem))
    assert float((control(unseen) - wanted).abs().max()) > 1e-3 * size


@pytest.mark.parametrize("classes", ["full", "permutation"])
@pytest.mark.parametrize("wider", [False, True])
def test_networks_of_two_widths_are_matched_beside_other_channels(classes: str, wider: bool) -> None:
    """The narrower network's hidden tokens are those of the wider one, some of which do nothing."""
    x, order = _tokens(), torch.from_numpy(np.random.default_rng(0).permutation(HIDDEN + 2))
    torch.manual_seed(0)
    narrow, wide = Mixer().double(), Mixer(HIDDEN + 2).double()
    state = dict(narrow.state_dict())
    spare = torch.zeros(2, TOKENS, dtype=DOUBLE)
    state["up.weight"] = torch.cat([state["up.weight"], spare])[order]
    state["up.bias"] = torch.cat([state["up.bias"], spare[:, 0]])[order]
    state["down.weight"] = torch.cat([state["down.weight"], spare.T], 1)[:, order]
    wide.load_state_dict(state)
    models = [narrow, wide] if wider else [wide, narrow]
    options: dict[str, Any] = {"match": "activation", "classes": classes, "solve": None, "normalize": None}
    with torch.no_grad():
        wanted = narrow(x)
        close(vfx.merge(models, x, data=x, progress=False, **options).module(x), wanted, 1e-9)
        wide.up.weight.copy_(wide.up.weight[torch.arange(HIDDEN + 2).roll(1)])  # control: another function
        control = vfx.merge(models, x, data=x, progress=False, **options).module(x)
    assert float((control - wanted).abs().max()) > 1e-3


class Normed(nn.Module):
    """A layer whose weights are zero between two BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(2))
        nn.init.zeros_(self.second.weight)
        for norm in self.norms:
            nn.init.normal_(norm.bias)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        return self.out(self.norms[1](self.second(x)).relu())


@pytest.mark.parametrize("classes", ["full", "permutation"])
def test_a_copy_comes_back_behind_a_layer_of_zeros(classes: str) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(64, 12), Normed().eval()
    program = vfx.trace(model, x)
    facts = vfx.symmetry(program)
    moved = act(facts, random_element(facts, np.random.default_rng(1), "permutation"), program.weights[0])
    pair = program.with_weights([program.weights[0], moved])
    options: dict[str, Any] = {"match": "activation", "classes": classes, "solve": None, "normalize": None}
    with torch.no_grad():
        wanted = model(x)
        close(vfx.merge(pair, data=x, progress=False, **options).module(x), wanted, 1e-5)
        control = vfx.merge(pair, data=x, progress=False, **options | {"match": None}).module(x)
    assert float((control - wanted).abs().max()) > 0.1


def test_silent_features_of_maps_tell_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 7, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    nn.init.zeros_(encoder.layers[0].self_attn.in_proj_weight)  # queries, keys and values are zero on all samples
    options: dict[str, Any] = {"match": "activation", "solve": None, "normalize": None}
    close(vfx.merge([encoder, encoder], x, data=x, progress=False, **options).module(x), encoder(x), 1e-6)
