"""Planes of rotary embeddings: found in every form, proved, matched; and nothing claimed that does not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfx
from vfx.analyse.classes import Maps, contains, contragredient, draw, turning, turns
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.verify import verify
from vfx.elements import Element, act, check_elements, random_element
from vfx.errors import ArgumentError
from vfx.match.solve import procrustes

TOKENS, HEADS, SIZE, INPUTS = 7, 4, 6, 20
WIDTH = HEADS * SIZE


def _angles(size: int) -> Tensor:
    """(tokens, size / 2)"""
    return torch.outer(torch.arange(TOKENS).float(), 10 ** (-torch.arange(size // 2).float() / 2)) + 0.1


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Attention with rotary embeddings; subclasses differ in one thing."""

    keys = HEADS  # heads of keys
    rotary = SIZE  # channels that are rotated
    form = staticmethod(halves)
    embed = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.normed = nn.Linear(INPUTS, self.embed), nn.LayerNorm(self.embed)
        self.q, self.k = nn.Linear(self.embed, WIDTH), nn.Linear(self.embed, self.keys * SIZE)
        self.v, self.o = nn.Linear(self.embed, self.keys * SIZE), nn.Linear(WIDTH, self.embed)
        self.head = nn.Linear(self.embed, 3)
        angles = _angles(self.rotary)
        wide = angles.repeat_interleave(2, -1) if type(self).form is neighbours else torch.cat([angles, angles], -1)
        self.register_buffer("cos", wide.cos())
        self.register_buffer("sin", wide.sin())

    def turned(self, x: Tensor) -> Tensor:
        own = type(self).form(x[..., : self.rotary], self.cos, self.sin)
        return torch.cat([own, x[..., self.rotary :]], -1) if self.rotary < SIZE else own

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], TOKENS, -1, SIZE).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // self.keys, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.inside(x))
        q, k, v = (self.split(own(x)) for own in (self.q, self.k, self.v))
        found = self.attend(self.turned(q), self.turned(k), v)
        return self.head(x + self.o(found.transpose(1, 2).flatten(2)))


class Neighbours(Attention):
    form = staticmethod(neighbours)


class Shared(Attention):
    keys = 2


class Grouped(Attention):
    keys = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Partly(Attention):
    rotary = 4


class Written(Attention):
    """Softmax of a product, and no operator for the whole."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1) @ v


class Growing(Attention):
    """Queries grow with their position as keys shrink (xPos)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.inside(x))
        q, k, v = (self.split(own(x)) for own in (self.q, self.k, self.v))
        scale = torch.arange(TOKENS).float()[:, None] * torch.tensor([0.1, 0.2, 0.3] * 2)
        found = self.attend(self.turned(q) * scale.exp(), self.turned(k) * (-scale).exp(), v)
        return self.head(x + self.o(found.transpose(1, 2).flatten(2)))


class Packed(Attention):
    """One layer for queries, keys and values, the keys without a bias."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.inside(x))
        found = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        q, k, v = found.view(x.shape[0], TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(x + self.o(self.attend(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2)))


class Fixed(Attention):
    """Heads that differ in the graph: they cannot be permuted, and turn all the same."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v * torch.arange(1.0, 1 + HEADS)[:, None, None])


# nothing may be claimed ---------------------------------------------------------------------------------------------


class Pieces(Fixed):
    """The bias of the queries is put together from those of two pairs of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.randn(WIDTH // 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.inside(x))
        q = self.split(F.linear(x, self.q.weight, torch.cat([self.one, self.other])))
        k, v = self.split(self.k(x)), self.split(self.v(x))
        return self.head(x + self.o(self.attend(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2)))


class Plain(Attention):
    def turned(self, x: Tensor) -> Tensor:
        return x


class Normed(Attention):
    """Queries are normalized with a gain for each channel before they are rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SIZE)

    def turned(self, x: Tensor) -> Tensor:
        return super().turned(self.norm(x))


class Scaled(Attention):
    """A gain for each channel, all ones as long as it was not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(SIZE))

    def turned(self, x: Tensor) -> Tensor:
        return super().turned(x) * self.gain


class Seen(Attention):
    """Queries are used once more."""

    def forward(self, x: Tensor) -> Tensor:
        own = super().forward(x)
        return own + self.q(self.inside(x))[..., :3].tanh()


class Uneven(Attention):
    """The halves are turned by different angles: no planes."""

    def __init__(self) -> None:
        super().__init__()
        self.cos[:, :3] *= torch.linspace(0.5, 1.5, TOKENS)[:, None]


class Tied(Attention):
    """Queries are the keys: z would stand on both."""

    def __init__(self) -> None:
        super().__init__()
        self.k = self.q


FOUND = {
    Attention: (HEADS, SIZE), Neighbours: (HEADS, SIZE), Shared: (2, SIZE), Grouped: (2, SIZE), Partly: (HEADS, 4),
    Written: (HEADS, SIZE), Growing: (HEADS, SIZE), Packed: (HEADS, SIZE), Fixed: (1, WIDTH),
}  # fmt: skip


def _facts(kind: type[Attention]) -> Symmetry:
    torch.manual_seed(0)
    return vfx.symmetry(vfx.trace(kind().eval(), torch.randn(2, TOKENS, INPUTS)))


@pytest.mark.parametrize("kind", FOUND)
def test_planes_are_found_and_proved(kind: type[Attention]) -> None:
    facts = _facts(kind)
    (group,) = facts.rotations
    assert group.blocks == FOUND[kind]
    assert group.kind is Maps.ROTATIONS
    assert not facts.unknown_ops
    assert verify(facts) <= 1e-10
    for member in group.members:
        assert verify(facts, without=(member,)) > 1e-6


@pytest.mark.parametrize("kind", [Plain, Normed, Scaled, Seen, Uneven, Tied, Pieces])
def test_nothing_is_claimed_that_does_not_hold(kind: type[Attention]) -> None:
    facts = _facts(kind)
    assert facts.rotations == ()
    assert verify(facts) <= 1e-10


def test_a_map_one_step_larger_fails() -> None:
    """Any invertible map of a plane, or a reflection, changes the function."""
    facts = _facts(Attention)
    program = facts.program.to("cpu", torch.float64)
    (group,) = facts.rotations
    x = torch.randn(3, TOKENS, INPUTS, dtype=torch.float64)
    before = program(x)

    def after(matrix: np.ndarray) -> Tensor:
        wide = np.stack([np.kron(np.eye(SIZE // 2), matrix)] * HEADS)
        weights = act(facts, {group.index: Element(matrix=wide)}, program.weights[0])
        return program.with_weights([weights])(x)

    assert (after(turning(np.array([0.3 - 1.7j]))) - before).abs().max() < 1e-12
    for larger in (np.diag([1.0, -1.0]), np.diag([1.0, 2.0]), np.array([[1.0, 0.5], [0.0, 1.0]])):
        assert (after(larger) - before).abs().max() > 1e-4
    with pytest.raises(ArgumentError, match="rotations of planes"):
        check_elements(facts, {group.index: Element(matrix=np.stack([np.eye(SIZE)[::-1]] * HEADS))})


@pytest.mark.parametrize("kind", [Attention, Shared, Packed, Partly, Fixed])
@pytest.mark.parametrize("match", ["weight", "activation"])
def test_matching_brings_a_turned_network_back(kind: type[Attention], match: str) -> None:
    facts = _facts(kind)
    program = facts.program.to("cpu", torch.float64)
    moved = act(facts, random_element(facts, np.random.default_rng(1)), program.weights[0])
    both, data = (
        program.with_weights([program.weights[0], moved]),
        [torch.randn(64, TOKENS, INPUTS, dtype=torch.float64)],
    )
    x = torch.randn(8, TOKENS, INPUTS, dtype=torch.float64)

    def error(classes: str) -> float:
        aligned = vfx.Align(match, data if match == "activation" else None, classes=classes, progress=False)(both)
        return float((vfx.Interpolate(0.5)(aligned)(x) - program(x)).abs().max())

    assert error("full") < 1e-9
    assert error("permutation") > 1e-3


def test_statistics_of_turned_queries_are_known() -> None:
    """REPAIR's goals for a layer that makes queries are those of the turned ones."""
    facts = _facts(Attention)
    program = facts.program.to("cpu", torch.float64)
    (group,) = facts.rotations
    chosen = {group.index: random_element(facts, np.random.default_rng(2))[group.index]}
    moved = act(facts, chosen, program.weights[0])
    both, data = (
        program.with_weights([program.weights[0], moved]),
        [torch.randn(64, TOKENS, INPUTS, dtype=torch.float64)],
    )
    aligned = vfx.Align("activation", data, progress=False)(both)
    assert any(name.startswith("linear") for name in aligned.goals)
    for goal in aligned.goals.values():
        assert torch.allclose(goal.mean[0], goal.mean[1], atol=1e-8)
        assert torch.allclose(goal.std[0], goal.std[1], atol=1e-8)


def test_turning_and_its_numbers() -> None:
    generator = np.random.default_rng(0)
    matrix = draw(Maps.ROTATIONS, 8, generator)
    assert contains(Maps.ROTATIONS, matrix)
    assert not contains(Maps.ROTATIONS, np.eye(8)[::-1])
    assert np.abs(turning(turns(matrix)) - matrix).max() < 1e-15
    assert np.abs(turns(contragredient(matrix)) - 1 / turns(matrix).conj()).max() < 1e-12


def test_procrustes_of_planes_against_a_search() -> None:
    gain = np.random.default_rng(0).standard_normal((4, 4))
    found, value = procrustes(gain, Maps.ROTATIONS)
    angles = np.exp(1j * np.linspace(0, 2 * np.pi, 2001))
    best = sum(max((turning(z[None]) * gain[p : p + 2, p : p + 2]).sum() for z in angles) for p in (0, 2))
    assert contains(Maps.ROTATIONS, found)
    assert 0 <= value - best < 1e-4
