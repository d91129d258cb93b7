"""Cost counted from the graph: the papers' tables, hand-computed micro networks, and PyTorch's own FLOP counter."""

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vfx
from vfx.analyse.contractions import einsum
from vfx.analyse.cost import Profile, cost
from vfx.capture.capture import capture as trace
from vfx.errors import ArgumentError, OutputError
from vfx.files import write_atomic
from vfx.models import resnet20_bn, vgg16, vgg16_bn, vgg16_ln
from vfx.program import Program, copy_graph

# Vanishing Feature, Table 12: module | input | output | params | MAdd | FLOPs | MemRead | MemWrite | MemR+W. Misprints
# corrected: MemRead of features.12 and .14 (printed 242,856), MemR+W of features.16 (printed 19,120).
TABLE_12 = """
features.0 | 3 32 32 | 64 32 32 | 1792 | 3538944 | 1835008 | 19456 | 262144 | 281600
features.1 | 64 32 32 | 64 32 32 | 0 | 65536 | 65536 | 262144 | 262144 | 524288
features.2 | 64 32 32 | 64 32 32 | 36928 | 75497472 | 37814272 | 409856 | 262144 | 672000
features.3 | 64 32 32 | 64 32 32 | 0 | 65536 | 65536 | 262144 | 262144 | 524288
features.4 | 64 32 32 | 64 16 16 | 0 | 49152 | 65536 | 262144 | 65536 | 327680
features.5 | 64 16 16 | 128 16 16 | 73856 | 37748736 | 18907136 | 360960 | 131072 | 492032
features.6 | 128 16 16 | 128 16 16 | 0 | 32768 | 32768 | 131072 | 131072 | 262144
features.7 | 128 16 16 | 128 16 16 | 147584 | 75497472 | 37781504 | 721408 | 131072 | 852480
features.8 | 128 16 16 | 128 16 16 | 0 | 32768 | 32768 | 131072 | 131072 | 262144
features.9 | 128 16 16 | 128 8 8 | 0 | 24576 | 32768 | 131072 | 32768 | 163840
features.10 | 128 8 8 | 256 8 8 | 295168 | 37748736 | 18890752 | 1213440 | 65536 | 1278976
features.11 | 256 8 8 | 256 8 8 | 0 | 16384 | 16384 | 65536 | 65536 | 131072
features.12 | 256 8 8 | 256 8 8 | 590080 | 75497472 | 37765120 | 2425856 | 65536 | 2491392
features.13 | 256 8 8 | 256 8 8 | 0 | 16384 | 16384 | 65536 | 65536 | 131072
features.14 | 256 8 8 | 256 8 8 | 590080 | 75497472 | 37765120 | 2425856 | 65536 | 2491392
features.15 | 256 8 8 | 256 8 8 | 0 | 16384 | 16384 | 65536 | 65536 | 131072
features.16 | 256 8 8 | 256 4 4 | 0 | 12288 | 16384 | 65536 | 16384 | 81920
features.17 | 256 4 4 | 512 4 4 | 1180160 | 37748736 | 18882560 | 4737024 | 32768 | 4769792
features.18 | 512 4 4 | 512 4 4 | 0 | 8192 | 8192 | 32768 | 32768 | 65536
features.19 | 512 4 4 | 512 4 4 | 2359808 | 75497472 | 37756928 | 9472000 | 32768 | 9504768
features.20 | 512 4 4 | 512 4 4 | 0 | 8192 | 8192 | 32768 | 32768 | 65536
features.21 | 512 4 4 | 512 4 4 | 2359808 | 75497472 | 37756928 | 9472000 | 32768 | 9504768
features.22 | 512 4 4 | 512 4 4 | 0 | 8192 | 8192 | 32768 | 32768 | 65536
features.23 | 512 4 4 | 512 2 2 | 0 | 6144 | 8192 | 32768 | 8192 | 40960
features.24 | 512 2 2 | 512 2 2 | 2359808 | 18874368 | 9439232 | 9447424 | 8192 | 9455616
features.25 | 512 2 2 | 512 2 2 | 0 | 2048 | 2048 | 8192 | 8192 | 16384
features.26 | 512 2 2 | 512 2 2 | 2359808 | 18874368 | 9439232 | 9447424 | 8192 | 9455616
features.27 | 512 2 2 | 512 2 2 | 0 | 2048 | 2048 | 8192 | 8192 | 16384
features.28 | 512 2 2 | 512 2 2 | 2359808 | 18874368 | 9439232 | 9447424 | 8192 | 9455616
features.29 | 512 2 2 | 512 2 2 | 0 | 2048 | 2048 | 8192 | 8192 | 16384
avgpool | 512 2 2 | 512 1 1 | 0 | 2048 | 2048 | 8192 | 2048 | 10240
classifier.0 | 512 | 10 | 5130 | 10230 | 5120 | 22568 | 40 | 22608
"""
ROWS_12 = [[cell.strip() for cell in line.split("|")] for line in TABLE_12.strip().splitlines()]


def _profile(model: nn.Module, *shape: int) -> Profile:
    return cost(trace(model, torch.zeros(2, *shape)))


def _uninitialised(build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are whatever memory held: drawing them takes longer than counting them."""
    with torch.device("meta"):
        model = build()
    return model.to_empty(device="cpu").eval()


@pytest.fixture(scope="module")
def vgg() -> Profile:
    return _profile(_uninitialised(vgg16), 3, 32, 32)


# the papers' tables


def test_vgg16_rows_are_table_12(vgg: Profile) -> None:
    modules = {line[0] for line in ROWS_12}
    rows = [row for row in vgg.rows if row.module in modules]
    assert len(rows) == len(ROWS_12) == 32
    for row, (module, before, after, *numbers) in zip(rows, ROWS_12):
        shapes = [" ".join(map(str, shape)) for shape in (row.input_shape[1:], row.output_shape[1:])]
        memory = (row.memory_read, row.memory_write, row.memory_read + row.memory_write)
        assert [row.module, *shapes] == [module, before, after]
        assert [row.params, row.madd, row.flops, *memory] == [int(n) for n in numbers], module


def test_vgg16_totals(vgg: Profile) -> None:
    assert (vgg.params, vgg.flops, vgg.madd) == (14_719_818, 313_879_552, 626_774_006)
    assert vgg.memory_read + vgg.memory_write == sum(int(line[-1]) for line in ROWS_12)  # the paper repeats a row here


@pytest.mark.parametrize(
    ("model", "params", "flops"),
    [
        (vgg16_bn, 14_728_266, 314_432_512),
        (vgg16_ln, 14_728_266, 314_432_512),  # LayerNorm counts as BatchNorm
        (resnet20_bn, 272_474, 41_214_592),
    ],
)
def test_totals(model: Callable[[], nn.Module], params: int, flops: int) -> None:
    profile = _profile(_uninitialised(model), 3, 32, 32)
    assert (profile.params, profile.flops) == (params, flops)
    assert profile.unknown_ops == ()


def test_batch_norm_row() -> None:
    """Vanishing Feature, Table 15: 65,536 MAdd for 128 parameters and 16,384 elements."""
    row = _profile(nn.Sequential(nn.BatchNorm2d(64)), 64, 16, 16).rows[0]
    assert (row.params, row.flops, row.madd) == (128, 32_768, 65_536)
    assert (row.memory_read, row.memory_write) == ((16_384 + 128) * 4, 16_384 * 4)


# hand-computed


class Attention(nn.Module):
    """Three heads of 4 with a key length of its own."""

    def forward(self, x: Tensor) -> Tensor:
        query = x.unflatten(-1, (3, 4)).transpose(1, 2)  # (N, 3, 5, 4)
        return F.scaled_dot_product_attention(query, query[:, :, :2], query[:, :, :2])


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (N, 5, 12)
        scores = torch.matmul(x.unsqueeze(1), x.unsqueeze(1).mT)  # (N, 1, 5, 5)
        return torch.bmm(scores.squeeze(1), x)


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, x)


# network, input shape, MACs, FLOPs, MAdd
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7), 7560, 7770, 15120),  # 6·35 outputs · 4·9
    "conv_unbiased": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 5, 7), 7560, 7560, 14910),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), (4, 5, 7), 1296, 1296, 2556),  # 6·2·3 · 36
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (4, 5, 7), 7560, 7560, 14910),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 7), 3780, 3990, 7560),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (4, 5, 7), 1260, 1260, 2380),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 7), 360, 360, 690),  # 6·5 · 12
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 3, 3, 3), 384, 384, 744),  # 3·8 · 16
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 3, 5), 1440, 1800, 2880),  # 4·15 · 6·4; 360 out
    "transposed_grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False),
        (4, 3, 5),
        720,
        720,
        1080,
    ),
    "linear": (lambda: nn.Linear(8, 3), (8,), 24, 24, 45),
    "linear_positions": (lambda: nn.Linear(8, 3), (5, 8), 120, 120, 225),
    "attention": (Attention, (5, 12), 240, 240, 390),  # 3 heads · 5·2 scores · (4 + 4); 30 scores, 60 outputs
    "products": (Products, (5, 12), 600, 600, 1115),  # 25·12 + 60·5; 25 and 60 outputs
    "einsum": (lambda: Einsum("nqd,nkd->nqk"), (5, 12), 300, 300, 575),
    "einsum_ellipsis": (lambda: Einsum("...qd,...kd->...qk"), (2, 5, 12), 600, 600, 1150),
}


@pytest.mark.parametrize("name", LAYERS)
def test_micro_networks(name: str) -> None:
    network, shape, *expected = LAYERS[name]
    model = nn.Sequential(network())
    profile = _profile(model, *shape)
    assert [profile.macs, profile.flops, profile.madd] == expected
    assert 2 * profile.macs == _counted(model, *shape)
    assert profile.unknown_ops == ()


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (torchvision.models.resnet18, 64),
        (lambda: torchvision.models.vit_b_32(image_size=64), 64),
    ],
)
def test_networks_against_the_flop_counter(model: Callable[[], nn.Module], size: int) -> None:
    network = _uninitialised(model)
    profile = _profile(network, 3, size, size)
    assert 2 * profile.macs == _counted(network, 3, size, size)
    assert profile.params == sum(p.numel() for p in network.parameters())
    assert profile.unknown_ops == ()


def _counted(model: nn.Module, *shape: int) -> int:
    """FLOPs by PyTorch's counter; with gradients and the plain attention, since it does not see into fused kernels."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops()


# what counts, and where


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(F.relu(x), 2), 2), 1) + 1


def test_functional_activations_and_pools_cost_nothing() -> None:
    profile = _profile(Functional(), 4, 8, 8)
    assert (profile.flops, profile.madd, profile.unknown_ops) == (0, 0, ())
    assert [row.operator for row in profile.rows] == [
        *("aten.relu", "aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d", "aten.add"),
    ]


@pytest.mark.parametrize(
    ("module", "flops", "madd"),
    [
        (nn.ReLU(), 256, 256),
        (nn.ReLU(inplace=True), 256, 256),
        (nn.GELU(), 256, 256),
        (nn.PReLU(), 256, 256),
        (nn.Softsign(), 256, 256),  # three operators, counted once
        (nn.Softmax(1), 256, 256),
        (nn.MaxPool2d(2), 256, 3 * 64),
        (nn.MaxPool2d(3, stride=2, padding=1), 256, 8 * 64),
        (nn.AvgPool2d((2, 4)), 256, 8 * 32),
        (nn.AdaptiveAvgPool2d(1), 0, 0),
        (nn.Dropout(), 0, 0),
        (nn.LayerNorm(8), 512, 1024),
        (nn.GroupNorm(2, 4), 512, 1024),
    ],
)
def test_modules(module: nn.Module, flops: int, madd: int) -> None:
    profile = _profile(nn.Sequential(module), 4, 8, 8)
    assert (profile.flops, profile.madd, profile.unknown_ops) == (flops, madd, ())


def test_softmax_inside_attention_is_not_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=True)[0]

    profile = _profile(Net(), 5, 8)
    assert any(row.operator == "aten.softmax" for row in profile.rows)
    assert profile.flops == profile.macs == 5 * 8 * 24 + 2 * (2 * 25 * 4) + 5 * 8 * 8


def _with_affine(program: Program) -> Program:
    """A mul and an add behind the first layer, without module information, as passes add them."""
    graph, _ = copy_graph(program.graph)
    layer = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(layer):
        scale = graph.create_node("get_attr", "scale")
    with graph.inserting_after(layer):
        first = graph.call_function(torch.ops.aten.mul.Tensor, (layer, scale))
    with graph.inserting_after(first):
        second = graph.call_function(torch.ops.aten.batch_norm.default, (first, None, None, None, None, False, 0, 0, 0))
    layer.replace_all_uses_with(second, lambda user: user is not first)
    first.meta = second.meta = {"val": layer.meta["val"]}
    weights = {**program.weights[0], "scale": torch.ones(4)}
    return program.with_graph(graph, (weights,), "affine")


def test_nodes_without_module_information() -> None:
    before = trace(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 3))
    old, new = cost(before), cost(_with_affine(before))
    assert [row.operator for row in new.rows] == ["aten.linear", "aten.mul", "aten.batch_norm"]
    assert [(row.module, row.params, row.flops) for row in new.rows[1:]] == [("", 4, 0), ("", 0, 8)]
    assert new.ratio(old) == {"params": 20 / 16, "flops": 20 / 12}


def test_missing_shape_is_refused() -> None:
    program = trace(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 3))
    graph, _ = copy_graph(program.graph)
    next(node for node in graph.nodes if node.op == "call_function").meta = {}
    with pytest.raises(ArgumentError, match=r"node linear .* carries no shape"):
        cost(program.with_graph(graph, program.weights, "broken"))


class Shared(nn.Module):
    """One layer twice, one parameter through a view, one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) + self.token.expand(x.shape[0], -1) + self.offset


def test_shared_weights_count_once() -> None:
    profile = _profile(Shared(), 4)
    linear = [row for row in profile.rows if row.operator == "aten.linear"]
    assert [row.params for row in linear] == [20, 0]
    assert [row.memory_read for row in linear] == [(4 + 20) * 4] * 2  # both calls read it
    assert profile.params == 24
    assert [row.operator for row in profile.rows if row.params == 4] == ["aten.expand"]
    assert [row.memory_read for row in profile.rows[-2:]] == [2 * 4 * 4, 4 * 4]  # the buffer is no read


def test_dtype_and_batch() -> None:
    half = cost(trace(nn.Sequential(nn.Linear(3, 4)).to(torch.bfloat16), torch.zeros(7, 3, dtype=torch.bfloat16)))
    row = half.rows[0]
    assert (row.input_shape, row.output_shape) == ((1, 3), (1, 4))
    assert (row.memory_read, row.memory_write) == ((3 + 16) * 2, 4 * 2)


def test_unknown_operators_are_reported() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x)

    profile = _profile(Net(), 4, 3)
    assert profile.unknown_ops == ("aten.cdist",)
    assert [(row.operator, row.flops) for row in profile.rows] == [("aten.cdist", 0)]
    assert "aten.cdist" in str(profile).splitlines()[-1]


def test_every_report_with_a_total_names_what_is_not_counted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))[:, None]
            return self.second(torch.cdist(h, h).expand(-1, 1, 3)).sum(1)

    torch.manual_seed(0)
    one, other, x = Net().eval(), Net().eval(), torch.randn(8, 4)
    results = [
        vfx.merge([one, other], x, match="weight", normalize=None, progress=False),
        vfx.prune(one, x, sparsity=0.5, protect=(), progress=False),
        vfx.prune_structured(one, x, sparsity=0.5, progress=False),
    ]
    for report in (result.report for result in results):
        assert report.to_dict()["not_counted"] == ["aten.cdist"]
        assert "not counted: aten.cdist" in str(report)
    comparison = vfx.compare([one, other], x, data=[x], grid={"match": ["weight"]}, solve=None, progress=False)
    assert comparison.to_dict()["not_counted"] == ["aten.cdist"]
    assert "FLOPs without aten.cdist" in str(comparison)


# recurrent layers, and products of several tensors


class Steps(nn.Module):
    """A recurrent layer of 7 steps, or a cell for one."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        found = self.cell(x)
        return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("build", "shape", "macs", "outputs"),
    [
        (lambda: nn.LSTM(12, 16, batch_first=True), (7, 12), 7 * 64 * (12 + 16), 7 * 2 * 64),
        (lambda: nn.GRU(12, 16, batch_first=True, bias=False), (7, 12), 7 * 48 * (12 + 16), 7 * 2 * 48),
        (lambda: nn.RNN(12, 16, batch_first=True), (7, 12), 7 * 16 * (12 + 16), 7 * 2 * 16),
        (
            lambda: nn.LSTM(12, 16, num_layers=2, bidirectional=True, batch_first=True),
            (7, 12),
            7 * 2 * 64 * ((12 + 16) + (32 + 16)),
            7 * 2 * 2 * 2 * 64,
        ),
        (
            lambda: nn.LSTM(12, 16, proj_size=5, batch_first=True),
            (7, 12),
            7 * (64 * (12 + 5) + 5 * 16),
            7 * (2 * 64 + 5),
        ),
        (lambda: nn.LSTMCell(12, 16), (12,), 64 * (12 + 16), 2 * 64),
        (lambda: nn.GRUCell(12, 16), (12,), 48 * (12 + 16), 2 * 48),
        (lambda: nn.RNNCell(12, 16), (12,), 16 * (12 + 16), 2 * 16),
    ],
)
def test_recurrent_layers(build: Callable[[], nn.Module], shape: tuple[int, ...], macs: int, outputs: int) -> None:
    profile = _profile(Steps(build()), *shape)
    assert (profile.macs, profile.flops, profile.madd) == (macs, macs, 2 * macs - outputs)
    assert profile.unknown_ops == ()


def test_a_budget_counts_recurrent_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0])

    cost_of = lambda width: 7 * 4 * width * (12 + width) + 7 * width * 5  # noqa: E731
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    report = vfx.prune_structured(Net().eval(), x, budget={"flops": 0.5}, progress=False).report
    after = report.widths[0].after
    assert report.flops_ratio == pytest.approx(cost_of(after) / cost_of(16))
    assert cost_of(after) <= 0.5 * cost_of(16) < cost_of(after + 1)


class Contracted(nn.Module):
    """x (N, 5, 6) with tensors of its own."""

    def __init__(self, run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.run, self.own = run, nn.ParameterList(torch.ones(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, *self.own)


SEVERAL: list[tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = [
    (lambda x, a, b: torch.einsum("nti,ij,jk->ntk", x, a, b), [(6, 7), (7, 4)]),
    (lambda x, a, b: torch.einsum("...i,ij,jk", x, a, b), [(6, 7), (7, 4)]),
    (lambda x, a, b, c: torch.einsum("nti,ij,jk,kl->ntl", x, a, b, c), [(6, 7), (7, 4), (4, 3)]),
    (lambda x, a: torch.einsum("nti,ij,nsj->nts", x, a, x), [(6, 6)]),
    (lambda x, a, b: torch.einsum("nti,i,ij->ntj", x, a, b), [(6,), (6, 7)]),  # a product entry by entry first
    (lambda x, a: torch.einsum("nti,tj->nij", x, a), [(5, 7)]),
    (lambda x: torch.einsum("nti,nsj->nts", x, x), []),  # what stands in one operand alone is summed first
    (lambda x: torch.einsum("nti,ntj->ntij", x, x), []),
    (lambda x, a: torch.tensordot(x, a, 2), [(5, 6, 3)]),
    (lambda x, a: torch.tensordot(x, a, ([1], [2])), [(4, 3, 5)]),
    (lambda x, a: torch.inner(x, a), [(7, 6)]),
    (lambda x, a: torch.einsum("nti,ti->n", x, a), [(5, 6)]),
]


@pytest.mark.parametrize("case", range(len(SEVERAL)))
def test_products_of_several_tensors_are_those_that_run(case: int) -> None:
    run, shapes = SEVERAL[case]
    model = Contracted(run, *shapes)
    profile = _profile(model, 5, 6)
    assert 2 * profile.macs == _counted(model, 5, 6)
    assert profile.unknown_ops == ()


def test_products_summed_over_a_batch() -> None:
    model = Contracted(lambda x, a: torch.addbmm(a, x.unflatten(1, (5, 1))[0], x.unflatten(1, (5, 1))[0].mT), (1, 1))
    assert _profile(model, 5, 6).macs == 5 * 6


def test_the_order_of_an_einsum_is_its_path() -> None:
    shapes = [(2, 30), (30, 3), (3, 20)]
    sums = lambda path: sum(c.macs for c in einsum("ab,bc,cd->ad", shapes, path))  # noqa: E731
    assert sums(None) == sums([0, 1, 0, 1]) == 2 * 30 * 3 + 2 * 3 * 20
    assert sums([1, 2, 0, 1]) == 30 * 3 * 20 + 2 * 30 * 20


def test_bilinear_layers_are_two_products() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.Bilinear(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.pairs(x, x[..., :4])

    profile = _profile(Net(), 5, 6)
    assert profile.macs == 5 * 3 * 6 * 4 + 5 * 3 * 4
    assert profile.madd == 2 * profile.macs - 5 * 3 * 4 - 5 * 3
    assert profile.params == 3 * 6 * 4 + 3


def test_deformable_convolutions_count_as_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.offset = nn.Conv2d(4, 18, 3, padding=1, bias=False)
            self.layer = torchvision.ops.DeformConv2d(4, 6, 3, padding=1, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, self.offset(x))

    for bias in (False, True):
        profile = _profile(Net(bias), 4, 5, 7)
        row = next(row for row in profile.rows if row.operator == "torchvision.deform_conv2d")
        assert (row.macs, row.flops) == (6 * 35 * 36, 6 * 35 * 36 + 6 * 35 * bias)
        assert profile.unknown_ops == ()


def test_edges() -> None:
    program = trace(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 3))
    program = program.with_weights(program.weights * 2)
    assert cost(program, edge=1) == cost(program)
    with pytest.raises(ArgumentError, match="edge 2 does not exist"):
        cost(program, edge=2)


def test_ratio_of_networks_without_parameters() -> None:
    empty, layer = _profile(nn.Sequential(nn.Flatten()), 3), _profile(nn.Sequential(nn.Linear(3, 4)), 3)
    assert empty.ratio(empty) == {"params": 1.0, "flops": 1.0}
    assert layer.ratio(empty) == {"params": math.inf, "flops": math.inf}


# files


def test_csv_round_trip(vgg: Profile, tmp_path: Path) -> None:
    text = vgg.to_csv(tmp_path / "cost.csv")
    assert (tmp_path / "cost.csv").read_bytes().decode() == text == vgg.to_csv()
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == len(vgg.rows)
    assert (lines[0]["module"], lines[0]["input_shape"]) == ("features.0", "1x3x32x32")
    for name in ("params", "macs", "flops", "madd", "memory_read", "memory_write"):
        assert [int(line[name]) for line in lines] == [getattr(row, name) for row in vgg.rows]


def test_json_round_trip(vgg: Profile, tmp_path: Path) -> None:
    text = vgg.to_json(tmp_path / "cost.json")
    assert (tmp_path / "cost.json").read_text(encoding="utf-8") == text
    document = json.loads(text)
    assert document["totals"]["flops"] == vgg.flops
    assert document["unknown_ops"] == []
    for line, row in zip(document["rows"], vgg.rows, strict=True):
        assert line == {**vars(row), "input_shape": [*row.input_shape], "output_shape": [*row.output_shape]}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_no_file(
    vgg: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    (tmp_path / "old.csv").write_text("old")
    monkeypatch.setattr(os, broken, fail)
    for name in ("new.csv", "old.csv"):
        with pytest.raises(OSError, match="no space"):
            vgg.to_csv(tmp_path / name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old.csv": "old"}


def test_write_replaces_and_needs_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "file"
    link = tmp_path / "link"
    link.symlink_to(target)
    for data in (b"one", "zwölf"):
        write_atomic(link, data)
    assert target.read_text(encoding="utf-8") == "zwölf"
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    with pytest.raises(OutputError, match="missing does not exist"):
        write_atomic(tmp_path / "missing" / "file", "text")


def test_table_shows_every_row_in_full(vgg: Profile) -> None:
    lines = str(vgg).splitlines()
    assert sum("features." in line for line in lines) == 30
    assert "313,879,552" in lines[-2]
    assert len({len(line) for line in lines}) == 1
