"""Reconstruction: calls as products of rows with a matrix, and their sums, against all rows written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import close, node_values
from literal import RIDGE, drawn, equal_weights, squared_error, with_ones
from micro_models import net, parameter
from torch import Tensor, fx, nn
from vfx.passes.reconstruct import Reconstruct

from vfx.api import trace
from vfx.reconstruct.collect import Collected
from vfx.reconstruct.forms import Form, form_of
from vfx.reconstruct.references import Reference
from vfx.reconstruct.sums import Sums, sums_of
from vfx.reconstruct.windows import Window, window_gram

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


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
    x = drawn(*shape, seed=3)
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
    goals = drawn(*y.shape, seed=4)
    found, rows, wanted = form.sums(x, goals), form.rows(x), form.goals(goals)
    _close_sums(found, _literal_sums(rows, wanted))
    _close_sums(form.thinned(x, goals, rows.shape[1], 0), sums_of(rows, wanted))
    if rows.shape[1] > 3:
        few = form.thinned(x, goals, 3, 0)
        assert few.count == 3
        assert torch.linalg.matrix_rank(few.gram).max() <= 3


@pytest.mark.parametrize("name", FORMS)
def test_small_batches_are_multiplied_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, x, y, _, _ = _call(name)
    rows, goals = form.rows(x), form.goals(y)
    assert form.entries == rows.shape[0] * rows.shape[2] ** 2
    taken = []
    products = form.products
    monkeypatch.setattr(form, "products", lambda *pair: taken.append(pair[1].shape[form.along]) or products(*pair))
    arranged = form.arranged(x, y)
    for entries, together in ((10**9, 3), (sum(part.numel() for part in arranged) + 1, 2), (1, 1)):
        monkeypatch.setattr(type(form), "entries", entries)
        collected = Collected()
        collected.add(form.sums(x, 2 * y))
        taken.clear()
        for scale in (1.0, -0.5, 3.0):
            collected.wait(form, x, scale * y)
        batches = [(rows, scale * goals) for scale in (2.0, 1.0, -0.5, 3.0)]
        _close_sums(collected.sums(), _literal_sums(*(torch.cat(parts, 1) for parts in zip(*batches))))
        single = arranged[1].shape[form.along]
        assert taken == [min(together, 3 - start) * single for start in range(0, 3, together)]


def test_batches_of_other_sizes_do_not_wait_for_each_other() -> None:
    form = _call("conv2d")[0]
    collected, parts = Collected(), []
    for seed, size in enumerate([(3, 8, 6, 7), (2, 8, 6, 9), (2, 8, 6, 9), (3, 8, 6, 7)]):
        x = drawn(*size, seed=seed)
        rows = form.rows(x)
        y = drawn(rows.shape[1], 5, seed=seed + 9).reshape(size[0], -1, 5).mT
        y = y.reshape(size[0], 5, *form.window.outputs(size[2:]))  # type: ignore[attr-defined]
        collected.wait(form, x, y)
        parts.append((rows, form.goals(y)))
    _close_sums(collected.sums(), _literal_sums(*(torch.cat(columns, 1) for columns in zip(*parts))))


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
    x = drawn(4, 7, 6)
    parts = {"w": parameter(6, 5), "b": parameter(5), "heads": parameter(3, 6, 5)}
    program = trace(net(forward, **parts).double(), x)
    other = program.with_weights([{name: 2 * tensor for name, tensor in program.weights[0].items()}])
    solved = Reconstruct([Reference(other)], x, ridge=RIDGE, progress=False)(program)
    equal_weights(solved, program)


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
    rows, goals, matrix, bias = drawn(2, 30, 5), drawn(2, 30, 3, seed=1), drawn(2, 5, 3, seed=2), drawn(2, 3)
    whole = _literal_sums(rows, goals)
    first, second = sums_of(rows[:, :11], goals[:, :11]), sums_of(rows[:, 11:], goals[:, 11:])
    _close_sums(first + second, whole)
    single = sums_of(rows[:, :11].float(), goals[:, :11].float()).double()
    assert all(getattr(single, field).dtype == torch.float64 for field in FIELDS)
    first += second
    _close_sums(first, whole)
    gram, cross = whole.with_ones()
    close(gram, with_ones(rows).mT @ with_ones(rows), 1e-12)
    close(cross, with_ones(rows).mT @ goals, 1e-12)
    y = rows @ matrix + bias[:, None]
    close(squared_error(whole, matrix, bias), (y - goals).square().sum(), 1e-12)
    close(squared_error(whole, matrix, None), (rows @ matrix - goals).square().sum(), 1e-12)
    for found, expected in zip(whole.moments(matrix, bias), (y.mean(1), y.var(1, correction=0))):
        close(found, expected, 1e-12)
