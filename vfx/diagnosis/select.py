"""``vfx.select``: a subset of the data to calibrate and match on, at random, by difficulty, or balanced over classes.

*The Role of Data in Model Merging*: 5 % of random data is enough, while easy data alone give wrong statistics (variance
ratio below 1) and up to twice the barrier. Difficulty is EL2N; ties fall to the earlier sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfx.arguments import checked
from vfx.diagnosis.difficulty import networks, scores
from vfx.errors import ArgumentError, DataError
from vfx.statistics.data import BATCH_SIZE, reusable
from vfx.statistics.labels import NAMES, batch_labels, class_labels, in_order

Strategy = Literal["random", "easy", "hard", "balanced"]


@dataclass(frozen=True, eq=False)
class SampleSelection:
    """Chosen samples: ``indices`` (n,) into the data in their fixed order, and ``batches`` to be used as ``data=``.

    Iterating gives the batches, built like the data's own. ``scores`` are the EL2N of all samples and ``labels`` their
    classes (given or pseudo), where they were needed; None otherwise.
    """

    indices: Tensor
    batches: tuple[Any, ...]
    strategy: str
    scores: Tensor | None = None
    labels: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    @property
    def samples(self) -> int:
        return len(self.indices)


@checked
def select(
    data: Any,
    n: int | float,
    strategy: Strategy = "random",
    *,
    models: Any = None,
    labels: Tensor | None = None,
    pseudo_labels: bool = False,
    quantiles: tuple[float, float] = (0.0, 1.0),
    balanced: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SampleSelection:
    """Choose ``n`` samples (a number, or a share below 1) of ``data``: a tensor, or batches as for ``vfx.merge``.

    ``strategy``: "random"; "easy" or "hard", the lowest or highest EL2N of ``models`` (modules, Results or Programs);
    "balanced", equally many of each class. ``balanced=True`` balances the other strategies too: a class that runs out
    leaves its share to the others. ``quantiles`` keeps only samples between these quantiles of difficulty, e.g.
    (0.25, 0.75). Class labels come with the batches or as ``labels`` (N,); ``pseudo_labels`` takes those that the
    models' ensemble predicts instead. ``max_samples``: only the first so many are looked at.
    Same data, seed and models: same selection.
    Raises ArgumentError, DataError.
    """
    _check(strategy, quantiles)
    data = in_order(data.split(BATCH_SIZE) if isinstance(data, Tensor) else reusable(data))
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise DataError(f"data must be a tensor or an iterable of batches, got {type(data).__name__}")
    data = data if max_samples is None else _First(data, max_samples)
    balanced = balanced or strategy == "balanced"
    ranked = strategy in ("easy", "hard") or tuple(quantiles) != (0.0, 1.0)
    facts = _survey(data, labels, models, pseudo_labels, ranked, balanced, progress)
    count = _count(n, facts.samples)
    generator = np.random.default_rng(seed)
    order = _order(strategy, facts, quantiles, generator)
    if balanced:
        assert facts.labels is not None
        order = _balanced(order, facts.labels)
    if len(order) < count:
        raise ArgumentError(f"{count} samples asked for, {len(order)} lie between the quantiles {quantiles}")
    indices = torch.from_numpy(np.sort(order[:count]))
    return SampleSelection(indices, tuple(_gather(data, indices, facts)), strategy, facts.scores, facts.labels)


@dataclass(frozen=True)
class _Facts:
    """What one pass over the data found: each batch's samples and fingerprint, and each sample's score and label."""

    sizes: tuple[int, ...]
    prints: tuple[float, ...]
    scores: Tensor | None
    labels: Tensor | None

    @property
    def samples(self) -> int:
        return sum(self.sizes)


def _survey(
    data: Any, labels: Tensor | None, models: Any, pseudo: bool, ranked: bool, balanced: bool, progress: bool
) -> _Facts:
    sizes: list[int] = []
    prints: list[float] = []

    def watched() -> Iterator[Any]:
        for raw in data:
            sizes.append(_size(raw))
            prints.append(_fingerprint(raw))
            yield raw

    def known(raw: Any, samples: int) -> Tensor | None:
        if pseudo:
            return None
        if labels is None:
            return _own_labels(raw, samples)
        part = class_labels(labels[sum(sizes[:-1]) : sum(sizes)], samples)
        if part is None:
            raise DataError(f"labels= holds {len(labels)} values, not one class for each sample of the data")
        return part

    if ranked or (balanced and pseudo):
        runs = networks(models, _tuples_end_in_labels(data))
        scored_runs = list(scores(watched(), runs, known, pseudo, progress))
        if not scored_runs:
            raise DataError("the data hold no samples; give at least one batch")
        values, classes = (torch.cat(parts) for parts in zip(*scored_runs))
        return _Facts(tuple(sizes), tuple(prints), values, classes)
    parts = [known(raw, sizes[-1]) for raw in watched()]
    if not sum(sizes):
        raise DataError("the data hold no samples; give at least one batch")
    if balanced and any(part is None for part in parts):
        raise DataError(
            "balanced classes need a class label for each sample: give batches (inputs, labels), labels=, or "
            "pseudo_labels=True with models="
        )
    classes_ = torch.cat(parts) if all(part is not None for part in parts) else None  # type: ignore[arg-type]
    return _Facts(tuple(sizes), tuple(prints), None, classes_)


def _check(strategy: str, quantiles: tuple[float, float]) -> None:
    low, high = quantiles
    if not 0 <= low < high <= 1:
        raise ArgumentError(f"quantiles must satisfy 0 <= low < high <= 1, got {quantiles}")


def _count(n: int | float, samples: int) -> int:
    if isinstance(n, bool) or not isinstance(n, Real):
        raise ArgumentError(f"n must be a number of samples or a share of them, got {n!r}")
    if not isinstance(n, Integral) and not 0 < n <= 1:
        raise ArgumentError(f"a share of the samples must lie in (0, 1], got {n}; give an int for a number of them")
    count = int(n) if isinstance(n, Integral) else round(float(n) * samples)
    if not 1 <= count <= samples:
        raise ArgumentError(f"n={n} means {count} samples; the data hold {samples}")
    return count


def _order(
    strategy: str, facts: _Facts, quantiles: tuple[float, float], generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    """All samples between the quantiles, the preferred ones first."""
    if facts.scores is None:
        return generator.permutation(facts.samples)
    ranks = np.argsort(facts.scores.numpy(), kind="stable")
    low, high = (round(q * len(ranks)) for q in quantiles)
    if strategy == "hard":
        return ranks[low:high][::-1]
    return ranks[low:high] if strategy == "easy" else generator.permutation(ranks[low:high])


def _balanced(order: np.ndarray[Any, Any], labels: Tensor) -> np.ndarray[Any, Any]:
    """``order`` with the classes taking turns, so that they differ by one sample at most while they last."""
    classes = labels.numpy()[order]
    turn = np.empty(len(order), dtype=np.int64)
    for value in np.unique(classes):
        here = classes == value
        turn[here] = np.arange(here.sum())
    return order[np.argsort(turn, kind="stable")]


class _First:
    """The batches of some data up to a number of samples; the last is cut."""

    def __init__(self, data: Iterable[Any], samples: int):
        if samples < 1:
            raise ArgumentError(f"max_samples must be at least 1, got {samples}")
        self._data, self._samples = data, samples

    def __iter__(self) -> Iterator[Any]:
        left = self._samples
        for raw in self._data:
            size = _size(raw)
            yield raw if size <= left else _rows(raw, torch.arange(left), size)
            left -= size
            if left <= 0:
                return


def _own_labels(raw: Any, samples: int) -> Tensor | None:
    """Labels of a batch whose network is not known: under their name, or the last entry of a tuple."""
    if isinstance(raw, (tuple, list)):
        return class_labels(raw[-1], samples) if len(raw) > 1 else None
    return batch_labels(raw, 1, samples)


def _tuples_end_in_labels(data: Any) -> bool:
    first = next(iter(data), None)
    return isinstance(first, (tuple, list)) and len(first) > 1 and _own_labels(first, _size(first)) is not None


def _size(raw: Any) -> int:
    leaves = [x for x in pytree.tree_leaves(raw) if isinstance(x, Tensor) and x.ndim]
    if not leaves:
        raise DataError(f"a batch must hold tensors, got {type(raw).__name__}")
    return len(leaves[0])


def _fingerprint(raw: Any) -> float:
    """A number that tells whether a second pass sees the same batch."""
    first = next(x for x in pytree.tree_leaves(raw) if isinstance(x, Tensor) and x.ndim)
    return float(first.double().sum())


def _gather(data: Any, indices: Tensor, facts: _Facts) -> Iterator[Any]:
    """The chosen samples in a second pass, batched anew."""
    parts, start = [], 0
    for raw, size, seen in zip(data, facts.sizes, facts.prints):
        if _size(raw) != size or _fingerprint(raw) != seen:
            raise DataError("the data come in another order each time they are read; give a loader with shuffle=False")
        here = indices[(indices >= start) & (indices < start + size)] - start
        if len(here):
            parts.append(_rows(raw, here, size))
        start += size
    yield from _batched(parts)


def _rows(raw: Any, rows: Tensor, size: int) -> Any:
    pick = lambda x: x[rows.to(x.device)] if isinstance(x, Tensor) and x.ndim and len(x) == size else x  # noqa: E731
    labels = isinstance(raw, Mapping) and any(isinstance(raw.get(name), list) for name in NAMES)
    if labels:
        raw = {k: torch.tensor(v) if k in NAMES and isinstance(v, list) else v for k, v in raw.items()}
    return pytree.tree_map(pick, dict(raw) if isinstance(raw, Mapping) else raw)


def _batched(parts: list[Any]) -> Iterator[Any]:
    """Parts joined to batches of at least the usual size (the last one may be smaller)."""
    pending: list[Any] = []
    for part in parts:
        pending.append(part)
        if sum(map(_size, pending)) >= BATCH_SIZE:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def _joined(parts: list[Any]) -> Any:
    leaves, specs = zip(*(pytree.tree_flatten(part) for part in parts))
    sizes = [_size(part) for part in parts]
    same = lambda xs: all(isinstance(x, Tensor) and x.ndim and len(x) == n for x, n in zip(xs, sizes))  # noqa: E731
    return pytree.tree_unflatten([torch.cat(xs) if same(xs) else xs[0] for xs in zip(*leaves)], specs[0])
