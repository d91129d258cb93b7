"""Two to five edges merged into one: matching methods × normalization on scikit-learn's digits.

VGG16 ×0.25 and ResNet20-BN ×0.5 are trained here from different seeds and kept in ``--cache``; the first N of them are
merged with equal weights. Matching, normalization and reconstruction read the first 512 training images; accuracy is
over the 500 test images. "solved" is least squares for the mean of all edges, "default" the default call, which may
follow one of them, or take it as it is. Results go to ``benchmarks/results``: many.json, many.md. Cells already in
many.json are kept (``--fresh`` measures them anew).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.options import Cache, Fresh, Output
from benchmarks.pairs_report import grid
from vfx.api import collect, merge, symmetry, trace
from vfx.data import digits
from vfx.elements import identity
from vfx.files import write_atomic
from vfx.match.catalogue import matcher
from vfx.match.matcher import Known, Matching, Problem
from vfx.match.universe import pair_objective
from vfx.models import MODELS, Training, accuracy, fit, predict

COUNTS = (2, 3, 4, 5)
BATCH, CALIBRATION = 128, 512
MATCHES = (None, "weight", "activation", "c2m3", "iterated", "ste")
SOLVED: dict[str, dict[str, Any]] = {  # beside the normalizations, for activation matching
    "least_squares": {"solve": "least_squares", "follow": 0},
    "default": {},
}
TITLES = {None: "none", "reset": "RESET", "rescale": "RESCALE", "repair": "REPAIR"}
TITLES |= {"least_squares": "solved", "default": "default"}
console = Console(stderr=True)


@dataclass(frozen=True)
class Network:
    """An architecture, how it is trained, and the normalizations that fit it."""

    name: str
    model: str
    width: float
    epochs: int
    lr: float
    normalizations: tuple[str | None, ...]

    def edge(self, seed: int, data: Sequence[Tensor], cache: Path) -> nn.Module:
        """One trained network, from the cache if it is there."""
        torch.manual_seed(seed)
        model = MODELS[self.model](width=self.width, in_channels=1)
        file = cache / f"{self.model}_w{self.width:g}_e{self.epochs}_s{seed}.safetensors"
        if file.is_file():
            model.load_state_dict(load_file(file))
            return model.eval()
        console.print(f"training {self.name}, seed {seed}")
        fit(model, data[0], data[1], Training(self.epochs, self.lr, batch_size=64, seed=seed))
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
        return model


NETWORKS = (
    Network("VGG16 ×0.25", "vgg16", 0.25, 15, 0.1, (None, "rescale", "repair")),
    Network("ResNet20-BN ×0.5", "resnet20_bn", 0.5, 15, 0.2, (None, "reset")),
)


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["edges"], cell["match"], cell["normalize"]


def cells(network: Network, counts: Sequence[int], matches: Sequence[str | None]) -> Iterator[tuple[Any, ...]]:
    for count in counts:
        for match in matches:
            for normalize in (*network.normalizations, *(SOLVED if match == "activation" else ())):
                yield count, match, normalize


class Subject:
    """The first N edges of a network as one Program, with their statistics; each method matches them once."""

    def __init__(self, edges: Sequence[nn.Module], data: Sequence[Tensor]):
        train, labels, self.images, self.labels = data[0][:CALIBRATION], data[1][:CALIBRATION], *data[2:]
        self.program = trace(list(edges), train[:2])
        self.facts = symmetry(self.program)
        self.batches = list(zip(train.split(BATCH), labels.split(BATCH)))
        self.statistics = collect(self.program, data=self.batches, progress=False)
        self.problem = Problem(self.program, self.facts, self.statistics, data=self.batches)
        self.matchings: dict[str, Matching] = {}

    def matching(self, match: str) -> Matching:
        if match not in self.matchings:
            finder = matcher(match, classes="permutation")
            assert finder is not None
            self.matchings[match] = finder(self.problem)
        return self.matchings[match]

    def measure(self, match: str | None, normalize: str | None) -> dict[str, Any]:
        found = self.matching(match) if match else None
        options = SOLVED.get(str(normalize), {"normalize": normalize})
        data = [images for images, _ in self.batches] if normalize in SOLVED else self.batches  # no labels to choose by
        result = merge(
            self.program,
            data=data,
            statistics=self.statistics,
            match=Known(found) if found else None,
            verify=False,
            progress=False,
            **options,
        )
        elements = found.elements if found else [identity(self.facts)] * self.program.edges
        return {
            "edges": self.program.edges,
            "match": match,
            "normalize": normalize,
            "accuracy": round(100 * accuracy(result.module, self.images, self.labels), 2),
            "weight_objective": round(pair_objective(self.facts, self.program.weights, elements), 4),
            "objective": [round(x, 6) for x in found.objective] if found else [],
            "attempts": [list(values) for values in found.attempts] if found else [],
        }


def references(edges: Sequence[nn.Module], data: Sequence[Tensor]) -> dict[str, Any]:
    """Accuracy in % of the edges and of the ensembles of the first N, by mean of probabilities."""
    outputs = [predict(edge, data[2]) for edge in edges]
    right = lambda scores: round(100 * float((scores.argmax(1) == data[3]).double().mean()), 2)  # noqa: E731
    votes = torch.stack([output.softmax(1) for output in outputs])
    return {"edges": [right(x) for x in outputs], "ensembles": {str(n): right(votes[:n].mean(0)) for n in COUNTS}}


def measure(network: Network, known: dict[str, Any], matches: Sequence[str | None], options: Any) -> Iterator[Any]:
    """The network's results after every cell."""
    data, cache, counts = options
    edges = [network.edge(seed, data, cache) for seed in range(max(counts))]
    result = {**references(edges, data), "cells": list(known.get("cells", []))}
    done = {key(cell) for cell in result["cells"]}
    left = [cell for cell in cells(network, counts, matches) if cell not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    subjects: dict[int, Subject] = {}
    with Progress(*columns, console=console) as progress:
        for count, match, normalize in progress.track(left, description=network.name):
            if count not in subjects:
                subjects = {count: Subject(edges[:count], data)}
            result["cells"].append(subjects[count].measure(match, normalize))
            yield result
    yield result


def markdown(results: dict[str, Any]) -> str:
    """A table for each network: rows N and method, columns normalization."""
    lines = ["# Many edges merged into one", "", (__doc__ or "").strip(), ""]
    lines += [
        "“Σ⟨·,·⟩” is the sum over pairs of edges of the inner product of their aligned weights, the objective of C²M³.",
        "",
    ]
    for name, result in results.items():
        lines += [f"## {name}", "", f"Edges {', '.join(f'{a:.2f}' for a in result['edges'])} %. Ensembles: "
                  + ", ".join(f"{n} edges {a:.2f} %" for n, a in result["ensembles"].items()) + ".", ""]  # fmt: skip
        by = {key(cell): cell for cell in result["cells"]}
        normalizations = list(dict.fromkeys(cell["normalize"] for cell in result["cells"]))
        rows = []
        for count, match in sorted({k[:2] for k in by}, key=lambda k: (k[0], MATCHES.index(k[1]))):
            own = [by.get((count, match, normalize)) for normalize in normalizations]
            first = next(cell for cell in own if cell)
            figures = [f"{cell['accuracy']:.2f}" if cell else "" for cell in own]
            rows.append([str(count), match or "none", *figures, f"{first['weight_objective']:.2f}"])
        lines += [*grid(["edges", "match", *(TITLES[n] for n in normalizations), "Σ⟨·,·⟩"], rows), ""]
    return "\n".join(lines)


def main(
    cache: Cache = Path("demo"),
    output: Output = RESULTS,
    network: Annotated[list[str] | None, typer.Option(help="vgg16 or resnet20_bn (may be repeated).")] = None,
    match: Annotated[list[str] | None, typer.Option(help="Only these methods, or none (may be repeated).")] = None,
    fresh: Fresh = False,
    train: Annotated[bool, typer.Option(help="Only train the networks.")] = False,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Train five edges of each network (or take them from the cache), merge the first N, write the tables."""
    torch.set_num_threads(threads)
    matches = [None if name == "none" else name for name in match] if match else MATCHES
    data = digits()
    output.mkdir(parents=True, exist_ok=True)
    file = output / "many.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for one in NETWORKS:
        if network and one.model not in network:
            continue
        if train:
            [one.edge(seed, data, cache) for seed in range(max(COUNTS))]
            continue
        known = {} if fresh else results.get(one.name, {})
        for found in measure(one, known, matches, (data, cache, COUNTS)):
            results[one.name] = found
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(output / "many.md", markdown(results))
    console.print(f"wrote {file} and many.md")


if __name__ == "__main__":
    typer.run(main)
