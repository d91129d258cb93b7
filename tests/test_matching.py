"""Matching: A against π(A) plus noise gives π back, group by group; the objective only grows; seeds decide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
import transformers
from conftest import edges, images, network, transported
from micro_models import conv, net
from torch import Tensor, nn

import vfx.match.weight as weight_module
from vfx.analyse.symmetry import Symmetry
from vfx.api import collect, compile, merge, symmetry, trace
from vfx.elements import act, identity, inverse_permutations, permuted, random_permutations
from vfx.elements.permutations import moved
from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.catalogue import MATCHERS, matcher
from vfx.match.descent import Descent
from vfx.match.matcher import Matching, Problem, assign
from vfx.match.units import units
from vfx.match.weight import WeightMatching
from vfx.models import linear_net, resnet20_bn, resnet20_ln, resnet20_plain, vgg16, vgg16_bn, vgg16_ln
from vfx.program import Program
from vfx.statistics.collect import Statistics

NOISE, CONSTANT = 0.01, 1e-6


def residual() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = F.relu(self.n0(self.stem(x)))
        s = F.relu(s + self.a2(F.relu(self.a1(s))))
        s = F.relu(self.down(s) + self.b2(F.relu(self.b1(s))))
        return self.fc(s.mean((2, 3)))

    return net(
        forward,
        stem=conv(3, 8),
        n0=nn.BatchNorm2d(8),
        a1=conv(8, 7),
        a2=conv(7, 8),
        down=conv(8, 12, 1),
        b1=conv(8, 9),
        b2=conv(9, 12),
        fc=nn.Linear(12, 4),
    )


def concatenated() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(torch.cat([a, x], 1)))
        c = F.relu(self.c(torch.cat([b, a], 1)))
        return self.fc(torch.cat([a, c, b], 1).mean((2, 3)))

    return net(forward, a=conv(3, 6), b=conv(9, 5), c=conv(11, 7), fc=nn.Linear(18, 4))


def depthwise() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = F.relu6(self.n1(self.expand(F.relu(self.stem(x)))))
        h = F.relu6(self.n2(self.depth(h)))
        return self.fc(F.relu(self.project(h)).mean((2, 3)))

    return net(
        forward,
        stem=conv(3, 6),
        expand=conv(6, 12, 1, bias=False),
        n1=nn.BatchNorm2d(12),
        depth=conv(12, 12, groups=12, bias=False),
        n2=nn.BatchNorm2d(12),
        project=conv(12, 5, 1),
        fc=nn.Linear(5, 4),
    )


def squeeze_excite() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        gate = self.up(F.relu(self.down(h.mean((2, 3), keepdim=True)))).sigmoid()
        return self.fc(F.relu(self.last(h * gate)).flatten(1))

    return net(
        forward, stem=conv(3, 10), down=conv(10, 4, 1), up=conv(4, 10, 1), last=conv(10, 6), fc=nn.Linear(6 * 64, 4)
    )


def grouped() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(F.relu(self.mid(F.relu(self.stem(x)))))).mean((2, 3)))

    return net(forward, stem=conv(3, 12), mid=conv(12, 12, groups=3), last=conv(12, 6), fc=nn.Linear(6, 4))


class Attention(nn.Module):
    """Pre-norm self-attention over patches: packed qkv, three heads."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.patch, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 20), nn.Linear(20, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def resnext_block() -> nn.Module:
    """Both inner groups of a grouped convolution stand on one weight."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(x.mean((2, 3)))

    return net(
        forward,
        stem=conv(3, 8),
        a=conv(8, 20, 1),
        b=conv(20, 12, groups=4),
        c=conv(12, 8, 1),
        fc=nn.Linear(8, 4),
    )


def products() -> nn.Module:
    """Layers written as products with a weight (GPT-2's Conv1D), one with a bias and one without."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(torch.addmm(self.b, x.flatten(1), self.w))
        return self.fc(torch.tanh(h @ self.v))

    shapes = {"w": (3 * 64, 10), "b": (10,), "v": (10, 8)}
    parts = {name: nn.Parameter(torch.randn(shape) / shape[0] ** 0.5) for name, shape in shapes.items()}
    return net(forward, **parts, fc=nn.Linear(8, 4))


@dataclass(frozen=True)
class Case:
    """A network, the size of its pictures and how many of them activation matching sees."""

    build: Callable[[], nn.Module]
    size: int = 8
    count: int = 32

    @property
    def name(self) -> str:
        return getattr(self.build, "__name__", "net")


def _named(name: str, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    build.__name__ = name
    return build


SMALL = [
    Case(residual),
    Case(concatenated),
    Case(depthwise),
    Case(squeeze_excite),
    Case(grouped),
    Case(resnext_block),
    Case(_named("attention", Attention), count=64),
    Case(products, count=64),
    Case(_named("mlp", lambda: linear_net(4, 12, 3 * 64, 5)), count=64),
    Case(_named("residual_mlp", lambda: linear_net(5, 12, 3 * 64, 5, residual=True)), count=64),
]
PAPERS = [
    Case(_named("vgg16", lambda: vgg16(width=0.125)), 32, 16),
    Case(_named("vgg16_bn", lambda: vgg16_bn(width=0.125)), 32, 16),
    Case(_named("vgg16_ln", lambda: vgg16_ln(width=0.125)), 32, 16),
    Case(_named("resnet20_bn", lambda: resnet20_bn(width=0.5)), 32, 16),
    Case(_named("resnet20_ln", lambda: resnet20_ln(width=0.5)), 32, 16),
    Case(_named("resnet20_plain", lambda: resnet20_plain(width=0.5)), 32, 16),
]
ZOO = [
    Case(tv.resnet18, 64, 64),
    Case(tv.squeezenet1_0, 64, 256),
    Case(tv.shufflenet_v2_x0_5, 64, 64),
]


@torch.no_grad()
def _noisy(model: nn.Module, seed: int = 1) -> nn.Module:
    """1 % of each tensor's standard deviation added to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
        parameter.add_(NOISE * spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    return twin


@dataclass(frozen=True)
class Pair:
    """A and its noisy image π(A) as one Program, its groups, and the answer."""

    program: Program
    x: Tensor
    facts: Symmetry
    expected: dict[int, np.ndarray]


_pairs: dict[str, Pair] = {}


def _pair(case: Case) -> Pair:
    if case.name not in _pairs:
        x = images(case.count, case.size)
        moved, facts, element = transported(network(case.build, x), x)
        own = _noisy(moved).state_dict()
        first = facts.program.weights[0]
        program = facts.program.with_weights([first, {name: own.get(name, first[name]) for name in first}])
        _pairs[case.name] = Pair(program, x, symmetry(program), inverse_permutations(facts.groups, element))
    return _pairs[case.name]


def _free(statistics: Statistics, facts: Symmetry, expected: dict[int, np.ndarray], edge: int = 1) -> dict[int, Any]:
    """Channels that are constant in one of the edges at every tap: nothing correlates with a constant."""
    free = {group.index: np.ones(group.size, bool) for group in facts.groups}
    for tap in statistics.taps:
        image = moved(facts.groups, tap.groups, tap.digits, expected)
        row = {tuple(digits): index for index, digits in enumerate(tap.digits.tolist())}
        first, second = (statistics.features[tap.key].moments[e].std.numpy() for e in (0, edge))
        other = second[[row[tuple(digits)] for digits in image.tolist()]]
        varies = (first > CONSTANT * first.max()) & (other > CONSTANT * other.max())
        for column, group in enumerate(tap.groups):
            free[group][tap.digits[varies, column]] = False
    return free


def _wrong(found: Matching, pair: Pair, silent: dict[int, np.ndarray] | None = None) -> dict[str, int]:
    """Channels of each group that were sent to a wrong place, constant ones left out."""
    wrong = {}
    for group in pair.facts.groups:
        missed = found.permutations[1][group.index] != pair.expected[group.index]
        if silent is not None:
            missed &= ~silent[group.index]  # an inner group's channel is silent if it is in every block
        if missed.any():
            wrong[group.name] = int(missed.sum())
    return wrong


@pytest.mark.parametrize("case", [*SMALL, *PAPERS, *ZOO], ids=lambda case: case.name)
def test_weight_matching_recovers_the_permutation(case: Case) -> None:
    pair = _pair(case)
    found = WeightMatching(classes="permutation")(Problem(pair.program, pair.facts))
    assert len(pair.facts.groups) == len(found.permutations[1]) > 0
    assert all((p == np.arange(p.shape[-1])).all() for p in found.permutations[0].values())
    assert _wrong(found, pair) == {}


@pytest.mark.parametrize("case", [*SMALL, *PAPERS, *ZOO], ids=lambda case: case.name)
def test_activation_matching_recovers_the_permutation(case: Case) -> None:
    pair = _pair(case)
    statistics = collect(pair.program, data=pair.x.split(16), progress=False)
    silent = _free(statistics, pair.facts, pair.expected)
    found = ActivationMatching(classes="permutation")(Problem(pair.program, pair.facts, statistics))
    free = sum(int(mask.sum()) for mask in silent.values())
    assert free <= 0.2 * pair.facts.channels, "too little is left to be recovered"
    assert _wrong(found, pair, silent) == {}


def test_a_wrong_permutation_is_seen() -> None:
    """Negative control of the two tests above."""
    pair = _pair(SMALL[0])
    found = WeightMatching(classes="permutation")(Problem(pair.program, pair.facts))
    found.permutations[1][0][[0, 1]] = found.permutations[1][0][[1, 0]]
    assert sum(_wrong(found, pair).values()) == 2


@pytest.mark.parametrize("match", ["weight", "activation"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_aligning_a_permuted_copy_gives_the_original_back(case: Case, match: str) -> None:
    """align(A, πA) = A, bit for bit: permutations move weights and never change them."""
    from vfx.passes.align import Align

    x = images(case.count, case.size)
    model = network(case.build, x)
    moved, _, _ = transported(model, x, seed=3)
    program = trace([model, moved], x[:2])
    assert any(not torch.equal(a, b) for a, b in zip(program.weights[0].values(), program.weights[1].values()))
    aligned = Align(match, x if match == "activation" else None, progress=False)(program)
    for name, tensor in aligned.weights[1].items():
        assert torch.equal(tensor, program.weights[0][name]), name


@pytest.mark.parametrize("case", [SMALL[0], SMALL[3]], ids=lambda case: case.name)
def test_permuting_and_permuting_back_is_the_identity(case: Case) -> None:
    x = images(4, case.size)
    program = trace(network(case.build, x), x[:2])
    facts = symmetry(program)
    element = random_permutations(facts.groups, np.random.default_rng(0))
    there = act(facts, permuted(element), program.weights[0])
    back = act(facts, permuted(inverse_permutations(facts.groups, element)), there)
    for name, tensor in program.weights[0].items():
        assert torch.equal(back[name], tensor)
        assert name not in {m.fqn for g in facts.groups for m in g.members} or not torch.equal(there[name], tensor)


@pytest.mark.parametrize("case", [*SMALL, PAPERS[3]], ids=lambda case: case.name)
def test_weight_matching_never_loses_ground(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between independent networks, every later assignment keeps or raises the objective; so does every restart."""
    x = images(4, case.size)
    program = trace(edges(case.build, x), x[:2])
    facts = symmetry(program)
    values: list[float] = []
    improve = weight_module.Descent._improve

    def watched(self: weight_module.Descent, unit: object, settled: object, sweep: int) -> None:
        improve(self, unit, settled, sweep)  # type: ignore[arg-type]
        if settled is None:
            values.append(self.objective)

    monkeypatch.setattr(weight_module.Descent, "_improve", watched)
    found = WeightMatching(classes="permutation")(Problem(program, facts))
    assert len(values) >= len(units(facts))
    steps = np.diff(values)
    assert (steps >= -1e-6 * abs(values[-1])).all()
    assert found.objective[0] == pytest.approx(values[-1], rel=1e-12)
    before = sum(float((program.weights[0][n] * program.weights[1][n]).sum()) for n in program.names()
                 if n not in program.buffers)  # fmt: skip
    assert found.objective[0] > before
    assert WeightMatching(restarts=2, classes="permutation")(Problem(program, facts)).objective[0] >= found.objective[0]


def test_no_step_is_left_where_a_descent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps taken once more gain nothing; after the first sweep alone (control) some do."""
    x, more = images(4, 8), []
    for seed in range(0, 12, 2):
        program = trace(edges(residual, x, seed=seed), x[:2])
        descent = weight_module.Descent(symmetry(program), *program.weights)
        found, objective, _ = descent.run(np.random.default_rng(seed))
        assert descent.run(np.random.default_rng(seed), found)[1] == pytest.approx(objective, rel=1e-12)
        with monkeypatch.context() as patch:
            patch.setattr("vfx.match.descent.MAX_SWEEPS", 1)
            early, reached, _ = descent.run(np.random.default_rng(seed))
            more.append(descent.run(np.random.default_rng(seed), early)[1] - reached)
    assert max(more) > 1e-3


def test_a_step_that_saw_all_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between copies hidden channels are assigned in the first sweep, streams that it saw in part again."""
    x = images(4, 8)
    program = trace(network(residual, x), x[:2])
    facts = symmetry(program)
    element = random_permutations(facts.groups, np.random.default_rng(0))
    moved_weights = act(facts, permuted(element), program.weights[0])
    steps: list[int] = []
    best = weight_module.Descent._best

    def counted(self: weight_module.Descent, group: Any, settled: Any) -> dict[int, Any]:
        steps.append(group.index)
        return best(self, group, settled)

    monkeypatch.setattr(weight_module.Descent, "_best", counted)
    weight_module.Descent(facts, program.weights[0], moved_weights).run(np.random.default_rng(0))
    hidden = {g.index for g in facts.groups if {m.fqn for m in g.members} & {"a1.weight"} and g.size == 7}
    assert len(hidden) == 1
    assert {index: steps.count(index) for index in hidden} == dict.fromkeys(hidden, 1)
    assert steps.count(0) == 2


def test_the_objective_is_the_inner_product_of_the_aligned_weights() -> None:
    x = images(4, 8)
    program = trace(edges(residual, x), x[:2])
    facts = symmetry(program)
    found = WeightMatching(classes="permutation")(Problem(program, facts))
    moved = act(facts, permuted(found.permutations[1]), program.weights[1])
    members = {m.fqn for g in facts.groups for m in g.members} - program.buffers
    expected = sum(float((program.weights[0][n].double() * moved[n].double()).sum()) for n in members)
    assert found.objective[0] == pytest.approx(expected, rel=1e-12)


def test_running_statistics_do_not_sway_weight_matching() -> None:
    x = images(8, 8)
    models = edges(residual, x)
    program = trace(models, x[:2])
    found = WeightMatching(classes="permutation")(Problem(program, symmetry(program)))
    models[1].n0.running_mean.mul_(100)
    models[1].n0.running_var.mul_(1e4)
    program = trace(models, x[:2])
    again = WeightMatching(classes="permutation")(Problem(program, symmetry(program)))
    assert all((found.permutations[1][g] == again.permutations[1][g]).all() for g in found.permutations[1])


@pytest.mark.parametrize("match", [WeightMatching(), WeightMatching(restarts=2), ActivationMatching()])
def test_one_seed_one_answer(match: WeightMatching | ActivationMatching) -> None:
    x = images(16, 8)
    program = trace(edges(residual, x), x[:2])
    facts = symmetry(program)
    statistics = collect(program, data=x, progress=False)
    first, second = (match(Problem(program, facts, statistics, seed=7)) for _ in range(2))
    assert first.objective == second.objective
    for group in facts.groups:
        assert (first.permutations[1][group.index] == second.permutations[1][group.index]).all()


@pytest.mark.parametrize("match", ["weight", "activation"])
def test_each_of_three_edges_is_aligned_to_the_first(match: str) -> None:
    x = images(32, 8)
    model = network(concatenated, x)
    moved = [transported(model, x, seed=seed) for seed in (1, 2)]
    program = trace([model, *(_noisy(twin, seed) for seed, (twin, _, _) in enumerate(moved))], x[:2])
    facts = symmetry(program)
    statistics = collect(program, data=x, progress=False)
    finder = matcher(match)
    assert finder is not None
    found = finder(Problem(program, facts, statistics))
    assert len(found.permutations) == 3
    assert len(found.objective) == len(found.sweeps) == 2
    for edge, (_, own, element) in enumerate(moved, start=1):
        expected = inverse_permutations(own.groups, element)
        silent = _free(statistics, facts, expected, edge)
        for group in own.groups:
            wrong = found.permutations[edge][group.index] != expected[group.index]
            assert not (wrong & ~silent[group.index]).any(), (edge, group.name)


def test_the_first_edge_never_moves_and_every_edge_keeps_its_function() -> None:
    from vfx.passes.align import Align

    x = images(16, 8, dtype=torch.float64)
    models = edges(residual, x, count=3)
    program = trace(models, x[:2])
    result = Align("activation", x, progress=False).run(program)
    aligned = result.program
    assert result.record.error < 1e-10
    assert all(aligned.weights[0][name] is tensor for name, tensor in program.weights[0].items())
    with torch.no_grad():
        for edge, model in enumerate(models):
            torch.testing.assert_close(aligned(x, edge=edge), model(x), rtol=0, atol=1e-10)


def test_assignment_maximises() -> None:
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    permutation, value = assign(gain)
    assert value == pytest.approx(float(gain[torch.arange(6), torch.from_numpy(permutation)].sum()), rel=1e-12)
    rng = np.random.default_rng(0)
    assert all(float(gain.numpy()[np.arange(6), rng.permutation(6)].sum()) <= value for _ in range(500))


class Reversing:
    """A user's own matcher."""

    needs: frozenset[str] = frozenset()
    exact = True

    def __call__(self, problem: Problem) -> Matching:
        swap = {group.index: np.arange(group.size)[::-1].copy() for group in problem.symmetry.groups}
        return Matching((identity(problem.symmetry), permuted(swap)), objective=(0.0,))


def test_a_matching_holds_elements() -> None:
    with pytest.raises(ArgumentError, match="Element"):
        Matching(({}, {0: np.arange(3)}))  # type: ignore[dict-item]


def test_a_matcher_of_the_users_own_is_used() -> None:
    x = images(4, 8)
    models = edges(residual, x)
    result = merge(models, x[:2], match=Reversing(), weights=1.0)
    assert result.report.passes[0] == "Align(Reversing)"
    with torch.no_grad():
        torch.testing.assert_close(result.module(x), models[1](x), rtol=1e-4, atol=1e-4)
    state = result.module.state_dict()
    assert torch.equal(state["stem.bias"], models[1].stem.bias.flip(0))


def test_unknown_matchers_and_missing_data_are_refused() -> None:
    x = images(4, 8)
    models = edges(residual, x)
    assert set(MATCHERS) >= {"weight", "activation"}
    with pytest.raises(ArgumentError, match="choose one of weight, activation"):
        merge(models, x[:2], match="telepathy")
    with pytest.raises(ArgumentError, match="needs data"):
        merge(models, x[:2], match="activation")
    from vfx.passes.align import Align

    with pytest.raises(ArgumentError, match="needs data"):
        compile(models, x[:2], passes=[Align("activation")])


@torch.no_grad()
def test_gpt2_gives_its_permutation_back() -> None:
    """Heads, their channels, the residual stream and tied embeddings of a tiny GPT-2, by both matchers."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn_like(parameter)
        parameter.copy_(1 + noise if "ln" in name and "weight" in name else noise)
    ids = torch.randint(0, 100, (64, 16))
    program = trace(model, {"input_ids": ids[:2]})
    facts = symmetry(program)
    assert sorted(g.blocks for g in facts.groups if g.parent is not None) == [(4, 8)] * 4
    element = random_permutations(facts.groups, np.random.default_rng(0))
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: tensor
        if name in program.buffers
        else tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in act(facts, permuted(element), program.weights[0]).items()
    }
    pair = program.with_weights([program.weights[0], moved])
    statistics = collect(pair, data=[{"input_ids": ids}], progress=False)
    expected = inverse_permutations(facts.groups, element)
    for finder in (WeightMatching(classes="permutation"), ActivationMatching(classes="permutation")):
        found = finder(Problem(pair, facts, statistics)).permutations[1]
        assert all((found[group] == expected[group]).all() for group in expected), type(finder).__name__


@pytest.mark.parametrize("seed", range(5))
def test_a_group_on_both_axes_of_a_weight_never_loses_ground(seed: int) -> None:
    """What the best assignment gains on one axis the other may lose."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(h + self.b(h))

    x = torch.randn(2, 3, dtype=torch.float64)
    program = trace(
        edges(lambda: net(forward, a=nn.Linear(3, 7), b=nn.Linear(7, 7), c=nn.Linear(7, 2)), x, seed=seed), x
    )
    facts, (first, other) = symmetry(program), program.weights
    first, other = ({**weights, "b.weight": 10 * weights["b.weight"]} for weights in (first, other))
    generator, descent = np.random.default_rng(seed), Descent(facts, first, other)
    for _ in range(5):
        start = random_permutations(facts.groups, generator)
        placed = act(facts, permuted(start), other)
        before = sum(float((first[name] * placed[name]).sum()) for name in descent.target)
        assert descent.run(generator, start)[1] >= before - 1e-3  # of some hundreds, in single precision
