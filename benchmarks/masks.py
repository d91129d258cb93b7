"""One-shot masks solved for the dense network's outputs, beside what RESET or REPAIR leaves.

Global magnitude masks of the first network of each Fashion-MNIST pair, calibrated on the first 2,000 training images
without labels (RESET and REPAIR on 64, as ``vfx.prune`` reads them), accuracy over the test images; nothing is trained.
"auto" is ``solve="auto"``, which chooses on held-out images.

Results go to ``benchmarks/results``: masks.json and masks.md, written after each cell; a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks import transformers
from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, command, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Samples
from benchmarks.pairs_report import grid
from vfx.api import prune, trace
from vfx.files import write_atomic
from vfx.models.training import predict
from vfx.program import Program
from vfx.pruning.targets import find_targets, heads

CALIBRATION = 2000
SAME_SIZE = "same size"  # a method's option: as many weights are left as without a whole last layer
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "RESET / REPAIR": {"score": "magnitude", "solve": None},
    "solved": {"score": "magnitude", "solve": "least_squares"},
    "auto": {"score": "magnitude"},
}
console = Console(stderr=True)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network with the inputs (and labels) that calibrate it, and those that it is judged on."""

    model: nn.Module
    calibration: Tensor
    calibration_labels: Tensor
    inputs: Tensor
    labels: Tensor

    def accuracy(self, module: nn.Module) -> float:
        """Percent of the labels."""
        right = predict(module, self.inputs, 250).argmax(-1) == self.labels
        return round(100 * float(right.double().mean()), 2)


@dataclass(frozen=True)
class Sources:
    """Where networks and their data lie; transformers are trained into ``cache`` where they are not there."""

    checkpoints: Path
    data: Path
    cache: Path = Path("demo")
    samples: int | None = None

    def __call__(self, name: str) -> Trained:
        """The first network of a Fashion-MNIST pair, or of a pair of ``benchmarks.transformers``."""
        if name in PAIRS:
            model = PAIRS[name].edges(self.checkpoints)[0]
            train = fashion_mnist(self.data, "train", CALIBRATION)
            return Trained(model, *train, *fashion_mnist(self.data, "test", self.samples))
        pair = transformers.PAIRS[name]
        loaded = pair.load(self.data)
        train, judged = loaded[:2], loaded[2:]
        model = pair.edges(loaded, self.cache, pair.epochs)[0].eval()
        return Trained(model, *(x[: pair.calibration] for x in train), *(x[: self.samples] for x in judged))


@dataclass(frozen=True)
class Sweep:
    """A table of ways to prune networks: ``methods`` name keywords of ``vfx.prune``, None for no data at all.

    ``shares`` are sparsities and patterns such as "2:4", which allocations have nothing to spread in.
    """

    name: str
    title: str
    preface: str
    methods: Mapping[str, Mapping[str, Any] | None]
    shares: Sequence[float | str]

    def markdown(self, results: dict[str, Any]) -> str:
        head = ["network", "method", *(s if isinstance(s, str) else f"{100 * s:g} %" for s in self.shares), "seconds"]
        rows = []
        for name, found in results.items():
            for number, method in enumerate(self.methods):
                cells = [found["cells"].get(f"{method}/{s}") for s in self.shares]
                seconds = [cell["seconds"] for cell in cells if cell]
                span = f"{min(seconds):.0f}–{max(seconds):.0f}" if seconds else ""
                title = f"{name} ({found['dense']:.2f})" if not number else ""
                rows.append([title, method, *(f"{cell['accuracy']:.2f}" if cell else "" for cell in cells), span])
        return "\n".join([f"# {self.title}", "", self.preface, "", *grid(head, rows), ""])

    def __call__(
        self,
        networks: Sequence[str],
        sources: Sources,
        output: Path,
        fresh: bool,
        rows: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        """Measure the cells (of some ``rows`` and ``columns``) that the results do not hold, and write them singly."""
        methods = {name: way for name, way in self.methods.items() if name in (rows or self.methods)}
        shares = [share for share in self.shares if columns is None or str(share) in columns]
        output.mkdir(parents=True, exist_ok=True)
        file = output / f"{self.name}.json"
        results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and not fresh else {}
        for name in networks:
            trained = sources(name)
            program = trace(trained.model, trained.calibration[:2])
            measured = results.setdefault(name, {"dense": trained.accuracy(trained.model), "cells": {}})["cells"]
            for share, method in product(shares, methods):
                key = f"{method}/{share}"
                if key in measured or not fits(methods[method], share, program):
                    continue
                measured[key] = self._cell(program, method, share, trained)
                console.print(name, key, measured[key])
                write_atomic(file, json.dumps(results, indent=1) + "\n")
                write_atomic(file.with_suffix(".md"), self.markdown(results))

    def _cell(self, program: Program, method: str, share: float | str, trained: Trained) -> dict[str, Any]:
        options, start = self.methods[method], time.process_time()
        given = {} if options is None else {"data": trained.calibration, **options}
        if given.pop(SAME_SIZE, False) and isinstance(share, float):
            share *= beside_the_head(program)
        given |= {"sparsity": share} if isinstance(share, float) else {"scope": share, "protect": ("first", "head")}
        result = prune(program, progress=False, **given)
        seconds = round(time.process_time() - start, 1)
        choices = {name: result.report.choices[name] for name in ("solve", "normalize")}
        return {"accuracy": trained.accuracy(result.module), "seconds": seconds} | choices


def beside_the_head(program: Program) -> float:
    """By how much more of their weights the other layers lose where the last one stays whole, at the same size."""
    targets, _ = find_targets(program)
    whole = heads(targets)
    everything = sum(target.numel for target in targets)
    return everything / sum(target.numel for target in targets if target.name not in whole)


def fits(options: Mapping[str, Any] | None, share: float | str, program: Program) -> bool:
    """Whether a way of pruning has this share: patterns leave allocations nothing to spread."""
    options = options or {}
    if isinstance(share, float):
        return SAME_SIZE not in options or share * beside_the_head(program) < 1
    spreads = options.get("allocation", "scope") != "scope" or options.get("scope") == "global"
    return not spreads and SAME_SIZE not in options


SWEEP = Sweep("masks", "Masks, solved", (__doc__ or "").split("\n\n")[1].replace("\n", " "), METHODS, SPARSITIES)


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    samples: Samples = None,
    fresh: Fresh = False,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
) -> None:
    """Prune every network by every method and write masks.json and masks.md."""
    if threads:
        torch.set_num_threads(threads)
    SWEEP(pair or list(PAIRS), Sources(checkpoints, data, samples=samples), output, fresh)


if __name__ == "__main__":
    command(main)
