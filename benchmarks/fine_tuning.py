"""Pruned networks before and after a short fine-tuning: our default calls, and the peers' networks as they come.

The first networks of trained Fashion-MNIST pairs lose 50 % of their channels (``vfx.prune_structured``; Torch-Pruning
by the L2 norm of groups and by Taylor, at equal parameters) or 90 % of their weights (``vfx.prune``; global magnitude,
Wanda and SparseGPT without repair), calibrated on the first 1,000 training images. All are then trained alike: one
epoch over the first 5,000 training images with labels (SGD, Nesterov momentum 0.9, batch 128, linear warm-up and decay,
learning rate 0.02). Masks stay in force through the training (``masks="parametrize"``): "left" is the share of weights
that are not zero behind it, or of parameters. Accuracy is over the test images.

``torch-pruning`` must be installed. Results go to ``benchmarks/results``: fine_tuning.json and fine_tuning.md, written
after each cell; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.channel_peers import BATCH, PEERS, Subject, begin, fitted, parameters, subject_of
from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, RESULTS, command, fashion_mnist
from benchmarks.masks import Sources
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Samples
from benchmarks.pairs_report import grid
from vfx.api import prune, prune_structured
from vfx.files import write_atomic
from vfx.models import Training, fit
from vfx.pruning.masks import make_permanent

NETWORKS = ("resnet20_bn_w05", "vgg16_bn_w025")
CHANNELS, WEIGHTS, TRAINED = 0.5, 0.9, 5000
HOW = Training(1, 0.02, batch_size=128)
BARE: dict[str, Any] = {"solve": None, "normalize": None}
console = Console(stderr=True)


def smaller(subject: Subject) -> nn.Module:
    """Our default without half of the channels."""
    batches = subject.train.split(BATCH)
    return prune_structured(subject.model, subject.train[:2], sparsity=CHANNELS, data=batches, progress=False).module


def peer(subject: Subject, name: str) -> nn.Module:
    """Torch-Pruning's network, with at most as many parameters as ours (whose widths do not depend on data)."""
    plain = prune_structured(subject.program, sparsity=CHANNELS, progress=False, **BARE)
    size = parameters(plain.module)
    pruned = fitted(subject, PEERS[name], CHANNELS, size)
    assert pruned is not None
    return pruned[0]


def masked(subject: Subject, **options: Any) -> nn.Module:
    """A network whose masks stay in force."""
    given = {"data": subject.train.split(BATCH), "masks": "parametrize", "progress": False} | options
    return prune(subject.model, subject.train[:2], sparsity=WEIGHTS, **given).module


METHODS: dict[str, Callable[[Subject], nn.Module]] = {
    "50 % of channels: vfx, default": smaller,
    "50 % of channels: Torch-Pruning, L2": lambda subject: peer(subject, "L2"),
    "50 % of channels: Torch-Pruning, Taylor": lambda subject: peer(subject, "Taylor"),
    "90 % of weights: vfx, default": masked,
    "90 % of weights: magnitude": lambda subject: masked(subject, score="magnitude", **BARE),
    "90 % of weights: Wanda": lambda subject: masked(subject, score="wanda", **BARE),
    "90 % of weights: SparseGPT": lambda subject: masked(subject, score="sparsegpt", **BARE),
}


def left(module: nn.Module, whole: nn.Module, of_weights: bool) -> float:
    """The share of the convolution and linear weights that are not zero, or of parameters that are there."""
    if not of_weights:
        return parameters(module) / parameters(whole)
    permanent = copy.deepcopy(module)
    make_permanent(permanent)
    weights = [m.weight for m in permanent.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def measured(subject: Subject, method: str, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy before and after the training, and what is left."""
    module = METHODS[method](subject)
    percent = lambda: round(100 * float(subject.right(module.eval()).double().mean()), 2)  # noqa: E731
    before, start = percent(), time.process_time()
    fit(module, images, labels, HOW, progress=False)
    seconds = round(time.process_time() - start, 1)
    share = round(left(module, subject.model, method.startswith("90")), 4)
    return {"before": before, "after": percent(), "left": share, "seconds": seconds}


def markdown(results: dict[str, Any]) -> str:
    """A row for each network and method."""
    lines = ["# A short fine-tuning", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    rows = []
    for name, result in results.items():
        for method, cell in ((m, result["cells"][m]) for m in METHODS if m in result["cells"]):
            figures = [
                f"{cell['before']:.2f}",
                f"{cell['after']:.2f}",
                f"{cell['left']:.3f}×",
                f"{cell['seconds']:.0f}",
            ]
            rows.append([f"{name} ({result['dense']:.2f})", method, *figures])
    head = ["network", "method", "before", "after one epoch", "left", "seconds of training"]
    return "\n".join([*lines, *grid(head, rows), ""])


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    samples: Samples = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
) -> None:
    """Prune and train by every method and write fine_tuning.json and fine_tuning.md."""
    begin(threads)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "fine_tuning.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    images, labels = fashion_mnist(data, "train", TRAINED)
    for name in pair or NETWORKS:
        subject = subject_of(name, Sources(checkpoints, data, samples=samples))
        dense = round(100 * float(subject.right(subject.model).double().mean()), 2)
        result = results.setdefault(name, {"dense": dense, "cells": {}})
        for method in METHODS:
            if method not in result["cells"]:
                result["cells"][method] = measured(subject, method, images, labels)
                console.print(name, method, result["cells"][method])
                write_atomic(file, json.dumps(results, indent=1) + "\n")
                write_atomic(file.with_suffix(".md"), markdown(results))


if __name__ == "__main__":
    command(main)
