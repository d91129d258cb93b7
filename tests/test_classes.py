"""The class of every axis: each operator's, proved with random maps, and refuted one step up the lattice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from micro_models import conv, linear, net, parameter
from torch import Tensor, nn

from vfx.analyse.classes import Maps, contains, contragredient, draw, meet
from vfx.analyse.drawing import to_networkx
from vfx.analyse.groups import Group
from vfx.analyse.slots import Slots, nullspace
from vfx.analyse.symmetry import Symmetry, symmetry
from vfx.analyse.verify import randomise, verify
from vfx.capture.capture import capture
from vfx.elements import Element, act, check_elements, permuted, random_element, random_permutations
from vfx.elements.parts import mapped, parts
from vfx.errors import ArgumentError
from vfx.program import run
from vfx.proof import Trial, in_double, random_inputs

EXACT, BROKEN = 1e-11, 1e-5
ALL = [own for own in Maps.__members__.values() if own is not Maps.ROTATIONS]
P, S, A, M = Maps.PERMUTATION, Maps.SIGNED, Maps.POSITIVE_MONOMIAL, Maps.MONOMIAL
ONES, Q, L = Maps.ORTHOGONAL_ONES, Maps.ORTHOGONAL, Maps.LINEAR
COVERS = {P: (S, A, ONES), S: (M, Q), A: (M,), M: (L,), ONES: (Q,), Q: (L,), L: ()}


# the lattice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), list(product(ALL, ALL)))
def test_the_meet_is_what_both_classes_hold(left: Maps, right: Maps) -> None:
    below = {one for one in ALL if one & left == one and one & right == one}
    assert meet(left, right) is meet(right, left)
    assert meet(left, right) in below
    assert all(meet(one, meet(left, right)) is one for one in below)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [(Q, M, S), (ONES, M, P), (ONES, Q, ONES), (A, S, P), (A, Q, P), (L, A, A), (M, S, S)],
)
def test_meets_by_hand(left: Maps, right: Maps, expected: Maps) -> None:
    assert meet(left, right) is expected


@pytest.mark.parametrize("maps", ALL)
def test_drawn_elements_belong_to_their_class_and_to_no_smaller_one(maps: Maps) -> None:
    matrix = draw(maps, 7, np.random.default_rng(1))
    assert matrix.dtype == np.float64
    assert np.linalg.cond(matrix) < 5
    for other in ALL:
        assert contains(other, matrix) == (meet(other, maps) is maps)
    np.testing.assert_allclose(contragredient(matrix).T @ matrix, np.eye(7), atol=1e-12)
    if meet(maps, Q) is maps:
        np.testing.assert_allclose(contragredient(matrix), matrix, atol=1e-12)


def test_equations_of_scales_are_solved() -> None:
    # z = x + y, w = 2 z, w = x: y = -x/2
    found = nullspace(range(4), [{0: 1, 1: 1, 2: -1}, {2: 2, 3: -1}, {3: 1, 0: -1}])
    values = {x: {y: float(c) for y, c in row.items()} for x, row in found.items()}
    free = {0: 3.0, 1: 5.0, 2: 7.0, 3: 11.0}
    number = {x: sum(c * free[y] for y, c in row.items()) for x, row in values.items()}
    assert number[0] + number[1] == number[2]
    assert number[3] == 2 * number[2] == number[0]
    assert any(number.values())
    assert nullspace([0, 1], [{0: 1, 1: 1}, {0: 1, 1: -1}]) == {0: {}, 1: {}}
    assert nullspace([0, 1], [{0: 1, 1: 1}, {0: 1, 1: -1}], 2) == {0: {0: 1}, 1: {0: 1}}


def test_a_map_that_meets_its_dual_is_orthogonal() -> None:
    slots = Slots()
    a, b, c = (slots.fresh(0) for _ in range(3))
    slots.tie(a, b, dual=True)
    slots.tie(b, c, dual=True)
    assert slots.maps(slots.find(a)[0]) is L
    assert slots.find(a)[1] == slots.find(c)[1] != slots.find(b)[1]
    slots.tie(a, c, dual=True)
    assert slots.maps(slots.find(a)[0]) is Q


# each operator's class ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A network with one hazard: the class of each of its groups by the parameter that first makes the feature.

    A list gives the classes of the groups of that name in the order of their sizes.
    """

    name: str
    build: Callable[[], nn.Module]
    kinds: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ((4, 5),)

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)


IMAGE, TOKENS = ((3, 3, 6, 6),), ((3, 6, 5),)


def chain(middle: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], nn.Module]:
    """Linear, a function of seven features, linear."""
    return lambda: net(lambda s, x: s.b(middle(s.a(x))), a=nn.Linear(5, 7, **options), b=nn.Linear(7, 3))


def within(middle: Callable[..., Tensor], out: int = 7, **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Linear, modules on seven features, linear."""
    return lambda: net(
        lambda s, x: s.b(middle(s, s.a(x))),
        a=nn.Linear(5, 7),
        b=nn.Linear(out, 3),
        **{name: part() for name, part in parts.items()},
    )


def maps_of(middle: Callable[..., Tensor], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Convolution, modules on six channels, convolution, mean."""
    return lambda: net(
        lambda s, x: s.b(middle(s, s.a(x))).mean((2, 3)),
        a=conv(3, 6),
        b=conv(6, 3),
        **{name: part() for name, part in parts.items()},
    )


def attended(s: Any, x: Tensor) -> Tensor:
    n, tokens, _ = x.shape
    q, k, v = s.qkv(x).view(n, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = (s.norm(y) if hasattr(s, "norm") else y for y in (q, k))
    q, k = (F.normalize(y, dim=-1) if hasattr(s, "cosine") else y for y in (q, k))
    return s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, 8))


def attention(**parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: net(
        attended, qkv=nn.Linear(5, 24), out=nn.Linear(8, 3), **{name: part() for name, part in parts.items()}
    )


def grouped(s: Any, x: Tensor) -> Tensor:
    n, tokens, _ = x.shape
    q = s.q(x).view(n, tokens, 6, 3).transpose(1, 2)
    k, v = (f(x).view(n, tokens, 2, 3).transpose(1, 2) for f in (s.k, s.v))
    return s.c(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def written_out(s: Any, x: Tensor) -> Tensor:
    scores = (s.q(x) @ s.k(x).transpose(1, 2) / 2).softmax(-1)
    return s.c(scores @ s.v(x))


def mean_square(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def standard(h: Tensor) -> Tensor:
    return mean_square(h - h.mean(-1, keepdim=True))


def pre_norm(norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A residual stream of seven features with one block."""
    return within(lambda s, h: h + s.d(F.gelu(s.c(s.norm(h)))), norm=norm, c=linear(7, 6), d=linear(6, 7))


CASES = [
    Case("linear", chain(lambda h: h), {"a.weight": L}),
    Case("linear_without_bias", chain(lambda h: h, bias=False), {"a.weight": L}),
    Case("scaled", chain(lambda h: 3 * h / 2), {"a.weight": L}),
    Case("doubled", chain(lambda h: h + h), {"a.weight": L}),
    Case("negated", chain(lambda h: -h), {"a.weight": L}),
    Case("shifted", chain(lambda h: h + 3), {"a.weight": ONES}),
    Case("relu", chain(F.relu), {"a.weight": A}),
    Case("leaky_relu", chain(F.leaky_relu), {"a.weight": A}),
    Case("clamp_at_zero", chain(lambda h: h.clamp(min=0)), {"a.weight": A}),
    Case("abs", chain(torch.abs), {"a.weight": A}),
    Case("prelu", within(lambda s, h: s.act(h), act=lambda: nn.PReLU(7)), {"a.weight": A}),
    Case("prelu_shared", within(lambda s, h: s.act(h), act=nn.PReLU), {"a.weight": A}),
    Case("maximum", within(lambda s, h: torch.maximum(h, s.c(h)), c=linear(7, 7)), {"a.weight": A}),
    Case("tanh", chain(torch.tanh), {"a.weight": S}),
    Case("sin", chain(torch.sin), {"a.weight": S}),
    Case("hardtanh", chain(F.hardtanh), {"a.weight": S}),
    Case("hardtanh_of_unlike_bounds", chain(lambda h: F.hardtanh(h, -0.1, 0.5)), {"a.weight": P}),
    Case("clamp_symmetric", chain(lambda h: h.clamp(-0.3, 0.3)), {"a.weight": S}),
    Case("relu6", chain(lambda h: F.relu6(h) + F.hardtanh(h, -0.1, 0.5)), {"a.weight": P}),
    Case("gelu", chain(F.gelu), {"a.weight": P}),
    Case("silu", chain(F.silu), {"a.weight": P}),
    Case("sigmoid", chain(torch.sigmoid), {"a.weight": P}),
    Case("softmax", chain(lambda h: h.softmax(1)), {"a.weight": P}),
    Case("square", chain(torch.square), {"a.weight": P}),  # the two sides have scales and squares of scales
    Case("flatten", lambda: nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(144, 3)), {"0.weight": L}, IMAGE),
    Case("average_pool", maps_of(lambda s, h: F.avg_pool2d(h, 2)), {"a.weight": L}, IMAGE),
    Case("adaptive_pool", maps_of(lambda s, h: F.adaptive_avg_pool2d(h, 3)), {"a.weight": L}, IMAGE),
    Case("max_pool", maps_of(lambda s, h: F.max_pool2d(h, 2)), {"a.weight": A}, IMAGE),
    Case("upsample", maps_of(lambda s, h: F.interpolate(h, scale_factor=2.0)), {"a.weight": L}, IMAGE),
    Case("residual", maps_of(lambda s, h: h + s.d(F.relu(s.c(h))), c=lambda: conv(6, 4), d=lambda: conv(4, 6)),
         {"a.weight": L, "c.weight": A}, IMAGE),
    Case("mean_over_channels", within(lambda s, h: h - h.mean(1, keepdim=True)), {"a.weight": ONES}),
    Case("layer_norm", pre_norm(lambda: nn.LayerNorm(7)), {"a.weight": P, "c.weight": P}),
    Case("layer_norm_without_gain", pre_norm(lambda: nn.LayerNorm(7, elementwise_affine=False)),
         {"a.weight": ONES, "c.weight": P}),
    Case("layer_norm_by_hand", within(lambda s, h: h + s.c(standard(h)), c=linear(7, 7)), {"a.weight": ONES}),
    Case("rms_norm", pre_norm(lambda: nn.RMSNorm(7)), {"a.weight": S, "c.weight": P}),
    Case("rms_norm_without_gain", pre_norm(lambda: nn.RMSNorm(7, elementwise_affine=False)),
         {"a.weight": Q, "c.weight": P}),
    Case("rms_norm_by_hand", within(lambda s, h: h + s.c(mean_square(h)), c=linear(7, 7)), {"a.weight": Q}),
    Case("rms_norm_of_products", chain(lambda h: h / ((h * h).sum(-1, keepdim=True) + 1).sqrt()), {"a.weight": Q}),
    Case("rms_norm_of_squares_cast",
         chain(lambda h: h * (h.pow(2).to(torch.float64).mean(-1, keepdim=True) + 1e-6).rsqrt().to(h.dtype)),
         {"a.weight": Q}),
    Case("rms_norm_of_squares_copied",
         chain(lambda h: h * (h.pow(2).clone().mean(-1, keepdim=True) + 1e-6).rsqrt()), {"a.weight": Q}),
    Case("rms_norm_by_hand_with_gain", within(lambda s, h: s.g * mean_square(h), g=lambda: parameter(7)),
         {"a.weight": S}),
    Case("normalized", chain(lambda h: F.normalize(h, dim=1)), {"a.weight": Q}),
    Case("batch_norm", maps_of(lambda s, h: s.n(h), n=lambda: nn.BatchNorm2d(6)), {"a.weight": M}, IMAGE),
    Case("batch_norm_relu", maps_of(lambda s, h: s.n(h).relu(), n=lambda: nn.BatchNorm2d(6)), {"a.weight": A}, IMAGE),
    Case("batch_norm_bare", maps_of(lambda s, h: s.n(h), n=lambda: nn.BatchNorm2d(6, affine=False)), {"a.weight": M},
         IMAGE),
    Case("instance_norm", maps_of(lambda s, h: s.n(h), n=lambda: nn.InstanceNorm2d(6, affine=True)), {"a.weight": S},
         IMAGE),
    Case("group_norm", maps_of(lambda s, h: s.n(h), n=lambda: nn.GroupNorm(2, 6)), {"a.weight": [P, P]}, IMAGE),
    Case("group_norm_without_gain", maps_of(lambda s, h: s.n(h), n=lambda: nn.GroupNorm(2, 6, affine=False)),
         {"a.weight": [P, ONES]}, IMAGE),
    Case("depthwise", maps_of(lambda s, h: s.d(h), d=lambda: conv(6, 6, groups=6)), {"a.weight": M}, IMAGE),
    Case("grouped_convolution", maps_of(lambda s, h: s.d(h), d=lambda: conv(6, 6, groups=2)),
         {"a.weight": [P, L], "d.weight": L}, IMAGE),
    Case("transposed", lambda: net(lambda s, x: s.b(s.a(x)).mean((2, 3)), a=nn.ConvTranspose2d(3, 6, 2, 2),
                                   b=nn.ConvTranspose2d(6, 3, 2)), {"a.weight": L}, IMAGE),
    Case("layer_scale", within(lambda s, h: h + s.g * s.c(h), g=lambda: parameter(7), c=linear(7, 7)), {"a.weight": M}),
    Case("gate", within(lambda s, h: s.d(s.c(h) * h), c=linear(7, 7), d=linear(7, 7)), {"a.weight": P, "d.weight": L}),
    Case("swiglu", within(lambda s, h: s.d(F.silu(s.c(h)) * s.u(h)), c=linear(7, 6), u=linear(7, 6), d=linear(6, 7)),
         {"a.weight": L, "c.weight": P, "d.weight": L}),
    Case("attention", attention(), {"qkv.weight": [P, L, L]}, TOKENS),
    Case("attention_with_norms", attention(norm=lambda: nn.RMSNorm(4)), {"qkv.weight": [P, L, S]}, TOKENS),
    Case("attention_with_bare_norms", attention(norm=lambda: nn.RMSNorm(4, elementwise_affine=False)),
         {"qkv.weight": [P, L, Q]}, TOKENS),
    Case("attention_of_cosines", attention(cosine=nn.Identity), {"qkv.weight": [P, L, Q]}, TOKENS),
    Case("grouped_queries", lambda: net(grouped, q=nn.Linear(5, 18), k=nn.Linear(5, 6), v=nn.Linear(5, 6),
                                        c=nn.Linear(18, 3)), {"q.weight": [P, P, L], "v.weight": L}, TOKENS),
    Case("attention_written_out", lambda: net(written_out, q=nn.Linear(5, 4), k=nn.Linear(5, 4), v=nn.Linear(5, 6),
                                              c=nn.Linear(6, 3)), {"q.weight": L, "v.weight": L}, TOKENS),
    Case("token_mixing", lambda: net(lambda s, x: s.b(s.a(x.transpose(1, 2)).tanh()).mean(1), a=nn.Linear(6, 7),
                                     b=nn.Linear(7, 3)), {"a.weight": S}, TOKENS),
    Case("concatenated", within(lambda s, h: torch.cat([F.relu(s.c(h)), h, s.d(h).tanh()], 1), 18, c=linear(7, 6),
                                d=linear(7, 5)), {"a.weight": L, "c.weight": A, "d.weight": S}),
    Case("chunked", within(lambda s, h: (y := s.c(h).chunk(2, 1))[0].sigmoid() * y[1], 6, c=linear(7, 12)),
         {"a.weight": L, "c.weight": P}),
    Case("put_together", within(lambda s, h: torch.cat([h[:, 3:], h[:, :3]], 1)), {"a.weight": L}),
    Case("put_together_behind_tanh", within(lambda s, h: torch.cat([h[:, 3:].tanh(), h[:, :3].tanh()], 1)),
         {"a.weight": S}),
    Case("shared_module", within(lambda s, h: s.c(s.c(h)), c=linear(7, 7)), {"a.weight": L}),
    Case("shared_module_relu", within(lambda s, h: s.c(F.relu(s.c(h))), c=linear(7, 7)), {"a.weight": A}),
    Case("einsum", within(lambda s, h: torch.einsum("ni, oi -> no", h, s.w), w=lambda: parameter(7, 7)),
         {"a.weight": L, "w": L}),
    Case("bilinear", within(lambda s, h: s.c(h, s.d(h)), 6, c=lambda: nn.Bilinear(7, 4, 6), d=linear(7, 4)),
         {"a.weight": L, "c.weight": L, "d.weight": L}),
    Case("two_activations", within(lambda s, h: h.relu() + h.tanh()), {"a.weight": P}),
    Case("homogeneous_chain", chain(lambda h: (h.abs() + 2 * F.relu(h)).sqrt().pow(2)), {"a.weight": A}),
]  # fmt: skip


@cache
def _of(case: Case) -> Symmetry:
    torch.manual_seed(0)
    return symmetry(capture(case.build().eval(), case.inputs()))


def _error(facts: Symmetry, move: Callable[[dict[str, Tensor]], dict[str, Tensor]], seed: int = 0) -> float:
    """How far the function is from itself under a change of (randomised) weights."""
    generator = torch.Generator().manual_seed(seed)
    program = in_double(facts.program)
    inputs = random_inputs(program, generator)
    weights = randomise(program, inputs, generator)
    network = partial(run, program.graph)
    return Trial(network, weights, inputs).error(network(move(weights), inputs))


def _forced(facts: Symmetry, group: Group, maps: Maps, seed: int = 0) -> float:
    """The error of one map of a class on all sides that make or read a group's feature; gains are only permuted."""
    generator = np.random.default_rng(seed)
    permutation = random_permutations(facts.groups, generator)[group.index]
    matrix = np.stack([_behind(maps, group.size, generator) for _ in range(group.blocks[0])])
    own = facts.classes[group.index]

    def move(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        result = act(facts, permuted({group.index: permutation}), weights)
        element, dual = Element(matrix=matrix), contragredient(matrix)
        for member in group.members:
            for part in parts(facts, group, member):
                if part.side in own.features:
                    result[member.fqn] = mapped(result[member.fqn], member.dim, part, element, dual)
        return result

    return _error(facts, move, seed)


def _behind(maps: Maps, size: int, generator: np.random.Generator) -> Any:
    """A map of a class without a permutation."""
    matrix = draw(maps, size, generator)
    return matrix if maps.mixes else np.diag(matrix.sum(1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_class_of_each_group_is_found_and_true(case: Case) -> None:
    facts = _of(case)
    found: dict[str, list[Maps]] = {}
    for group in sorted(facts.groups, key=lambda group: (group.size, group.parent or -1)):
        found.setdefault(group.name, []).append(group.kind)
    expected = {name: sorted(kind if isinstance(kind, list) else [kind]) for name, kind in case.kinds.items()}
    assert {name: sorted(kinds) for name, kinds in found.items()} == expected
    for seed in range(3):
        assert verify(facts, seed) <= EXACT
        assert verify(facts, seed, classes="permutation") <= EXACT


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_class_could_be_one_step_larger(case: Case) -> None:
    facts = _of(case)
    outer = {group.parent for group in facts.groups}
    for group in facts.groups:
        if group.index not in outer:
            assert _forced(facts, group, group.kind) <= EXACT
            for maps in COVERS[group.kind]:
                assert max(_forced(facts, group, maps, seed) for seed in range(3)) >= BROKEN, (group.name, maps)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reason_names_a_node_of_the_graph(case: Case) -> None:
    facts = _of(case)
    nodes = {node.name for node in facts.program.graph.nodes}
    for group in facts.groups:
        assert bool(group.reason) == (group.kind is not L)
        if "(" in group.reason:
            assert group.reason.partition("(")[2].rstrip(")") in nodes


# elements -------------------------------------------------------------------------------------------------------------


def _named(name: str) -> Symmetry:
    return _of(next(case for case in CASES if case.name == name))


def test_a_gain_takes_one_scale_in_and_gives_another_out() -> None:
    facts = _named("batch_norm_relu")
    (group,) = facts.groups
    sides = {(fqn, dim): side for side in group.sides for fqn, dim, _ in side.members}
    before, behind = sides["a.weight", 0], sides["b.weight", 1]
    assert (before.kind, behind.kind, sides["n.running_var", 0].kind) == (M, A, P)
    assert sides["n.running_mean", 0] is sides["a.bias", 0] is before
    assert sides["n.bias", 0] is behind
    scales = random_element(facts, np.random.default_rng(0))[group.index].scales
    gain = sides["n.weight", 0]
    np.testing.assert_allclose(scales[before.index] * scales[gain.index], scales[behind.index], rtol=1e-12)
    assert (scales[behind.index] > 0).all()
    assert (scales[before.index] < 0).any()


@pytest.mark.parametrize("name", ["linear", "relu", "layer_norm_without_gain", "attention", "grouped_convolution"])
def test_a_transformed_weight_set_is_a_literal_product(name: str) -> None:
    """Along each axis a member is T times itself where the feature is made, T⁻ᵀ times where it is read."""
    facts = _named(name)
    weights = {n: t.double() for n, t in facts.program.weights[0].items()}
    chosen = {
        index: Element(matrix=element.matrix, scales=element.scales)
        for index, element in random_element(facts, np.random.default_rng(2)).items()
    }
    expected = {name: tensor.numpy().copy() for name, tensor in weights.items()}
    for group in facts.groups:
        own, element = facts.classes[group.index], chosen[group.index]
        for member in group.members:
            sides, duals = own.slots[member.fqn, member.dim]
            blocks = facts.blocks_of(group, member)
            array = np.moveaxis(expected[member.fqn], member.dim, 0)
            for copy, (side, dual) in enumerate(zip(sides, duals)):
                for block in range(group.outer if isinstance(blocks, tuple) else 1):
                    b = block if isinstance(blocks, tuple) else blocks[copy]
                    if element.matrix is not None:
                        matrix = element.matrix if group.parent is None else element.matrix[b]
                    else:
                        ones = np.ones(group.size)
                        matrix = np.diag(element.scales.get(side, ones if group.parent is None else [ones] * 9)[...])
                    matrix = np.linalg.inv(matrix).T if dual else matrix
                    rows = member.position[:, copy]
                    if isinstance(blocks, tuple):
                        axis, there = blocks
                        part = np.moveaxis(array, axis if axis > member.dim else axis + 1, 1)
                        where = np.ix_(rows, there == b)
                        part[where] = np.tensordot(matrix, part[where], 1)
                    else:
                        array[rows] = np.tensordot(matrix, array[rows], 1)
    moved = act(facts, chosen, weights)
    assert any(not torch.equal(moved[name], weights[name]) for name in weights)
    for name, tensor in moved.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-12, atol=1e-12)


def test_a_map_and_the_wrong_dual_change_the_function() -> None:
    facts = _named("linear")
    matrix = draw(L, 7, np.random.default_rng(0))
    good = {0: Element(matrix=matrix)}
    assert _error(facts, lambda weights: act(facts, good, weights)) <= EXACT
    (member,) = (m for m in facts.groups[0].members if m.role == "in")
    assert _error(facts, lambda weights: act(facts, good, weights, (member,))) >= BROKEN


def test_maps_outside_their_class_are_refused() -> None:
    linear_map = draw(L, 7, np.random.default_rng(0))
    for name, message in (("relu", "positive monomial"), ("rms_norm_without_gain", "not orthogonal")):
        facts = _named(name)
        with pytest.raises(ArgumentError, match=message):
            check_elements(facts, {0: Element(matrix=linear_map)})
    facts = _named("relu")
    side = facts.groups[0].sides[0].index
    with pytest.raises(ArgumentError, match="equations of its sides"):
        check_elements(facts, {0: Element(scales={side: -np.ones(7)})})
    with pytest.raises(ArgumentError, match="no such sides"):
        check_elements(facts, {0: Element(scales={-5: np.ones(7)})})
    with pytest.raises(ArgumentError, match="full, permutation"):
        verify(facts, classes="orthogonal")


def test_permutations_alone_move_nothing_else() -> None:
    facts = _named("linear")
    chosen = random_element(facts, np.random.default_rng(0), "permutation")
    assert all(element.matrix is None and not element.scales for element in chosen.values())
    weights = facts.program.weights[0]
    moved = act(facts, chosen, weights)
    assert all(torch.equal(moved[name].sort().values, weights[name].sort().values) for name in ("a.bias", "b.weight"))


@pytest.mark.parametrize(("norm", "kind"), [(lambda h: h, Q), (lambda h: F.layer_norm(h, (7,)), ONES)])
def test_tied_embeddings_are_orthogonal(norm: Callable[[Tensor], Tensor], kind: Maps) -> None:
    """One axis both makes and reads the stream: T and T⁻ᵀ meet on it."""
    torch.manual_seed(0)
    model = net(lambda s, x: F.linear(norm(s.table(x)), s.table.weight), table=nn.Embedding(9, 7))
    facts = symmetry(capture(model, (torch.randint(0, 9, (3, 4)),)))
    assert [group.kind for group in facts.groups] == [kind]
    assert verify(facts) <= EXACT
    for maps in COVERS[kind]:
        assert _forced(facts, facts.groups[0], maps) >= BROKEN


def test_the_table_shows_classes_and_what_lowered_them() -> None:
    text = str(_named("batch_norm_relu"))
    assert "positive monomial: aten.relu (relu)" in " ".join(text.split())
    assert "a side of its own: monomial" in " ".join(text.split())
    graph = to_networkx(_named("relu"))
    assert graph.nodes[0]["maps"] == "positive monomial"
    assert graph.nodes[0]["reason"] == "aten.relu (relu)"


def test_parts_of_one_layer_have_classes_of_their_own() -> None:
    """What is cut from a feature goes its own way, and no array of slots is written to."""
    layers = {"a": nn.Conv2d(3, 9, 1, bias=False), "one": nn.Conv2d(4, 2, 1), "other": nn.Conv2d(5, 2, 1)}

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        x = s.a(x)
        return s.one(x[:, :4].relu()) + s.other(x[:, 4:].tanh())

    torch.manual_seed(0)
    facts = symmetry(capture(net(forward, **layers), (torch.randn(2, 3, 8, 8),)))
    assert {group.size: group.kind for group in facts.groups} == {4: A, 5: S}
    assert verify(facts) <= EXACT
