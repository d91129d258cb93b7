"""A folder of images as ImageNet is stored: a folder for each class, numbered in the order of their names.

Images are read batch by batch as they are asked for, in one shuffled order that is the same in every pass, so that the
first of them hold all classes. Folders ``train`` and ``val`` (``valid``, ``validation``, ``test``) with the classes
inside are the parts to calibrate and to measure on; without them both are the whole folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfx.errors import DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"))
PARTS = {"train": ("train",), "test": ("val", "valid", "validation", "test")}
BATCH_SIZE = 64


class ImageFolder:
    """Batches (images (N, C, H, W), labels (N,)) of the images below a folder; ``classes`` are their names.

    ``transform`` makes a tensor (C, H, W) of an image. Raises DataError for a folder without classes or images, and
    when it is read for a file that is no whole image.

    >>> batches = ImageFolder("photos/train", preprocessing((3, 224, 224)))
    """

    def __init__(
        self,
        folder: str | Path,
        transform: Callable[[Image.Image], Tensor],
        *,
        samples: int | None = None,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
    ):
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"there is no folder {root}")
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = [(file, label) for label, folder in enumerate(folders) for file in _images(folder)]
        if not files:
            raise DataError(f"{root} holds no images in folders, one for each class ({', '.join(sorted(SUFFIXES))})")
        order = np.random.default_rng(seed).permutation(len(files))[:samples]
        self.classes = tuple(folder.name for folder in folders)
        self.files = [files[index] for index in order]
        self.transform, self.batch_size = transform, batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.files) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.files), self.batch_size):
            chosen = self.files[start : start + self.batch_size]
            images = torch.stack([self._read(file) for file, _ in chosen])
            yield images, torch.tensor([label for _, label in chosen])

    def _read(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return self.transform(image)
        except Exception as error:  # a damaged image raises any class
            raise DataError(f"{file} cannot be read as an image: {error or type(error).__name__}") from error


def part_of(folder: str | Path, part: str) -> Path:
    """The folder of "train" or "test" where ``folder`` is split so, else ``folder`` itself."""
    root = Path(folder)
    parts = {key: next((root / name for name in names if (root / name).is_dir()), None) for key, names in PARTS.items()}
    return parts[part] or root if all(parts.values()) else root


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
