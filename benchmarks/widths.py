"""Merge networks of different widths by every method that can, beside direct truncation to the narrow one's channels.

VGG16 ×0.25 into ×0.125 and back, and VGG16-BN ×0.5 into ×0.25, on Fashion-MNIST: the first edge has the width of the
result, the other one is carried to its channels. Weight and activation matching select channels (semi-permutations
between balanced networks), or embed the narrow network in the wide one; optimal transport averages. The ×0.125 network
is trained here (on the first 20,000 images, as the trained pairs were) and kept in the folder of --cache. Calibration
and matching read the first 2,000 training images; accuracy is over the test images, or the first of them (--samples).
α is the other edge's share: 1 means the carried edge alone. Rows that widths.json already holds are kept; results are
written after each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, command, fashion_mnist
from benchmarks.options import Cache, Checkpoints, DataFolder, Output, Samples
from vfx.api import merge
from vfx.elements import Element
from vfx.files import write_atomic
from vfx.match.activation import ActivationMatching
from vfx.match.carry import AcrossWidths, Carrier, Crossing
from vfx.match.transport import OptimalTransport
from vfx.match.weight import WeightMatching
from vfx.models import MODELS, Training, accuracy, fit

CALIBRATION, BATCH, TRAINING = 2000, 128, 20_000
console = Console(stderr=True)


class Truncation(OptimalTransport):
    """The control: the other edge's first channels, whatever they are (in a wider network all of them, repeated)."""

    def __init__(self) -> None:
        super().__init__(cost="weight")

    def carry(self, crossing: Crossing) -> tuple[Carrier, float]:
        carrier = Carrier(crossing.pairing)
        for group, twin in carrier.pairing.twin.items():
            size, other = carrier.pairing.one.groups[group].size, carrier.pairing.other.groups[twin].size
            carrier.found[group] = Element(np.arange(size) % other)
        return carrier, 0.0


METHODS: dict[str, Callable[[], AcrossWidths]] = {
    "truncation": Truncation,
    "weight": WeightMatching,
    "activation": ActivationMatching,
    "exact": OptimalTransport,
    "exact, weights": lambda: OptimalTransport(cost="weight"),
    "sinkhorn": lambda: OptimalTransport("sinkhorn"),
    "sinkhorn, weights": lambda: OptimalTransport("sinkhorn", "weight"),
}
NAMES = ("truncation", "weight", "activation")
SUBJECTS = {  # model, the pair that the wide network is of, the narrow one's width, whether that is the first edge
    "vgg16": ("vgg16", "vgg16_w025", 0.125, True),
    "vgg16, back": ("vgg16", "vgg16_w025", 0.125, False),
    "vgg16_bn": ("vgg16_bn", "vgg16_bn_w05", 0.25, True),
}
NORMALIZATIONS: tuple[str | None, ...] = (None, "repair")
ALPHAS = (0.5, 1.0)


def edges(subject: str, checkpoints: Path, data: Path, cache: Path, epochs: int) -> list[nn.Module]:
    """The network whose width the result has, and the other."""
    model, wide, width, narrow_first = SUBJECTS[subject]
    narrow = next((p for p in PAIRS.values() if p.model == model and p.width == width), None)
    first = narrow.edges(checkpoints)[0] if narrow is not None else trained(model, width, data, cache, epochs)
    both = [first, PAIRS[wide].edges(checkpoints)[1]]
    return both if narrow_first else both[::-1]


def trained(model: str, width: float, data: Path, cache: Path, epochs: int, seed: int = 0) -> nn.Module:
    """A network from the cache, or trained and put there."""
    file = cache / f"{model}_w{width:g}_e{epochs}_s{seed}.safetensors"
    torch.manual_seed(seed)
    network = MODELS[model](width=width, in_channels=1)
    if file.is_file():
        network.load_state_dict(load_file(file))
        return network.eval()
    images, labels = fashion_mnist(data, "train", TRAINING)
    fit(network, images, labels, Training(epochs, lr=0.05, flip=True, seed=seed))
    cache.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    return network


def measure(
    models: Sequence[nn.Module], row: dict[str, Any], calibration: Tensor, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    start = time.perf_counter()
    result = merge(
        models,
        calibration[:2],
        data=calibration.split(BATCH),
        match=METHODS[row["method"]](),
        normalize=row["normalize"],
        weights=row["alpha"],
        progress=False,
    )
    seconds = time.perf_counter() - start
    return {**row, "accuracy": percent(result.module, images, labels), "seconds": round(seconds, 2)}


def percent(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    return round(100 * accuracy(module, images, labels), 2)


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Edges of different widths", "", (__doc__ or "").split("\n\n", 1)[1].strip()]
    for subject, found in results.items():
        model, wide, width, narrow_first = SUBJECTS[subject]
        count, (first, other) = found["test_images"], found["edges"]
        into, own = (width, PAIRS[wide].width) if narrow_first else (PAIRS[wide].width, width)
        lines += [
            "",
            f"## {model}: ×{own:g} into ×{into:g} (edges {other:.2f} % and {first:.2f} %, {count:,} test images)",
            "",
            "| method | none, α = 0.5 | REPAIR, α = 0.5 | none, α = 1 | REPAIR, α = 1 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for method in METHODS:
            cells = [
                next((f"{r['accuracy']:.2f}" for r in found["rows"] if _key(r) == (method, normalize, alpha)), "")
                for alpha in ALPHAS
                for normalize in NORMALIZATIONS
            ]
            if any(cells):
                lines.append(f"| {method if method in NAMES else f'OT, {method}'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _key(row: dict[str, Any]) -> tuple[str, str | None, float]:
    return row["method"], row["normalize"], row["alpha"]


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    cache: Cache = Path("demo"),
    output: Output = RESULTS,
    subject: Annotated[list[str] | None, typer.Option(help=f"Only one of {', '.join(map(repr, SUBJECTS))}.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the network trained here.")] = 8,
    samples: Samples = None,
) -> None:
    """Merge networks of different widths and write widths.json and widths.md."""
    run(subject or list(SUBJECTS), checkpoints, data, cache, output, epochs, samples)


def run(
    names: Sequence[str], checkpoints: Path, data: Path, cache: Path, output: Path, epochs: int, samples: int | None
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    file = output / "widths.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    calibration, _ = fashion_mnist(data, "train", CALIBRATION)
    images, labels = fashion_mnist(data, "test", samples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for name in names:
        models = edges(name, checkpoints, data, cache, epochs)
        fresh = {"edges": [percent(m, images, labels) for m in models], "test_images": len(images), "rows": []}
        found = results.get(name, fresh)
        if (found["edges"], found["test_images"]) != (fresh["edges"], fresh["test_images"]):
            found = fresh
        results[name] = found
        wanted = [
            {"method": method, "normalize": normalize, "alpha": alpha}
            for method in METHODS
            for normalize in NORMALIZATIONS
            for alpha in ALPHAS
        ]
        missing = [row for row in wanted if _key(row) not in {_key(r) for r in found["rows"]}]
        with Progress(*columns, console=console) as progress:
            for row in progress.track(missing, description=name):
                found["rows"].append(measure(models, row, calibration, images, labels))
                write_atomic(file, json.dumps(results, indent=1) + "\n")
                write_atomic(output / "widths.md", markdown(results))
    console.print(f"wrote {file} and widths.md")


if __name__ == "__main__":
    command(main)
