"""Reconstruction: every formula against literal implementations with all rows written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import close, edges, images, node_values
from micro_models import between, conv, net, norm_first, parameter
from torch import Tensor, fx, nn

from passes.duplicate_branches import DuplicateBranches
from passes.interpolate import Interpolate
from passes.reconstruct import Reconstruct
from vfx.api import trace
from vfx.emit.module import emit
from vfx.errors import ArgumentError, PassError
from vfx.program import Program
from vfx.reconstruct import solve as solving
from vfx.reconstruct.forms import Form, form_of
from vfx.reconstruct.references import Reference
from vfx.reconstruct.solve import RIDGES, START, Problem, chosen_ridge, solve
from vfx.reconstruct.sums import Sums, sums_of
from vfx.reconstruct.windows import Window, patches, shares_products, window_gram, window_sums
from vfx.statistics.spill import Spill

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

X = images(16, 6, dtype=torch.float64)
VECTORS = torch.randn(24, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
RIDGE = 1e-3
EXACT = 1e-8
THIRDS = [0.5, 0.3, 0.2]


def _random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _fitted(rows: Tensor, goals: Tensor, before: Tensor, ridge: float, support: Tensor | None = None) -> Tensor:
    """argmin ‖X W − Y‖² + λ ‖W − W₀‖², output by output on its own inputs; of several solutions the nearest to W₀."""
    strength = (ridge * rows.square().sum(0).mean()).sqrt()
    found = torch.zeros_like(before)
    for output in range(goals.shape[1]):
        own = torch.arange(len(before)) if support is None else support[:, output].nonzero()[:, 0]
        if len(own):
            start = before[own, output]
            above = torch.cat([rows[:, own], strength * torch.eye(len(own), dtype=rows.dtype)])
            right = torch.cat([goals[:, output] - rows[:, own] @ start, torch.zeros_like(start)])
            found[own, output] = start + torch.linalg.lstsq(above, right[:, None], driver="gelsd").solution[:, 0]
    return found


def _ones(rows: Tensor) -> Tensor:
    """The rows with a one behind them, which reads the bias."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


# windows --------------------------------------------------------------------------------------------------------------

PLAIN = [  # stride 1, no further padding than the kernel reaches
    (Window((3,), (1,), (1,), ((1, 1),)), (7,)),
    (Window((4,), (1,), (2,), ((5, 2),)), (9,)),
    (Window((5,), (1,), (1,), ((0, 0),)), (5,)),
    (Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))), (5, 6)),
    (Window((2, 3), (1, 1), (2, 1), ((2, 0), (0, 1))), (6, 5)),
    (Window((3, 2), (1, 1), (1, 3), ((0, 0), (0, 0))), (5, 7)),
    (Window((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2))), (3, 2)),
    (Window((4, 1), (1, 1), (1, 1), ((3, 3), (0, 0))), (2, 4)),
    (Window((1, 3), (1, 1), (1, 2), ((0, 0), (1, 4))), (3, 6)),
    (Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))), (3, 4)),
]
OTHERS = [
    (Window((4,), (2,), (2,), ((3, 1),)), (9,)),
    (Window((3,), (1,), (1,), ((-1, -2),)), (8,)),
    (Window((2, 3), (1, 2), (2, 1), ((2, 0), (0, 1))), (6, 5)),
    (Window((3, 3), (3, 2), (1, 1), ((1, 1), (4, 3))), (7, 4)),
    (Window((2, 1, 3), (1, 2, 1), (1, 1, 2), ((1, 0), (0, 0), (2, 2))), (3, 4, 5)),
]


def _written(window: Window, x: Tensor) -> Tensor:
    """All windows, (samples, positions…, C · window), entry by entry."""
    samples, channels, *sizes = x.shape
    own = [[offset * d for offset in range(k)] for k, d in zip(window.kernel, window.dilation)]
    counts = [
        (size + sum(pair) - steps[-1] - 1) // stride + 1
        for size, pair, steps, stride in zip(sizes, window.padding, own, window.stride)
    ]
    values = x.numpy()
    rows = []
    for sample, *position in itertools.product(range(samples), *map(range, counts)):
        starts = [p * stride - pair[0] for p, stride, pair in zip(position, window.stride, window.padding)]
        row = []
        for channel, *offset in itertools.product(range(channels), *own):
            place = tuple(a + b for a, b in zip(starts, offset))
            inside = all(0 <= p < size for p, size in zip(place, sizes))
            row.append(values[(sample, channel, *place)] if inside else 0.0)
        rows.append(row)
    return torch.tensor(rows, dtype=x.dtype).reshape(samples, *counts, -1)


@pytest.mark.parametrize(("window", "sizes"), PLAIN + OTHERS)
def test_windows_are_those_that_a_loop_writes_out(window: Window, sizes: tuple[int, ...]) -> None:
    x = _random(2, 3, *sizes)
    written = _written(window, x)
    assert torch.equal(patches(window, x), written)
    assert window.outputs(sizes) == written.shape[1:-1]
    close(window_sums(window, x), written.flatten(0, -2).sum(0), 1e-12)


@pytest.mark.parametrize(("window", "sizes"), PLAIN)
def test_the_gram_matrix_of_shared_products_is_that_of_written_rows(window: Window, sizes: tuple[int, ...]) -> None:
    x = _random(3, 2, *sizes)
    rows = _written(window, x).flatten(0, -2)
    close(window_gram(window, x), rows.T @ rows, 1e-12)
    others = _written(window, x.flip(*range(2, x.ndim))).flatten(0, -2)
    if window.size > 1:
        assert (others.T @ others - rows.T @ rows).abs().max() > 0.1, "negative control: a mirrored picture"


def test_gram_matrices_of_all_small_windows_of_one_axis() -> None:
    for kernel, step, size in itertools.product((2, 3, 4), (1, 2, 3), (1, 2, 3, 5)):
        reach = step * (kernel - 1)
        for before, behind in itertools.product(range(reach + 1), repeat=2):
            window = Window((kernel,), (1,), (step,), ((before, behind),))
            if window.outputs((size,))[0] > 0:
                _check_gram(window, (size,))


def test_gram_matrices_of_many_small_windows_of_two_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        kernel, step, sizes = (torch.randint(1, n, (2,), generator=generator).tolist() for n in (4, 4, 6))
        reach = [d * (k - 1) for d, k in zip(step, kernel)]
        pairs = [torch.randint(0, r + 1, (2,), generator=generator).tolist() for r in reach]
        padding = tuple((before if k > 1 else 0, behind if k > 1 else 0) for (before, behind), k in zip(pairs, kernel))
        window = Window(tuple(kernel), (1, 1), tuple(step), padding)
        if min(window.outputs(sizes)) > 0:
            _check_gram(window, tuple(sizes))


def _check_gram(window: Window, sizes: tuple[int, ...]) -> None:
    x = _random(2, 2, *sizes)
    rows = patches(window, x).flatten(0, -2)
    assert (window_gram(window, x) - rows.T @ rows).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("window", "sizes"),
    [
        (Window((3,), (1,), (3,), ((6, 6),)), (2,)),
        (Window((3, 3), (1, 1), (2, 2), ((2, 2), (2, 2))), (1, 3)),
        (Window((7, 6), (1, 1), (2, 2), ((8, 7), (7, 5))), (1, 1)),
    ],
)
def test_windows_whose_steps_pass_over_the_whole_picture(window: Window, sizes: tuple[int, ...]) -> None:
    """Some overhanging windows see nothing of the picture then."""
    x = _random(3, 2, *sizes)
    rows = _written(window, x).flatten(0, -2)
    close(window_gram(window, x), rows.T @ rows, 1e-12)


def test_products_are_shared_only_where_the_formula_holds() -> None:
    plain = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert shares_products(plain, 8, (32, 32))
    assert not shares_products(plain, 7, (32, 32))
    assert not shares_products(replace(plain, stride=(1, 2)), 8, (32, 32))
    assert not shares_products(replace(plain, padding=((1, 3), (1, 1))), 8, (32, 32))
    assert not shares_products(replace(plain, padding=((1, -1), (1, 1))), 8, (32, 32))
    assert not shares_products(Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))), 8, (32, 32))
    assert not shares_products(Window((3,) * 3, (1,) * 3, (1,) * 3, ((1, 1),) * 3), 8, (32,) * 3)
    assert not shares_products(plain, 8, (2, 2)), "borders cost more than they save"


# forms ----------------------------------------------------------------------------------------------------------------


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
SEQUENCE, MAPS = (4, 7, 6), (3, 8, 7, 6)
FORMS: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 5), SEQUENCE),
    "addmm": (lambda: net(lambda s, x: torch.addmm(s.b, x, s.w), w=parameter(6, 5), b=parameter(5)), (4, 6)),
    "gpt2": (
        lambda: net(
            lambda s, x: torch.addmm(s.b, x.view(-1, 6), s.w).view(-1, 7, 5), w=parameter(6, 5), b=parameter(5)
        ),
        SEQUENCE,
    ),
    "mm": (lambda: net(lambda s, x: torch.mm(x, s.w), w=parameter(6, 5)), (4, 6)),
    "matmul": (lambda: net(lambda s, x: x @ s.w, w=parameter(6, 5)), SEQUENCE),
    "weight in front": (lambda: net(lambda s, x: s.w @ x, w=parameter(5, 7)), SEQUENCE),
    "a weight for each head": (lambda: net(lambda s, x: x @ s.w, w=parameter(3, 6, 5)), (4, 3, 7, 6)),
    "bmm": (
        lambda: net(lambda s, x: torch.bmm(x.transpose(0, 1), s.w).transpose(0, 1), w=parameter(7, 6, 5)),
        SEQUENCE,
    ),
    "einsum": (lambda: net(lambda s, x: torch.einsum("bti,oi->bot", x, s.w), w=parameter(5, 6)), SEQUENCE),
    "einsum of heads": (
        lambda: net(lambda s, x: torch.einsum("hoi, bthi -> bhto", s.w, x), w=parameter(3, 5, 6)),
        (4, 7, 3, 6),
    ),
    "einsum of two inputs": (
        lambda: net(lambda s, x: torch.einsum("bhtd,dho->bto", x, s.w), w=parameter(6, 3, 5)),
        (4, 3, 7, 6),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (3, 4, 11)),
    "conv1d grouped same": (lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2, dilation=3), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 5, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), MAPS),
    "conv2d same": (lambda: nn.Conv2d(8, 5, (4, 3), padding="same", dilation=(1, 2)), MAPS),
    "conv2d valid": (lambda: nn.Conv2d(8, 5, 2, padding="valid", bias=False), MAPS),
    "conv2d of shared products": (lambda: nn.Conv2d(8, 5, 3, padding=1), (3, 8, 12, 14)),
    "conv2d uneven shared products": (
        lambda: nn.Conv2d(8, 5, (2, 4), padding="same", dilation=(3, 1)),
        (2, 8, 14, 12),
    ),
    "conv1d of shared products": (lambda: nn.Conv1d(8, 5, 5, padding=2), (3, 8, 40)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2), MAPS),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8, stride=2), MAPS),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), padding=(0, 1, 0), groups=2, dilation=(1, 2, 1)), (2, 2, 4, 5, 3)),
    "one picture": (lambda: net(lambda s, x: s.c(x[0])[None], c=nn.Conv2d(8, 5, 3)), MAPS),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 7)),
    "transposed 1d cropped": (lambda: nn.ConvTranspose1d(4, 6, 2, stride=3, padding=3, dilation=2), (3, 4, 7)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(
            8, 6, (3, 2), (2, 3), (1, 0), output_padding=(1, 2), groups=2, dilation=(1, 2), bias=False
        ),
        (3, 8, 4, 3),
    ),
    "transposed 2d of shared products": (lambda: nn.ConvTranspose2d(8, 6, 3, padding=1), (3, 8, 12, 12)),
}


def _call(name: str) -> tuple[Form, Tensor, Tensor, Tensor, Tensor | None]:
    """A call's form, input, output, weight and bias."""
    build, shape = FORMS[name]
    x = _random(*shape, seed=3)
    torch.manual_seed(0)
    program = trace(build().double(), x)
    values = node_values(program, x)
    calls = [(node, form_of(node)) for node in program.graph.nodes if node.op == "call_function"]
    [(node, (form, source, weight, bias))] = [(node, found) for node, found in calls if found is not None]
    own = [program.weights[0][str(a.target)] if isinstance(a, fx.Node) else None for a in (weight, bias)]
    assert own[0] is not None
    return form, values[source.name], values[node.name], own[0], own[1]


@pytest.mark.parametrize("name", FORMS)
def test_rows_times_the_matrix_are_what_the_call_gives(name: str) -> None:
    form, x, y, weight, bias = _call(name)
    rows, goals, matrix = form.rows(x), form.goals(y), form.matrix(weight)
    assert torch.equal(form.weight(matrix), weight)
    added = torch.zeros_like(goals[:, 0]) if bias is None else bias.reshape(goals.shape[0], goals.shape[2])
    close(rows @ matrix + added[:, None], goals, 1e-12)
    if matrix.shape[1] > 1:
        assert (rows @ matrix.flip(1) + added[:, None] - goals).abs().max() > 0.1, "negative control: inputs turned"


@pytest.mark.parametrize("name", FORMS)
def test_sums_of_a_call_are_those_of_its_written_rows(name: str) -> None:
    form, x, y, _, _ = _call(name)
    goals = _random(*y.shape, seed=4)
    found, rows, wanted = form.sums(x, goals), form.rows(x), form.goals(goals)
    _close_sums(found, _literal_sums(rows, wanted))
    _close_sums(form.thinned(x, goals, rows.shape[1], 0), sums_of(rows, wanted))
    if rows.shape[1] > 3:
        few = form.thinned(x, goals, 3, 0)
        assert few.count == 3
        assert torch.linalg.matrix_rank(few.gram).max() <= 3


@pytest.mark.parametrize("name", ["conv2d", "grouped", "transposed 2d"])
def test_rows_are_written_out_a_few_samples_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, x, y, _, _ = _call(name)
    monkeypatch.setattr("vfx.reconstruct.forms.WRITTEN", 1)
    _close_sums(form.sums(x, y), _literal_sums(form.rows(x), form.goals(y)))


def test_calls_with_shared_products_are_among_those_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def noted(window: Window, x: Tensor) -> Tensor:
        taken.append(name)
        return window_gram(window, x)

    monkeypatch.setattr("vfx.reconstruct.forms.window_gram", noted)
    for name in FORMS:
        form, x, y, _, _ = _call(name)
        form.sums(x, y)
    assert set(taken) >= {name for name in FORMS if "shared products" in name}
    assert not {"conv2d", "grouped", "conv3d", "transposed 2d"} & set(taken)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.einsum("bti,io->bt", x, s.w),
        lambda s, x: torch.einsum("btt,to->bo", x[:, :6], s.w),
        lambda s, x: torch.einsum("bti,io", x, s.w),
        lambda s, x: x[:, None] @ s.heads,
        lambda s, x: x @ (2 * s.w),
        lambda s, x: torch.addmm(s.b, x[:, 0], s.w, alpha=2),
        lambda s, x: x.mean() + s.w.mm(s.w.T @ s.w),
    ],
)
def test_what_is_no_product_of_an_input_with_a_parameter_is_kept(forward: Callable[..., Tensor]) -> None:
    x = _random(4, 7, 6)
    parts = {"w": parameter(6, 5), "b": parameter(5), "heads": parameter(3, 6, 5)}
    program = trace(net(forward, **parts).double(), x)
    other = program.with_weights([{name: 2 * tensor for name, tensor in program.weights[0].items()}])
    solved = Reconstruct([Reference(other)], x, ridge=RIDGE, progress=False)(program)
    _equal_weights(solved, program)


# sums -----------------------------------------------------------------------------------------------------------------

FIELDS = ("gram", "cross", "inputs", "goals", "squares")


def _literal_sums(rows: Tensor, goals: Tensor) -> Sums:
    """The sums of one batch, group by group and row by row."""
    parts: dict[str, list[Tensor]] = {field: [] for field in FIELDS}
    for own, wanted in zip(rows, goals):
        total = [torch.zeros(own.shape[1], n, dtype=own.dtype) for n in (own.shape[1], wanted.shape[1])]
        for x, y in zip(own, wanted):
            total[0] += x[:, None] * x
            total[1] += x[:, None] * y
        for field, value in zip(FIELDS, (*total, own.sum(0), wanted.sum(0), (wanted**2).sum(0))):
            parts[field].append(value)
    return Sums(**{field: torch.stack(value) for field, value in parts.items()}, count=rows.shape[1])


def _close_sums(found: Sums, expected: Sums) -> None:
    assert found.count == expected.count
    for field in FIELDS:
        close(getattr(found, field), getattr(expected, field), 1e-11)


def test_sums_add_up_and_tell_errors_and_moments() -> None:
    rows, goals, matrix, bias = _random(2, 30, 5), _random(2, 30, 3, seed=1), _random(2, 5, 3, seed=2), _random(2, 3)
    whole = _literal_sums(rows, goals)
    first, second = sums_of(rows[:, :11], goals[:, :11]), sums_of(rows[:, 11:], goals[:, 11:])
    _close_sums(first + second, whole)
    single = sums_of(rows[:, :11].float(), goals[:, :11].float()).double()
    assert all(getattr(single, field).dtype == torch.float64 for field in FIELDS)
    first += second
    _close_sums(first, whole)
    gram, cross = whole.with_ones()
    close(gram, _ones(rows).mT @ _ones(rows), 1e-12)
    close(cross, _ones(rows).mT @ goals, 1e-12)
    y = rows @ matrix + bias[:, None]
    close(whole.error(matrix, bias), (y - goals).square().sum(), 1e-12)
    close(whole.error(matrix, None), (rows @ matrix - goals).square().sum(), 1e-12)
    for found, expected in zip(whole.moments(matrix, bias), (y.mean(1), y.var(1, correction=0))):
        close(found, expected, 1e-12)


# solutions ------------------------------------------------------------------------------------------------------------

MASKS = ("none", "unstructured", "rows", "2:4", "empty column", "empty")


def _support(kind: str, groups: int, inputs: int, outputs: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(groups, inputs, outputs, generator=generator) > 0.4
    if kind == "none":
        return None
    if kind == "rows":
        return mask[:, :, :1].expand_as(mask)
    if kind == "2:4":
        scores = torch.rand(groups, inputs // 4, 4, outputs, generator=generator)
        return (scores.argsort(2).argsort(2) < 2).reshape(groups, inputs, outputs)
    if kind == "empty column":
        mask[:, :, 1] = False
    return mask & (kind != "empty")


def _regression(rows: int = 40, inputs: int = 8, outputs: int = 5, groups: int = 2) -> tuple[Tensor, ...]:
    """Rows whose inputs differ in size and hang together, goals, a centre and its bias."""
    x = _random(groups, rows, inputs) @ (torch.eye(inputs, dtype=torch.float64) + 0.3 * _random(inputs, inputs, seed=1))
    x = x * torch.linspace(0.3, 3, inputs, dtype=torch.float64) + 0.5
    return x, _random(groups, rows, outputs, seed=2), _random(groups, inputs, outputs, seed=3), _random(groups, outputs)


def _literal(
    rows: Tensor, goals: Tensor, centre: Tensor, bias: Tensor | None, support: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    found = []
    for group, (x, y, start) in enumerate(zip(rows, goals, centre)):
        mask = None if support is None else support[group]
        if bias is not None:
            x, start = _ones(x), torch.cat([start, bias[group][None]])
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:1])])
        found.append(_fitted(x, y, start, ridge, mask))
    whole = torch.stack(found)
    return (whole, None) if bias is None else (whole[:, :-1], whole[:, -1])


def _close_solutions(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    close(found[0], expected[0], EXACT)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None and expected[1] is not None:
        close(found[1], expected[1], EXACT)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_solutions_are_those_of_written_rows(mask: str, biased: bool, ridge: float) -> None:
    rows, goals, centre, bias = _regression()
    support = _support(mask, *centre.shape)
    if support is not None:
        centre = centre * support
    problem = Problem(centre, bias if biased else None, support)
    found = solve(problem, sums_of(rows, goals), ridge)
    _close_solutions(found, _literal(rows, goals, centre, problem.bias, support, ridge))
    if support is not None:
        assert not found[0][~support].any()
    if ridge and mask != "empty":
        moved = solve(replace(problem, centre=centre * 0), sums_of(rows, goals), ridge)[0]
        assert (moved - found[0]).abs().max() > 1e-4, "negative control: the ridge draws to the centre"


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS[1:])
def test_a_centre_outside_the_mask_counts_for_nothing(mask: str, biased: bool) -> None:
    """Only the entries of the mask may differ from zero, whatever the ridge draws to."""
    rows, goals, centre, bias = _regression()
    support = _support(mask, *centre.shape)
    assert support is not None
    problem = Problem(centre, bias if biased else None, support)
    found = solve(problem, sums_of(rows, goals), 0.1)
    assert not found[0][~support].any()
    _close_solutions(found, _literal(rows, goals, centre, problem.bias, support, 0.1))


def _noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which masked problems are solved from here on, by name."""
    taken: list[str] = []

    def noting(way: str, solver: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*arguments: Tensor) -> Tensor:
            taken.append(way)
            return solver(*arguments)

        return noted

    for way in ("_small_systems", "_conjugate_gradients"):
        monkeypatch.setattr(solving, way, noting(way, getattr(solving, way)))
    return taken


@pytest.mark.parametrize("price", [0, 10**9])
@pytest.mark.parametrize("mask", MASKS[1:])
def test_both_ways_to_solve_within_a_mask_agree(mask: str, price: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients at a price of zero, small systems one by one at a high one."""
    rows, goals, centre, bias = _regression(120, 24, 5)
    support = _support(mask, *centre.shape)
    assert support is not None
    taken = _noted(monkeypatch)
    monkeypatch.setattr(solving, "GRADIENT_PRICE", price)
    monkeypatch.setattr(solving, "GATHERED", 1)  # one system at a time
    found = solve(Problem(centre * support, bias, support), sums_of(rows, goals), 1e-3)
    _close_solutions(found, _literal(rows, goals, centre * support, bias, support, 1e-3))
    assert set(taken) == {"_small_systems" if price else "_conjugate_gradients"}


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _noted(monkeypatch)
    for inputs, share in ((64, 0.9), (400, 0.9), (400, 0.1)):
        mask = torch.rand(1, inputs, 3, generator=torch.Generator().manual_seed(0)) < share
        rows = math.sqrt(inputs) * torch.eye(inputs, dtype=torch.float64)[None]
        solve(Problem(_random(1, inputs, 3) * mask, None, mask), sums_of(rows, _random(1, inputs, 3)), 0.0)
    assert taken == ["_small_systems", "_conjugate_gradients", "_small_systems"]


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-3])
def test_conjugate_gradients_that_are_cut_off_fit_about_as_well(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs whose Gram matrix has a condition number of a million: more steps than there are."""
    scales = torch.logspace(0, -3, 64, dtype=torch.float64)
    turn = torch.linalg.qr(_random(64, 64)).Q
    rows, goals = _random(1, 300, 64, seed=1) @ (turn * scales) @ turn.T, _random(1, 300, 5, seed=2)
    support = torch.rand(1, 64, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    sums, errors = sums_of(rows, goals), []
    for price in (0, 10**9):
        monkeypatch.setattr(solving, "GRADIENT_PRICE", price)
        errors.append(float(sums.error(*solve(Problem(torch.zeros(1, 64, 5).double(), None, support), sums, ridge))))
    assert errors[0] <= errors[1] * 1.001
    assert errors[1] < 0.95 * float(sums.squares.sum())


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
@pytest.mark.parametrize("mask", ["none", "unstructured", "2:4"])
def test_solutions_have_no_unit(mask: str, scale: float) -> None:
    """Inputs in another unit, weights in its inverse."""
    rows, goals, centre, _ = _regression()
    support = _support(mask, *centre.shape)
    centre = centre if support is None else centre * support
    found = solve(Problem(centre / scale, None, support), sums_of(rows * scale, goals), 1e-3)[0] * scale
    close(found, _literal(rows, goals, centre, None, support, 1e-3)[0], EXACT)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("price", [0, 10**9])
@pytest.mark.parametrize("mask", ["none", "unstructured", "rows", "empty column"])
def test_singular_inputs_change_nothing_that_no_row_tells(
    mask: str, price: int, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A doubled input, two dead ones and a constant one beside the bias."""
    rows, goals, centre, bias = _regression()
    rows[..., 1] = rows[..., 0]
    rows[..., 2] = rows[..., 5] = 0
    rows[..., 3] = 1
    support = _support(mask, *centre.shape)
    centre = centre if support is None else centre * support
    monkeypatch.setattr(solving, "GRADIENT_PRICE", price)
    found = solve(Problem(centre, bias, support), sums_of(rows, goals), ridge)
    assert found[1] is not None
    assert found[0].isfinite().all()
    assert found[1].isfinite().all()
    expected = _literal(rows, goals, centre, bias, support, ridge)
    _close_solutions(found, expected)


def test_no_inputs_that_vary_at_all() -> None:
    uneven = torch.tensor([[[1, 0], [1, 1], [1, 0], [1, 1]]]).bool()
    for support in (None, torch.ones(1, 4, 2, dtype=torch.bool), uneven):
        centre = _random(1, 4, 2) * (1 if support is None else support)
        found = solve(Problem(centre, None, support), sums_of(torch.zeros(1, 9, 4).double(), _random(1, 9, 2)), 0.0)
        assert torch.equal(found[0], centre)


def _held_errors(problem: Problem, parts: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """What the solution of each ridge on the first rows errs on the second."""
    (x, y), (held, wanted) = parts
    errors = []
    for ridge in RIDGES:
        matrix, bias = _literal(x, y, problem.centre, problem.bias, problem.support, ridge)
        assert bias is not None
        errors.append(float((held @ matrix + bias[:, None] - wanted).square().sum()))
    return errors


@pytest.mark.parametrize(
    ("noise", "away", "best"),
    [(0, 1, 0), (0.01, 1, 1), (0.03, 1, 2), (0.01, 0.3, 3), (0.1, 1, 4), (1, 1, 5), (3, 1, 6)],
)
def test_the_ridge_is_the_one_that_errs_least_on_held_rows(noise: float, away: float, best: int) -> None:
    rows, centre, bias = _random(1, 100, 20), _random(1, 20, 5, seed=1), _random(1, 5, seed=2)
    rows = rows * torch.logspace(0, -2, 20, dtype=torch.float64)
    truth = centre + away * _random(1, 20, 5, seed=3)
    goals = rows @ truth + bias[:, None] + noise * _random(1, 100, 5, seed=4)
    parts = [(rows[:, :30], goals[:, :30]), (rows[:, 30:], goals[:, 30:])]
    problem = Problem(centre, bias)
    errors = _held_errors(problem, parts)
    least = errors.index(min(errors))
    assert errors[: least + 1] == sorted(errors[: least + 1], reverse=True)
    assert errors[least:] == sorted(errors[least:])
    assert least == best
    assert chosen_ridge(problem, *(sums_of(x, y) for x, y in parts)) == RIDGES[least]


def test_some_outputs_choose_the_ridge_of_many_masked_ones() -> None:
    """Outputs that are spread evenly; without a mask all are asked."""
    rows, noise = _random(1, 60, 6), _random(1, 60, 130, seed=1)
    asked = torch.arange(64) * 130 // 64
    goals = noise * 3
    goals[..., asked] = 0.01 * noise[..., asked] + rows @ _random(1, 6, 64, seed=2)
    centre = torch.zeros(1, 6, 130, dtype=torch.float64)
    parts = [(rows[:, :20], goals[:, :20]), (rows[:, 20:], goals[:, 20:])]
    found = []
    for mask, columns in ((torch.ones_like(centre).bool(), asked), (None, torch.arange(130))):
        problem = Problem(centre, centre[:, 0], mask)
        found.append(chosen_ridge(problem, *(sums_of(x, y) for x, y in parts)))
        own = Problem(centre[..., columns], centre[:, 0, columns], None)
        errors = _held_errors(own, [(x, y[..., columns]) for x, y in parts])
        assert found[-1] == RIDGES[errors.index(min(errors))]
    assert found[0] != found[1]


def test_ridges_that_all_err_alike() -> None:
    problem = Problem(_random(1, 4, 2), torch.zeros(1, 2, dtype=torch.float64))
    nothing, something = (
        sums_of(torch.zeros(1, 9, 4).double(), torch.zeros(1, 9, 2).double()),
        sums_of(_random(1, 9, 4), _random(1, 9, 2)),
    )
    assert chosen_ridge(problem, nothing, nothing) == RIDGES[START]
    assert chosen_ridge(problem, nothing, something) == RIDGES[START]
    matrix, bias = solve(problem, nothing, chosen_ridge(problem, nothing, nothing))
    assert torch.equal(matrix, problem.centre)
    assert bias is not None
    assert bias.isfinite().all()


# whole networks -------------------------------------------------------------------------------------------------------

Build = Callable[[], nn.Module]


def _equal_weights(found: Program, expected: Program) -> None:
    """Bit for bit."""
    assert found.weights[0].keys() == expected.weights[0].keys()
    for name, tensor in expected.weights[0].items():
        assert torch.equal(found.weights[0][name], tensor), name


def _close_weights(found: Program, expected: Program, tolerance: float) -> None:
    assert found.weights[0].keys() == expected.weights[0].keys()
    for name, tensor in expected.weights[0].items():
        close(found.weights[0][name], tensor, tolerance)


def _solved(aligned: Program, x: Any = X, start: Program | None = None, **options: Any) -> Program:
    options = {"ridge": RIDGE, "progress": False} | options
    return Reconstruct(aligned, x, **options)(start or Interpolate(options.get("weights"))(aligned))


def _mean(values: Sequence[Tensor], shares: Sequence[float] | None = None) -> Tensor:
    shares = shares or [1 / len(values)] * len(values)
    return sum(share * value for share, value in zip(shares, values))  # type: ignore[return-value]


def _goal(aligned: Program, node: str, x: Tensor = X, shares: Sequence[float] | None = None) -> Tensor:
    """The mean of the edges' values at a node."""
    return _mean([node_values(aligned, x, edge)[node] for edge in range(aligned.edges)], shares)


def _flat(y: Tensor) -> Tensor:
    """A value (samples, channels, …) as rows of channels."""
    return y.movedim(1, -1).flatten(0, -2)


def _unfolded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    options: Any = (layer.dilation, layer.padding, layer.stride)
    return F.unfold(x, layer.kernel_size, *options).mT.flatten(0, 1)  # type: ignore[arg-type]


def _stacked(weight: Tensor, bias: Tensor) -> Tensor:
    """A layer's weight and the bias below it, (inputs + 1, outputs)."""
    return torch.cat([weight.flatten(1).T, bias[None]])


def _layer(weights: Any, name: str) -> Tensor:
    return _stacked(weights[f"{name}.weight"], weights[f"{name}.bias"])


def chain() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(torch.tanh(self.mid(h.flatten(1))))

    layers = {"a": nn.Conv2d(3, 5, 3, 2, 1), "b": nn.Conv2d(5, 4, 2, dilation=2)}
    return net(forward, **layers, mid=nn.Linear(4, 3), fc=nn.Linear(3, 3))


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize(("count", "weights"), [(2, None), (2, 0.3), (3, THIRDS)])
def test_layers_are_solved_one_after_the_other(count: int, weights: Any, ridge: float) -> None:
    """A loop over activations: each layer reads what the layers solved before it give."""
    models: Any = edges(chain, X, count)
    program = trace(models, X[:2])
    shares = weights if count == 3 else [0.5, 0.5] if weights is None else [0.7, 0.3]
    found = _solved(program, weights=weights, ridge=ridge).weights[0]
    x, ys = X, [X] * count
    for name in ("a", "b", "mid", "fc"):
        layers = [getattr(model, name) for model in models]
        ys = [layer(y) for layer, y in zip(layers, ys)]
        before = _mean([_stacked(layer.weight, layer.bias) for layer in layers], shares)
        rows = _ones(x if x.ndim == 2 else _unfolded(x, layers[0]))
        goal = _flat(_mean(ys, shares))
        close(_layer(found, name), _fitted(rows, goal, before, ridge), EXACT)
        if name != "a":  # all read the same pictures there: the average is the solution
            other = _fitted(_ones(torch.rand_like(rows[:, :-1])), goal, before, ridge)
            assert (_layer(found, name) - other).abs().max() > 1e-3, "negative control: other inputs"
            assert (_layer(found, name) - before).abs().max() > 1e-3, "negative control: the average is no solution"
        solution = _fitted(rows, goal, before, ridge)
        own = {"weight": solution[:-1].T.reshape(layers[0].weight.shape), "bias": solution[-1]}
        x = torch.func.functional_call(layers[0], own, x)
        act: Any = {"mid": torch.tanh, "fc": lambda y: y}.get(name, F.relu)
        x, ys = act(x), [act(y) for y in ys]
        if name == "b":
            x, ys = x.flatten(1), [y.flatten(1) for y in ys]


def mixed() -> nn.Module:
    """Every kind of layer, in a row."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(self.depth(h))
        h = F.relu(self.group(h))
        h = F.relu(self.up(h))
        h = F.relu(self.same(h)).flatten(2)
        h = F.relu(self.line(h)).mT
        h = torch.tanh(h @ self.w)
        h = torch.tanh(torch.einsum("bti,hio->bhto", h, self.heads))
        return self.fc(torch.tanh(h @ self.own).mean(2).flatten(1))

    return net(
        forward, stem=conv(3, 8), depth=conv(8, 8, groups=8), group=nn.Conv2d(8, 6, 3, 2, groups=2, bias=False),
        up=nn.ConvTranspose2d(6, 4, 3, 2, groups=2, output_padding=1), same=nn.Conv2d(4, 5, 2, padding="same"),
        line=nn.Conv1d(5, 6, 3, dilation=2), w=parameter(6, 5), heads=parameter(2, 5, 4), own=parameter(2, 4, 3),
        fc=nn.Linear(6, 2),
    )  # fmt: skip


LAYERS = ("conv2d", "conv2d_1", "conv2d_2", "conv_transpose2d", "conv2d_3", "conv1d", "matmul", "einsum", "matmul_1")


@pytest.mark.parametrize("node", [*LAYERS, "linear"])
def test_no_step_makes_a_layer_err_less(node: str, mixed_networks: tuple[Program, Program]) -> None:
    """Whatever a layer's form: the gradient of its own squared error, by autograd through the call, is zero."""
    aligned, result = mixed_networks
    gradients = {}
    for name, program in (("solved", result), ("average", Interpolate()(aligned))):
        values, call = node_values(result, X), result.node(node)
        own = {a: program.weights[0][str(a.target)].clone() for a in call.all_input_nodes if a.op == "get_attr"}
        for tensor in own.values():
            tensor.requires_grad_()
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), lambda a, o=own, v=values: o.get(a, v[a.name]))  # type: ignore
        error = (call.target(*args, **kwargs) - _goal(aligned, node)).square().sum()  # type: ignore[operator]
        gradients[name] = torch.cat([g.flatten() for g in torch.autograd.grad(error, list(own.values()))])
    if node != "conv2d":
        assert gradients["average"].norm() > 1e-3, "negative control"
    assert gradients["solved"].norm() < EXACT * max(1.0, float(gradients["average"].norm()))


@pytest.fixture(scope="module")
def mixed_networks() -> tuple[Program, Program]:
    aligned = trace(edges(mixed, X), X[:2])
    return aligned, _solved(aligned, ridge=0.0)


def _map(program: Program, node: str, norm: str | None = None) -> tuple[Form, str, Tensor, Tensor | None]:
    """A call's form and source, and its matrix and bias, those of the BatchNorm module ``norm`` behind it included."""
    found = form_of(program.node(node))
    assert found is not None
    form, source, weight, bias = found
    own = program.weights[0]
    matrix = form.matrix(own[str(weight.target)])
    shape = (matrix.shape[0], matrix.shape[2])
    shift = None if bias is None else own[str(bias.target)].reshape(shape)
    if norm is not None:
        ones = torch.ones(shape, dtype=matrix.dtype)
        mean, variance = (own[f"{norm}.running_{role}"].reshape(shape) for role in ("mean", "var"))
        scale = own.get(f"{norm}.weight", ones).reshape(shape) / (variance + 1e-5).sqrt()
        beta = own.get(f"{norm}.bias", ones * 0).reshape(shape)
        matrix, shift = matrix * scale[:, None], beta + scale * ((0 if shift is None else shift) - mean)
    return form, source.name, matrix, shift


def _check(
    result: Program, start: Program, node: str, goal: Tensor, norm: str | None = None, x: Tensor = X,
    ridge: float = RIDGE, support: Tensor | None = None,
) -> None:  # fmt: skip
    """A layer of ``result`` is the literal solution for its own inputs, with the ridge towards ``start``."""
    form, source, matrix, bias = _map(result, node, norm)
    _, _, centre, shift = _map(start, node, norm)
    rows = form.rows(node_values(result, x)[source])
    expected = _literal(rows, form.goals(goal), centre, shift, support, ridge)
    _close_solutions((matrix, bias), expected)


def _differs(found: Program, other: Program, name: str) -> None:
    """Negative control."""
    assert (found.weights[0][name] - other.weights[0][name]).abs().max() > 1e-3


# BatchNorm ------------------------------------------------------------------------------------------------------------


def normed(layer: Callable[[], nn.Module], norm: Callable[[int], nn.Module]) -> Build:
    """A layer with a BatchNorm behind it, between others; linear ones read means over the positions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = self.norm(self.layer(h.mean((2, 3)) if isinstance(self.layer, nn.Linear) else h))
        return self.fc(F.relu(h).flatten(2).mean(2) if h.ndim > 2 else F.relu(h))

    return lambda: net(forward, stem=conv(3, 6), layer=layer(), norm=norm(4), fc=nn.Linear(4, 2))


NORMED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], nn.Module], str]] = {
    "conv": (lambda: conv(6, 4), nn.BatchNorm2d, "conv2d_1"),
    "conv without bias": (lambda: conv(6, 4, bias=False), nn.BatchNorm2d, "conv2d_1"),
    "grouped": (lambda: conv(6, 4, groups=2), nn.BatchNorm2d, "conv2d_1"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.BatchNorm2d, "conv_transpose2d"),
    "linear": (lambda: nn.Linear(6, 4), nn.BatchNorm1d, "linear"),
    "no gain, no shift": (lambda: conv(6, 4), lambda width: nn.BatchNorm2d(width, affine=False), "conv2d_1"),
}


@pytest.mark.parametrize("name", NORMED)
def test_a_layer_and_its_batchnorm_are_one_map(name: str) -> None:
    layer, norm, node = NORMED[name]
    aligned = trace(edges(normed(layer, norm), X), X[:2])
    start = Interpolate()(aligned)
    result = _solved(aligned)
    goal = _goal(aligned, "batch_norm")
    _check(result, start, node, goal, "norm")
    _differs(result, start, "layer.weight")
    with pytest.raises(AssertionError):  # negative control: the layer's own outputs are not the goal
        _check(result, start, node, _goal(aligned, node), "norm")


@torch.no_grad()
@pytest.mark.parametrize("name", list(NORMED)[:-1])
def test_running_statistics_are_those_of_the_data(name: str) -> None:
    """So the result goes on alike in training, in the user's class."""
    layer, norm, node = NORMED[name]
    aligned = trace(edges(normed(layer, norm), X), X[:2])
    result = _solved(aligned)
    rows = _flat(node_values(result, X)[node])
    close(result.weights[0]["norm.running_mean"], rows.mean(0), EXACT)
    close(result.weights[0]["norm.running_var"], rows.var(0, correction=0), EXACT)
    module, reason = emit(result)
    assert not reason
    assert type(module) is type(aligned.module)
    still = module(X)
    close(still, result(X), 1e-12)
    close(module.train()(X), still, 1e-6)
    average = emit(Interpolate()(aligned))[0]
    gap = (average(X) - average.train()(X)).abs().max()
    assert gap > 1e-3, "negative control: the average's statistics are not those of the data"


def test_a_batchnorm_without_gain_keeps_its_variance() -> None:
    layer, norm, _ = NORMED["no gain, no shift"]
    aligned = trace(edges(normed(layer, norm), X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    assert torch.equal(result.weights[0]["norm.running_var"], start.weights[0]["norm.running_var"])
    assert torch.equal(result.weights[0]["layer.bias"], start.weights[0]["layer.bias"])


def test_dead_and_negative_gains() -> None:
    """A channel that the average's BatchNorm puts out comes back, for its edges' outputs may differ."""
    models: Any = edges(normed(*NORMED["conv"][:2]), X)
    with torch.no_grad():
        for model, sign in zip(models, (1, -1)):
            model.norm.weight[0] = sign * 0.7
            model.norm.weight[1] *= -1
            model.norm.weight[2] = 0
    aligned = trace(models, X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    _check(result, start, "conv2d_1", _goal(aligned, "batch_norm"), "norm")
    assert all(tensor.isfinite().all() for tensor in result.weights[0].values())
    close(emit(result)[0].train()(X), result(X), 1e-6)


def crossed(first: Callable[..., Tensor]) -> Build:
    layers: dict[str, Any] = {name: lambda: conv(6, 6) for name in "ab"}
    norms: dict[str, Any] = {name: lambda: nn.BatchNorm2d(6) for name in "mn"}
    return between(lambda s, h: first(s, F.relu(h)), **layers, **norms)


def _second_first(self: Any, h: Tensor) -> Tensor:
    one, two = self.a(h), self.b(h)
    two = self.n(two)
    return self.m(one) + two


def _norm_behind_another_layer(self: Any, h: Tensor) -> Tensor:
    one, two = self.a(h), self.b(h)
    return self.m(one) + self.n(two.relu())


@pytest.mark.parametrize(
    ("first", "goals"),
    [
        (_second_first, {"conv2d_1": ("conv2d_1", None), "conv2d_2": ("batch_norm", "n")}),
        (_norm_behind_another_layer, {"conv2d_1": ("conv2d_1", None), "conv2d_2": ("conv2d_2", None)}),
    ],
)
def test_a_batchnorm_far_behind_its_layer(first: Any, goals: dict[str, tuple[str, str | None]]) -> None:
    """Another layer, or another layer's BatchNorm, runs between a layer and its own: they are solved apart."""
    aligned = trace(edges(crossed(first), X), X[:2])
    result = _solved(aligned, goals="output")
    for node, (goal, norm) in goals.items():
        _check(result, Interpolate()(aligned), node, _goal(aligned, goal), norm)
    _differs(result, Interpolate()(aligned), "m.weight")


# gains and shifts -----------------------------------------------------------------------------------------------------


def _normalised(h: Tensor, weights: Any) -> Tensor:
    mean, variance = (weights[f"n.running_{role}"].reshape(-1, 1, 1) for role in ("mean", "var"))
    return (h - mean) / (variance + 1e-5).sqrt()


Slope = Callable[[Tensor, Any], Tensor]


def _nothing(h: Tensor, weights: Any) -> Tensor:
    return torch.zeros_like(h)


# the module, the call's name, where its parameter stands, and what one unit of the gain adds to which base
DIAGONAL: dict[str, tuple[Build, str, tuple[int, ...], Slope | None, Slope]] = {
    "layer norm": (
        between(lambda s, h: norm_first(s, F.relu(h)), norm=lambda: nn.LayerNorm(6)),
        "layer_norm", (6,), lambda h, w: F.layer_norm(h, (6,)), _nothing,
    ),
    "layer norm of maps": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.LayerNorm((6, 6, 6))),
        "layer_norm", (6, 6, 6), lambda h, w: F.layer_norm(h, (6, 6, 6)), _nothing,
    ),
    "rms norm": (
        between(lambda s, h: norm_first(s, F.relu(h)), norm=lambda: nn.RMSNorm(6)),
        "rms_norm", (6,), lambda h, w: F.rms_norm(h, (6,)), _nothing,
    ),
    "group norm": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.GroupNorm(2, 6)),
        "group_norm", (6, 1, 1), lambda h, w: F.group_norm(h, 2), _nothing,
    ),
    "instance norm": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.InstanceNorm2d(6, affine=True)),
        "instance_norm", (6, 1, 1), lambda h, w: F.instance_norm(h), _nothing,
    ),
    "batch norm": (
        between(lambda s, h: s.n(F.relu(h)), n=lambda: nn.BatchNorm2d(6)),
        "batch_norm", (6, 1, 1), _normalised, _nothing,
    ),
    "layer scale": (
        between(lambda s, h: F.relu(h) * s.p, p=lambda: parameter(6, 1, 1)), "mul", (6, 1, 1), lambda h, w: h, _nothing,
    ),
    "one factor": (
        between(lambda s, h: s.p * F.relu(h), p=lambda: nn.Parameter(torch.randn(()))),
        "mul", (), lambda h, w: h, _nothing,
    ),
    "position embedding": (
        between(lambda s, h: F.relu(h) + s.p, p=lambda: parameter(6, 6, 6)), "add", (6, 6, 6), None, lambda h, w: h,
    ),
    "embedding of rows": (
        between(lambda s, h: s.p + F.relu(h), p=lambda: parameter(1, 6, 1, 6)),
        "add", (1, 6, 1, 6), None, lambda h, w: h,
    ),
    "prelu": (
        between(lambda s, h: s.n(s.c(F.relu(h))), c=lambda: conv(6, 6), n=lambda: nn.PReLU(6)),
        "prelu", (6, 1, 1), lambda h, w: h.clamp(max=0), lambda h, w: h.clamp(min=0),
    ),
    "prelu of one slope": (
        between(lambda s, h: s.n(s.c(F.relu(h))), c=lambda: conv(6, 6), n=lambda: nn.PReLU()),
        "prelu", (1,), lambda h, w: h.clamp(max=0), lambda h, w: h.clamp(min=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("name", DIAGONAL)
def test_gains_and_shifts_are_solved_entry_by_entry(name: str, ridge: float) -> None:
    build, node, place, slope, base = DIAGONAL[name]
    aligned = trace(edges(build, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned, ridge=ridge)
    [call] = [n for n in result.graph.nodes if n.name == node]
    parameters = [str(a.target) for a in call.all_input_nodes if a.op == "get_attr" and "running" not in str(a.target)]
    [source] = [a.name for a in call.all_input_nodes if a.op == "call_function"]
    h, own = node_values(result, X)[source], result.weights[0]
    rows = [torch.ones_like(h)] if slope is None else [slope(h, own)]
    if slope is not None and len(parameters) == 2:
        rows.append(torch.ones_like(h))
    wanted = _goal(aligned, node) - base(h, own)
    entries = torch.arange(own[parameters[0]].numel()).reshape(place).expand(h.shape)
    found, before = ([program.weights[0][p].flatten() for p in parameters] for program in (result, start))
    moved = 0.0
    for entry in entries.unique():
        chosen = entries == entry
        old = torch.stack([p[entry] for p in before])[:, None]
        expected = _fitted(torch.stack([row[chosen] for row in rows], 1), wanted[chosen][:, None], old, ridge)
        close(torch.stack([p[entry] for p in found])[:, None], expected, EXACT)
        moved = max(moved, float((expected - old).abs().max()))
    assert moved > 1e-3, "negative control: the average is no solution"


# one weight, several calls --------------------------------------------------------------------------------------------


def twice() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        first = torch.tanh(self.shared(F.relu(self.stem(x))))
        return self.fc(torch.tanh(self.shared(torch.tanh(self.mid(first)))).mean((2, 3)))

    return net(forward, stem=conv(3, 4), shared=nn.Conv2d(4, 4, 2, groups=2), mid=conv(4, 4), fc=nn.Linear(4, 3))


def test_a_module_called_twice_is_solved_for_both_calls() -> None:
    """Both uses' equations together; up to the second use the network runs ahead with the old weights."""
    aligned = trace(edges(twice, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    ahead = {name: (result if name.startswith("stem") else start).weights[0][name] for name in start.weights[0]}
    values = node_values(start.with_weights([ahead]), X)
    form, _, centre, shift = _map(start, "conv2d_1")
    uses = [(_map(start, node)[1], node) for node in ("conv2d_1", "conv2d_3")]
    rows = torch.cat([form.rows(values[source]) for source, _ in uses], 1)
    goals = torch.cat([form.goals(_goal(aligned, node)) for _, node in uses], 1)
    expected = _literal(rows, goals, centre, shift, None, RIDGE)
    _close_solutions(_map(result, "conv2d_1")[2:], expected)
    alone = _literal(rows[:, : X.shape[0] * 25], goals[:, : X.shape[0] * 25], centre, shift, None, RIDGE)
    assert (alone[0] - expected[0]).abs().max() > 1e-3, "negative control: the first use alone"
    _check(result, start, "conv2d_2", _goal(aligned, "conv2d_2"))
    _check(result, start, "linear", _goal(aligned, "linear"))


def shared_block() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.stem(x)
        for _ in range(2):
            h = h + self.shared(F.relu(h))
        return self.fc(h.mean((2, 3)))

    return net(forward, stem=conv(3, 4), shared=conv(4, 4), fc=nn.Linear(4, 3))


def test_a_block_called_twice_is_solved_for_both_sums() -> None:
    aligned = trace(edges(shared_block, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    values = node_values(start, X)  # the stem reads the same pictures everywhere: it is solved already
    form, _, centre, shift = _map(start, "conv2d_1")
    wanted = [_goal(aligned, total) - values[known] for total, known in (("add", "conv2d"), ("add_1", "add"))]
    rows = torch.cat([form.rows(values[source]) for source in ("relu", "relu_1")], 1)
    expected = _literal(rows, torch.cat([form.goals(goal) for goal in wanted], 1), centre, shift, None, RIDGE)
    _close_solutions(_map(result, "conv2d_1")[2:], expected)
    _differs(result, _solved(aligned, goals="output"), "shared.weight")


def _two_layouts(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.tanh(torch.tanh(self.a(x)) @ self.a.weight))


def _two_biases(self: Any, x: Tensor) -> Tensor:
    return self.c(F.linear(torch.tanh(self.a(x)), self.a.weight))


def _read_elsewhere(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.tanh(self.a(x)) * self.a.weight.mean())


def _computed(self: Any, x: Tensor) -> Tensor:
    return self.c(torch.tanh(F.linear(x, self.a.weight.tanh(), self.a.bias)))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_two_layouts, "different layouts"),
        (_two_biases, "different biases"),
        (_read_elsewhere, "in another way"),
        (_computed, "is computed"),
    ],
)
def test_what_keeps_its_weights_says_why(forward: Any, reason: str) -> None:
    aligned = trace(edges(lambda: net(forward, a=nn.Linear(5, 5), c=nn.Linear(5, 2)), VECTORS), VECTORS[:2])
    start, result = Interpolate()(aligned), _solved(aligned, VECTORS)
    [note] = result.notes
    assert note.startswith("reconstruction: linear keeps its weights")
    assert reason in note
    assert torch.equal(result.weights[0]["a.weight"], start.weights[0]["a.weight"])
    _differs(result, start, "c.weight")


# sums -----------------------------------------------------------------------------------------------------------------


def stream(behind: Callable[..., Tensor], **parts: Any) -> Build:
    """A stream to which ``behind`` adds what a branch gives."""

    def branch(self: Any, h: Tensor) -> Tensor:
        h = F.relu(h)
        return behind(self, h, F.relu(self.a(h)))

    return between(branch, a=lambda: conv(6, 5), b=lambda: conv(5, 6), **parts)


def _added(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return h + s.b(y)


def _behind_dropout(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return s.drop(s.b(y)) + h


def _behind_norm(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return s.n(s.b(y)) + h


def _scaled(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return h + s.p * s.b(y)


def _both_branches(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return s.b(y) + s.c(h)


def _with_a_factor(s: Any, h: Tensor, y: Tensor) -> Tensor:
    return torch.add(h, s.b(y), alpha=2)


def _a_layer_between(s: Any, h: Tensor, y: Tensor) -> Tensor:
    z, other = s.b(y), s.c(h)
    return (h + z) + other


def _read_twice(s: Any, h: Tensor, y: Tensor) -> Tensor:
    z = s.b(y)
    return h + z + z.tanh()


# the calls that are solved for a sum, with the node of the sum and the layer's BatchNorm, and one that is not
STREAMS: dict[str, tuple[Build, dict[str, tuple[str, str | None]], dict[str, str | None]]] = {
    "add": (stream(_added), {"conv2d_2": ("add", None)}, {"conv2d_1": None}),
    "dropout": (stream(_behind_dropout, drop=lambda: nn.Dropout()), {"conv2d_2": ("add", None)}, {"conv2d_1": None}),
    "norm": (stream(_behind_norm, n=lambda: nn.BatchNorm2d(6)), {"conv2d_2": ("add", "n")}, {"conv2d_1": None}),
    "scale": (stream(_scaled, p=lambda: parameter(6, 1, 1)), {}, {"conv2d_2": None}),
    "two branches": (stream(_both_branches, c=lambda: conv(6, 6)), {"conv2d_3": ("add", None)}, {"conv2d_2": None}),
    "a layer between": (stream(_a_layer_between, c=lambda: conv(6, 6)), {}, {"conv2d_2": None, "conv2d_3": None}),
    "factor": (stream(_with_a_factor), {}, {"conv2d_2": None}),
    "read twice": (stream(_read_twice), {}, {"conv2d_2": None}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_layer_in_front_of_an_add_is_solved_for_the_sum(name: str) -> None:
    build, towards, others = STREAMS[name]
    aligned = trace(edges(build, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    values = node_values(result, X)
    for node, (total, norm) in towards.items():
        call = result.node(total)
        [known] = [a for a in call.all_input_nodes if not _depends(a, node)]
        _check(result, start, node, _goal(aligned, total) - values[known.name], norm)
    for node, norm in others.items():
        _check(result, start, node, _goal(aligned, node), norm)


def _depends(node: fx.Node, name: str) -> bool:
    return node.name == name or any(_depends(a, name) for a in node.all_input_nodes)


def test_a_scale_in_front_of_an_add_is_solved_for_the_sum() -> None:
    aligned = trace(edges(STREAMS["scale"][0], X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned)
    values = node_values(result, X)
    wanted = _goal(aligned, "add") - values["relu"]
    for channel in range(6):
        row, goal = values["conv2d_2"][:, channel].reshape(-1, 1), wanted[:, channel].reshape(-1, 1)
        before = start.weights[0]["p"][channel].reshape(1, 1)
        close(result.weights[0]["p"][channel].reshape(1, 1), _fitted(row, goal, before, RIDGE), EXACT)


@pytest.mark.parametrize("name", ["add", "norm"])
def test_goals_of_outputs_leave_the_stream_alone(name: str) -> None:
    build, towards, _ = STREAMS[name]
    aligned = trace(edges(build, X), X[:2])
    start, result = Interpolate()(aligned), _solved(aligned, goals="output")
    [(node, (_, norm))] = towards.items()
    _check(result, start, node, _goal(aligned, "batch_norm" if norm else node), norm)
    _differs(result, _solved(aligned), "b.weight")


# following one edge ---------------------------------------------------------------------------------------------------


def deep() -> nn.Module:
    """Two residual blocks, one with norms."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = h + self.b(F.relu(self.a(h)))
        h = F.relu(self.n(self.d(F.relu(self.m(self.c(h))))) + h)
        return self.fc(h.mean((2, 3)))

    layers = {"stem": conv(3, 5), "a": conv(5, 4), "b": conv(4, 5), "c": conv(5, 4), "d": conv(4, 5)}
    return net(forward, **layers, m=nn.BatchNorm2d(4), n=nn.BatchNorm2d(5), fc=nn.Linear(5, 3))


FOLLOWED = {  # of each layer its call and BatchNorm, and the value that it is solved for
    "conv2d": (None, "conv2d"),
    "conv2d_1": (None, "conv2d_1"),
    "conv2d_2": (None, "add"),
    "conv2d_3": ("m", "batch_norm"),
    "conv2d_4": ("n", "add_1"),
    "linear": (None, "linear"),
}
STREAM = {"add": "relu", "add_1": "add"}  # the other operand of each sum


@pytest.fixture(scope="module")
def three() -> Program:
    return trace(edges(deep, X, 3), X[:2])


@pytest.mark.parametrize("edge", [0, 1, 2])
def test_following_to_the_end_gives_that_edge(edge: int, three: Program) -> None:
    for follow in (6, "fc"):
        result = _solved(three, follow=follow, follow_edge=edge)
        close(result(X), three.select(edge)(X), 1e-12)
        _equal_weights(result, three.select(edge))
    other = three.select((edge + 1) % 3)(X)
    assert (result(X) - other).abs().max() > 1e-3, "negative control"


@pytest.mark.parametrize("edge", [0, 1])
@pytest.mark.parametrize("follow", [1, 2, 3, 4, 5, "b", "m"])
def test_layers_behind_those_that_follow_are_solved_for_the_mean(follow: int | str, edge: int, three: Program) -> None:
    count = {"b": 3, "m": 4}.get(str(follow), follow)
    assert isinstance(count, int)
    start = Interpolate(THIRDS)(three)
    result = _solved(three, weights=THIRDS, follow=follow, follow_edge=edge)
    values, own = node_values(result, X), node_values(three, X, edge)
    for index, (node, (norm, wanted)) in enumerate(FOLLOWED.items()):
        if index < count:
            close(values[node], own[node], 1e-12)
            continue
        goal = _goal(three, wanted, shares=THIRDS)
        _check(result, start, node, goal - values[STREAM[wanted]] if wanted in STREAM else goal, norm)
    assert f"edge {edge} up to layer {count}" in result.history[-1]


def test_layers_behind_kept_branches_are_solved_for_the_followed_edge() -> None:
    """The joined branches give neither edge's values, so the layers behind are not simply those of the edge."""
    aligned = trace(edges(deep, X), X[:2])
    start = Interpolate()(DuplicateBranches(1)(aligned))
    result = _solved(aligned, start=start, follow=2, follow_edge=1)
    own = {name: aligned.weights[1][name] for name in ("a.weight", "a.bias")}  # what the ridge draws to
    drawn = start.with_weights([start.weights[0] | own])  # type: ignore[operator]
    _check(result, drawn, "conv2d_1", node_values(aligned, X, 1)["conv2d_1"])
    _differs(result, drawn, "a.weight")
    total = _goal(aligned, "add") - node_values(result, X)[_stream_of(result)]
    _check(result, start, "conv2d_2", total)
    for name in start.private:
        assert torch.equal(result.weights[0][name], start.weights[0][name])


def _stream_of(program: Program) -> str:
    [known] = [a for a in program.node("add").all_input_nodes if not _depends(a, "conv2d_2")]
    return known.name


# masks ----------------------------------------------------------------------------------------------------------------

MASKED = {"stem": "conv2d", "depth": "conv2d_1", "group": "conv2d_2", "up": "conv_transpose2d", "fc": "linear"}


def _masked_start(aligned: Program, kept: float) -> tuple[Program, dict[str, Tensor]]:
    """The average with some weights at zero, and its masks."""
    start, generator = Interpolate()(aligned), torch.Generator().manual_seed(1)
    weights = dict(start.weights[0])
    masks = {}
    for name in (f"{layer}.weight" for layer in MASKED):
        masks[name] = torch.rand(weights[name].shape, generator=generator) < kept
        weights[name] = weights[name] * masks[name]
    return start.with_weights([weights]), masks


@pytest.mark.parametrize("kept", [0.6, 0.0])
@pytest.mark.parametrize("ridge", [RIDGE, None])
def test_masks_are_kept_exactly(ridge: float | None, kept: float) -> None:
    aligned = trace(edges(mixed, X), X[:2])
    start, masks = _masked_start(aligned, kept)
    solve_ = Reconstruct(aligned, X, ridge=ridge, masks=masks, progress=False)
    result = solve_(start)
    ridges = {solved.node: solved.ridge for solved in solve_.solved}
    for layer, node in MASKED.items():
        name = f"{layer}.weight"
        assert not result.weights[0][name][~masks[name]].any()
        support = _map(start, node)[0].matrix(masks[name].double()) > 0
        _check(result, start, node, _goal(aligned, node), support=support, ridge=ridges[node])
        if kept:
            _differs(result, start, name)
    free = _solved(aligned, start=start)
    assert any(free.weights[0][name][~mask].any() for name, mask in masks.items()), "negative control"


def test_masks_of_a_layer_with_a_batchnorm() -> None:
    aligned = trace(edges(normed(*NORMED["conv"][:2]), X), X[:2])
    start = Interpolate()(aligned)
    mask = torch.rand(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    weights = start.weights[0] | {"layer.weight": start.weights[0]["layer.weight"] * mask}  # type: ignore[operator]
    start = start.with_weights([weights])
    result = _solved(aligned, start=start, masks={"layer.weight": mask})
    assert not result.weights[0]["layer.weight"][~mask].any()
    support = _map(start, "conv2d_1")[0].matrix(mask.double()) > 0
    _check(result, start, "conv2d_1", _goal(aligned, "batch_norm"), "norm", support=support)
    close(emit(result)[0].train()(X), result(X), 1e-6)


@pytest.mark.parametrize("centre", ["own", "references"])
def test_masks_hold_whatever_the_ridge_draws_to(centre: str) -> None:
    """Dense references, and weights that are dense themselves."""
    aligned = trace(edges(chain, X), X[:2])
    generator = torch.Generator().manual_seed(0)
    shapes = {name: aligned.weights[0][name].shape for name in ("b.weight", "fc.weight")}
    masks = {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in shapes.items()}
    result = _solved(aligned, masks=masks, centre=centre)
    for (name, mask), node in zip(masks.items(), ("conv2d_1", "linear_1")):
        assert not result.weights[0][name][~mask].any()
        support = _map(result, node)[0].matrix(mask.double()) > 0
        _check(result, Interpolate()(aligned), node, _goal(aligned, node), support=support)


# ridge, centre, rounds ------------------------------------------------------------------------------------------------


def test_the_ridge_is_chosen_layer_by_layer_on_held_samples() -> None:
    """Every fifth sample is held out; the solution then comes from all."""
    x = images(60, 6, seed=4, dtype=torch.float64)
    aligned = trace(edges(chain, x, 2, 40), x[:2])
    one = Reconstruct(aligned, x, progress=False)
    start = Interpolate()(aligned)
    result = one(start)
    values, held = node_values(result, x), torch.arange(60) % 5 == 4
    assert [solved.node for solved in one.solved] == ["conv2d", "conv2d_1", "linear", "linear_1"]
    for solved in one.solved[1:]:
        form, source, centre, bias = _map(start, solved.node)
        goal = _goal(aligned, solved.node, x)
        parts = [(form.rows(values[source][chosen]), form.goals(goal[chosen])) for chosen in (~held, held)]
        errors = _held_errors(Problem(centre, bias), parts)
        least = errors.index(min(errors))
        assert errors[: least + 1] == sorted(errors[: least + 1], reverse=True)
        assert errors[least:] == sorted(errors[least:])
        assert solved.ridge == RIDGES[least]
        _check(result, start, solved.node, goal, x=x, ridge=solved.ridge)
    assert len({solved.ridge for solved in one.solved}) > 1


def test_with_too_few_samples_to_hold_any_out_the_ridge_is_fixed() -> None:
    aligned = trace(edges(chain, X), X[:2])
    one = Reconstruct(aligned, X[:4], progress=False)
    result = one(Interpolate()(aligned))
    assert {solved.ridge for solved in one.solved} == {RIDGES[START]}
    _equal_weights(result, _solved(aligned, X[:4], ridge=RIDGES[START]))


def test_what_is_said_of_each_layer() -> None:
    aligned = trace(edges(chain, X), X[:2])
    start, one = Interpolate()(aligned), Reconstruct(aligned, X, ridge=RIDGE, progress=False)
    values = node_values(one(start), X)
    for solved in one.solved:
        form, source, matrix, bias = _map(start, solved.node)
        rows, goals = form.rows(values[source]), form.goals(_goal(aligned, solved.node))
        assert bias is not None
        spread = (goals - goals.mean(1, keepdim=True)).square().sum()
        before = (rows @ matrix + bias[:, None] - goals).square().sum() / spread
        after = (form.goals(values[solved.node]) - goals).square().sum() / spread
        assert solved.ridge == RIDGE
        assert abs(solved.before - before) < EXACT
        assert abs(solved.after - after) < EXACT
    assert one.solved[1].after < one.solved[1].before


@pytest.mark.parametrize("centre", ["own", "references"])
def test_what_the_ridge_draws_to(centre: str) -> None:
    aligned = trace(edges(normed(*NORMED["conv"][:2]), X), X[:2])
    first = aligned.select(0)
    result = _solved(aligned, start=first, centre=centre, weights=0.3, ridge=0.5)
    for node, goal, norm in (
        ("conv2d", "conv2d", None),
        ("conv2d_1", "batch_norm", "norm"),
        ("linear", "linear", None),
    ):
        form, source, matrix, bias = _map(result, node, norm)
        maps = [_map(aligned.select(edge), node, norm)[2:] for edge in range(2)]
        shares = [1.0, 0.0] if centre == "own" else [0.7, 0.3]
        before, shift = (_mean([pair[k] for pair in maps], shares) for k in range(2))  # type: ignore[misc]
        rows, goals = form.rows(node_values(result, X)[source]), form.goals(_goal(aligned, goal, shares=[0.7, 0.3]))
        _close_solutions((matrix, bias), _literal(rows, goals, before, shift, None, 0.5))


def test_rounds_start_from_the_last_result() -> None:
    aligned = trace(edges(deep, X), X[:2])
    once = _solved(aligned)
    _equal_weights(_solved(aligned, rounds=2), _solved(aligned, start=once))
    _differs(_solved(aligned, rounds=2), once, "fc.weight")


# data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [deep, twice, mixed, chain])
def test_values_that_wait_on_disk_change_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned = trace(edges(build, X), X[:2])
    data, written, append = X.split(5), [0], Spill._append

    def counted(self: Spill, storage: torch.UntypedStorage) -> Any:
        written[0] += 1
        return append(self, storage)

    monkeypatch.setattr(Spill, "_append", counted)
    for ridge in (RIDGE, None):
        results = [_solved(aligned, data, ridge=ridge, memory_limit=limit) for limit in (None, 0, 20_000)]
        for result in results[1:]:
            _equal_weights(result, results[0])
    assert written[0]


@pytest.mark.parametrize("build", [deep, twice, chain])
@pytest.mark.parametrize("ridge", [RIDGE, None])
def test_batches_of_any_size_give_the_same(build: Build, ridge: float | None) -> None:
    aligned = trace(edges(build, X), X[:2])
    whole = _solved(aligned, ridge=ridge)
    for data in (X.split(5), [X[:1], X[1:3], X[3:]], [(x, torch.zeros(len(x))) for x in X.split(3)]):
        _close_weights(_solved(aligned, data, ridge=ridge), whole, 1e-9)
    _close_weights(_solved(aligned, iter(X.split(7)), ridge=ridge), whole, 1e-9)
    _equal_weights(_solved(aligned, [X, images(9, 6, seed=8).double()], ridge=ridge, max_samples=16), whole)
    _differs(_solved(aligned, X[:11], ridge=ridge), whole, "fc.weight")


def test_random_rows_are_noted() -> None:
    aligned = trace(edges(chain, X), X[:2])
    whole, all_rows, few = (_solved(aligned, max_rows=rows) for rows in (None, 10**6, 12))
    note = "reconstruction: at most 12 random rows of each batch were read"
    assert few.notes == (note,)
    assert not whole.notes
    _close_weights(all_rows, whole, 1e-9)
    _differs(few, whole, "fc.weight")
    _equal_weights(few, _solved(aligned, max_rows=12))


def test_nothing_that_was_given_is_changed() -> None:
    aligned = trace(edges(deep, X), X[:2])
    start, data = Interpolate()(aligned), X.clone()
    masks = {"a.weight": torch.rand(4, 5, 3, 3) < 0.5}
    before = [{name: tensor.clone() for name, tensor in own.items()} for own in (*aligned.weights, *start.weights)]
    result = _solved(aligned, data, start, masks=masks, follow=1, rounds=2)
    for own, old in zip((*aligned.weights, *start.weights), before):
        assert all(torch.equal(own[name], tensor) for name, tensor in old.items())
    assert torch.equal(data, X)
    _differs(result, start, "fc.weight")
    assert result.graph is start.graph
    assert {name: (t.shape, t.dtype) for name, t in result.weights[0].items()} == {
        name: (t.shape, t.dtype) for name, t in start.weights[0].items()
    }


def test_single_precision_comes_near() -> None:
    models = edges(deep, X)
    exact = _solved(trace(models, X[:2]))
    single = _solved(trace([model.float() for model in models], X[:2].float()), X.float())
    assert all(tensor.dtype == torch.float32 for tensor in single.weights[0].values() if tensor.is_floating_point())
    close(single(X.float()).double(), exact(X), 1e-3)


# references -----------------------------------------------------------------------------------------------------------


def perceptron(width: int) -> Build:
    return lambda: nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def test_references_are_carried_to_the_networks_channels() -> None:
    """An index of channels, a matrix, and their shares."""
    student, wide, narrow = (
        trace(edges(perceptron(width), VECTORS, 1, seed)[0], VECTORS[:2]) for seed, width in enumerate((3, 6, 4))
    )
    index, matrix = torch.tensor([4, 0, 2]), _random(3, 4)

    def chosen(node: str, dim: int) -> Tensor | None:
        return index if (node, dim) == ("linear", 1) else None

    def mixed_up(node: str, dim: int) -> Tensor | None:
        return matrix if (node, dim) == ("linear", 1) else None

    references = [Reference(wide, 0.4, chosen), Reference(narrow, 0.6, mixed_up)]
    result = Reconstruct(references, VECTORS, ridge=RIDGE, progress=False)(student)
    one, two = (node_values(reference, VECTORS) for reference in (wide, narrow))
    hidden = 0.4 * one["linear"][:, index] + 0.6 * _row_by_row(two["linear"], matrix)
    _check(result, student, "linear", hidden, x=VECTORS)
    _check(result, student, "linear_1", 0.4 * one["linear_1"] + 0.6 * two["linear_1"], x=VECTORS)
    _differs(result, student, "0.weight")


def _row_by_row(value: Tensor, matrix: Tensor) -> Tensor:
    return torch.stack([matrix @ row for row in value])


def test_calls_that_no_reference_has_keep_their_weights() -> None:
    shorter, longer = (
        trace(edges(build, VECTORS, 1, seed)[0], VECTORS[:2])
        for seed, build in enumerate(
            (perceptron(4), lambda: nn.Sequential(*perceptron(4)().children(), nn.Linear(3, 2)))
        )
    )
    result = Reconstruct([Reference(shorter)], VECTORS, ridge=RIDGE, progress=False)(longer)
    assert torch.equal(result.weights[0]["3.weight"], longer.weights[0]["3.weight"])
    for node in ("linear", "linear_1"):
        _check(result, longer, node, node_values(shorter, VECTORS)[node], x=VECTORS)


def test_a_reference_of_the_same_channels_comes_back() -> None:
    aligned = trace(edges(deep, X), X[:2])
    result = Reconstruct([Reference(aligned.select(1))], X, ridge=1e-9, progress=False)(aligned.select(0))
    close(result(X), aligned.select(1)(X), 1e-5)
    assert (aligned.select(0)(X) - aligned.select(1)(X)).abs().max() > 0.1, "negative control"


def test_what_is_refused() -> None:
    aligned = trace(edges(chain, X), X[:2])
    merged = Interpolate()(aligned)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ridge": -1.0}, "ridge"), ({"ridge": float("nan")}, "ridge"), ({"goals": "mean"}, "goals"),
        ({"centre": "zero"}, "centre"), ({"rounds": 0}, "rounds"), ({"max_rows": 0}, "max_rows"),
        ({"weights": [0.5, 0.6]}, "sum to 1"), ({"weights": [1.0]}, "1 weights for 2"),
    ]  # fmt: skip
    for options, match in wrong:
        with pytest.raises(ArgumentError, match=match):
            Reconstruct(aligned, X, **options)
    for options, match in (
        ({"follow_edge": 2}, "follow_edge=2"),
        ({"follow_edge": -1}, "follow_edge"),
        ({"follow": 9}, "9"),
    ):
        with pytest.raises(ArgumentError, match=match):
            _solved(aligned, start=merged, **options)
    with pytest.raises(ArgumentError, match="reference"):
        Reconstruct([], X)(merged)
    with pytest.raises(PassError, match="merged network"):
        _solved(aligned, start=aligned)
