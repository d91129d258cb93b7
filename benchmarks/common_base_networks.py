"""Networks of a common base: a ViT-Tiny that was trained to tell rotations, fine-tuned on four tasks.

The base tells by how many quarter turns an image was rotated, on scikit-learn's digits and Fashion-MNIST without their
labels. Fine-tuned from it, each with a head of its own: digits, Fashion-MNIST's classes 0–4, its classes 5–9, and
Fashion-MNIST upside down. Trained networks are kept by their recipe's digest.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.fashion import fashion_mnist
from vfx.data import digits
from vfx.files import write_atomic
from vfx.models import Training, fit, vit_tiny

BASE, TASKS = "rotations", {"digits": 10, "fashion 0–4": 5, "fashion 5–9": 5, "fashion upside down": 10}  # classes
IMAGES, TESTS = 8000, 5000  # of Fashion-MNIST, the first ones
console = Console(stderr=True)
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # training images and labels, test images and labels


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: from scratch, or fine-tuned from the ``base``'s digest with a new head."""

    task: str
    epochs: int
    lr: float
    seed: int = 0
    width: float = 1 / 3
    patch: int = 8
    images: int = IMAGES
    batch: int = 128
    base: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def file(self, folder: Path) -> Path:
        return folder / f"common_base_{self.task.replace(' ', '_').replace('–', '-')}_{self.digest}.safetensors"

    def built(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return vit_tiny(self.width, 1, TASKS.get(self.task, 4), size=32, patch=self.patch)

    def load(self, folder: Path) -> nn.Module:
        """The trained network in eval mode."""
        network = self.built()
        network.load_state_dict(load_file(self.file(folder)))
        return network.eval()

    def seconds(self, folder: Path) -> float:
        """What its training took."""
        with safe_open(self.file(folder), "pt") as file:
            return float(file.metadata()["seconds"])


PRETRAINED = Recipe(BASE, 15, 2e-3)
EPOCHS = {"digits": 30, "fashion 0–4": 6, "fashion 5–9": 6, "fashion upside down": 5}
FINE_TUNED = tuple(Recipe(task, epochs, 5e-4, 1, base=PRETRAINED.digest) for task, epochs in EPOCHS.items())


@cache
def data_of(task: str, folder: Path) -> Data:
    """Images and labels of a task."""
    fashion = (*fashion_mnist(folder, "train", IMAGES), *fashion_mnist(folder, "test", TESTS))
    if task == "digits":
        return digits()
    if task == "fashion upside down":
        return fashion[0].rot90(2, (2, 3)), fashion[1], fashion[2].rot90(2, (2, 3)), fashion[3]
    if task == BASE:
        own = digits()
        parts = [
            _rotated(torch.cat(pair), seed) for seed, pair in enumerate(((own[0], fashion[0]), (own[2], fashion[2])))
        ]
        return (*parts[0], *parts[1])
    first = 0 if task.endswith("4") else 5
    chosen = [(labels >= first) & (labels < first + 5) for labels in (fashion[1], fashion[3])]
    images, labels, tests, truth = fashion
    return images[chosen[0]], labels[chosen[0]] - first, tests[chosen[1]], truth[chosen[1]] - first


def _rotated(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Each image turned by a random number of quarter turns, and that number."""
    turns = torch.randint(0, 4, (len(images),), generator=torch.Generator().manual_seed(seed))
    turned = images.clone()
    for quarter in range(1, 4):
        turned[turns == quarter] = images[turns == quarter].rot90(quarter, (2, 3))
    return turned, turns


def trained(recipe: Recipe, data: Path, folder: Path) -> nn.Module:
    """The network of a recipe: read from the folder, or trained and kept there."""
    if not recipe.file(folder).is_file():
        begin, network = time.perf_counter(), recipe.built()
        if recipe.base:
            trunk = load_file(PRETRAINED.file(folder))
            network.load_state_dict({k: x for k, x in trunk.items() if not k.startswith("head.")}, strict=False)
        images, labels, _, _ = data_of(recipe.task, data)
        how = Training(recipe.epochs, recipe.lr, recipe.batch, weight_decay=0.05, seed=recipe.seed, adam=True)
        fit(network, images, labels, how, progress=False)
        seconds = time.perf_counter() - begin
        facts = {"recipe": json.dumps(asdict(recipe)), "seconds": f"{seconds:.1f}"}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe.file(folder), save({k: x.contiguous() for k, x in network.state_dict().items()}, facts))
        console.print(f"{recipe.task}: trained in {seconds:.0f} s")
    return recipe.load(folder)
