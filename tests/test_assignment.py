"""Large assignments: the prices that stand in front of the solver leave the best assignment the best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vfx.match.auction import SMALLEST, Gain, costs
from vfx.match.matcher import assign

SIZE = SMALLEST + 88


def _products(rng: np.random.Generator) -> Gain:
    """Two networks of their own: inner products of random weights."""
    first, second = rng.standard_normal((2, SIZE, 96)).astype(np.float32)
    return np.asarray(first @ second.T, np.float64)


def _copies(rng: np.random.Generator) -> Gain:
    """A permuted copy, with noise."""
    weights = rng.standard_normal((SIZE, 96))
    other = weights[rng.permutation(SIZE)] + 0.7 * rng.standard_normal((SIZE, 96))
    return np.asarray(weights @ other.T)


def _uneven(rng: np.random.Generator) -> Gain:
    """A few channels are thousands of times as large as most."""
    rows, columns = np.exp(2 * rng.standard_normal((2, SIZE)))
    return np.asarray(rows[:, None] * _products(rng) * columns)


UNIQUE: dict[str, Callable[[np.random.Generator], Gain]] = {
    "products": _products,
    "copies": _copies,
    "uneven": _uneven,
    "float32": lambda rng: _products(rng).astype(np.float32),
    "tiny": lambda rng: 1e-200 * _products(rng),
    "huge": lambda rng: 1e200 * _products(rng),
    "far from zero": lambda rng: 1e4 + _products(rng),
    "negative": lambda rng: -np.abs(_products(rng)),
}
TIED: dict[str, Callable[[np.random.Generator], Gain]] = {
    "integers": lambda rng: rng.integers(-3, 4, (SIZE, SIZE)).astype(np.float64),
    "dead channels": lambda rng: np.where(np.arange(SIZE) < 150, 0.0, _products(rng)),
    "equal channels": lambda rng: np.repeat(_products(rng)[: SIZE // 4], 4, axis=0),
    "constant": lambda _: np.full((SIZE, SIZE), 2.5),
}


@pytest.mark.parametrize("name", UNIQUE)
def test_the_assignment_is_the_solvers_own(name: str) -> None:
    gain = UNIQUE[name](np.random.default_rng(0))
    rows, columns = linear_sum_assignment(gain, maximize=True)
    assert costs(gain) is not None
    permutation, value = assign(gain)
    assert (permutation == columns).all()
    assert value == gain[rows, columns].sum()


@pytest.mark.parametrize("name", TIED)
def test_of_equal_assignments_one_is_found(name: str) -> None:
    gain = TIED[name](np.random.default_rng(0))
    rows, columns = linear_sum_assignment(gain, maximize=True)
    assert costs(gain) is not None
    permutation, value = assign(gain)
    assert (np.sort(permutation) == rows).all()
    assert value == pytest.approx(gain[rows, columns].sum(), rel=1e-12)


def test_channels_that_may_stay_do() -> None:
    """A network with itself, many of whose channels are dead."""
    weights = np.random.default_rng(0).standard_normal((SIZE, 96)) * (np.arange(SIZE) % 3 > 0)[:, None]
    gain = weights @ weights.T
    assert (assign(gain)[0] == np.arange(SIZE)).all()
    assert (linear_sum_assignment(costs(gain))[1] != np.arange(SIZE)).any()


def test_prices_of_some_rows_alone_would_be_seen() -> None:
    """Control: what is taken off a column counts in every row or not at all."""
    gain = _products(np.random.default_rng(0))
    cost = costs(gain)
    assert cost is not None
    cost[::2] = -gain[::2]
    rows, columns = linear_sum_assignment(cost)
    assert gain[rows, columns].sum() < (1 - 1e-3) * assign(gain)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gains_that_are_no_numbers_are_left_to_the_solver(value: float) -> None:
    gain = _products(np.random.default_rng(0))
    gain[3, 5] = value
    assert costs(gain) is None
    with pytest.raises(ValueError):
        assign(gain)


def test_small_gains_and_more_columns_than_rows_have_no_prices() -> None:
    gain = _products(np.random.default_rng(0))
    assert costs(gain[: SMALLEST - 1, : SMALLEST - 1]) is None
    assert costs(gain[:-8]) is None
    assert costs(np.zeros((SIZE, SIZE))) is None
