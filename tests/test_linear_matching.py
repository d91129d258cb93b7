"""What every linear matching method owes: A and π(A) give back A, and the order of an edge's channels does not matter.

The table of networks is that of ``test_matching``; a new method gets all tests by one line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, edges, images
from test_matching import SMALL, Case
from torch import Tensor
from vfx.passes.align import Align
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.interpolate import Interpolate
from vfx.passes.transform import Transform

from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.api import collect, merge, trace
from vfx.elements import act, behind_exact, permuted, random_permutations
from vfx.errors import ArgumentError
from vfx.match.cca import CCAMerging
from vfx.match.linear import Features, LinearMatching, Solution, _explained
from vfx.match.zipit import ZipIt
from vfx.program import Program
from vfx.statistics.moments import CrossMoments

METHODS: dict[str, Callable[[], LinearMatching]] = {
    "zipit": ZipIt,
    "zipit between edges": lambda: ZipIt(b=0),
    "cca": CCAMerging,
}
EDGES = 3

_subjects: dict[str, tuple[Program, Symmetry, Tensor]] = {}


def _subject(case: Case) -> tuple[Program, Symmetry, Tensor]:
    """Three independent networks, BatchNorms folded, and the pictures they see."""
    if case.name not in _subjects:
        x = images(case.count, case.size, dtype=torch.float64)
        program = FoldNormalization(batch_norm=True, verify=False)(trace(edges(case.build, x, EDGES), x[:2]))
        _subjects[case.name] = program, symmetry(program), x
    return _subjects[case.name]


def _chosen(program: Program, *weights: dict[str, Tensor]) -> Program:
    return replace(program, weights=tuple(weights))


def _merged(program: Program, method: LinearMatching, x: Tensor, cut: int = 0) -> Program:
    alphas = None
    for one in (
        Align(method, x.split(16), verify=False, progress=False),
        DuplicateBranches(cut, alphas),
        Transform(),
        Interpolate(alphas),
    ):
        program = one(program)
    return program


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_network_and_its_permutations_give_it_back(case: Case, method: str) -> None:
    program, facts, x = _subject(case)
    first = program.weights[0]
    element = random_permutations(facts.groups, np.random.default_rng(1))
    found = Align(METHODS[method](), x, progress=False)(_chosen(program, first, act(facts, permuted(element), first)))
    merged = Interpolate()(Transform()(found))
    close(merged(x), program(x), 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_order_of_an_edges_channels_does_not_matter(case: Case, method: str) -> None:
    program, facts, x = _subject(case)
    element = random_permutations(facts.groups, np.random.default_rng(2))
    for count in (2, 3) if case is SMALL[0] else (2,):
        own = program.weights[:count]
        expected = _merged(_chosen(program, *own), METHODS[method](), x)(x)
        moved = _chosen(program, *own[:-1], act(facts, permuted(element), own[-1]))
        close(_merged(moved, METHODS[method](), x)(x), expected, 1e-5)
        assert (program(x) - expected).abs().max() > 1e-3 * expected.abs().max(), "merging must change something"


@pytest.mark.parametrize("method", METHODS)
def test_preserved_layers_are_joined_in_the_common_space(method: str) -> None:
    """At the deepest cut of a chain the merged classifier reads Σ αᵢ Tᵢ xᵢ with the weight Σ αᵢ Wᵢ Uᵢ."""
    case = SMALL[1]
    program, facts, x = _subject(case)
    program = _chosen(program, *program.weights[:2])
    result = Align(METHODS[method](), x, progress=False).run(program)
    aligned = merged = result.program
    assert result.record.matching is not None
    for one in (DuplicateBranches(3, join="activation"), Transform(), Interpolate()):
        merged = one(merged)
    expected = torch.zeros(())
    features, weights, bias = [], [], []
    for edge in range(2):
        own = aligned.weights[edge]
        maps, axis = behind_exact(result.record.matching.elements[edge]), dict(facts.axes_of("fc.weight"))[1]
        merge, unmerge = torch.eye(18, dtype=torch.float64), torch.eye(18, dtype=torch.float64)
        for group, (matrix) in ((facts.groups[g], m) for g, m in maps.items()):
            member = next((m for m in group.members if m.fqn == "fc.weight"), None)
            if member is not None:
                where = torch.from_numpy(member.position[:, 0])
                merge[where[:, None], where] = torch.from_numpy(matrix.matrix)
                unmerge[where[:, None], where] = torch.from_numpy(matrix.dual.mT)
        assert len(axis) == 18
        features.append(0.5 * _penultimate(own, x) @ merge.T)
        weights.append(0.5 * own["fc.weight"] @ unmerge)
        bias.append(0.5 * own["fc.bias"])
    expected = sum(features) @ sum(weights).T + sum(bias)  # type: ignore[union-attr]
    close(merged(x), expected, 1e-12)


def _penultimate(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The values in front of ``fc`` in the network ``concatenated``."""

    def layer(name: str, value: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(value, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()

    a = layer("a", x)
    b = layer("b", torch.cat([a, x], 1))
    c = layer("c", torch.cat([b, a], 1))
    return torch.cat([a, c, b], 1).mean((2, 3))


def test_maps_of_heads_stand_in_matched_blocks() -> None:
    """Values and outputs of attention are mapped inside each pair of matched heads; queries and keys are permuted."""
    case = next(case for case in SMALL if case.name == "attention")
    program, facts, x = _subject(case)
    matching = Align(CCAMerging(), x, progress=False).run(_chosen(program, *program.weights[:2])).record.matching
    assert matching is not None
    maps = behind_exact(matching.elements[1])
    inner = [group for group in facts.groups if group.parent is not None]
    mapped = [group for group in inner if group.index in maps]
    assert len(inner) == 2
    assert len(mapped) == 1
    assert maps[mapped[0].index].matrix.shape == (3, 4, 4)
    assert all(facts.groups[group.parent].index not in maps for group in mapped if group.parent is not None)


def test_a_wrong_map_is_seen() -> None:
    """Negative control of the two tests of networks."""
    program, _, x = _subject(SMALL[1])
    aligned = Align(CCAMerging(), x, progress=False)(_chosen(program, *program.weights[:2]))
    right = Interpolate()(Transform()(aligned))(x)
    index, own = next(iter(aligned.transport.elements[1].items()))
    aligned.transport.elements[1][index] = replace(own, dual=own.dual[:, ::-1])
    assert (Interpolate()(Transform()(aligned))(x) - right).abs().max() > 1e-3 * right.abs().max()


class Scrambled(LinearMatching):
    """Permutations of the common space must not change anything but the order of channels in the middle."""

    title = "scrambled"

    def __init__(self, seed: int):
        self.seed = seed

    def solve(self, features: Features) -> Solution:
        found = CCAMerging().solve(features)
        order = np.random.default_rng(self.seed).permutation(features.size)
        return Solution([own[order] for own in found.merge], [own[:, order] for own in found.unmerge])


def test_the_order_of_the_common_channels_does_not_matter() -> None:
    program, _, x = _subject(SMALL[2])
    program = _chosen(program, *program.weights[:2])
    expected = _merged(program, CCAMerging(), x)
    found = _merged(program, Scrambled(3), x)
    for name, tensor in expected.weights[0].items():
        close(found.weights[0][name], tensor, 1e-9)


def test_pooled_moments_are_those_of_the_features() -> None:
    """Covariance, second moment and correlation of two taps, edge by edge, against their definitions."""
    generator = torch.Generator().manual_seed(0)
    taps = [[torch.randn(4, n, generator=generator, dtype=torch.float64).exp() for _ in range(2)] for n in (50, 70)]
    moments = []
    for values in taps:
        cross = CrossMoments(2, 4, within=True)
        cross.update([value.clone() for value in values])
        moments.append((cross, (torch.arange(4), torch.tensor([2, 0, 3, 1]))))
    _, facts, _ = _subject(SMALL[0])
    group = replace(facts.groups[0], size=4)
    features = Features(group, (0.5, 0.5), tuple(moments))
    rows = [[values[0], values[1][[2, 0, 3, 1]]] for values in taps]
    for i in range(2):
        for j in range(2):
            covariance = sum(np.cov(r[i].numpy(), r[j].numpy(), bias=True)[:4, 4:] for r in rows) / 2
            correlation = sum(np.corrcoef(r[i].numpy(), r[j].numpy())[:4, 4:] for r in rows) / 2
            second = sum(r[i] @ r[j].T / r[i].shape[1] for r in rows) / 2
            close(features.covariance[i, j], covariance, 1e-12)
            close(features.correlation[i, j], correlation, 1e-12)
            close(features.second[i, j], second, 1e-12)


@pytest.mark.parametrize("match", ["zipit", "cca"])
def test_statistics_need_second_moments_inside_each_edge(match: str) -> None:
    program, _, x = _subject(SMALL[1])
    program = _chosen(program, *program.weights[:2])
    with pytest.raises(ArgumentError, match="within"):
        merge(program, data=x, statistics=collect(program, data=x, progress=False), match=match, progress=False)
    with pytest.raises(ArgumentError, match="data"):
        merge(program, match=match, progress=False)


def test_the_objective_is_the_share_of_the_variance_that_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    x, u = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((50, 4), (4, 4)))
    z = x @ torch.randn(4, 4, generator=generator, dtype=torch.float64) + 0.3 * x.flip(0)
    whole = torch.cov(torch.cat([x, z], 1).T, correction=0)
    expected = 1 - (x - z @ u.T).var(0, correction=0).sum() / x.var(0, correction=0).sum()
    assert abs(_explained(whole[:4, :4], whole[4:, :4], whole[4:, 4:], u) - float(expected)) <= 1e-12 * abs(expected)
