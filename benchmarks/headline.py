"""Wide networks, three pairs each: the papers' methods and the default call at the same parameters.

The networks of ``benchmarks.train wide`` (full width, all training images of Fashion-MNIST, 30 epochs), in the three
pairs of three seeds. For each cut l of L layers kept for each edge (PFM): activation matching by permutations,
averaged at α = 0.5 and normalized as the papers do ("none", REPAIR and RESCALE, or RESET where there is BatchNorm),
and the default call of ``vfx.merge`` with the same layers kept, which has the same parameters, or those of one edge
where it takes an edge as it is. Matching and calibration read the first 2,000 training images without labels; accuracy
is over the 10,000 test images, mean ± standard deviation over the pairs. "Gain" is the default call minus the better
edge, its error that of the mean over the pairs; they share networks, so it is a lower bound. The edges were trained on
the images that calibrate, and hardly err on them: held-out images of that kind tell candidates apart badly.

Results go to ``benchmarks/results``: headline.json and headline.md, written after each pair; a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import FASHION_MNIST, RESNET_CUTS, RESULTS, VGG_CUTS, command, fashion_mnist
from benchmarks.options import DataFolder, Device, Output
from benchmarks.pairs_report import NAMES, grid
from benchmarks.train import FAMILIES, TRAINED, Recipe, trained
from vfx.api import collect, merge, trace
from vfx.files import write_atomic
from vfx.models.training import predict

CALIBRATION, BATCH = 2000, 128
CUTS = {"vgg16": VGG_CUTS, "vgg16_bn": VGG_CUTS, "resnet20_bn": RESNET_CUTS}
LAYERS = {"vgg16": 14, "vgg16_bn": 14, "resnet20_bn": 20}
NORMALIZATIONS = {True: (None, "reset"), False: (None, "repair", "rescale")}  # by BatchNorm
DEFAULT = "default"
console = Console(stderr=True)


class Subject:
    """One pair with the data it is merged and measured on."""

    def __init__(self, recipes: list[Recipe], networks: Path, data: Path, device: str):
        self.device = device
        self.calibration = fashion_mnist(data, "train", CALIBRATION)[0].split(BATCH)
        images, labels = fashion_mnist(data, "test")
        self.images, self.labels = images.to(device), labels.to(device)
        self.edges = [recipe.load(networks) for recipe in recipes]
        self.program = trace(self.edges, self.calibration[0][:2])

    def predicted(self, module: nn.Module) -> Tensor:
        return predict(module.to(self.device), self.images)

    def accuracy(self, outputs: Tensor) -> float:
        return round(100 * (outputs.argmax(1) == self.labels).double().mean().item(), 2)

    def measure(self, cuts: tuple[int, ...], normalizations: tuple[str | None, ...]) -> dict[str, Any]:
        """Accuracy of the edges, their ensemble, and every cell."""
        outputs = [self.predicted(edge) for edge in self.edges]
        read = collect(self.program, data=self.calibration, device=self.device, progress=False)
        papers: dict[str, Any] = {"solve": None, "statistics": read, "match": "activation", "classes": "permutation"}
        cells = {}
        for cut in cuts:
            for normalize in normalizations:
                cells[f"{NAMES[normalize]}/{cut}"] = self._cell(preserve=cut, normalize=normalize, **papers)
            cells[f"{DEFAULT}/{cut}"] = self._cell(preserve=cut)
        return {
            "edges": [self.accuracy(output) for output in outputs],
            "ensemble": self.accuracy(torch.stack(outputs).softmax(2).mean(0)),
            "cells": cells,
        }

    def _cell(self, **options: Any) -> dict[str, Any]:
        start = time.perf_counter()
        result = merge(self.program, data=self.calibration, device=self.device, progress=False, **options)
        seconds = time.perf_counter() - start
        report = result.report
        return {
            "accuracy": self.accuracy(self.predicted(result.module)),
            "params_ratio": round(report.params_ratio, 4),
            "flops_ratio": round(report.flops_ratio, 4),
            "outcome": report.outcome,
            "seconds": round(seconds, 2),
        }


def pairs(name: str) -> dict[str, list[Recipe]]:
    """Two networks each, by their seeds."""
    recipes = FAMILIES["wide"][name]
    return {f"{name}/{a.seed}-{b.seed}": [a, b] for a, b in itertools.combinations(recipes, 2)}


def measured(key: str, networks: Path, data: Path, device: str) -> dict[str, Any]:
    """One pair, in a process of its own."""
    name = key.split("/")[0]
    found = Subject(pairs(name)[key], networks, data, device).measure(CUTS[name], NORMALIZATIONS[name.endswith("_bn")])
    return {"device": torch.cuda.get_device_name() if device.startswith("cuda") else device} | found


def markdown(results: dict[str, Any]) -> str:
    """A table a network: methods by cuts."""
    lines = ["# Wide networks: the papers' methods and the default call", ""]
    devices = dict.fromkeys(pair["device"] for pair in results.values())
    lines += [(__doc__ or "").split("\n\n")[1].replace("\n", " "), "", f"Device: {', '.join(devices)}.", ""]
    for name, cuts in CUTS.items():
        found = [value for key, value in results.items() if key.split("/")[0] == name]
        if found:
            lines += [*_table(name, cuts, found), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(name: str, cuts: tuple[int, ...], found: list[dict[str, Any]]) -> list[str]:
    methods = list(dict.fromkeys(cell.split("/")[0] for cell in found[0]["cells"]))
    rows = []
    for cut in cuts:
        cells = {method: [pair["cells"][f"{method}/{cut}"] for pair in found] for method in methods}
        gains = [cell["accuracy"] - max(pair["edges"]) for cell, pair in zip(cells[DEFAULT], found)]
        size = cells[methods[0]][0]
        sizes = sorted({cell["params_ratio"] for cell in cells[DEFAULT]})
        rows.append([
            f"PFM {cut}/{LAYERS[name]}", *(_spread([cell["accuracy"] for cell in cells[method]]) for method in methods),
            _gain(gains), f"{size['params_ratio']:.3f}×", _range(sizes),
        ])  # fmt: skip
    edges = _spread([edge for pair in found for edge in pair["edges"]])
    ensemble = _spread([pair["ensemble"] for pair in found])
    title = f"## {name} ×1, {len(found)} pairs: edges {edges}, ensembles {ensemble}"
    outcomes = sorted(
        {cell["outcome"] for pair in found for key, cell in pair["cells"].items() if key == f"{DEFAULT}/0"}
    )
    said = ["", "The default call at one edge's parameters:", "", *(f"- {outcome}" for outcome in outcomes)]
    return [title, "", *grid(["", *methods, "gain", "parameters", "of the default"], rows), *said]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _range(ratios: list[float]) -> str:
    """From the smallest to the largest of sorted ratios."""
    return " to ".join(f"{ratio:.3f}×" for ratio in dict.fromkeys((ratios[0], ratios[-1])))


def _gain(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{error}"


def main(
    data: DataFolder = FASHION_MNIST,
    networks: Annotated[Path, typer.Option(help="Folder of the trained networks.")] = TRAINED,
    output: Output = RESULTS,
    only: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(CUTS)} (may be repeated).")] = None,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option(help="Pairs measured at a time.")] = 1,
) -> None:
    """Train what is missing, measure what headline.json does not hold yet, and write it and headline.md."""
    names = only or list(CUTS)
    trained([recipe for name in names for recipe in FAMILIES["wide"][name]], data, networks, device, jobs)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "headline.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    missing = [key for name in names for key in pairs(name) if key not in results]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measured, key, networks, data, device): key for key in missing}
        for future in as_completed(running):
            results[running[future]] = future.result()
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(file.with_suffix(".md"), markdown(results))
            console.print(f"{running[future]} is measured")


if __name__ == "__main__":
    command(main)
