"""Model folding (Wang et al., ICLR 2025) against structured magnitude pruning, with and without data.

25, 50 and 75 % of the channels of every symmetry group go from networks trained on Fashion-MNIST: removed by magnitude
(L2 over all members of a group), by Taylor or activation score, or folded; uniform widths. Without data nothing is
calibrated, but folding approximates the variances of merged channels ("fold" against "fold, no variance"). "RESET /
REPAIR" reads 64 training images, "solved" solves every layer for the dense network's outputs on 512 or 2,000, "default"
chooses on held-out images: magnitude or activation, solved, normalized, or both. Accuracy is over the test images, for
the first network of each pair; nothing is trained.

Results go to ``benchmarks/results``: folding.json and folding.md.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, command, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Samples
from benchmarks.pairs_report import grid
from vfx.api import prune_structured, trace
from vfx.files import write_atomic
from vfx.models.training import predict
from vfx.program import Program

SPARSITIES = (0.25, 0.5, 0.75)
REPAIR, READ, MORE, BATCH, TEST_BATCH = 64, 512, 2000, 64, 250
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude"},
    "fold, no variance": {"method": "fold", "variance": False},
    "fold": {"method": "fold"},
    "magnitude, RESET / REPAIR": {"data": REPAIR, "score": "magnitude", "solve": None},
    "taylor, RESET / REPAIR": {"data": READ, "score": "taylor", "solve": None},
    "fold, RESET / REPAIR": {"data": REPAIR, "method": "fold", "solve": None},
    "magnitude, solved (512)": {"data": READ, "score": "magnitude", "solve": "least_squares"},
    "activation, solved (512)": {"data": READ, "score": "activation", "solve": "least_squares"},
    "default (512)": {"data": READ},
    "taylor, solved (512)": {"data": READ, "score": "taylor", "solve": "least_squares"},
    "fold, solved (512)": {"data": READ, "method": "fold", "solve": "least_squares"},
    "magnitude, solved (2,000)": {"data": MORE, "score": "magnitude", "solve": "least_squares"},
    "activation, solved (2,000)": {"data": MORE, "score": "activation", "solve": "least_squares"},
    "default (2,000)": {"data": MORE},
}
console = Console(stderr=True)


class Subject:
    """A trained network with the data it is pruned and measured on."""

    def __init__(self, pair: str, checkpoints: Path, data: Path, samples: int | None):
        self.model: nn.Module = PAIRS[pair].edges(checkpoints)[0]
        images, labels = fashion_mnist(data, "train", MORE)
        self.batches = list(zip(images.split(BATCH), labels.split(BATCH)))
        self.images, self.labels = fashion_mnist(data, "test", samples)
        self.program: Program = trace(self.model, images[:2])

    def accuracy(self, module: nn.Module) -> float:
        outputs: Tensor = predict(module, self.images, TEST_BATCH)
        return round(100 * (outputs.argmax(1) == self.labels).double().mean().item(), 2)

    def measure(self, name: str, sparsity: float) -> dict[str, Any]:
        """One cell: accuracy and size of the smaller network, and the seconds it took to make."""
        options = dict(METHODS[name])
        count = options.pop("data", 0)
        options |= {"data": self.batches[: -(-count // BATCH)], "max_samples": count} if count else {}
        start = time.perf_counter()
        result = prune_structured(
            self.program, sparsity=sparsity, allocation="uniform", repair_samples=REPAIR, progress=False, **options
        )
        seconds = time.perf_counter() - start
        return {
            "accuracy": self.accuracy(result.module),
            "params_ratio": round(result.report.params_ratio, 4),
            "flops_ratio": round(result.report.flops_ratio, 4),
            "normalize": result.report.choices["normalize"],
            "verify_error": result.report.error,
            "seconds": round(seconds, 2),
        }


def markdown(results: dict[str, Any]) -> str:
    """A table for each network: methods by share of channels removed."""
    lines = ["# Model folding and structured pruning", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    for name, result in results.items():
        head = ["", *(f"{100 * s:.0f} % of channels" for s in SPARSITIES)]
        rows = []
        for method in METHODS:
            cells = [result["cells"].get(f"{method}/{s}") for s in SPARSITIES]
            rows.append([method, *(f"{cell['accuracy']:.2f}" if cell else "" for cell in cells)])
        sizes = [result["cells"].get(f"magnitude/{s}") for s in SPARSITIES]
        rows.append(["parameters, FLOPs", *(_size(cell) if cell else "" for cell in sizes)])
        title = f"## {name}: accuracy in %, whole network {result['dense']:.2f} ({result['test_images']:,} images)"
        lines += [title, "", *grid(head, rows), ""]
    return "\n".join(lines)


def _size(cell: dict[str, Any]) -> str:
    return f"{cell['params_ratio']:.3f}×, {cell['flops_ratio']:.3f}×"


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    samples: Samples = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
) -> None:
    """Measure every method on every network; a run that was stopped goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    unknown = sorted(set(pair or ()) - set(PAIRS))
    if unknown:
        raise typer.BadParameter(f"no pair {unknown[0]!r}; there are {', '.join(PAIRS)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "folding.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in pair or list(PAIRS):
            _measure(Subject(name, checkpoints, data, samples), name, results, file, progress)
    console.print(f"wrote {file} and folding.md")


def _measure(subject: Subject, name: str, results: dict[str, Any], file: Path, progress: Progress) -> None:
    result = results.setdefault(name, {"cells": {}})
    if result.get("test_images") != len(subject.images):
        result |= {"dense": subject.accuracy(subject.model), "test_images": len(subject.images), "cells": {}}
    missing = [(m, s) for m in METHODS for s in SPARSITIES if f"{m}/{s}" not in result["cells"]]
    for method, sparsity in progress.track(missing, description=name):
        result["cells"][f"{method}/{sparsity}"] = subject.measure(method, sparsity)
        ordered = {known: results[known] for known in PAIRS if known in results}
        write_atomic(file, json.dumps(ordered, indent=1) + "\n")
        write_atomic(file.with_suffix(".md"), markdown(ordered))


if __name__ == "__main__":
    command(main)
