"""Merge the trained Fashion-MNIST pairs at α = 0.5 in every way and measure accuracy, size and time.

Calibration and matching read the first 2,000 training images in order, batch 128; accuracy is over the 10,000 test
images. Results go to ``benchmarks/results``: pairs.json, pairs.md and pairs.png. With ``--pair`` the other pairs' old
results are kept.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, MissingData, Pair, command, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Output, Render, Samples
from benchmarks.pairs_report import draw, markdown
from vfx.api import collect, merge, trace
from vfx.files import write_atomic
from vfx.models.training import predict

CALIBRATION, BATCH, TEST_BATCH = 2000, 128, 250
MATCHES = (None, "weight", "activation")
JOINS = ("preactivation", "activation")
PLAIN: tuple[str | None, ...] = (None, "bias_calibration", "repair", "rescale")
NORMED: tuple[str | None, ...] = (None, "reset")

Cell = tuple[str | None, int, str | None, str]
console = Console(stderr=True)


def cells(pair: Pair, matches: Sequence[str | None]) -> Iterator[Cell]:
    """Every match, cut, normalization and join; without preserved layers there is no join to choose."""
    for match in matches:
        for cut in pair.cuts:
            for normalize in NORMED if pair.batch_norm else PLAIN:
                for join in JOINS if cut else JOINS[:1]:
                    yield match, cut, normalize, join


class Subject:
    """One pair with the data it is merged and measured on."""

    def __init__(self, pair: Pair, checkpoints: Path, data: Path, samples: int | None):
        self.pair = pair
        self.calibration, _ = fashion_mnist(data, "train", CALIBRATION)
        images, self.labels = fashion_mnist(data, "test", samples)
        self.images = images.contiguous(memory_format=torch.channels_last)  # a third faster on a processor
        self.edges = pair.edges(checkpoints)
        self.program = trace(self.edges, self.calibration[:2])
        start = time.perf_counter()
        self.statistics = collect(self.program, data=self.calibration.split(BATCH))
        self.seconds = time.perf_counter() - start

    def references(self) -> dict[str, Any]:
        """Accuracy of the edges and of their ensembles, in percent."""
        outputs = [self._predict(edge) for edge in self.edges]
        probabilities = [output.softmax(1) for output in outputs]
        return {
            "edges": [self._accuracy(output) for output in outputs],
            "ensemble_logits": self._accuracy(torch.stack(outputs).mean(0)),
            "ensemble_probabilities": self._accuracy(torch.stack(probabilities).mean(0)),
            "statistics_seconds": round(self.seconds, 3),
            "test_images": len(self.images),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Merge as ``cell`` says; ``seconds`` is the whole of ``merge`` but trace and statistics."""
        match, cut, normalize, join = cell
        start = time.perf_counter()
        result = merge(
            self.program,
            data=self.calibration.split(BATCH),
            statistics=self.statistics,
            match=match,
            classes="permutation",
            normalize=normalize,
            preserve=cut,
            join=join,  # type: ignore[arg-type]
            progress=False,
        )
        seconds = time.perf_counter() - start
        return {
            "match": match,
            "preserve": cut,
            "normalize": normalize,
            "join": join,
            "accuracy": self._accuracy(self._predict(result.module)),
            "params_ratio": round(result.report.params_ratio, 5),
            "flops_ratio": round(result.report.flops_ratio, 5),
            "seconds": round(seconds, 3),
            "own_class": result.report.own_class,
        }

    def _predict(self, module: nn.Module) -> Tensor:
        return predict(copy.deepcopy(module).to(memory_format=torch.channels_last), self.images, TEST_BATCH)  # type: ignore[call-overload]

    def _accuracy(self, outputs: Tensor) -> float:
        return round(100 * (outputs.argmax(1) == self.labels).double().mean().item(), 2)


def measure_pair(subject: Subject, matches: Sequence[str | None], progress: Progress) -> dict[str, Any]:
    chosen = list(cells(subject.pair, matches))
    task = progress.add_task(subject.pair.name, total=len(chosen))
    rows = []
    for cell in chosen:
        rows.append(subject.measure(cell))
        progress.advance(task)
    return {"layers": 20 if "resnet" in subject.pair.name else 14, **subject.references(), "cells": rows}


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    match: Annotated[list[str] | None, typer.Option(help="Only none, weight or activation (may be repeated).")] = None,
    samples: Samples = None,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
    render: Render = False,
) -> None:
    """Merge the trained Fashion-MNIST pairs and write pairs.json, pairs.md and pairs.png."""
    if threads:
        torch.set_num_threads(threads)
    unknown = sorted(set(pair or ()) - set(PAIRS))
    if unknown:
        raise typer.BadParameter(f"no pair {unknown[0]!r}; there are {', '.join(PAIRS)}")
    matches = [None if name == "none" else name for name in match] if match else MATCHES
    run([] if render else pair or list(PAIRS), matches, checkpoints, data, output, samples)


def run(
    names: Sequence[str],
    matches: Sequence[str | None],
    checkpoints: Path,
    data: Path,
    output: Path,
    samples: int | None,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    file = output / "pairs.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        for name in names:
            results[name] = measure_pair(Subject(PAIRS[name], checkpoints, data, samples), matches, progress)
            results = {known: results[known] for known in PAIRS if known in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
    if not results:
        raise MissingData(f"{file} does not exist; run without --render first")
    write_atomic(output / "pairs.md", markdown(results))
    draw(results, output / "pairs.png")
    console.print(f"wrote {file}, pairs.md and pairs.png")


if __name__ == "__main__":
    command(main)
