"""CIFAR-10 and CIFAR-100: 32×32 pixels, three channels; 50,000 images to train on and 10,000 to test.

torchvision's downloads as they lie on the disk (python pickles, read by ``pickles.py``), or the binary version. Each is
standardised by the means and deviations of its own training pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vfx.data.pickles import read_arrays
from vfx.errors import ArgumentError, DataError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Set:
    name: str  # torchvision's class
    python: str  # folder of the pickles
    binary: str  # folder of the binary version
    files: dict[str, tuple[str, ...]]
    labels: str  # as the pickles call them
    bytes_of_labels: int  # in front of each image of the binary version; the last one counts
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR10 = _Set(
    "CIFAR10", "cifar-10-batches-py", "cifar-10-batches-bin",
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}, "labels", 1,
    (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
)  # fmt: skip
_CIFAR100 = _Set(
    "CIFAR100", "cifar-100-python", "cifar-100-binary", {"train": ("train",), "test": ("test",)}, "fine_labels", 2,
    (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
)  # fmt: skip


def cifar10(
    folder: str | Path | None = None, part: str = "train", *, samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the first images (N, 3, 32, 32) and labels (N,) of ``part``, "train" or "test".

    ``folder`` (``data`` by default) holds the files, or is the root that torchvision downloads to. Raises
    ArgumentError, DataError.

    >>> images, labels = cifar10("data", "test", samples=100)
    """
    return _read(_CIFAR10, Path("data" if folder is None else folder), part, samples)


def cifar100(
    folder: str | Path | None = None, part: str = "train", *, samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the first images (N, 3, 32, 32) and fine labels (N,) of ``part``, as ``cifar10`` does.

    >>> images, labels = cifar100("data", "test", samples=100)
    """
    return _read(_CIFAR100, Path("data" if folder is None else folder), part, samples)


def _read(dataset: _Set, root: Path, part: str, samples: int | None) -> tuple[Tensor, Tensor]:
    if part not in dataset.files:
        raise ArgumentError(f"part={part!r} is unknown; it is {' or '.join(map(repr, dataset.files))}")
    read, files = _found(dataset, root, part)
    pixels, labels, count = [], [], 0
    for file in files:
        if samples is not None and count >= samples:
            break
        images, classes = read(dataset, file)
        pixels.append(images)
        labels.append(classes)
        count += len(images)
    raw = torch.from_numpy(np.concatenate(pixels)[:samples].reshape(-1, 3, 32, 32))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (dataset.mean, dataset.std))
    return (raw.float() / 255 - mean) / std, torch.from_numpy(np.concatenate(labels)[:samples].astype(np.int64))


_Reader = Callable[[_Set, Path], tuple[np.ndarray, np.ndarray]]


def _found(dataset: _Set, root: Path, part: str) -> tuple[_Reader, list[Path]]:
    ways: list[tuple[_Reader, str, str]] = [(_pickled, dataset.python, ""), (_plain, dataset.binary, ".bin")]
    for read, folder, suffix in ways:
        for place in (root, root / folder):
            files = [place / f"{name}{suffix}" for name in dataset.files[part]]
            if all(file.is_file() for file in files):
                return read, files
    raise DataError(
        f"no {dataset.name} files {', '.join(dataset.files[part])} in {root}: download them with "
        f"torchvision.datasets.{dataset.name}(root, download=True) and name that root"
    )


def _pickled(dataset: _Set, file: Path) -> tuple[np.ndarray, np.ndarray]:
    held = read_arrays(file)
    images, labels = held.get("data"), held.get(dataset.labels)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != PIXELS:
        raise DataError(f"{file} holds no 'data' of {PIXELS} bytes an image")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(isinstance(x, int) for x in labels):
        raise DataError(f"{file} holds no {dataset.labels!r}, one for each of its {len(images)} images")
    return images, np.array(labels)


def _plain(dataset: _Set, file: Path) -> tuple[np.ndarray, np.ndarray]:
    raw, row = np.fromfile(file, np.uint8), dataset.bytes_of_labels + PIXELS
    if not len(raw) or len(raw) % row:
        raise DataError(f"{file} holds {len(raw)} bytes, which are no images of {row}")
    rows = raw.reshape(-1, row)
    return rows[:, dataset.bytes_of_labels :], rows[:, dataset.bytes_of_labels - 1]
