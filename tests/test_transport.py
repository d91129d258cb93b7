"""Optimal transport: couplings against slow solvers, what OT fusion must keep, and edges of different widths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, network, transported
from micro_models import conv, net
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from test_matching import Attention, concatenated, depthwise, grouped, residual
from torch import Tensor, nn
from vfx.passes.to_first_width import ToFirstWidth

from vfx.api import collect, merge, symmetry, trace
from vfx.elements import Element, behind_exact
from vfx.errors import ArchitectureError, ArgumentError
from vfx.match import coupling
from vfx.match.carry import Crossing, Pairing
from vfx.match.coupling import exact, sinkhorn
from vfx.match.transport import OptimalTransport, distances
from vfx.models import resnet20_bn

X = images(12, 8, dtype=torch.float64)
PICTURES = images(6, 32, dtype=torch.float64)
NETWORKS: dict[str, Any] = {
    "residual": (residual, X),
    "concatenated": (concatenated, X),
    "depthwise": (depthwise, X),
    "grouped": (grouped, X),
    "attention": (Attention, X),
}


def _cost(n: int, m: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return cdist(rng.standard_normal((n, 5)), rng.standard_normal((m, 5)))


def _merge(models: Any, x: Tensor, **options: Any) -> Any:
    return merge(models, None if hasattr(models, "graph") else x[:2], data=x, progress=False, **options)


# couplings ------------------------------------------------------------------------------------------------------------


def _cheapest(cost: Any) -> float:
    """The transport problem written out as a linear programme."""
    n, m = cost.shape
    rows = [np.eye(n)[i][:, None] * np.ones(m) for i in range(n)]
    columns = [np.ones(n)[:, None] * np.eye(m)[j] for j in range(m)]
    sums = np.stack([x.reshape(-1) for x in rows + columns])
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return float(linprog(cost.reshape(-1), A_eq=sums, b_eq=marginals).fun)


@pytest.mark.parametrize("sizes", [(6, 6), (4, 8), (9, 6), (5, 7), (1, 3)])
def test_exact_transport_is_the_cheapest_coupling(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    cost = _cost(*sizes)
    for limit in (4096, 0):  # repeated channels, and the linear programme
        monkeypatch.setattr(coupling, "LARGEST_ASSIGNMENT", limit)
        found = exact(cost)
        close(found.sum(1), np.full(sizes[0], 1 / sizes[0]), 1e-12)
        close(found.sum(0), np.full(sizes[1], 1 / sizes[1]), 1e-12)
        assert (found >= 0).all()
        assert abs((found * cost).sum() - _cheapest(cost)) < 1e-10


def test_between_sets_of_one_size_transport_is_a_permutation() -> None:
    found = exact(_cost(7, 7)) * 7
    assert (np.sort(found, axis=1)[:, -1] == 1).all()
    assert np.count_nonzero(found) == 7


@pytest.mark.parametrize("regularization", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("sizes", [(6, 6), (4, 9), (9, 4)])
def test_sinkhorn_is_what_plain_iterations_in_the_log_domain_reach(
    sizes: tuple[int, int], regularization: float
) -> None:
    cost, (n, m) = _cost(*sizes) / 4, sizes
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(4_000):
        f = -regularization * (np.log(np.exp((g[None] - cost) / regularization).sum(1)) + math.log(n))
        g = -regularization * (np.log(np.exp((f[:, None] - cost) / regularization).sum(0)) + math.log(m))
    close(sinkhorn(cost, regularization), np.exp((f[:, None] + g - cost) / regularization), 1e-8)


def test_sinkhorn_survives_small_regularization() -> None:
    cost = _cost(12, 12)
    assert abs((sinkhorn(cost, 1e-3) * cost).sum() - (exact(cost) * cost).sum()) < 2e-3
    blurred = (sinkhorn(cost, 10.0) * cost).sum()
    assert blurred > (exact(cost) * cost).sum() + 0.1  # negative control


# costs ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_distances_are_those_of_activation_columns() -> None:
    models = edges(residual, X)
    program = trace(models, X[:2])
    statistics = collect(program, data=X, progress=False)
    tap = next(tap for tap in statistics.taps if tap.size == 7)
    columns = []
    for model in models:
        s = F.relu(model.n0(model.stem(X)))  # type: ignore[operator]
        x = F.relu(model.a1(s)).movedim(1, -1).reshape(-1, 7)  # type: ignore[operator]
        length = x.norm(dim=0)
        columns.append(torch.where(length > 0, x / length, 0.0).numpy())
    close(distances(statistics.features[tap.key], 1), cdist(columns[0].T, columns[1].T), 1e-6)


# fusion ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["activation", "weight"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_copy_is_transported_back(name: str, cost: Any) -> None:
    build, x = NETWORKS[name]
    model = network(build, x)
    twin, _, _ = transported(model, x)
    program = trace([model, twin], x[:2])
    merged = _merge(program, x, match=OptimalTransport(cost=cost), normalize=None)
    close(merged.module(x), model(x), 1e-9)
    direct = _merge(program, x, match=None, normalize=None)
    assert (direct.module(x) - model(x)).abs().max() > 1e-3, "negative control: without transport it is another network"


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
@pytest.mark.parametrize("name", ["residual", "grouped", "attention"])
def test_permuting_an_edge_first_changes_nothing(name: str, method: Any) -> None:
    """With three edges."""
    build, x = NETWORKS[name]
    models = edges(build, x, 3)
    moved = [models[0], transported(models[1], x, 1)[0], transported(models[2], x, 2)[0]]
    outputs = [
        _merge(own, x, match=OptimalTransport(method), normalize="repair").module(x).detach() for own in (models, moved)
    ]
    close(outputs[1], outputs[0], 1e-5)


def test_soft_maps_stand_behind_the_nearest_permutation() -> None:
    """T = C Π, put together from the permutation and the map, for each head's channels too."""
    program = trace(edges(Attention, X), X[:2])
    statistics = collect(program, data=X, within=True, progress=False)
    facts = symmetry(program)
    method = OptimalTransport("sinkhorn", regularization=0.2)
    from vfx.match.matcher import Problem

    found = method(Problem(program, facts, statistics))
    readings = [(tap, tap, statistics.features[tap.key]) for tap in statistics.taps]
    carrier, _ = method.carry(Crossing(Pairing(facts, facts), 1, *program.weights, readings))
    behind = behind_exact(found.elements[1])
    assert {index for index, own in carrier.found.items() if own.matrix is not None} == set(behind)
    assert any(own.matrix.ndim == 3 for own in behind.values())
    for index, own in behind.items():
        permutation = np.eye(facts.groups[index].size)[found.permutations[1][index]]
        assert not np.allclose(own.matrix, own.matrix @ permutation)
        close(own.matrix @ permutation, carrier.found[index].matrix, 1e-12)
        close(own.dual, own.matrix, 1e-12)
        close(own.matrix.sum(-1), np.ones(own.matrix.shape[:-1]), 1e-12)


def test_goals_behind_soft_maps_need_covariances() -> None:
    program = trace(edges(residual, X), X[:2])
    statistics = collect(program, data=X, progress=False)
    with pytest.raises((ArgumentError, Exception), match="collect"):
        _merge(program, X, match=OptimalTransport("sinkhorn"), statistics=statistics, normalize="repair")


def test_options_are_checked() -> None:
    for options in ({"method": "fast"}, {"cost": "both"}, {"regularization": 0.0}):
        with pytest.raises(ArgumentError):
            OptimalTransport(**options)  # type: ignore[arg-type]


# edges of different widths --------------------------------------------------------------------------------------------


def branched(k: int) -> nn.Module:
    """A stream, a depthwise kernel, a norm over channels, a concatenation and C·H·W behind flatten, k times as wide."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        s = F.relu(self.stem(x))
        s = s + self.project(F.relu(self.depth(self.expand(s))))
        s = self.norm(s.movedim(1, -1)).movedim(-1, 1)
        s = torch.cat([F.relu(self.left(s)), x, F.relu(self.right(s))], 1)
        return self.head(F.gelu(self.fc(F.max_pool2d(s, 2).flatten(1))))

    return net(
        forward,
        stem=conv(3, 4 * k),
        expand=conv(4 * k, 5 * k, 1),
        depth=conv(5 * k, 5 * k, groups=5 * k),
        project=conv(5 * k, 4 * k, 1),
        norm=nn.LayerNorm(4 * k),
        left=conv(4 * k, 3 * k),
        right=conv(4 * k, 2 * k),
        fc=nn.Linear(16 * (5 * k + 3), 6 * k),
        head=nn.Linear(6 * k, 4),
    )


@torch.no_grad()
def widened(narrow: nn.Module) -> nn.Module:
    """``branched(2)`` that computes what ``narrow`` does: every channel stands twice, shuffled."""
    wide = branched(2).to(next(narrow.parameters()).dtype).eval()
    rng = torch.Generator().manual_seed(0)
    orders = {c: torch.randperm(2 * c, generator=rng) % c for c in (2, 3, 4, 5, 6)}
    left, right = orders[3], orders[2]
    maps = torch.cat([left, torch.arange(3, 6), 6 + right])  # of the concatenation
    inputs = {
        "expand": orders[4],
        "project": orders[5],
        "left": orders[4],
        "right": orders[4],
        "head": orders[6],
        "fc": (maps[:, None] * 16 + torch.arange(16)).reshape(-1),
    }
    doubled = {"fc": torch.tensor([0.5] * 6 + [1.0] * 3 + [0.5] * 4).repeat_interleave(16)}
    sizes = {"stem": 4, "expand": 5, "depth": 5, "project": 4, "norm": 4, "left": 3, "right": 2, "fc": 6}
    for name, old in narrow.state_dict().items():
        layer = name.split(".")[0]
        value = old[orders[sizes[layer]]] if layer in sizes else old
        if name.endswith("weight") and layer in inputs:
            value = value[:, inputs[layer]]
            scale = doubled.get(layer, torch.full((value.shape[1],), 0.5))
            value = value * scale.to(value).reshape(1, -1, *[1] * (value.ndim - 2))
        wide.get_parameter(name).copy_(value)
    return wide


@pytest.mark.parametrize("options", [{}, {"cost": "weight"}])
def test_a_network_with_doubled_channels_is_transported_to_the_narrow_one(options: dict[str, Any]) -> None:
    narrow = network(lambda: branched(1), X)
    wide = widened(narrow)
    close(wide(X), narrow(X), 1e-12)
    method = OptimalTransport(**options)
    merged = _merge([narrow, wide], X, match=method, normalize=None, weights=1.0)
    assert type(merged.module) is type(narrow)
    if options.get("cost") == "weight":  # halved inputs are at other distances: only the shapes are sure
        assert merged.module(X).isfinite().all()
    else:
        close(merged.module(X), narrow(X), 1e-9)
    other = network(lambda: branched(2), X, seed=5)
    control = _merge([narrow, other], X, match=method, normalize=None, weights=1.0)
    assert (control.module(X) - narrow(X)).abs().max() > 1e-2, "negative control"


def test_the_narrow_network_fills_the_wide_one() -> None:
    narrow = network(lambda: branched(1), X)
    merged = _merge([widened(narrow), narrow], X, match="ot", normalize=None, weights=1.0)
    close(merged.module(X), narrow(X), 1e-9)


def test_three_widths_with_repair() -> None:
    models = [network(lambda k=k: branched(k), X, seed=k) for k in (2, 1, 3)]
    moved = [models[0], *(transported(model, X, 3)[0] for model in models[1:])]
    outputs = [_merge(own, X, match="ot", normalize="repair").module(X).detach() for own in (models, moved)]
    assert outputs[0].isfinite().all()
    close(outputs[1], outputs[0], 1e-5)


@torch.no_grad()
def test_goals_are_the_statistics_of_carried_outputs() -> None:
    """Against T y on explicit outputs of the wide edge's layers."""
    models = [network(lambda: branched(1), X, seed=1), network(lambda: branched(2), X, seed=2)]
    programs = [trace(model, X[:2]) for model in models]
    method = OptimalTransport("sinkhorn", regularization=0.3)
    carried = ToFirstWidth(programs[1:], method, X, layers=True, progress=False).run(programs[0])
    assert carried.record.statistics is not None
    moments = {program: {} for program in range(2)}  # type: dict[int, dict[str, Tensor]]
    for edge, model in enumerate(models):
        s = F.relu(model.stem(X))  # type: ignore[operator]
        moments[edge] = {"stem": s.movedim(1, -1).reshape(-1, s.shape[1])}
    product = [x / x.norm(dim=0).clamp_min(1e-300) for x in (moments[0]["stem"], moments[1]["stem"])]
    # The stream has taps behind the stem and the norm; its coupling is read back from what it did to the stem's bias.
    T, *_ = torch.linalg.lstsq(
        models[1].stem.weight.flatten(1).T, carried.program.weights[1]["stem.weight"].flatten(1).T
    )
    assert product[0].shape[1] * 2 == product[1].shape[1]
    y = models[1].stem(X).movedim(1, -1).reshape(-1, 8) @ T  # type: ignore[operator]
    node = next(name for name in carried.record.statistics.layers if "conv2d" in name)
    close(carried.record.statistics.layers[node][1].mean, y.mean(0), 1e-6)
    close(carried.record.statistics.layers[node][1].std, y.std(0, correction=0), 1e-6)


@pytest.mark.parametrize("build", [lambda k: resnet20_bn(width=0.25 * k), lambda k: Attention(12 * k)])
def test_papers_networks_of_two_widths_become_one_of_the_first_width(build: Any) -> None:
    x = X if isinstance(build(1), Attention) else PICTURES
    models = [network(lambda k=k: build(k), x, seed=k) for k in (1, 2)]
    merged = _merge(models, x, match="ot")
    assert merged.module(x).isfinite().all()
    shapes = {name: tensor.shape for name, tensor in models[0].state_dict().items()}
    own = {name: tensor.shape for name, tensor in merged.module.state_dict().items() if name in shapes}
    assert own.items() <= shapes.items()


def test_other_matchers_and_other_networks_are_refused() -> None:
    narrow, wide = network(lambda: branched(1), X), network(lambda: branched(2), X)
    with pytest.raises(ArchitectureError, match="'weight', 'activation' or 'ot'"):
        _merge([narrow, wide], X, match="zipit")
    with pytest.raises(ArgumentError, match="preserve"):
        _merge([narrow, wide], X, match="ot", preserve=2)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.b((F.relu if self.kind else F.gelu)(self.a(x)).mean((2, 3)))

    def build(kind: bool, width: int) -> nn.Module:
        model = net(forward, a=conv(3, width), b=nn.Linear(width, 2)).double()
        model.kind = kind
        return model.eval()

    with pytest.raises(ArchitectureError, match="relu"):
        _merge([build(True, 4), build(False, 8)], X, match="ot")


def test_selection_without_a_coupling() -> None:
    """A channel that stands twice is read back as the mean of its copies."""
    own = Element(np.array([1, 0, 1]))
    close(own.table("out", 3), np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0]], float), 0)
    close(own.table("in", 3), np.array([[0, 0.5, 0], [1, 0, 0], [0, 0.5, 0]], float), 0)
