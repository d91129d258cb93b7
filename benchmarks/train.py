"""Train the networks of the benchmarks, each by its recipe, and keep them by the recipe's digest.

A recipe says the network, its width, the data, how many training images, epochs, rate and schedule; SGD with Nesterov
momentum 0.9 and weight decay 5e-4 or AdamW with 0.05, gradients clipped at norm 1, random shifts of ±2 pixels and, on
Fashion-MNIST, flips. "pairs" makes the networks of ``shared/checkpoints`` anew; "wide" those of ``benchmarks.headline``
(full width, all 60,000 images, 30 epochs: minutes on a GPU, many hours on two cores); "digits" and "small" those of
``benchmarks.reproduce``. What the folder holds already is not trained again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.fashion import FASHION_MNIST, command, fashion_mnist
from benchmarks.options import DataFolder, Device
from vfx.data import digits
from vfx.files import write_atomic
from vfx.models import MODELS, Training, accuracy, fit

TRAINED = Path("build") / "trained"
console = Console(stderr=True)


@dataclass(frozen=True)
class Recipe:
    """One network and how it is trained; a field more is another digest."""

    model: str
    width: float
    images: int
    epochs: int
    lr: float
    seed: int
    batch: int = 128
    schedule: str = "linear"
    data: str = "fashion-mnist"
    adam: bool = False

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.model}_w{self.width:g}_s{self.seed}_{digest}.safetensors"

    def built(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return MODELS[self.model](width=self.width, in_channels=1)

    def load(self, folder: Path) -> nn.Module:
        """The trained network in eval mode; raises FileNotFoundError."""
        network = self.built()
        network.load_state_dict(load_file(folder / self.name))
        return network.eval()

    def percent(self, folder: Path) -> float:
        """Its accuracy over the test images, in percent, as it was measured behind the training."""
        with safe_open(folder / self.name, "pt") as file:
            return float(file.metadata()["accuracy"])


def _family(
    model: str, width: float, images: int, epochs: int, lr: float, seeds: int, batch: int, **others: Any
) -> list[Recipe]:
    return [Recipe(model, width, images, epochs, lr, seed, batch, **others) for seed in range(seeds)]


def _papers(data: str, images: int, epochs: int, batch: int) -> dict[str, list[Recipe]]:
    """The papers' architectures at widths that two cores train in minutes, three seeds each."""
    narrow = {"vgg16": 0.1, "vgg16_bn": 0.1, "vgg16_ln": 0.05, "vgg11": 0.1}
    rates = [*((name, 0.25, lr) for name, lr in narrow.items()), ("resnet20_bn", 0.5, 0.2)]
    found = {name: _family(name, width, images, epochs, lr, 3, batch, data=data) for name, width, lr in rates}
    return found | {
        "resnet20_fixup": _family("resnet20_fixup", 0.5, images, 3 * epochs, 0.1, 3, batch, data=data),
        # without norms or their like SGD ends at chance for some seeds, at any rate that learns in time
        "resnet20_plain": _family("resnet20_plain", 0.5, images, 3 * epochs, 1e-3, 3, batch, data=data, adam=True),
        "vit": _family("vit_tiny", 1 / 3, images, 3 * epochs, 1e-3, 3, batch, data=data, adam=True),
    }


FAMILIES: dict[str, dict[str, list[Recipe]]] = {
    "pairs": {
        "vgg16_w025": _family("vgg16", 0.25, 20_000, 8, 0.05, 2, 128),
        "vgg16_bn_w025": _family("vgg16_bn", 0.25, 20_000, 6, 0.1, 2, 128),
        "vgg16_bn_w05": _family("vgg16_bn", 0.5, 20_000, 5, 0.1, 2, 128),
        "resnet20_bn_w05": _family("resnet20_bn", 0.5, 20_000, 8, 0.2, 2, 128),
    },
    "wide": {
        "vgg16": _family("vgg16", 1, 60_000, 30, 0.05, 3, 256),
        "vgg16_bn": _family("vgg16_bn", 1, 60_000, 30, 0.1, 3, 256),
        "resnet20_bn": _family("resnet20_bn", 1, 60_000, 30, 0.2, 3, 256),
    },
    "digits": _papers("digits", 1297, 15, 64),
    "small": _papers("fashion-mnist", 10_000, 8, 128),
}


@cache
def images_of(data: str, folder: Path, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels, once a process."""
    fashion = data == "fashion-mnist"
    parts = (*fashion_mnist(folder, "train"), *fashion_mnist(folder, "test")) if fashion else digits()
    images, labels, tests, truth = (part.to(device) for part in parts)
    return images, labels, tests, truth


def train(recipe: Recipe, data: Path, output: Path, device: str) -> tuple[float, float]:
    """Train one network and write it; accuracy in percent, and seconds."""
    images, labels, tests, truth = images_of(recipe.data, data, device)
    start = time.perf_counter()
    torch.backends.cudnn.benchmark = True  # one size of batch, which is worth a search
    network = fit(
        recipe.built().to(device, memory_format=torch.channels_last), images[: recipe.images], labels[: recipe.images],
        Training(
            recipe.epochs, recipe.lr, recipe.batch, seed=recipe.seed, schedule=recipe.schedule,
            adam=recipe.adam, weight_decay=0.05 if recipe.adam else 5e-4, flip=recipe.data == "fashion-mnist",
            precision=torch.bfloat16 if device.startswith("cuda") else None,
        ),
        device=device, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    percent = 100 * accuracy(network, tests, truth)
    facts = {"recipe": json.dumps(asdict(recipe)), "accuracy": f"{percent:.2f}", "seconds": f"{seconds:.1f}"}
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    write_atomic(output / recipe.name, save(weights, facts | {"device": device}))
    return percent, seconds


def trained(recipes: Iterable[Recipe], data: Path, output: Path, device: str = "cpu", jobs: int = 1) -> None:
    """Train those recipes whose networks the folder does not hold yet, ``jobs`` at a time."""
    output.mkdir(parents=True, exist_ok=True)
    missing = [recipe for recipe in recipes if not (output / recipe.name).is_file()]
    if not missing:
        return
    # A forked process cannot use the CUDA of the one that it came from.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(train, recipe, data, output, device): recipe for recipe in missing}
        for future in as_completed(running):
            percent, seconds = future.result()
            console.print(f"{running[future].name}: {percent:.2f} % in {seconds:.0f} s")


def main(
    family: Annotated[str, typer.Argument(help=f"Which networks: {', '.join(FAMILIES)}.")] = "pairs",
    only: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    data: DataFolder = FASHION_MNIST,
    output: Annotated[Path, typer.Option(help="Folder of the trained networks.")] = TRAINED,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option(help="Networks trained at a time.")] = 1,
) -> None:
    """Train what the folder does not hold yet."""
    if family not in FAMILIES or set(only or ()) - set(FAMILIES[family]):
        known = (f"{family} ({', '.join(names)})" for family, names in FAMILIES.items())
        raise typer.BadParameter(f"there are {', '.join(known)}")
    names = only or list(FAMILIES[family])
    trained([recipe for name in names for recipe in FAMILIES[family][name]], data, output, device, jobs)


if __name__ == "__main__":
    command(main)
