"""Fashion-MNIST and the trained pairs of ``shared/checkpoints``, as its README prepares them."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from vfx.models import MODELS

CHECKPOINTS = Path(__file__).resolve().parents[1].parent / "shared" / "checkpoints"
RESULTS = Path(__file__).resolve().parent / "results"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs
MEAN, STD = 0.2860, 0.3530
LAYOUTS = (Path(), Path("raw"), Path("FashionMNIST") / "raw")  # the files themselves, or torchvision's root


class MissingData(Exception):
    """What a benchmark needs is not on this machine, and how to get it; ``command`` ends the command with it."""


def command(main: Callable[..., None]) -> None:
    """Run a benchmark's command; one that lacks what it reads has measured nothing and ends with status 1."""
    try:
        typer.run(main)
    except MissingData as error:
        sys.exit(f"nothing measured: {error}")


@dataclass(frozen=True)
class Pair:
    """Two networks of one architecture, trained from different seeds."""

    name: str
    model: str
    width: float
    cuts: tuple[int, ...]

    @property
    def batch_norm(self) -> bool:
        return self.model.endswith("_bn")

    def edges(self, folder: Path) -> list[nn.Module]:
        """Both networks in eval mode; raises MissingData."""
        files = [folder / f"{self.name}_s{seed}.safetensors" for seed in (0, 1)]
        absent = [file for file in files if not file.is_file()]
        if absent:
            raise MissingData(f"no checkpoint {absent[0]}; name their folder with --checkpoints")
        return [self._load(file) for file in files]

    def _load(self, file: Path) -> nn.Module:
        network = MODELS[self.model](width=self.width, in_channels=1)
        network.load_state_dict(load_file(file))
        return network.eval()


VGG_CUTS, RESNET_CUTS = (0, 3, 6, 8, 12), (0, 6, 10, 13, 19)
PAIRS = {
    pair.name: pair
    for pair in (
        Pair("vgg16_w025", "vgg16", 0.25, VGG_CUTS),
        Pair("vgg16_bn_w025", "vgg16_bn", 0.25, VGG_CUTS),
        Pair("vgg16_bn_w05", "vgg16_bn", 0.5, VGG_CUTS),
        Pair("resnet20_bn_w05", "resnet20_bn", 0.5, RESNET_CUTS),
    )
}


def fashion_mnist(folder: Path, kind: str, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images (N, 1, 32, 32) and labels (N,) of ``kind`` ("train", "t10k"); raises MissingData."""
    pixels = np.frombuffer(_read(folder, f"{kind}-images-idx3-ubyte"), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(_read(folder, f"{kind}-labels-idx1-ubyte"), np.uint8, offset=8)
    images = (torch.from_numpy(pixels[:samples].copy()).float() / 255 - MEAN) / STD
    images = torch.nn.functional.pad(images[:, None], (2,) * 4, value=-MEAN / STD)
    return images, torch.from_numpy(labels[:samples].copy()).long()


def _read(folder: Path, name: str) -> bytes:
    for layout in LAYOUTS:
        path = folder / layout / name
        if path.is_file():
            return path.read_bytes()
        if path.with_name(name + ".gz").is_file():
            return gzip.decompress(path.with_name(name + ".gz").read_bytes())
    raise MissingData(
        f"no Fashion-MNIST file {name}[.gz] in {folder}: install Debian's dataset-fashion-mnist, or download it with "
        "torchvision.datasets.FashionMNIST(root, download=True) and pass --data root"
    )
