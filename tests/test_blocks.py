"""Groups inside the blocks of another: found where every operator treats blocks one by one, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from conftest import images, network
from micro_models import conv, net
from test_matching import Attention, grouped, resnext_block
from torch import Tensor, nn

from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import verify
from vfx.api import symmetry, trace
from vfx.elements import (
    act,
    compose_permutations,
    inverse_permutations,
    permuted,
    random_permutations,
    still_permutations,
)

EXACT = 1e-10
X = images(4, 8)


class Heads(nn.Module):
    """Self-attention over patches with variations: width 12, three heads of four."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(4 if kind == "averaged heads" else 12, 12)
        self.head = nn.Linear(12, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.bias = nn.Parameter(torch.randn(3, 4, 4))
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(2, (3, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "query norm":
            q, k = self.norm(q), self.norm(k)
        scores = q @ k.transpose(-2, -1)
        if self.kind == "bias and scale":
            scores = scores * self.scale + self.bias
        if self.kind == "talking heads":
            scores = self.mix(scores.movedim(1, -1)).movedim(-1, 1)
        if self.kind == "softmax over heads":
            v = v.softmax(1)
        y = torch.einsum("bhls,bhsd->bhld", scores.softmax(-1), v) if self.kind == "letters" else scores.softmax(-1) @ v
        y = y.mean(1) if self.kind == "averaged heads" else y.transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


class GroupedQueries(nn.Module):
    """Six query heads, two key-value heads: heads are (2, 3)."""

    def __init__(self, fused: bool = False, interleaved: bool = False) -> None:
        super().__init__()
        self.fused, self.interleaved = fused, interleaved
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out, self.head = nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q = self.q(x).unflatten(2, (6, 4)).transpose(1, 2)
        k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.k, self.v))
        if self.interleaved:
            k, v = (t.repeat_interleave(3, 1) for t in (k, v))
        elif not self.fused:
            k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.fused).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


def group_norm() -> nn.Module:
    """Groups of channels are normalised: channels move within their group, groups as a whole."""
    return net(
        lambda self, x: self.fc(F.relu(self.norm(self.a(x))).mean((2, 3))),
        a=conv(3, 12),
        norm=nn.GroupNorm(3, 12),
        fc=nn.Linear(12, 4),
    )


def group_norm_across() -> nn.Module:
    """A grouped convolution whose groups cut across those of the norm behind it."""
    return net(
        lambda self, x: self.fc(F.relu(self.norm(self.b(F.relu(self.a(x))))).mean((2, 3))),
        a=conv(3, 12),
        b=conv(12, 12, groups=2),
        norm=nn.GroupNorm(6, 12),
        fc=nn.Linear(12, 4),
    )


def shuffled() -> nn.Module:
    """Channel shuffle spreads each group over the groups of the next convolution."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(self.a(F.relu(self.stem(x))))
        x = x.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
        return self.fc(F.relu(self.b(x)).mean((2, 3)))

    return net(forward, stem=conv(3, 9), a=conv(9, 9, groups=3), b=conv(9, 9, groups=3), fc=nn.Linear(9, 4))


def two_axes() -> nn.Module:
    """An outer product without any operator that knows of heads: a row's columns may not move on their own."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.fc((self.a(x)[:, :, None] * self.b(x)[:, None]).softmax(1).square().sum(1))

    return net(forward, a=nn.Linear(3, 5), b=nn.Linear(3, 4), fc=nn.Linear(4, 2))


# name: (network, blocks of the groups that have any)
TABLE: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int]]]] = {
    "packed qkv": (Attention, [(3, 4), (3, 4)]),
    "plain": (lambda: Heads("plain"), [(3, 4), (3, 4)]),
    "bias and scale": (lambda: Heads("bias and scale"), [(3, 4), (3, 4)]),
    "talking heads": (lambda: Heads("talking heads"), [(3, 4), (3, 4)]),
    "letters": (lambda: Heads("letters"), [(3, 4), (3, 4)]),
    "query norm": (lambda: Heads("query norm"), [(3, 4)]),  # one norm for all heads: only v's channels are free
    "averaged heads": (lambda: Heads("averaged heads"), [(3, 4)]),  # v's channels meet in the mean: only q and k's
    "softmax over heads": (lambda: Heads("softmax over heads"), [(3, 4)]),  # the same channel of all heads is compared
    "grouped queries": (GroupedQueries, [(2, 3), (2, 4), (2, 4)]),
    "grouped queries, interleaved": (lambda: GroupedQueries(interleaved=True), [(2, 3), (2, 4), (2, 4)]),
    "grouped queries, fused": (lambda: GroupedQueries(fused=True), [(2, 3), (2, 4), (2, 4)]),
    "grouped convolution": (grouped, [(3, 4), (3, 4)]),
    "resnext": (resnext_block, [(4, 3), (4, 5)]),
    "group norm": (group_norm, [(3, 4)]),
    "group norm across": (group_norm_across, [(2, 2), (2, 3), (2, 6)]),  # one level: 2 × (3 × 2)
    "shuffled": (shuffled, [(3, 3), (3, 3)]),  # a channel of each group: one of each reaches every later group
    "two axes": (two_axes, []),
}
_found: dict[str, Symmetry] = {}


def _symmetry(name: str) -> Symmetry:
    if name not in _found:
        _found[name] = symmetry(trace(network(TABLE[name][0], X), X[:2]))
    return _found[name]


def _with_parent(facts: Symmetry, inner: int, outer: int | None) -> Symmetry:
    """The same groups, one of them put inside the blocks of another."""
    blocks = facts.groups[outer].size if outer is not None else 1
    groups = [replace(g, parent=outer, outer=blocks) if g.index == inner else g for g in facts.groups]
    return replace(facts, groups=tuple(groups))


@pytest.mark.parametrize("name", TABLE)
def test_blocks_are_what_reason_finds(name: str) -> None:
    facts = _symmetry(name)
    assert sorted(group.blocks for group in facts.groups if group.parent is not None) == TABLE[name][1]
    assert verify(facts) <= EXACT
    assert verify(facts, seed=1) <= EXACT
    assert not facts.unknown_ops


@pytest.mark.parametrize("name", TABLE)
def test_no_other_group_may_move_inside_blocks(name: str) -> None:
    """A group that was left whole changes the function if it is put inside another's blocks, where that is possible."""
    facts = _symmetry(name)
    outer = {group.parent for group in facts.groups}
    for inner in facts.groups:
        for other in facts.groups:
            if inner.parent is not None or other.parent is not None or inner is other or inner.index in outer:
                continue
            try:
                error = verify(_with_parent(facts, inner.index, other.index))
            except AssertionError:  # some tensor has the inner group's channels without blocks
                continue
            assert error > 1e-6, (inner.name, other.name)


def test_putting_a_group_inside_blocks_by_hand_is_seen() -> None:
    """The control of the test above: it does meet groups that can be put there, and fail there."""
    facts = _symmetry("query norm")
    shared = next(g for g in facts.groups if any(m.fqn == "norm.weight" for m in g.members))
    heads = next(g.parent for g in facts.groups if g.parent is not None)
    assert shared.parent is None
    with pytest.raises(AssertionError, match="stands on no other axis"):
        verify(_with_parent(facts, shared.index, heads))
    facts = _symmetry("softmax over heads")
    shared = next(g for g in facts.groups if any(m.fqn == "v.weight" for m in g.members) and g.size == 4)
    heads = next(g.parent for g in facts.groups if g.parent is not None)
    assert verify(_with_parent(facts, shared.index, heads)) > 1e-3


@pytest.mark.parametrize("name", ["plain", "resnext", "group norm"])
def test_leaving_out_a_member_changes_the_function(name: str) -> None:
    facts = _symmetry(name)
    for group in facts.groups:
        for member in group.members:
            if member.fqn != "k.bias":  # the same for every key: the softmax does not see it
                assert verify(facts, without=(member,)) > 1e-8, member


@pytest.mark.parametrize("name", ["packed qkv", "grouped queries", "resnext", "group norm across"])
def test_elements_form_a_group(name: str) -> None:
    facts = _symmetry(name)
    generator = np.random.default_rng(0)
    a, b, c = (random_permutations(facts.groups, generator) for _ in range(3))
    weights = facts.program.weights[0]
    both = act(facts, permuted(b), act(facts, permuted(a), weights))
    for key, tensor in act(facts, permuted(compose_permutations(facts.groups, a, b)), weights).items():
        assert torch.equal(tensor, both[key]), key
    neutral = still_permutations(facts.groups)
    for other in (
        compose_permutations(facts.groups, a, inverse_permutations(facts.groups, a)),
        compose_permutations(facts.groups, inverse_permutations(facts.groups, a), a),
    ):
        assert all((other[g] == neutral[g]).all() for g in neutral)
    left, right = (
        compose_permutations(facts.groups, compose_permutations(facts.groups, a, b), c),
        compose_permutations(facts.groups, a, compose_permutations(facts.groups, b, c)),
    )
    assert all((left[g] == right[g]).all() for g in neutral)
    assert any(
        (compose_permutations(facts.groups, a, b)[g] != compose_permutations(facts.groups, b, a)[g]).any()
        for g in neutral
    )


def test_one_order_for_all_blocks_is_that_order_in_each() -> None:
    facts = _symmetry("packed qkv")
    element = random_permutations(facts.groups, np.random.default_rng(3))
    short = {g.index: element[g.index][0] if g.parent is not None else element[g.index] for g in facts.groups}
    long = compose_permutations(facts.groups, short, still_permutations(facts.groups))
    one, other = (act(facts, permuted(e), facts.program.weights[0]) for e in (short, long))
    assert all(torch.equal(one[name], other[name]) for name in one)
    undone = compose_permutations(facts.groups, short, inverse_permutations(facts.groups, short))
    assert all((undone[g] == p).all() for g, p in still_permutations(facts.groups).items())


@pytest.mark.parametrize(
    ("build", "size", "groups", "blocks"),
    [(lambda: tv.resnext50_32x4d(), 64, 53, 32), (lambda: tv.regnet_x_400mf(), 64, 71, 44)],
    ids=["resnext50", "regnet_x_400mf"],
)
def test_grouped_convolutions_of_real_networks(
    build: Callable[[], nn.Module], size: int, groups: int, blocks: int
) -> None:
    torch.manual_seed(0)
    facts = symmetry(trace(build().eval(), torch.randn(2, 3, size, size)))
    inner = [group for group in facts.groups if group.parent is not None]
    assert (len(facts.groups), len(inner)) == (groups, blocks)
    assert all(group.blocks[0] == facts.groups[group.parent].size for group in inner)  # type: ignore[index]
    assert verify(facts) <= EXACT
