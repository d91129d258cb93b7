"""Different widths by weight and activation matching: semi-permutations, semi-orthogonal maps, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, images, network, node_values, transported
from micro_models import conv, net
from scipy.linalg import polar
from test_matching import Attention
from torch import Tensor, nn
from vfx.passes.to_first_width import ToFirstWidth

from vfx.analyse.classes import Maps
from vfx.api import merge, symmetry, trace
from vfx.elements import act, permuted, random_permutations
from vfx.errors import ArgumentError
from vfx.match.activation import ActivationMatching
from vfx.match.carry import AcrossWidths, Crossing, Pairing
from vfx.match.frame import Frame, isometry
from vfx.match.solve import procrustes
from vfx.match.transport import OptimalTransport
from vfx.match.weight import WeightMatching
from vfx.program import Program, run

X = images(12, 8, dtype=torch.float64)
V = torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
S = torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mlp(a: int, b: int, activation: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.c(activation(self.b(activation(self.a(x)))))

    return net(forward, a=nn.Linear(6, a), b=nn.Linear(a, b), c=nn.Linear(b, 3))


def batch_normed(k: int) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = F.relu(self.n1(self.a(x)))
        s = s + self.c(F.relu(self.n2(self.b(s))))
        return self.fc(F.max_pool2d(s, 2).flatten(1))

    return net(
        forward,
        a=conv(3, 4 * k),
        n1=nn.BatchNorm2d(4 * k),
        b=conv(4 * k, 5 * k),
        n2=nn.BatchNorm2d(5 * k),
        c=conv(5 * k, 4 * k),
        fc=nn.Linear(64 * k, 4),
    )


class Stream(nn.Module):
    """A residual stream whose norms count channels, attention on it, and a branch with or without layer scale."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], heads: int = 2, scaled: bool = False):
        super().__init__()
        self.heads = heads
        self.embed, self.norms = nn.Linear(6, width), nn.ModuleList(norm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width)) if scaled else None
        self.up, self.down, self.head = nn.Linear(width, 20), nn.Linear(20, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(self.turned(q), self.turned(k), v).transpose(1, 2).flatten(2))
        branch = self.down(F.gelu(self.up(self.norms[1](x))))
        x = x + (branch if self.scale is None else self.scale * branch)
        return self.head(self.norms[2](x))

    def turned(self, x: Tensor) -> Tensor:
        return x


class Rotary(Stream):
    """With rotary embeddings of heads of four channels."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]):
        super().__init__(width, norm, width // 4)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.3] * 2)) + 0.1
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turned(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return x * self.cos + torch.cat([-other, one], -1) * self.sin


def rms(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-2)


def plain_rms(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-2, elementwise_affine=False)


def plain_layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-2, elementwise_affine=False)


class WrittenRms(nn.Module):
    """RMSNorm by its formula, as language models write it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2))


WIDENED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor]] = {
    "relu": (lambda: mlp(4, 5), lambda: mlp(9, 7), V),
    "tanh": (lambda: mlp(4, 5, torch.tanh), lambda: mlp(9, 7, torch.tanh), V),
    "one group alike": (lambda: mlp(4, 4), lambda: mlp(9, 4), V),
    "batch norm": (lambda: batch_normed(1), lambda: batch_normed(2), X),
    "attention": (lambda: Stream(8, nn.Identity), lambda: Stream(20, nn.Identity), S),
    "rms norm": (lambda: Stream(8, rms), lambda: Stream(20, rms), S),
    "layer scale": (lambda: Stream(8, rms, scaled=True), lambda: Stream(20, rms, scaled=True), S),
    "rms_norm_by_hand": (lambda: Stream(8, WrittenRms), lambda: Stream(20, WrittenRms), S),
    "rms norm without gain": (lambda: Stream(8, plain_rms), lambda: Stream(20, plain_rms), S),
    "layer norm without gain": (lambda: Stream(8, plain_layer_norm), lambda: Stream(20, plain_layer_norm), S),
    "more heads": (lambda: Stream(8, rms, 2), lambda: Stream(20, rms, 5), S),
    "rotary heads": (lambda: Rotary(8, rms), lambda: Rotary(20, rms), S),
    "more and larger heads": (lambda: Stream(8, rms, 2), lambda: Stream(24, rms, 3), S),
}
SLOW = ("one group alike", "attention", "rms_norm_by_hand", "rms norm without gain")
METHODS = ("weight", "activation")


def _pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A narrow network and an independent wide one."""
    narrow, wide, x = WIDENED[name]
    return network(narrow, x, 1), network(wide, x, 2), x


def _carried(models: Any, x: Tensor, method: Any = "weight", **options: Any) -> Any:
    """The second network alone in the shapes of the first."""
    options = {"normalize": None, "weights": 1.0, "progress": False} | options
    return merge(models, x[:2], data=x, match=method, **options)


@torch.no_grad()
def _error(module: Callable[[Tensor], Tensor], expected: Tensor, x: Tensor) -> float:
    return float((module(x) - expected).abs().max() / expected.abs().max())


# the problem in the frame ---------------------------------------------------------------------------------------------


def _crossing(first: nn.Module, other: nn.Module, x: Tensor) -> Crossing:
    programs = [trace(model, x[:2]) for model in (first, other)]
    return Crossing(Pairing(*map(symmetry, programs)), 1, programs[0].weights[0], programs[1].weights[0])


def _semi_permutations(n: int, m: int) -> list[np.ndarray]:
    """Every (n, m) matrix that matches as many channels as there are, written out."""
    if n > m:
        return [own.T for own in _semi_permutations(m, n)]
    return [np.eye(m)[list(chosen)] for chosen in permutations(range(m), n)]


def _product(first: nn.Module, other: nn.Module, a: np.ndarray, b: np.ndarray) -> float:
    """⟨W₀, T(W₁)⟩ of two MLPs."""
    w0, w1 = ({k: v.detach().numpy() for k, v in m.state_dict().items()} for m in (first, other))
    total = (w0["a.weight"] * (a @ w1["a.weight"])).sum() + w0["a.bias"] @ a @ w1["a.bias"]
    total += (w0["b.weight"] * (b @ w1["b.weight"] @ a.T)).sum() + w0["b.bias"] @ b @ w1["b.bias"]
    return float(total + (w0["c.weight"] * (w1["c.weight"] @ b.T)).sum())


@pytest.mark.parametrize("sizes", [((3, 2), (5, 4)), ((5, 4), (3, 2)), ((4, 3), (3, 5))])
def test_weight_matching_finds_the_best_semi_permutations(sizes: Any) -> None:
    """Of all pairs of them, the best of several descents."""
    first, other = (network(lambda s=s: mlp(*s), V, k) for k, s in enumerate(sizes))
    crossing = _crossing(first, other, V)
    _, value = WeightMatching(restarts=20, classes="permutation").carry(crossing)
    choices = [_semi_permutations(*pair) for pair in zip(*sizes)]
    values = [_product(first, other, a, b) for a, b in product(*choices)]
    assert abs(value - max(values)) < 1e-5 * abs(max(values))
    assert value > np.mean(values) + 0.1, "negative control: not any will do"


@pytest.mark.parametrize("sizes", [((5, 3), (3, 4)), ((3, 4), (5, 3)), ((4, 2), (6, 5))])
def test_activation_matching_finds_the_best_semi_permutations(sizes: Any) -> None:
    first, other = (network(lambda s=s: mlp(*s), V, k) for k, s in enumerate(sizes))
    program, narrow = (trace(model, V[:2]) for model in (first, other))
    crossing = ToFirstWidth([narrow], ActivationMatching("permutation"), V, progress=False)
    found = crossing.run(program).record.matching.objective
    features = []
    for model in (first, other):
        one = F.relu(model.a(V))  # type: ignore[operator]
        features.append((one, F.relu(model.b(one))))  # type: ignore[operator]
    expected = 0.0
    for x, y in zip(*features):
        n, m = x.shape[1], y.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.nan_to_num(np.corrcoef(x.detach().numpy().T, y.detach().numpy().T)[:n, n:])
        expected += max(float((correlation * T).sum()) for T in _semi_permutations(n, m))
    assert abs(found[0] - expected) < 1e-6 * expected


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4)])
def test_procrustes_in_the_frame_is_the_rectangular_polar_factor(sizes: tuple[int, int]) -> None:
    gain = np.random.default_rng(0).standard_normal(sizes)
    one, other = (isometry(max(sizes), size) for size in sizes)
    square, value = procrustes(one @ gain @ other.T)
    found = one.T @ square @ other
    close(found, polar(gain)[0], 1e-9)
    assert abs((found * gain).sum() - np.linalg.svd(gain, compute_uv=False).sum()) < 1e-9
    assert abs(value - (found * gain).sum()) < 1e-9


@pytest.mark.parametrize("sizes", [(4, 7), (7, 4)])
def test_semi_orthogonal_maps_may_keep_the_mean(sizes: tuple[int, int]) -> None:
    """1/√n₁ goes to 1/√n₀ (or comes from it), and no other map that does so gains more (300 drawn at random)."""
    rng, n = np.random.default_rng(1), max(sizes)
    gain = rng.standard_normal(sizes)
    one, other = (isometry(n, size, ones=True) for size in sizes)

    def between(square: np.ndarray) -> np.ndarray:
        return np.asarray(one.T @ square @ other)

    found = between(procrustes(one @ gain @ other.T, Maps.ORTHOGONAL_ONES)[0])
    close(found.sum(1) / np.sqrt(sizes[1]), np.full(sizes[0], sizes[0] ** -0.5), 1e-10)
    small = found @ found.T if sizes[0] < sizes[1] else found.T @ found
    close(small, np.eye(min(sizes)), 1e-10)
    drawn = [between(procrustes(rng.standard_normal((n, n)), Maps.ORTHOGONAL_ONES)[0]) for _ in range(300)]
    assert max((T * gain).sum() for T in drawn) < (found * gain).sum()


def test_a_frame_holds_both_networks() -> None:
    """Where each is the wider one in a group, the first one's graph is resized."""
    crossing = _crossing(network(lambda: mlp(4, 9), V), network(lambda: mlp(7, 3), V, 1), V)
    assert [group.size for group in Frame(crossing.pairing).facts.groups] == [7, 9]
    crossing = _crossing(network(lambda: mlp(4, 3), V), network(lambda: mlp(4, 9), V), V)
    assert Frame(crossing.pairing).facts is crossing.pairing.other


# functions ------------------------------------------------------------------------------------------------------------


@cache
def _programs(name: str) -> tuple[list[Program], list[Tensor], Tensor]:
    """The wide network and the narrow one, with their outputs."""
    narrow, wide, x = _pair(name)
    programs = [trace(model, x[:2]) for model in (wide, narrow)]
    return programs, [wide(x).detach(), narrow(x).detach()], x


def _distance(program: Program, expected: Tensor, x: Tensor, *shares: float) -> float:
    """Relative error of the mixed weight sets of a Program."""
    names = program.weights[0]
    mixed = {n: sum(c * w[n] for c, w in zip(shares, program.weights)) if names[n].is_floating_point() else names[n]
             for n in names}  # fmt: skip
    return _error(lambda x: run(program.graph, mixed, [x]), expected, x)


@pytest.mark.parametrize("name", WIDENED)
def test_a_narrow_network_keeps_its_function_in_a_wide_one(name: str) -> None:
    programs, outputs, x = _programs(name)
    for matcher in (WeightMatching(), ActivationMatching(), WeightMatching(classes="permutation")):
        carried = ToFirstWidth(programs[1:], matcher, x, progress=False)(programs[0])
        assert _distance(carried, outputs[1], x, 0, 1) < 1e-10
        assert "keeps its function" in carried.notes[0]
        assert _distance(carried, outputs[0], x, 0, 1) > 1e-2, "negative control"


@pytest.mark.parametrize("name", [n for n in WIDENED if n not in SLOW])
def test_a_widened_and_permuted_copy_comes_back(name: str) -> None:
    """A network embedded in a wide one, all of whose groups are permuted then."""
    programs, outputs, x = _programs(name)
    embedded = ToFirstWidth(programs[1:], WeightMatching(), progress=False)(programs[0]).weights[1]
    facts = symmetry(programs[0])
    moved = act(facts, permuted(random_permutations(facts.groups, np.random.default_rng(0))), embedded)
    for matcher in (WeightMatching(), ActivationMatching()):
        for start, back in ((moved, True), (programs[0].weights[0], False)):
            wide = programs[0].with_weights([start])
            carried = ToFirstWidth([wide], matcher, x, progress=False)(programs[1])
            errors = [_distance(carried, outputs[1], x, *shares) for shares in ((0, 1), (0.5, 0.5))]
            assert (max(errors) < 1e-8) if back else (min(errors) > 1e-2), "negative control: another network"


def test_a_lifted_network_keeps_its_function() -> None:
    """Without LayerNorm's gain; with it the added channels count."""
    narrow, wide = network(lambda: Attention(12), X), network(lambda: Attention(24), X, 1)
    assert _error(_carried([wide, narrow], X, prepare="lift").module, narrow(X), X) < 1e-10
    as_it_is = _carried([wide, narrow], X)
    assert _error(as_it_is.module, narrow(X), X) > 1e-3
    assert "run over the added channels" in " ".join(as_it_is.report.notes)


def test_a_network_that_loses_channels_loses_its_function() -> None:
    narrow, wide, x = _pair("relu")
    result = _carried([narrow, wide], x)
    assert "2 of 2 groups have fewer channels" in " ".join(result.report.notes)
    assert _error(result.module, wide(x), x) > 1e-2


def test_a_narrow_network_gets_channels_of_the_wide_one() -> None:
    narrow, wide, x = _pair("relu")
    found = _carried([narrow, wide], x, classes="permutation").module.a.weight
    rows = [(row == wide.a.weight).all(1).nonzero() for row in found]  # type: ignore[union-attr]
    assert all(len(row) == 1 for row in rows)
    assert len({int(row) for row in rows}) == 4


# merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_permuting_an_edge_first_changes_nothing(method: str) -> None:
    """Three networks of three widths, with REPAIR."""
    models = [network(lambda k=k: batch_normed(k), X, seed=k) for k in (2, 1, 3)]
    moved = [models[0], *(transported(model, X, 3)[0] for model in models[1:])]
    options: dict[str, Any] = {"weights": None, "normalize": "repair"}
    outputs = [_carried(own, X, method, **options).module(X).detach() for own in (models, moved)]
    close(outputs[1], outputs[0], 1e-5)


@pytest.mark.parametrize("name", ["relu", "tanh", "rms norm", "rms norm without gain", "batch norm"])
def test_goals_are_the_statistics_of_carried_layers(name: str) -> None:
    """Embedded exactly, a layer's outputs are those of the carried network itself."""
    programs, _, x = _programs(name)
    carried = ToFirstWidth(programs[1:], WeightMatching(), x, layers=True, progress=False).run(programs[0])
    assert carried.record.statistics is not None
    values = node_values(carried.program, x, 1)
    assert len(carried.record.statistics.layers) > 2
    for node, moments in carried.record.statistics.layers.items():
        rows = values[node].detach().movedim(1 if "conv" in node else -1, 0).flatten(1)
        close(moments[1].mean, rows.mean(1), 1e-6)
        close(moments[1].std, rows.std(1, correction=0), 1e-6)


@pytest.mark.parametrize("normalize", ["repair", "rescale", "bias_calibration", "reset", "auto"])
def test_every_normalization(normalize: str) -> None:
    narrow, wide, x = _pair("batch norm")
    models = [wide, narrow] if normalize in ("reset", "rescale") else [narrow, wide]
    result = _carried(models, x, "activation", weights=None, normalize=normalize)
    assert result.module(x).isfinite().all()
    assert type(result.module) is type(models[0])


@pytest.mark.parametrize("sizes", [(12, 24), (24, 12)])
def test_attention_of_two_widths_becomes_one(sizes: tuple[int, int]) -> None:
    models = [network(lambda size=size: Attention(size), X, size) for size in sizes]
    result = _carried(models, X, "activation", weights=None, normalize="repair")
    assert result.module(X).isfinite().all()
    assert result.report.matching.objective[0] > 0


def test_who_can_and_what_cannot() -> None:
    assert all(isinstance(own, AcrossWidths) for own in (WeightMatching(), ActivationMatching(), OptimalTransport()))
    narrow, wide, x = _pair("relu")
    with pytest.raises(ArgumentError, match="preserve"):
        _carried([narrow, wide], x, preserve=1)
    with pytest.raises(ArgumentError, match="data="):
        merge([narrow, wide], x[:2], match="activation", normalize=None, progress=False)
