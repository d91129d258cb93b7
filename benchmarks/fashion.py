"""Fashion-MNIST and the trained pairs of ``shared/checkpoints``, as its README prepares them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from vfx import data
from vfx.data.mnist import FASHION_MNIST as FASHION_MNIST  # where benchmarks look for it
from vfx.errors import DataError
from vfx.models import MODELS

CHECKPOINTS = Path(__file__).resolve().parents[1].parent / "shared" / "checkpoints"
RESULTS = Path(__file__).resolve().parent / "results"


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


def fashion_mnist(folder: Path, part: str, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """``vfx.data.fashion_mnist``; raises MissingData."""
    try:
        return data.fashion_mnist(folder, part, samples=samples)
    except DataError as error:
        raise MissingData(f"{error}; name the folder with --data") from error
