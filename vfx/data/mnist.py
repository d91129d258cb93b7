"""MNIST and Fashion-MNIST: 28×28 pixels, one channel, ten classes; 60,000 images to train on and 10,000 to test.

Each is standardised by the mean and deviation of its own training pixels and padded with its background to ``size``.
Folders may hold the files themselves, or be the root that torchvision downloads to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from vfx.data.idx import find_idx, read_idx
from vfx.errors import ArgumentError, DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs
PARTS = {"train": "train", "test": "t10k"}  # as the files call them
_SIDE = 28


@dataclass(frozen=True)
class _Set:
    title: str
    name: str  # torchvision's class and folder
    mean: float
    std: float
    places: tuple[Path, ...]  # where it lies if nobody says where
    way_out: str


_DOWNLOAD = "download it with torchvision.datasets.{}(root, download=True) and name that root"
_FASHION = _Set(
    "Fashion-MNIST", "FashionMNIST", 0.2860, 0.3530, (FASHION_MNIST, Path("data")),
    f"install Debian's dataset-fashion-mnist, or {_DOWNLOAD.format('FashionMNIST')}",
)  # fmt: skip
_MNIST = _Set("MNIST", "MNIST", 0.1307, 0.3081, (Path("data"),), _DOWNLOAD.format("MNIST"))


def fashion_mnist(
    folder: str | Path | None = None, part: str = "train", *, samples: int | None = None, size: int = 32
) -> tuple[Tensor, Tensor]:
    """Return the first images (N, 1, size, size) and labels (N,) of ``part``, "train" or "test".

    ``folder`` is by default where Debian's dataset-fashion-mnist lies, or ``data``. Raises ArgumentError, DataError.

    >>> images, labels = fashion_mnist("/usr/share/datasets/fashion-mnist", "test", samples=100)
    """
    return _read(_FASHION, folder, part, samples, size)


def mnist(
    folder: str | Path | None = None, part: str = "train", *, samples: int | None = None, size: int = 32
) -> tuple[Tensor, Tensor]:
    """Return the first images (N, 1, size, size) and labels (N,) of ``part``, "train" or "test".

    ``folder`` is ``data`` by default. Raises ArgumentError, DataError.

    >>> images, labels = mnist("data", "train", size=28)
    """
    return _read(_MNIST, folder, part, samples, size)


def _read(dataset: _Set, folder: str | Path | None, part: str, samples: int | None, size: int) -> tuple[Tensor, Tensor]:
    if part not in PARTS:
        raise ArgumentError(f"part={part!r} is unknown; it is {' or '.join(map(repr, PARTS))}")
    if size < _SIDE or size % 2:
        raise ArgumentError(
            f"{dataset.title} has {_SIDE}×{_SIDE} pixels and is padded to an even size from there, not {size}"
        )
    pixels = _array(dataset, folder, f"{PARTS[part]}-images-idx3-ubyte", 3)[:samples]
    labels = _array(dataset, folder, f"{PARTS[part]}-labels-idx1-ubyte", 1)[:samples]
    if pixels.shape[1:] != (_SIDE, _SIDE) or len(pixels) != len(labels):
        raise DataError(f"{dataset.title} holds images {tuple(pixels.shape)} and {len(labels)} labels")
    images = (pixels[:, None].float() / 255 - dataset.mean) / dataset.std
    return pad(images, ((size - _SIDE) // 2,) * 4, value=-dataset.mean / dataset.std), labels.long()


def _array(dataset: _Set, folder: str | Path | None, name: str, axes: int) -> Tensor:
    roots = dataset.places if folder is None else (Path(folder),)
    layouts = (Path(), Path("raw"), Path(dataset.name) / "raw")
    path = find_idx([root / layout for root in roots for layout in layouts], name)
    if path is None:
        raise DataError(f"no {dataset.title} file {name}[.gz] in {' or '.join(map(str, roots))}: {dataset.way_out}")
    array = read_idx(path)
    if array.ndim != axes:
        raise DataError(f"{path} holds an array of shape {tuple(array.shape)}, not one of {axes} axes")
    return array
