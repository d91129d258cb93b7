"""Reconstruction: windows of convolutions and their Gram matrices against written loops."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import close
from literal import drawn
from torch import Tensor

from vfx.reconstruct.windows import Window, patches, shares_products, window_cross, window_gram, window_sums

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


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
    (Window((3, 2, 3), (1, 1, 1), (1, 2, 1), ((1, 1), (0, 2), (2, 0))), (3, 4, 2)),
    (Window((2, 1, 3), (1, 1, 1), (1, 1, 2), ((1, 0), (0, 0), (4, 2))), (3, 4, 5)),
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
    x = drawn(2, 3, *sizes)
    written = _written(window, x)
    assert torch.equal(patches(window, x), written)
    assert window.outputs(sizes) == written.shape[1:-1]
    close(window_sums(window, x), written.flatten(0, -2).sum(0), 1e-12)


@pytest.mark.parametrize(("window", "sizes"), PLAIN)
def test_the_gram_matrix_of_shared_products_is_that_of_written_rows(window: Window, sizes: tuple[int, ...]) -> None:
    x = drawn(3, 2, *sizes)
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


@pytest.mark.parametrize("axes", [2, 3])
def test_products_of_many_small_windows_of_several_axes(axes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        kernel, step, sizes = (torch.randint(1, n, (axes,), generator=generator).tolist() for n in (4, 4, 6))
        reach = [d * (k - 1) for d, k in zip(step, kernel)]
        padding = tuple(tuple(torch.randint(0, r + 1, (2,), generator=generator).tolist()) for r in reach)
        window = Window(tuple(kernel), (1,) * axes, tuple(step), padding)
        if min(window.outputs(sizes)) > 0:
            _check_gram(window, tuple(sizes))


def _check_gram(window: Window, sizes: tuple[int, ...]) -> None:
    x, y = drawn(2, 2, *sizes), drawn(2, 3, *window.outputs(sizes), seed=1)
    rows = patches(window, x).flatten(0, -2)
    assert (window_gram(window, x) - rows.T @ rows).abs().max() < 1e-11
    for overlap in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vfx.reconstruct.windows.OVERLAP", overlap)
            cross = window_cross(window, x, y)
        assert (cross - rows.T @ y.movedim(1, -1).flatten(0, -2)).abs().max() < 1e-11


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
    x = drawn(3, 2, *sizes)
    rows = _written(window, x).flatten(0, -2)
    close(window_gram(window, x), rows.T @ rows, 1e-12)


def test_products_are_shared_only_where_the_formula_holds() -> None:
    plain = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert shares_products(plain, 8, (32, 32))
    assert not shares_products(plain, 7, (32, 32))
    assert shares_products(plain, 8, (4, 4))
    assert not shares_products(replace(plain, stride=(1, 2)), 8, (32, 32))
    assert not shares_products(replace(plain, padding=((1, 3), (1, 1))), 8, (32, 32))
    assert not shares_products(replace(plain, padding=((1, -1), (1, 1))), 8, (32, 32))
    assert not shares_products(Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0))), 8, (32, 32))
    assert shares_products(Window((3,) * 3, (1,) * 3, (1,) * 3, ((1, 1),) * 3), 8, (8,) * 3)
    assert shares_products(plain, 8, (2, 2))
    assert not shares_products(Window((7, 7), (1, 1), (1, 1), ((0, 0), (0, 0))), 8, (8, 8)), "borders cost more"
    assert not shares_products(Window((64, 64), (1, 1), (1, 1), ((31, 32), (31, 32))), 8, (64, 64)), "and here, too"
