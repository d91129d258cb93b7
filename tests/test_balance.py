"""Balanced scales and attention: canonical, exact in function, and only where a network leaves them free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network
from micro_models import conv, net, parameter
from torch import Tensor, nn
from vfx.passes.balance_attention import BalanceAttention
from vfx.passes.balance_scales import BalanceScales
from vfx.passes.fold_normalization import FoldNormalization

from vfx.analyse import scales as scaling
from vfx.analyse.balance import balance
from vfx.analyse.classes import Maps
from vfx.analyse.scales import Scales
from vfx.analyse.symmetry import symmetry
from vfx.api import merge, trace
from vfx.elements import Element, act
from vfx.errors import ArgumentError, VerificationError
from vfx.models import vgg16
from vfx.models.vit import vit_tiny
from vfx.operators import REGISTRY
from vfx.program import Program
from vfx.proof import same_function

PICTURES = images(3, 8, dtype=torch.float64)
LARGE = images(3, 32, dtype=torch.float64)
VECTORS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _program(build: Callable[[], nn.Module], x: Tensor) -> Program:
    return trace(edges(build, x), x)


def _mlp(activation: nn.Module | None = None) -> nn.Module:
    act = activation or nn.ReLU()
    return nn.Sequential(nn.Linear(5, 7), act, nn.Linear(7, 6), act, nn.Linear(6, 3))


def _stream() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.down(F.leaky_relu(self.up(h), 0.1))
        h = F.relu(h + self.square(h))  # reads the stream that it writes
        return self.head(h)

    return net(
        forward, stem=nn.Linear(5, 6), up=nn.Linear(6, 9), down=nn.Linear(9, 6), square=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )  # fmt: skip


def _pools() -> nn.Module:
    return nn.Sequential(
        conv(3, 5), nn.PReLU(5), nn.MaxPool2d(2), conv(5, 5, groups=5), nn.ReLU(), conv(5, 4), nn.LeakyReLU(0.2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def _gated() -> nn.Module:
    """down(silu(gate x) · up x): the gate keeps its scale, up and down share one."""
    return net(
        lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)),
        gate=nn.Linear(5, 7), up=nn.Linear(5, 7), down=nn.Linear(7, 3),
    )  # fmt: skip


BALANCED: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "mlp": (_mlp, VECTORS, 2),
    "prelu": (lambda: _mlp(nn.PReLU()), VECTORS, 2),
    "stream": (_stream, VECTORS, 2),
    "pools": (_pools, PICTURES, 3),
    "gated": (_gated, VECTORS, 1),
    "vgg16": (lambda: vgg16(width=0.0625), LARGE, 13),
    "vit": (lambda: vit_tiny(width=0.06, size=8, patch=4, depth=1), PICTURES, 5),
}


@pytest.mark.parametrize("name", BALANCED)
def test_the_function_stays(name: str) -> None:
    build, x, count = BALANCED[name]
    program = _program(build, x)
    balanced = BalanceScales()(program)
    assert balanced.history[-1] == f"BalanceScales({count} features)"
    assert not balanced.structural
    for edge in range(program.edges):
        assert same_function(program.select(edge), balanced.select(edge)) <= 1e-10
        changed = [n for n, t in program.weights[edge].items() if not torch.equal(t, balanced.weights[edge][n])]
        assert len(changed) > count


def _norm(weights: Mapping[str, Tensor], *parts: tuple[str, int]) -> Tensor:
    """Sum of squares of each channel over some parameters' axes."""
    return sum(weights[name].square().movedim(dim, 0).flatten(1).sum(1) if weights[name].ndim > 1
               else weights[name].square() for name, dim in parts)  # type: ignore[return-value]  # fmt: skip


def test_what_writes_a_channel_weighs_what_reads_it() -> None:
    weights = BalanceScales()(_program(_mlp, VECTORS)).weights[0]
    close(_norm(weights, ("0.weight", 0), ("0.bias", 0)), _norm(weights, ("2.weight", 1)), 1e-8)
    close(_norm(weights, ("2.weight", 0), ("2.bias", 0)), _norm(weights, ("4.weight", 1)), 1e-8)
    stream = BalanceScales()(_program(_stream, VECTORS)).weights[0]
    writers = [(f"{layer}.{name}", 0) for layer in ("stem", "down", "square") for name in ("weight", "bias")]
    readers = [(f"{layer}.weight", 1) for layer in ("up", "square", "head")]
    close(_norm(stream, *writers), _norm(stream, *readers), 1e-7)
    gated = BalanceScales()(_program(_gated, VECTORS)).weights[0]
    close(_norm(gated, ("up.weight", 0), ("up.bias", 0)), _norm(gated, ("down.weight", 1)), 1e-8)


def test_it_is_the_smallest_sum_of_squares() -> None:
    """Two layers: the minimum of d²P + N/d² is 2√(PN); random scales give more."""
    program = _program(lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), VECTORS)
    before, after = program.weights[0], BalanceScales()(program).weights[0]
    p, n = _norm(before, ("0.weight", 0), ("0.bias", 0)), _norm(before, ("2.weight", 1))
    total = sum(after[name].square().sum() for name in ("0.weight", "0.bias", "2.weight"))
    close(total, 2 * (p * n).sqrt().sum(), 1e-12)
    close(after["0.weight"], before["0.weight"] * (n / p)[:, None] ** 0.25, 1e-9)


@pytest.mark.parametrize("build", [_mlp, _stream, _gated])
def test_networks_that_differ_by_scales_become_equal(build: Callable[[], nn.Module]) -> None:
    program = _program(build, VECTORS)
    weights = dict(program.weights[0])
    scale = torch.rand(7 if build is not _stream else 6, dtype=torch.float64) * 5 + 0.1
    if build is _stream:
        for layer in ("stem", "down", "square"):
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] * scale[:, None]
            weights[f"{layer}.bias"] = weights[f"{layer}.bias"] * scale
        for layer in ("up", "square", "head"):
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] / scale
    else:
        first, second = ("0", "2") if build is _mlp else ("up", "down")
        weights[f"{first}.weight"] = weights[f"{first}.weight"] * scale[:, None]
        weights[f"{first}.bias"] = weights[f"{first}.bias"] * scale
        weights[f"{second}.weight"] = weights[f"{second}.weight"] / scale
    twins = program.with_weights([program.weights[0], weights])
    assert same_function(twins.select(0), twins.select(1)) < 1e-12
    one, other = BalanceScales()(twins).weights
    for name in one:
        close(other[name], one[name], 1e-7)


def _tiny() -> nn.Module:
    """A residual stream on channels: two writers, two readers, a gate, and an axis behind tanh."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.down(F.relu(self.up(h)))
        return self.head(torch.tanh(self.deep(h)) * self.gain)

    return net(
        forward, stem=nn.Linear(5, 6), up=nn.Linear(6, 4), down=nn.Linear(4, 6), deep=nn.Linear(6, 3),
        head=nn.Linear(3, 2), gain=parameter(3),
    )  # fmt: skip


def _straight() -> nn.Module:
    """Sums and linear layers alone."""
    return net(
        lambda self, x: self.head(self.first(x) - 3 * self.second(x).mean(0)),
        first=nn.Linear(5, 4), second=nn.Linear(5, 4), head=nn.Linear(4, 2),
    )  # fmt: skip


def test_writers_and_readers_of_each_free_scale() -> None:
    found = []
    for places in Scales(symmetry(_program(_tiny, VECTORS)), mixed=True).places.values():
        found.append(tuple({f"{p.fqn}[{p.dim}]" for p in places if p.exponent == sign} for sign in (1, -1)))
        assert sum(map(len, found[-1])) == len(places)
    assert len(found) == 3
    assert ({"stem.weight[0]", "stem.bias[0]", "down.weight[0]", "down.bias[0]"},
            {"up.weight[1]", "deep.weight[1]"}) in found  # fmt: skip
    assert ({"up.weight[0]", "up.bias[0]"}, {"down.weight[1]"}) in found
    assert ({"gain[0]"}, {"head.weight[1]"}) in found


@pytest.mark.parametrize("build", [_tiny, _straight, _stream, _gated])
def test_a_scale_that_leaves_one_member_out_is_seen(build: Callable[[], nn.Module]) -> None:
    """Each free scale changes no function, and every parameter that it moves is needed for that."""
    program = _program(build, VECTORS).select(0)
    facts = symmetry(program)
    scales = Scales(facts, mixed=True)
    generator = np.random.default_rng(0)
    for index, x in scales.places:
        group = facts.groups[index]
        log = generator.uniform(-1, 1, group.size)
        vectors = scales.vectors[index]
        element = {index: Element(scales={s: np.exp(float(v[x]) * log) for s, v in vectors.items() if x in v})}
        moved = {(place.fqn, place.dim) for place in scales.places[index, x]}
        for left in (None, *(m for m in group.members if (m.fqn, m.dim) in moved)):
            without = () if left is None else (left,)
            weights = act(facts, element, program.weights[0], without)
            error = same_function(program, program.with_weights([weights]))
            assert error <= 1e-12 if left is None else error >= 1e-6


def test_relu_leaves_positive_scales_and_linear_networks_all() -> None:
    for middle, count, pairs in ((F.relu, 1, 0), (torch.tanh, 0, 0), (lambda h: 2 * h, 1, 1)):
        program = _program(
            lambda middle=middle: net(lambda self, x: self.b(middle(self.a(x))), a=nn.Linear(5, 4), b=nn.Linear(4, 2)),
            VECTORS,
        )
        facts = symmetry(program)
        assert len(Scales(facts, mixed=True).places) == count
        assert len(Scales(facts).places) == count - pairs
        assert [group.kind is Maps.LINEAR for group in facts.groups] == [pairs > 0]


KEPT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "tanh": (lambda: _mlp(nn.Tanh()), VECTORS, r"0.weight \(aten.tanh \(tanh\)\), 2.weight \(aten.tanh \(tanh_1\)\)"),
    "gelu": (lambda: _mlp(nn.GELU()), VECTORS, "gelu"),
    "relu6": (lambda: _mlp(nn.ReLU6()), VECTORS, "hardtanh|relu6"),
    "a constant": (
        lambda: net(lambda self, x: self.b(F.relu(self.a(x) + 1)), a=nn.Linear(5, 7), b=nn.Linear(7, 3)),
        VECTORS,
        r"a.weight \(aten.add \(add\)\)",
    ),
    "batch norm": (
        lambda: net(lambda self, x: self.c(F.relu(self.n(self.a(x)))), a=conv(3, 4), n=nn.BatchNorm2d(4, affine=False),
                    c=conv(4, 2)),
        PICTURES,
        r"a.weight \(n.running_mean is kept\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_scales_that_are_not_free_stay(name: str) -> None:
    build, x, reason = KEPT[name]
    program = _program(build, x)
    result = BalanceScales()(program)
    assert result.history[-1] == "BalanceScales(0 features)"
    assert all(result.weights[0][key] is program.weights[0][key] for key in program.names())
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(result.notes))


def test_a_scale_that_tanh_sees_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "aten.tanh", replace(REGISTRY["aten.tanh"], classes="positive"))
    with pytest.raises(VerificationError, match="BalanceScales changed the function"):
        BalanceScales()(_program(lambda: _mlp(nn.Tanh()), VECTORS))


def test_batch_norm_gives_the_scale_of_its_gain_and_all_of_it_when_folded() -> None:
    program = _program(lambda: nn.Sequential(
        conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 3)), PICTURES)  # fmt: skip
    with_norms = BalanceScales()(program)
    assert with_norms.weights[0]["0.weight"] is program.weights[0]["0.weight"]
    assert not torch.equal(with_norms.weights[0]["1.weight"], program.weights[0]["1.weight"])
    assert "0.weight (1.running_mean is kept), 3.weight (4.running_mean is kept)" in with_norms.notes[0]
    folded = BalanceScales()(FoldNormalization(batch_norm=True)(program))
    assert not folded.notes
    assert folded.history[-1] == "BalanceScales(2 features)"
    assert same_function(program.select(0), folded.select(0)) <= 1e-10


def test_dead_channels_keep_their_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of them has no minimum: moved with its feature as a whole it shrank for thousands of sweeps."""
    program = _program(_mlp, VECTORS)
    weights = dict(program.weights[0])
    for name in ("0.weight", "0.bias"):
        weights[name] = weights[name].clone()
        weights[name][2] = 0
    weights["4.weight"] = weights["4.weight"].clone()
    weights["4.weight"][:, 1] = 0
    sweeps, steps = [], scaling._Whole.steps
    monkeypatch.setattr(scaling._Whole, "steps", lambda self: sweeps.append(None) or steps(self))
    found = scaling.Scales(symmetry(program))(weights)
    assert len(sweeps) < 200
    first, second = (next(iter(found[index].scales.values())) for index in sorted(found))
    assert first[2] == second[1] == 1
    assert (np.abs(np.log(np.delete(first, 2))) > 1e-3).all()  # the control: those that live do not
    assert (np.abs(np.log(np.delete(second, 1))) > 1e-3).all()
    balanced = act(symmetry(program), found, weights)
    again = scaling.Scales(symmetry(program))(balanced)
    assert all(np.abs(scale - 1).max() < 1e-8 for element in again.values() for scale in element.scales.values())


# attention ------------------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Heads over tokens: separate, packed or grouped projections, fused or written out."""

    def __init__(self, kind: str = "packed", bias: bool = True, fused: bool = True, heads: int = 2, groups: int = 2):
        super().__init__()
        self.kind, self.fused, self.heads, self.groups, self.size = kind, fused, heads, groups, 3
        inner = heads * self.size
        if kind == "packed":
            self.qkv = nn.Linear(8, 3 * inner, bias=bias)
        else:
            self.q = nn.Linear(8, inner, bias=bias)
            self.k, self.v = (nn.Linear(8, groups * self.size, bias=bias) for _ in "kv")
        self.out, self.head = nn.Linear(inner, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(3) if kind == "normed" else nn.Identity()
        angle = torch.arange(4.0)[:, None, None]
        cos, sin = angle.cos(), angle.sin()
        self.register_buffer("turn", torch.cat([torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)], 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "packed":
            q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).unflatten(2, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            if self.groups != self.heads:
                k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        q = self.norm(F.relu(q) if self.kind == "feature map" else q)
        if self.kind == "rotary":  # the first two channels of each head turn with the position
            q, k = (torch.cat([(t[..., None, :2] @ self.turn).squeeze(-2), t[..., 2:]], -1) for t in (q, k))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1) @ v
        return self.head(self.out(y.transpose(1, 2).flatten(2)).mean(1))


ATTENTION: dict[str, tuple[dict[str, Any], int]] = {
    "packed": ({}, 2),
    "packed, no bias": ({"bias": False}, 2),
    "packed, written out": ({"fused": False}, 2),
    "separate": ({"kind": "separate"}, 2),
    "separate, written out": ({"kind": "separate", "fused": False}, 2),
    "one head": ({"kind": "separate", "heads": 1, "groups": 1}, 2),
    "grouped": ({"kind": "separate", "heads": 4, "groups": 2}, 2),
    "feature map": ({"kind": "feature map"}, 1),
    "normed": ({"kind": "normed"}, 1),
    "rotary": ({"kind": "rotary"}, 1),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_keeps_its_function(name: str) -> None:
    options, count = ATTENTION[name]
    program = _program(lambda: _Attention(**options), TOKENS)
    balanced = BalanceAttention()(program)
    assert balanced.history[-1] == f"BalanceAttention({count} pairs)", balanced.notes
    assert len(balanced.notes) == 2 - count
    for edge in range(program.edges):
        assert same_function(program.select(edge), balanced.select(edge)) <= 1e-10


def _head(weights: Mapping[str, Tensor], layer: str, head: int) -> Tensor:
    """What writes the channels of a head, with its bias beside it, or reads them: (3, n)."""
    if layer == "out":
        return weights["out.weight"][:, 3 * head : 3 * head + 3].T
    own = [weights[f"{layer}.weight"], *([weights[f"{layer}.bias"][:, None]] if f"{layer}.bias" in weights else [])]
    return torch.cat(own, 1)[3 * head : 3 * head + 3]


@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_are_singular_vectors(bias: bool) -> None:
    program = _program(lambda: _Attention("separate", bias), TOKENS)
    old, new = program.weights[0], BalanceAttention()(program).weights[0]

    for head in (0, 1):
        q, k, v, o = (_head(new, layer, head) for layer in ("q", "k", "v", "out"))
        before = _head(old, "q", head).T @ _head(old, "k", head)
        close(q.T @ k, before, 1e-12)
        values = torch.linalg.svdvals(before)[:3]
        for one, other in ((q, k), (v, o)):
            gram = one @ one.T
            close(gram, torch.diag(gram.diagonal()), 1e-12)
            close(other @ other.T, gram, 1e-12)
        close((q @ q.T).diagonal(), values, 1e-12)


def test_attention_in_any_basis_becomes_equal() -> None:
    program = _program(lambda: _Attention("separate"), TOKENS)
    weights, generator = dict(program.weights[0]), torch.Generator().manual_seed(0)
    for head in (0, 1):
        rows = slice(3 * head, 3 * head + 3)
        for first, second in (("q", "k"), ("v", "out")):
            t = torch.randn(3, 3, generator=generator, dtype=torch.float64)
            for name in ("weight", "bias"):
                weights[f"{first}.{name}"] = weights[f"{first}.{name}"].clone()
                weights[f"{first}.{name}"][rows] = t @ weights[f"{first}.{name}"][rows]
                if second == "k":
                    weights[f"k.{name}"] = weights[f"k.{name}"].clone()
                    weights[f"k.{name}"][rows] = torch.linalg.inv(t).T @ weights[f"k.{name}"][rows]
            if second == "out":
                weights["out.weight"] = weights["out.weight"].clone()
                weights["out.weight"][:, rows] = weights["out.weight"][:, rows] @ torch.linalg.inv(t)
    one, other = BalanceAttention()(program.with_weights([program.weights[0], weights])).weights
    assert not torch.equal(weights["q.weight"], program.weights[0]["q.weight"])
    for name in one:
        close(other[name], one[name], 1e-9)


@pytest.mark.parametrize(("dead", "pair"), [("v", ("v", "out")), ("q", ("q", "k")), ("k", ("q", "k"))])
def test_a_head_without_a_product_stays_and_the_others_are_balanced(dead: str, pair: tuple[str, str]) -> None:
    program = _program(lambda: _Attention("separate"), TOKENS)
    weights = dict(program.weights[0])
    for name in (f"{dead}.weight", f"{dead}.bias"):
        weights[name] = weights[name].clone()
        weights[name][:3] = 0
    result = BalanceAttention()(program.with_weights([weights]))
    assert result.history[-1] == "BalanceAttention(2 pairs)"
    assert result.notes == (f"edge 0: heads 0 of {pair[0]}.weight left as they are: their product has a rank below 3",)
    for layer in pair:
        close(_head(result.weights[0], layer, 0), _head(weights, layer, 0), 1e-14)
    first, second = (_head(result.weights[0], layer, 1) for layer in pair)
    close(first @ first.T, second @ second.T, 1e-12)


# merging --------------------------------------------------------------------------------------------------------------


def test_merge_balances_its_edges() -> None:
    """A copy in other scales merges with its original without loss; without scaling it does not."""
    model = network(_mlp, VECTORS)
    twin = network(_mlp, VECTORS)
    with torch.no_grad():
        scale = torch.linspace(0.2, 5, 7, dtype=torch.float64)
        twin[0].weight *= scale[:, None]  # type: ignore[index]
        twin[0].bias *= scale  # type: ignore[index]
        twin[2].weight /= scale  # type: ignore[index]
    options: dict[str, Any] = {"match": "weight", "classes": "permutation", "normalize": None, "progress": False}
    balanced = merge([model, twin], VECTORS, prepare="balance", **options)
    close(balanced.module(VECTORS), model(VECTORS), 1e-6)
    assert balanced.report.own_class
    assert "BalanceScales" in " ".join(balanced.report.passes)
    plain = merge([model, twin], VECTORS, **options).module(VECTORS)
    assert (plain - model(VECTORS)).abs().max() > 1e-2
    with pytest.raises(ArgumentError, match="'lift', 'balance', 'remove_bias'"):
        merge([model, twin], VECTORS, prepare="polish", **options)


# depth ----------------------------------------------------------------------------------------------------------------


def _deep(depth: int) -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(16, 3)).double().eval()


def _steps_a_feature(depth: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """How often the scales of a feature change until all are balanced, and how far from it they are in the end."""
    program = trace(_deep(depth), torch.randn(2, 16, dtype=torch.float64))
    facts, calls, step = symmetry(program), [0], scaling._step
    with monkeypatch.context() as patch:
        patch.setattr(scaling, "_step", lambda *given: calls.__setitem__(0, calls[0] + 1) or step(*given))
        found = act(facts, balance(facts, program.weights[0]), program.weights[0])
    worst = 0.0
    for k in range(0, 2 * depth, 2):
        made = found[f"{k}.weight"].square().sum(1) + found[f"{k}.bias"].square()
        worst = max(worst, float((made / found[f"{k + 2}.weight"].square().sum(0)).log().abs().max()))
    return calls[0] / depth, worst


def test_deep_networks_are_balanced_in_as_many_sweeps_as_shallow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow, _ = _steps_a_feature(6, monkeypatch)
    deep, worst = _steps_a_feature(60, monkeypatch)
    assert worst < 1e-8
    assert deep < 2 * shallow + 5
    monkeypatch.setattr(scaling._Whole, "steps", lambda self: iter(()))
    slow, _ = _steps_a_feature(60, monkeypatch)
    assert slow > 10 * deep


def test_maps_that_one_tensor_takes_on_several_axes_settle() -> None:
    """Found side by side and at full length, those of two features that a product mixes grew until weights were NaN."""

    def forward(self: Any, x: Tensor) -> Tensor:
        u = self.stem(x)
        v = self.first(u, u)
        both = torch.cat([u, v], 1)
        return self.head(torch.cat([both, self.second(both, both)], 1))

    def build() -> nn.Module:
        return net(
            forward, stem=nn.Linear(5, 4), first=nn.Bilinear(4, 4, 4), second=nn.Bilinear(8, 8, 3),
            head=nn.Linear(11, 3),
        )  # fmt: skip

    program = _program(build, VECTORS)
    facts = symmetry(program)
    assert {facts.classes[g.index].kind for g in facts.moving} == {Maps.LINEAR}
    balanced = act(facts, balance(facts, program.weights[0]), program.weights[0])
    again = balance(facts, balanced)
    for element in again.values():
        assert element.matrix is not None
        gram = element.matrix @ element.matrix.swapaxes(-1, -2)
        assert np.abs(gram - np.eye(gram.shape[-1])).max() < 1e-8  # nothing but a rotation is left
    sums = [sum(float(t.double().square().sum()) for t in w.values()) for w in (program.weights[0], balanced)]
    assert sums[1] < sums[0]
