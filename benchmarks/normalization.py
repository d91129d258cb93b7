"""Normalizations on the trained Fashion-MNIST pairs: every method, the three sweeps, bias removal, partial alignment.

Studies (``--study``), all at α = 0.5 with activation matching unless said otherwise; matching and calibration read the
first 2,000 training images in order, batch 128; accuracy is over the first ``--samples`` test images:

- methods: every normalization at every number of preserved layers, "auto" among them (without and with labels);
- sweeps: exact, train-mode and uncorrected statistics (*Rethinking Model Re-Basin*, Table 9);
- removal: biases of the last (first) k layers set to zero (*Vanishing Feature*, Figure 13), and the k that is chosen;
- partial: only the first l layers aligned (Figure 4, left);
- biases: matching with and without the edges' biases (*Rethinking Model Re-Basin*, §3.2).

Each cell is written to normalization.json as soon as it is measured and is not measured again (``--fresh`` does).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, Pair, command, fashion_mnist
from benchmarks.normalization_report import draw, markdown
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Render
from vfx.api import collect, merge, trace
from vfx.emit.module import emit
from vfx.files import write_atomic
from vfx.match.activation import ActivationMatching
from vfx.match.first_layers import FirstLayers
from vfx.models.training import predict
from vfx.normalize.catalogue import Normalization

CALIBRATION, BATCH, TEST_BATCH = 2000, 128, 250
STUDIES = ("methods", "sweeps", "removal", "partial", "biases")
PLAIN: dict[str, Any] = {
    "none": None, "bias_calibration": "bias_calibration", "bias_removal": "bias_removal",
    "rescale_weights": "rescale_weights", "repair": "repair", "rescale": "rescale",
    "rescale_average": "rescale_average", "reshift": "reshift",
    "repair post-activation": Normalization("repair", site="activation"),
    "repair by batch": Normalization("repair", sweep="batch"),
}  # fmt: skip
NORMED: dict[str, Any] = {
    "none": None, "bias_calibration": "bias_calibration", "bias_removal": "bias_removal", "reset": "reset",
    "reset by batch": Normalization("reset", sweep="batch"),
}  # fmt: skip
console = Console(stderr=True)
Cell = dict[str, Any]


class Subject:
    """One pair and the data it is merged and measured on."""

    def __init__(self, pair: Pair, checkpoints: Path, data: Path, samples: int):
        self.pair = pair
        images, labels = fashion_mnist(data, "train", CALIBRATION)
        self.calibration = images.split(BATCH)
        self.labelled = list(zip(self.calibration, labels.split(BATCH)))
        self.images, self.labels = fashion_mnist(data, "test", samples)
        self.program = trace(pair.edges(checkpoints), images[:2])
        self.layers = 20 if "resnet" in pair.model else 14
        self.statistics = collect(self.program, data=self.calibration, activations=True)

    def accuracy(self, module: nn.Module) -> float:
        outputs = predict(module, self.images, TEST_BATCH)
        return round(100 * (outputs.argmax(1) == self.labels).double().mean().item(), 2)

    def merged(self, normalize: Any, *, labels: bool = False, **options: Any) -> Cell:
        settings: dict[str, Any] = {"match": "activation", "classes": "permutation", "statistics": self.statistics}
        settings |= {"verify": False, "progress": False} | options
        result = merge(
            self.program, data=self.labelled if labels else self.calibration, normalize=normalize, **settings
        )
        report = result.report
        chosen = {k: v for k, v in report.choices.items() if k in ("normalize", "count", "direction")}
        seconds = round(sum(report.seconds.values()), 2)
        cell = {"accuracy": self.accuracy(result.module), **chosen, "seconds": seconds}
        return cell | ({"scores": dict(report.scores)} if report.scores else {})

    # the studies: name of a cell -> how it is measured

    def references(self) -> Iterator[tuple[str, Any]]:
        for edge in range(2):
            yield f"edge {edge}", lambda edge=edge: {"accuracy": self.accuracy(emit(self.program, edge)[0])}
        yield "ensemble", self._ensemble

    def _ensemble(self) -> Cell:
        outputs = [predict(emit(self.program, edge)[0], self.images, TEST_BATCH).softmax(1) for edge in range(2)]
        correct = (torch.stack(outputs).mean(0).argmax(1) == self.labels).double().mean().item()
        return {"accuracy": round(100 * correct, 2)}

    def methods(self) -> Iterator[tuple[str, Any]]:
        table = NORMED if self.pair.batch_norm else PLAIN
        for cut in self.pair.cuts:
            for name, normalize in table.items():
                yield f"{name} {cut}", lambda n=normalize, c=cut: self.merged(n, preserve=c)
            yield f"auto {cut}", lambda c=cut: self.merged("auto", preserve=c)
            yield f"auto with labels {cut}", lambda c=cut: self.merged("auto", preserve=c, labels=True)

    def sweeps(self) -> Iterator[tuple[str, Any]]:
        for method in ("reset",) if self.pair.batch_norm else ("repair", "rescale"):
            for sweep in ("uncorrected", "train", "exact"):
                asked = Normalization(method, sweep=sweep)  # type: ignore[arg-type]
                yield f"{method} {sweep}", lambda asked=asked: self.merged(asked)

    def removal(self) -> Iterator[tuple[str, Any]]:
        for direction in () if self.pair.batch_norm else ("backward", "forward"):
            for count in range(self.layers + 1):
                asked = Normalization("bias_removal", count=count, direction=direction)  # type: ignore[arg-type]
                yield f"{direction} {count}", lambda asked=asked: self.merged(asked)
            asked = Normalization("bias_removal", direction=direction)  # type: ignore[arg-type]
            yield f"{direction} chosen", lambda asked=asked: self.merged(asked)

    def partial(self) -> Iterator[tuple[str, Any]]:
        method = "reset" if self.pair.batch_norm else "rescale"
        for count in range(0, self.layers, 1 if self.layers < 15 else 3):
            for name in (None, method):
                match = FirstLayers(ActivationMatching("permutation"), count)
                yield f"{name or 'none'} {count}", lambda n=name, m=match: self.merged(n, match=m)

    def biases(self) -> Iterator[tuple[str, Any]]:
        for edge in range(2):
            yield f"edge {edge} with biases", lambda edge=edge: {"accuracy": self.accuracy(emit(self.program, edge)[0])}
            yield f"edge {edge} without biases", lambda edge=edge: self._bare(edge)
        for match in (None, "weight", "activation"):
            for prepare in (None, "remove_bias"):
                name = f"{match or 'direct'} {'without' if prepare else 'with'} biases"
                own = {} if prepare is None else {"statistics": None}
                yield name, lambda m=match, p=prepare, o=own: self.merged(None, match=m, prepare=p, **o)

    def _bare(self, edge: int) -> Cell:
        import vfx

        return {"accuracy": self.accuracy(emit(vfx.RemoveBias(None)(self.program), edge)[0])}


def main(
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    study: Annotated[list[str] | None, typer.Option(help="Only this study (may be repeated).")] = None,
    samples: Annotated[int, typer.Option(help="Test images.", min=1)] = 2000,
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    fresh: Fresh = False,
    render: Render = False,
) -> None:
    """Measure the normalizations and write normalization.json, .md and .png."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "normalization.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name in () if render else pair or PAIRS:
        subject = Subject(PAIRS[name], checkpoints, data, samples)
        own = results.setdefault(name, {"layers": subject.layers, "test_images": {}, "studies": {}})
        for one in ("references", *(study or STUDIES)):
            if fresh or (one == "references" and own["test_images"].get(one) != samples):
                own["studies"].pop(one, None)
                own["test_images"].pop(one, None)
            if own["test_images"].setdefault(one, samples) != samples:
                images = own["test_images"][one]
                raise typer.BadParameter(f"{one} of {name} was measured on {images:,} test images; use --fresh")
            measure(subject, one, own["studies"].setdefault(one, {}), lambda: write(file, results))
    write_atomic(output / "normalization.md", markdown(results))
    draw(results, output / "normalization.png")
    console.print(f"wrote {file}, normalization.md and normalization.png")


def measure(subject: Subject, study: str, cells: dict[str, Any], save: Any) -> None:
    """Measure what is missing."""
    missing = [(name, cell) for name, cell in getattr(subject, study)() if name not in cells]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{subject.pair.name} {study}", total=len(missing))
        for name, cell in missing:
            cells[name] = cell()
            save()
            progress.advance(task)


def write(file: Path, results: Any) -> None:
    write_atomic(file, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command(main)
