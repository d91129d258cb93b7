"""Statistics: equal to numpy's two-pass float64 formulas under any partition into batches; one pass for all taps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, node_values
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_models import conv, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vfx.api import collect, merge, symmetry, trace
from vfx.errors import ArgumentError, DataError
from vfx.models import resnet20_bn
from vfx.statistics.collect import Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.data import Batches
from vfx.statistics.labels import tensor_labels
from vfx.statistics.moments import CrossMoments, Moments, batch_moments, channel_rows

PRECISION = [(torch.float64, 1e-10), (torch.float32, 1e-6)]
COUNT, CHANNELS = 40, 5


def _data(seed: int, dtype: torch.dtype, offset: float) -> Tensor:
    """(edges, samples, channels) with correlated channels of very different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(2, COUNT, CHANNELS, generator=generator, dtype=torch.float64)
    base[1] += base[0].flip(1)
    spread = torch.logspace(-2, 2, CHANNELS, dtype=torch.float64)
    return (base * spread + offset * spread).to(dtype)


def _parts(cuts: list[int]) -> list[tuple[int, int]]:
    edges_ = [0, *sorted(set(cuts)), COUNT]
    return list(pairwise(edges_))


partitions = st.lists(st.integers(1, COUNT - 1), max_size=COUNT)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), cuts=partitions, offset=st.sampled_from([0.0, 1.0, -3.0]))
def test_moments_are_numpys_under_any_partition(
    dtype: torch.dtype, tolerance: float, seed: int, cuts: list[int], offset: float
) -> None:
    x = _data(seed, dtype, offset)[0]
    moments = Moments(CHANNELS)
    for start, stop in _parts(cuts):
        moments.update(*batch_moments(x[start:stop], 1))
    exact = x.double().numpy()
    assert moments.count == COUNT
    scale = exact.std(0)  # the error of a mean is measured in standard deviations
    np.testing.assert_allclose(moments.mean.numpy() / scale, exact.mean(0) / scale, rtol=0, atol=4 * tolerance)
    np.testing.assert_allclose(moments.std.numpy(), exact.std(0), rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), cuts=partitions, offset=st.sampled_from([0.0, 1.0, -3.0]))
def test_cross_covariance_and_correlation_are_numpys_under_any_partition(
    dtype: torch.dtype, tolerance: float, seed: int, cuts: list[int], offset: float
) -> None:
    x = _data(seed, dtype, offset)
    cross = CrossMoments(2, CHANNELS)
    for start, stop in _parts(cuts):
        cross.update([part[start:stop].T.clone() for part in x])
    exact = [(e - e.mean(0)) / e.std(0) for e in x.double().numpy()]
    correlation = exact[0].T @ exact[1] / COUNT
    np.testing.assert_allclose(cross.correlation(0, 1).numpy(), correlation, rtol=0, atol=tolerance)
    covariance = cross.cross[0, 1].numpy() / COUNT
    scale = np.outer(*(e.std(0) for e in x.double().numpy()))
    np.testing.assert_allclose(covariance / scale, correlation, rtol=0, atol=tolerance)


def test_averaging_the_batches_variances_would_not_pass() -> None:
    """Negative control: the variance between batches is part of the total."""
    x = _data(0, torch.float64, 0.0)[0].sort(0).values
    within = torch.stack([part.var(0, correction=0) for part in x.split(10)]).mean(0).sqrt()
    moments = Moments(CHANNELS)
    for part in x.split(10):
        moments.update(*batch_moments(part, 1))
    assert (moments.std > 1.5 * within).all()
    close(moments.std, x.std(0, correction=0), 1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_channels_correlate_with_nothing(value: float, batch: int, dtype: torch.dtype) -> None:
    """Rounding of a mean must not turn a constant channel into a perfectly correlated one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3001, generator=generator, dtype=dtype)
    x[1], x[2] = value, value / 3
    cross = CrossMoments(2, 4)
    for part in x.split(batch, dim=1):
        cross.update([part.clone(), part.flip(0).clone()])
    found = cross.correlation(0, 1)
    assert torch.isfinite(found).all()
    assert (found[[1, 2]] == 0).all()
    assert (found[:, [1, 2]] == 0).all()
    assert found[0, 3] == pytest.approx(1, abs=1e-6)


def test_convolution_outputs_are_reduced_over_batch_and_space() -> None:
    x = images(6, 5, 4, dtype=torch.float64)
    for dim in (1, 2, -1):
        count, mean, m2 = batch_moments(x, dim)
        flat = x.movedim(dim, 0).reshape(x.shape[dim], -1).numpy()
        assert count == flat.shape[1]
        np.testing.assert_allclose(mean.numpy(), flat.mean(1), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(m2.numpy(), flat.var(1) * count, rtol=1e-12)


# collecting -----------------------------------------------------------------------------------------------------------


def _residual() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        stream = F.relu(self.stem(x))
        stream = F.relu(stream + self.a2(F.relu(self.a1(stream))))
        stream = F.relu(stream + self.b2(F.relu(self.b1(stream))))
        return self.fc(stream.mean((2, 3)))

    return net(forward, stem=conv(3, 6), a1=conv(6, 5), a2=conv(5, 6), b1=conv(6, 4), b2=conv(4, 6), fc=nn.Linear(6, 3))


X = images(23, 8, dtype=torch.float64)


@pytest.fixture(scope="module")
def residual() -> list[nn.Module]:
    return edges(_residual, X)


def test_every_tap_of_a_residual_stream_is_read(residual: list[nn.Module]) -> None:
    program = trace(residual, X[:2])
    facts = symmetry(program)
    found = collect(program, data=X.split(5), progress=False)
    stream = next(group for group in facts.groups if group.size == 6)
    taps = [tap for tap in found.taps if tap.groups == (stream.index,)]
    assert len(taps) == 3  # behind the stem and behind each add
    with torch.no_grad():
        for edge, model in enumerate(residual):
            s = F.relu(model.stem(X))
            expected = [s]
            for first, second in ((model.a1, model.a2), (model.b1, model.b2)):
                s = F.relu(s + second(F.relu(first(s))))
                expected.append(s)
            for tap, value in zip(taps, expected):
                moments = found.features[tap.key].moments[edge]
                flat = value.movedim(1, 0).reshape(6, -1)
                close(moments.mean, flat.mean(1), 1e-12)
                close(moments.std, flat.std(1, correction=0), 1e-12)


def test_layer_statistics_are_those_of_the_modules(residual: list[nn.Module]) -> None:
    found = collect(residual, X[:2], data=X.split(4), progress=False)
    assert found.samples == len(X)
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach()}))
        for name, module in residual[1].named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    residual[1](X)
    for handle in handles:
        handle.remove()
    assert len(found.layers) == len(seen) == 6
    for (_, moments), value in zip(found.layers.items(), seen.values()):
        flat = value.movedim(1, 0).reshape(value.shape[1], -1)
        close(moments[1].mean, flat.mean(1), 1e-12)
        close(moments[1].std, flat.std(1, correction=0), 1e-12)


def test_groups_that_share_an_axis_have_a_tap_each() -> None:
    """Also the group that stands at the front of the axis, in order."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(self.c(F.relu(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3)))

    models = edges(lambda: net(forward, a=conv(3, 3), b=conv(3, 5), c=conv(8, 4), fc=nn.Linear(4, 2)), X)
    found = collect(models, X[:2], data=X.split(5), progress=False)
    taps = [tap for tap in found.taps if tap.node == "relu"]
    assert [(tap.size, tap.whole) for tap in taps] == [(3, False), (5, False)]
    with torch.no_grad():
        values = F.relu(torch.cat([models[0].a(X), models[0].b(X)], 1)).movedim(1, 0).flatten(1)
    for tap in taps:
        moments = found.features[tap.key].moments[0]
        close(moments.mean, values[tap.position[:, 0]].mean(1), 1e-12)
        close(moments.std, values[tap.position[:, 0]].std(1, correction=0), 1e-12)


class Counted:
    """A loader that counts how often it is read."""

    def __init__(self, batches: list[Tensor]):
        self.batches, self.passes, self.served = batches, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for batch in self.batches:
            self.served += 1
            yield batch


def test_one_pass_serves_all_taps_of_all_edges(residual: list[nn.Module]) -> None:
    loader = Counted(list(X.split(6)))
    collect(residual, X[:2], data=loader, progress=False)
    assert (loader.passes, loader.served) == (1, 4)


def test_any_partition_and_any_form_of_the_data_give_the_same_statistics(residual: list[nn.Module]) -> None:
    labels = torch.arange(len(X))
    forms = {
        "tensor": X,
        "tensors": list(X.split(7)),
        "tuples": list(zip(X.split(4), labels.split(4))),
        "lists": [list(pair) for pair in zip(X.split(4), labels.split(4))],
        "dicts": [{"x": part, "y": 0} for part in X.split(9)],
        "iterator": iter(X.split(5)),
        "generator": (part for part in X.split(1)),
        "loader": DataLoader(TensorDataset(X, labels), batch_size=10),
    }
    program = trace(residual, X[:2])
    found = {name: collect(program, data=data, progress=False) for name, data in forms.items()}
    reference = found.pop("tensor")
    for statistics in found.values():
        assert statistics.samples == len(X)
        _same_statistics(statistics, reference, 1e-10)


def _same_statistics(one: Statistics, other: Statistics, tolerance: float) -> None:
    assert one.fingerprint == other.fingerprint
    for name, moments in one.layers.items():
        for a, b in zip(moments, other.layers[name]):
            close(a.mean, b.mean, tolerance)
            close(a.std, b.std, tolerance)
    for key, cross in one.features.items():
        close(cross.correlation(0, 1), other.features[key].correlation(0, 1), tolerance)


@pytest.mark.parametrize("limit", [1, 5, 12, 23, 1000])
def test_max_samples_cuts_inside_a_batch(residual: list[nn.Module], limit: int) -> None:
    program = trace(residual, X[:2])
    found = collect(program, data=X.split(5), max_samples=limit, progress=False)
    kept = collect(program, data=[X[:limit]], progress=False)
    assert found.samples == min(limit, len(X))
    _same_statistics(found, kept, 1e-10)


def test_max_samples_reads_no_more_than_it_needs(residual: list[nn.Module]) -> None:
    loader = Counted(list(X.split(5)))
    collect(residual, X[:2], data=loader, max_samples=10, progress=False)
    assert loader.served == 2
    with pytest.raises(ArgumentError, match="max_samples must be at least 1"):
        collect(residual, X[:2], data=X, max_samples=0, progress=False)


def test_features_and_layers_can_be_left_out(residual: list[nn.Module]) -> None:
    program = trace(residual, X[:2])
    facts = symmetry(program)
    without = collect_statistics(program, facts, X, features=False, progress=False)
    assert not without.features
    assert not without.taps
    assert len(without.layers) == 6
    without = collect_statistics(program, facts, X, layers=False, progress=False)
    assert without.features
    assert not without.layers


def test_statistics_are_refused_for_other_weights_and_other_graphs(residual: list[nn.Module]) -> None:
    found = collect(residual, X[:2], data=X, progress=False)
    merge(residual, X[:2], statistics=found, normalize=None, progress=False)
    with pytest.raises(DataError, match="another graph or other weights"):
        merge(residual[::-1], X[:2], statistics=found, normalize=None, progress=False)
    with pytest.raises(DataError, match="another graph or other weights"):
        merge(edges(_residual, X, seed=5), X[:2], statistics=found, normalize=None, progress=False)
    other = edges(lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)), X)
    with pytest.raises(DataError, match="another graph or other weights"):
        merge(other, X[:2], statistics=found, normalize=None, progress=False)


def test_permuted_goals_are_the_permuted_edges_own(residual: list[nn.Module]) -> None:
    """No second pass: the statistics of π(B) are those of B in π's order."""
    from vfx.passes.align import Align

    program = trace(residual, X[:2])
    aligned = Align("weight", X, progress=False)(program)
    again = collect_statistics(aligned, symmetry(aligned), X, progress=False).goals()
    moved = 0
    for name, goal in aligned.goals.items():
        close(goal.mean, again[name].mean, 1e-10)
        close(goal.std, again[name].std, 1e-10)
        moved += not torch.equal(goal.mean[1], collect(program, data=X, progress=False).goals()[name].mean[1])
    assert moved >= 5  # every layer but the last was permuted


def test_dead_channels_count_as_constant_and_break_nothing() -> None:
    models = edges(lambda: nn.Sequential(conv(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 3)), X)
    with torch.no_grad():
        models[0][0].bias[2] = -1e3
        models[1][0].bias[4] = -1e3
    found = collect(models, X[:2], data=X.split(8), progress=False)
    correlation = found.features[found.taps[0].key].correlation(0, 1)
    assert torch.isfinite(correlation).all()
    assert (correlation[2] == 0).all()
    assert (correlation[:, 4] == 0).all()
    assert (correlation.abs().sum(1) > 0).sum() == 5
    merged = merge(models, X[:2], data=X.split(8), normalize="repair", progress=False)
    assert torch.isfinite(merged.module(X)).all()


def test_statistics_of_a_network_with_batchnorm_use_the_running_statistics() -> None:
    models = edges(lambda: resnet20_bn(width=0.25), images(4))
    data = images(3, seed=9)
    found = collect(models, images(2), data=data, progress=False)
    name, moments = list(found.layers.items())[-1]
    with torch.no_grad():
        logits = models[0](data)
    close(moments[0].mean, logits.double().mean(0), 1e-5)
    assert name == "linear"


def test_data_that_do_not_fit_are_refused(residual: list[nn.Module]) -> None:
    program = trace(residual, X[:2])
    cases = [
        ([], "no samples"),
        (X[:0], "no samples"),
        (3, "must be a tensor or an iterable"),
        ([X[:, :2]], "captured with"),
        ([X[0]], "captured with"),
        ([X.float()], "takes torch.float64"),
        ([{"y": X}], "lacks x"),
        ([()], "the network takes 1"),
        (["abc"], "must be a tensor, a tuple or a dict"),
        ([("abc",)], "not a tensor"),
        ([X.where(X < 2, torch.nan)], "NaN or infinite"),
    ]
    for data, message in cases:
        with pytest.raises(DataError, match=message):
            collect(program, data=data, progress=False)


def test_second_moments_inside_each_edge_equal_numpy() -> None:
    x = images(23, 8, dtype=torch.float64)
    program = trace(edges(_residual, x), x[:2])
    found = collect(program, data=x.split(5), within=True, progress=False)
    assert found.reads == {"features", "layers", "within"}
    for edge in range(2):
        values = node_values(program, x, edge)
        for name, covariances in found.covariances.items():
            rows = values[name].movedim(1, 0).flatten(1).numpy()
            np.testing.assert_allclose(covariances[edge].numpy(), np.cov(rows, bias=True), rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(found.layers[name][edge].std.numpy(), rows.std(1), rtol=1e-10)
        for tap in found.taps:
            rows = values[tap.node].movedim(tap.dim, 0).flatten(1).numpy()
            own = found.features[tap.key].covariance(edge, edge).numpy()
            np.testing.assert_allclose(own, np.cov(rows, bias=True), rtol=1e-10, atol=1e-12)
    plain = collect(program, data=x.split(5), progress=False)
    assert not plain.covariances
    assert all((0, 0) not in cross.cross for cross in plain.features.values())


def test_labels_go_with_their_batches() -> None:
    x, y = torch.arange(10.0).reshape(10, 1), torch.arange(10)
    program = trace(nn.Linear(1, 2), x[:2])
    pairs = list(zip(x.split(4), y.split(4)))
    for data in (pairs, [{"input": a, "labels": b} for a, b in pairs]):
        found = list(Batches(program, data, max_samples=6).labelled())
        assert [(batch[0].flatten().tolist(), labels.tolist()) for batch, labels in found if labels is not None] == [
            ([0, 1, 2, 3], [0, 1, 2, 3]),
            ([4, 5], [4, 5]),
        ]
    positions = [(a, b[:, None].expand(-1, 3)) for a, b in pairs]
    assert [tuple(labels.shape) for _, labels in Batches(program, positions).labelled() if labels is not None] == [
        (4, 3),
        (4, 3),
        (2, 3),
    ]
    for silent in (x, [(a, b.float() + 0.5) for a, b in pairs], [(a, b[:1]) for a, b in pairs[:2]]):
        assert [labels for _, labels in Batches(program, silent).labelled() if labels is not None] == []


def test_labels_of_any_dtype_stand_behind_the_inputs() -> None:
    x, y = torch.randn(10, 3), torch.arange(10) + 0.5
    program = trace(nn.Linear(3, 2), x[:2])

    def read(data: list[object], limit: int | None = None) -> list[Tensor | None]:
        return [labels for _, labels in Batches(program, data, limit).labelled(tensor_labels)]

    for data in (
        [(x[:4], y[:4]), (x[4:], y[4:], "more")],
        [{"input": x, "labels": y}],
        [{"other": x, "input": x, "y": y}],
    ):
        for limit in (10, 7):
            assert torch.cat([labels for labels in read(data, limit) if labels is not None]).equal(y[:limit])
    assert read([x]) == [None]
    assert read([(x,)]) == [None]
    assert read([{"input": x, "weights": y}]) == [None]
    for wrong in (y[:4], 3, ["a"] * 10):
        with pytest.raises(DataError, match="a tensor of as many"):
            read([(x, wrong)])


def test_held_batches_are_those_that_a_loader_gave_once() -> None:
    x = torch.randn(10, 3)
    program = trace(nn.Linear(3, 2), x[:2])
    held = Batches(program, iter([x[:4], x[4:8], x[8:]]), 6).held()
    assert [len(batch) for batch in held] == [4, 4]
    assert torch.cat([batch[0] for batch in Batches(program, held, 6)]).equal(x[:6])


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_of_channels_are_no_view_of_the_activation(dim: int) -> None:
    """They are centred in place."""
    x = images(4)[:, :, 0, 0]
    before = x.clone()
    rows = channel_rows(x, dim)
    assert torch.equal(rows, before.movedim(dim, 0))
    rows.sub_(1)
    assert torch.equal(x, before)
