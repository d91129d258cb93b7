"""Class labels that come with calibration data, and loaders read in one fixed order.

Labels are a batch's entries behind the network's inputs (tuples) or under one of the usual names (dicts); one integer
for each sample is a class label, anything else is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from vfx.errors import DataError

NAMES = ("labels", "label", "targets", "target", "y")


def batch_labels(raw: Any, inputs: int, samples: int) -> Tensor | None:
    """The class labels (samples,) of one batch as the user's loader gave it, or None if it holds none."""
    return class_labels(_behind(raw, inputs), samples)


def integer_labels(raw: Any, inputs: int, samples: int) -> Tensor | None:
    """The integer labels (samples, …) of one batch, one for each sample or for each of its positions, or None."""
    labels = _behind(raw, inputs)
    if class_labels(labels, samples) is not None or not isinstance(labels, Tensor):
        return class_labels(labels, samples)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels if whole and labels.ndim and len(labels) == samples else None


def unread(raw: Any, inputs: int, samples: int) -> str:
    """Why what a batch holds behind the network's inputs are no integer labels, in words; nothing if it holds none."""
    labels = _behind(raw, inputs)
    if labels is None or integer_labels(raw, inputs, samples) is not None:
        return ""
    if not isinstance(labels, Tensor):
        count = f" of {len(labels)}" if isinstance(labels, Sized) else ""
        return f"they are a {type(labels).__name__}{count}, not {samples} integers"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        nan = f", {int(labels.isnan().sum())} of them NaN" if labels.isnan().any() else ""
        return f"they are {labels.dtype}{nan}; classes are integers (labels.long())"
    return f"their shape is {tuple(labels.shape)}, for a batch of {samples} samples"


def tensor_labels(raw: Any, inputs: int, samples: int) -> Tensor | None:
    """The labels (samples, …) of one batch whatever their dtype, or None if it holds none; a loss knows what they are.

    Raises DataError for labels that are no tensor of as many.
    """
    labels = _behind(raw, inputs)
    if labels is not None and (not isinstance(labels, Tensor) or not labels.ndim or len(labels) != samples):
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"the labels of a batch of {samples} samples must be a tensor of as many, got {shape}")
    return labels


def _behind(raw: Any, inputs: int) -> Any:
    """What a batch holds behind the network's inputs."""
    if isinstance(raw, Mapping):
        return next((raw[name] for name in NAMES if name in raw), None)
    return raw[inputs] if isinstance(raw, (tuple, list)) and len(raw) > inputs else None


def class_labels(value: Any, samples: int) -> Tensor | None:
    """``value`` as int64 labels (samples,) if it is that, else None."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return None
    value = value.reshape(-1) if value.numel() == samples else value
    return value.long().cpu() if value.shape == (samples,) and (not samples or int(value.min()) >= 0) else None


PADDING = -100  # labels that no loss counts, as torch.nn.functional.cross_entropy has it


def outside(labels: Tensor, classes: int) -> str:
    """Which labels are no class of ``classes`` and no padding (-100), in words; nothing if all are."""
    wrong = labels[((labels < 0) & (labels != PADDING)) | (labels >= classes)]
    if not len(wrong):
        return ""
    count, expected = f"{len(wrong)} of {labels.numel()} labels", f"the {classes} classes 0 to {classes - 1}"
    return f"{count} are none of {expected}, such as {int(wrong.max())}"


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise DataError for labels that are no class of ``classes`` and no padding."""
    problem = outside(labels, classes)
    if problem:
        raise DataError(f"{problem}; labels count from 0, and {PADDING} stands for none")


def in_order(data: Any) -> Any:
    """``data`` with the same order in every pass: a shuffling DataLoader becomes a sequential one.

    Raises DataError for a loader whose batches another sampler composes.
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return data
    if isinstance(data.sampler, SequentialSampler) and data.batch_size is not None:
        return data
    if not isinstance(data.sampler, RandomSampler) or data.batch_size is None:
        raise DataError(
            f"the order of a loader with {type(data.batch_sampler).__name__}({type(data.sampler).__name__}) is not "
            "known; give a loader with shuffle=False, or a list of batches"
        )
    return DataLoader(
        data.dataset,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
    )


def counted(data: Any, inputs: int) -> Any:
    """``data`` as a loader that counts class labels; what holds none (a tensor) or is no loader, as it is."""
    plain = isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable)
    return data if plain else LabelCount(data, inputs)


class LabelCount:
    """A loader that counts the class labels passing by; otherwise it is the loader. ``counts`` is one pass's."""

    def __init__(self, data: Any, inputs: int):
        self._data, self._inputs = data, inputs
        self.counts: dict[int, int] = {}

    def __iter__(self) -> Iterator[Any]:
        counts: dict[int, int] = {}
        for raw in self._data:
            labels = batch_labels(raw, self._inputs, _samples(raw))
            for label, count in zip(*_unique(labels)) if labels is not None else ():
                counts[label] = counts.get(label, 0) + count
            if sum(counts.values()) > sum(self.counts.values()):
                self.counts = dict(counts)
            yield raw

    def __len__(self) -> int:
        return len(self._data) if isinstance(self._data, Sized) else 0

    @property
    def batch_size(self) -> int | None:
        return getattr(self._data, "batch_size", None)


def _unique(labels: Tensor) -> tuple[list[int], list[int]]:
    values, counts = labels.unique(return_counts=True)
    return values.tolist(), counts.tolist()


def _samples(raw: Any) -> int:
    """Samples of a raw batch: the first axis of its first tensor that has one."""
    return next((len(x) for x in pytree.tree_leaves(raw) if isinstance(x, Tensor) and x.ndim), 0)
