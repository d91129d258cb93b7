"""Linear maps of groups: on a linear network T and T⁻¹ change nothing, in the weights and on the join edge alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, edges
from micro_models import conv, net
from torch import Tensor, nn
from vfx.passes.align import Align
from vfx.passes.duplicate_branches import DuplicateBranches
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.interpolate import Interpolate
from vfx.passes.transform import Transform

from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.api import trace
from vfx.elements import Element, Permutations, permuted, random_permutations, still_permutations
from vfx.errors import PassError
from vfx.match.maps import mappable
from vfx.match.matcher import Matching, Problem
from vfx.program import Program

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Random:
    """Random permutations, and random invertible maps behind them, for every group that can be mapped."""

    needs: frozenset[str] = frozenset()
    exact = False

    def __call__(self, problem: Problem) -> Matching:
        rng = np.random.default_rng(problem.seed)
        facts = problem.symmetry
        moved = [still_permutations(facts.groups)]
        moved += [random_permutations(facts.groups, rng) for _ in range(problem.program.edges - 1)]
        return Matching(tuple(_elements(facts, own, rng) for own in moved))


def _elements(facts: Symmetry, permutations: Permutations, rng: np.random.Generator) -> dict[int, Element]:
    """Permutations and, behind those of groups that can be mapped, T and T⁻¹."""
    found = permuted(permutations)
    for group in facts.groups:
        if mappable(facts, group):
            shape = (group.size,) * 2 if group.parent is None else (group.outer, group.size, group.size)
            behind = np.eye(group.size) + 0.3 * rng.standard_normal(shape) / group.size**0.5
            matrix = behind @ np.eye(group.size)[permutations[group.index]]
            found[group.index] = Element(permutations[group.index], matrix, dual=np.linalg.inv(matrix).mT)
    return found


def chain() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x))).flatten(1))

    return net(forward, a=conv(3, 6), b=conv(6, 5), c=conv(5, 4), fc=nn.Linear(4 * 64, 3))


def stream() -> nn.Module:
    """A residual stream that crosses every cut, and a position table that adds to it."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = self.stem(x) + self.table
        s = s + self.a2(self.a1(s))
        s = s + self.b2(self.b1(s))
        return self.fc(s.mean((2, 3)))

    return net(
        forward,
        stem=conv(3, 6),
        a1=conv(6, 5),
        a2=conv(5, 6),
        b1=conv(6, 4),
        b2=conv(4, 6),
        fc=nn.Linear(6, 3),
        table=nn.Parameter(torch.randn(6, 1, 1)),
    )


NETWORKS = {"chain": chain, "stream": stream}


def _program(name: str) -> Program:
    return trace(edges(NETWORKS[name], X), X[:2])


@pytest.mark.parametrize("name", NETWORKS)
def test_invertible_maps_keep_the_function_of_linear_networks(name: str) -> None:
    program = _program(name)
    moved = Transform()(Align(Random(), seed=1)(program))
    assert moved.transport is None
    for edge in range(2):
        close(moved(X, edge=edge), program(X, edge=edge), 1e-12)
        assert not torch.equal(moved.weights[edge]["a1.weight" if name == "stream" else "b.weight"],
                               program.weights[edge]["a1.weight" if name == "stream" else "b.weight"])  # fmt: skip


@pytest.mark.parametrize("join", ["preactivation", "activation"])
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_on_the_join_edge_are_exact(name: str, join: str) -> None:
    """With all the weight on one edge, the merged network is that edge, at every cut."""
    program = _program(name)
    total = 4 if name == "chain" else 6
    for cut in range(total + 1):
        for edge, alpha in enumerate((0.0, 1.0)):
            merged = program
            for one in (Align(Random(), seed=2), DuplicateBranches(cut, alpha, join), Transform(), Interpolate(alpha)):  # type: ignore[arg-type]
                merged = one(merged)
            close(merged(X), program(X, edge=edge), 1e-11)


def test_a_map_that_ends_a_branch_goes_into_its_last_layer() -> None:
    program = Align(Random(), seed=3)(_program("chain"))
    names = DuplicateBranches(2, 0.5)(program).names()
    assert not any("joins" in name for name in names)
    inside = DuplicateBranches(2, 0.5)(Align(Random(), seed=3)(_program("stream"))).names()
    assert [name for name in inside if "joins" in name], "the stream is read inside the branch too"


def test_maps_must_be_put_in_before_interpolation() -> None:
    with pytest.raises(PassError, match="Transform"):
        Interpolate(0.5)(Align(Random(), seed=4)(_program("chain")))


def test_a_wrong_inverse_is_seen() -> None:
    """Negative control."""
    program = Align(Random(), seed=5)(_program("chain"))
    index, own = next(iter(program.transport.elements[1].items()))
    program.transport.elements[1][index] = replace(own, dual=own.matrix.mT)
    assert (Transform()(program)(X, edge=1) - program(X, edge=1)).abs().max() > 1e-3


def test_batch_norms_of_every_edge_are_folded() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.a(x)).relu().mean((2, 3)))

    def build() -> nn.Module:
        return net(forward, a=conv(3, 6), norm=nn.BatchNorm2d(6), fc=nn.Linear(6, 3))

    program = trace(edges(build, X), X[:2])
    folded = FoldNormalization(batch_norm=True)(program)
    assert "batch_norm" not in str(folded.graph)
    for edge in range(2):
        close(folded(X, edge=edge), program(X, edge=edge), 1e-12)


def test_what_no_dense_map_goes_through() -> None:
    """Heads of queries and keys, tied embeddings and groups of a depthwise convolution's own are not mapped."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(self.depthwise(self.a(x)).mean((2, 3))) @ self.code @ self.code.T

    build = net(forward, a=conv(3, 6), depthwise=nn.Conv2d(6, 6, 3, groups=6), fc=nn.Linear(6, 5),
                code=nn.Parameter(torch.randn(5, 7)))  # fmt: skip
    facts = symmetry(trace(build.double(), X[:2]))
    found = {group.name: mappable(facts, group) for group in facts.groups}
    assert found["a.weight"]
    assert not found["code"]
