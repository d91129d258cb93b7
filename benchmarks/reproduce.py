"""The papers' tables by one command, on data that are at hand: trained, merged, measured, and held against the claims.

``--scale quick`` takes scikit-learn's digits, one pair of networks and the default call once a table, ``small``
Fashion-MNIST (10,000 training images) and the three pairs of three seeds, ``full`` the full-width networks of
``benchmarks.train wide`` (a GPU's work). Widths are reduced in the first two (VGG ×0.25, ResNet20 ×0.5, ViT of 64
channels), so figures are those of this setting, not the papers'. Calibration reads training images without labels (512
of digits, 1,000 of Fashion-MNIST; 2,000 at full width); accuracy is over all test images, mean ± standard deviation
over the pairs.

Results go to ``benchmarks/results/reproduce``: one JSON file and one page for each table, and README.md with all claims
of all tables. Each cell is written when it is measured; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

import vfx
from benchmarks.experiments import TABLES, Claim, Table, options_of
from benchmarks.fashion import FASHION_MNIST, RESULTS, command
from benchmarks.options import DataFolder, Device, Output
from benchmarks.pairs_report import grid
from benchmarks.train import FAMILIES, TRAINED, Recipe, images_of, trained
from vfx.files import write_atomic
from vfx.models import predict

BATCH = 128
CHANCE = 10  # percent: ten classes as frequent
console = Console(stderr=True)


@dataclass(frozen=True)
class Scale:
    """A family of ``benchmarks.train``, how many of its seeds, how many samples calibrate, and whether the default call
    is made at every cut.
    """

    family: str
    seeds: int
    calibration: int
    every_default: bool = True


SCALES = {
    "quick": Scale("digits", 2, 512, every_default=False),
    "small": Scale("small", 3, 1000),
    "full": Scale("wide", 3, 2000),
}


@dataclass(frozen=True)
class Pair:
    """Two trained networks, the data that merge them, and those that judge; a call that several tables show is made
    once.
    """

    recipes: tuple[Recipe, Recipe]
    networks: Path
    data: Path
    calibration: int
    device: str
    third: Recipe | None = None
    made: dict[str, dict[str, Any]] = field(default_factory=dict, compare=False)

    @cached_property
    def edges(self) -> list[nn.Module]:
        return [recipe.load(self.networks) for recipe in self.recipes]

    @cached_property
    def _images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return images_of(self.recipes[0].data, self.data, self.device)

    @cached_property
    def program(self) -> vfx.Program:
        return vfx.trace(self.edges, self._images[0][:2])

    @cached_property
    def independent(self) -> nn.Module:
        """A network of the same recipe that is none of the two."""
        assert self.third is not None
        trained([self.third], self.data, self.networks, self.device)
        return self.third.load(self.networks)

    @cached_property
    def recorded(self) -> vfx.Statistics:
        """The edges' statistics as training mode reads them, over all their training images."""
        recorders = []
        for recipe, edge in zip(self.recipes, self.edges):
            with torch.no_grad(), vfx.record(copy.deepcopy(edge).train()) as recorder:
                for batch in self._images[0][: recipe.images].split(BATCH):
                    recorder.model(batch)
            recorders.append(recorder)
        return vfx.recorded(self.program, recorders)

    def judged(self, outputs: Tensor) -> dict[str, float]:
        """Accuracy in percent and loss of outputs for the test images."""
        labels = self._images[3]
        right = (outputs.argmax(1) == labels).double().mean().item()
        return {"accuracy": round(100 * right, 2), "loss": round(F.cross_entropy(outputs, labels).item(), 4)}

    def ends(self) -> dict[str, Any]:
        """The edges and their ensemble (mean of probabilities)."""
        outputs = [predict(edge.to(self.device), self._images[2]) for edge in self.edges]
        mean = torch.stack(outputs).softmax(2).mean(0).clamp_min(1e-12).log()
        return {"edges": [self.judged(output) for output in outputs], "ensemble": self.judged(mean)}

    def cell(self, options: dict[str, Any]) -> dict[str, Any]:
        """What ``vfx.merge`` with these options gives."""
        key = repr(sorted(options.items()))
        if key not in self.made:
            self.made[key] = self._merged(dict(options))
        return self.made[key]

    def _merged(self, options: dict[str, Any]) -> dict[str, Any]:
        count = max(2, round(options.pop("samples", 1.0) * self.calibration))
        data = self._images[0][:count].split(BATCH)
        if options.pop("independent", False):
            options["references"] = [self.independent]
        if options.pop("recorded", False):
            options["statistics"] = self.recorded
        start = time.perf_counter()
        result = vfx.merge(self.program, data=data, device=self.device, progress=False, **options)
        seconds = round(time.perf_counter() - start, 2)
        report = result.report
        sizes = {"params_ratio": round(report.params_ratio, 4), "flops_ratio": round(report.flops_ratio, 4)}
        return self.judged(predict(result.module.to(self.device), self._images[2])) | sizes | {"seconds": seconds}


pair_of = cache(Pair)


def measure(name: str, scale: str, networks: Path, data: Path, file: Path, device: str) -> None:
    """Measure the cells of one table that its file does not hold yet."""
    table, setting = TABLES[name], SCALES[scale]
    seeds = FAMILIES[setting.family][table.network]
    recipes = seeds[: setting.seeds]
    trained(recipes, data, networks, device)
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    pairs = results.setdefault(scale, {})
    for first, second in itertools.combinations(recipes, 2):
        third = next((recipe for recipe in seeds if recipe not in (first, second)), None)
        pair = pair_of((first, second), networks, data, setting.calibration, device, third)
        measured = pairs.setdefault(f"{first.seed}-{second.seed}", {"cells": {}})
        if "edges" not in measured:
            measured |= {**pair.ends(), "default": pair.cell({})}
        columns = [name for name, options in table.columns.items() if options or setting.every_default]
        for row, column in itertools.product(table.rows, columns):
            if (key := f"{row}|{column}") not in measured["cells"]:
                measured["cells"][key] = pair.cell(options_of(table.rows[row], table.columns[column]))
                write_atomic(file, json.dumps(results, indent=1) + "\n")


# pages ----------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def values_of(pairs: dict[str, Any], row: str, column: str, measure: str = "accuracy") -> list[float]:
    """A cell's figure in each pair that has it."""
    key = f"{row}|{column}"
    return [pair["cells"][key][measure] for pair in pairs.values() if key in pair["cells"]]


def page(name: str, results: dict[str, Any]) -> str:
    """The table at every scale that was measured."""
    table = TABLES[name]
    lines = [f"# {table.title}", "", f"`python -m benchmarks.reproduce --only {name} --scale {'|'.join(results)}`", ""]
    for scale, pairs in results.items():
        lines += [*_section(table, scale, pairs), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(table: Table, scale: str, pairs: dict[str, Any]) -> Iterator[str]:
    recipe = FAMILIES[SCALES[scale].family][table.network][0]
    ends = [edge["accuracy"] for pair in pairs.values() for edge in pair["edges"]]
    yield f"## {recipe.model} ×{recipe.width:.3g}, {recipe.data}, {len(pairs)} pair{'s' * (len(pairs) > 1)}"
    yield ""
    yield (
        f"Accuracy in %. Edges {spread(ends)}, ensemble "
        f"{spread([pair['ensemble']['accuracy'] for pair in pairs.values()])}, chance {CHANCE}; the default call at "
        f"{spread([pair['default']['params_ratio'] for pair in pairs.values()])} × parameters: "
        f"{spread([pair['default']['accuracy'] for pair in pairs.values()])}."
    )
    yield ""
    first, sized = next(iter(table.columns)), any("preserve" in options for options in table.rows.values())
    columns = [name for name in table.columns if any(values_of(pairs, row, name) for row in table.rows)]
    rows = []
    for row in table.rows:
        cells = [values_of(pairs, row, column) for column in columns]
        sizes = [values_of(pairs, row, first, size)[:1] for size in ("params_ratio", "flops_ratio")] if sized else []
        rows.append([
            row, *(spread(cell) if cell else "–" for cell in cells),
            *(f"{size[0]:.3f}×" if size else "–" for size in sizes),
        ])  # fmt: skip
    yield from grid(["", *columns, *(["parameters", "FLOPs"] if sized else [])], rows)
    if table.claims:
        yield from ("", *(f"- {claim.text}: {verdict(claim, pairs)}" for claim in table.claims))


def verdict(claim: Claim, pairs: dict[str, Any]) -> str:
    """Whether a claim holds here: the mean difference over the pairs against twice its standard error.

    Networks that have not learned tell nothing.
    """
    gains = [a - b for a, b in zip(values_of(pairs, *claim.better), values_of(pairs, *claim.worse))]
    if not gains:
        return "not measured"
    least = min(edge["accuracy"] for pair in pairs.values() for edge in pair["edges"])
    if least < 2 * CHANCE:
        return f"not judged: an edge has {least:.2f} %"
    mean = statistics.mean(gains)
    if len(gains) == 1:
        said = "holds" if mean > 0 else "fails" if mean < 0 else "level"
        return f"**{said}** ({mean:+.2f}, one pair)"
    error = statistics.stdev(gains) / len(gains) ** 0.5
    said = "holds" if mean > 2 * error else "fails" if mean < -2 * error else "level"
    return f"**{said}** ({mean:+.2f} ± {error:.2f})"


def claims(folder: Path) -> str:
    """All claims of all tables that were measured, at a glance."""
    rows = []
    for name, table in TABLES.items():
        file = folder / f"{name}.json"
        for scale, pairs in (json.loads(file.read_text()) if file.is_file() else {}).items():
            for claim in table.claims:
                better, worse = (", ".join(cell) for cell in (claim.better, claim.worse))
                rows.append([
                    f"[{table.title}]({name}.md)", scale, claim.text, f"{better} > {worse}", verdict(claim, pairs),
                ])  # fmt: skip
    text = (__doc__ or "").strip().replace("``", "`")
    head = ["table", "scale", "claim", "read from", "here"]
    said = "A claim holds (fails) where the mean difference is above (below) twice its standard error over the pairs."
    return "\n".join(["# The papers' claims", "", text, "", said, "", *grid(head, rows), ""])


def main(
    scale: Annotated[str, typer.Option(help=f"How much: {', '.join(SCALES)}.")] = "small",
    only: Annotated[list[str] | None, typer.Option(help=f"Only this table: {', '.join(TABLES)} (repeatable).")] = None,
    data: DataFolder = FASHION_MNIST,
    networks: Annotated[Path, typer.Option(help="Folder of the trained networks.")] = TRAINED,
    output: Output = RESULTS / "reproduce",
    device: Device = "cpu",
) -> None:
    """Train what is missing, measure what the results do not hold yet, and write tables and claims."""
    if scale not in SCALES or set(only or ()) - set(TABLES):
        raise typer.BadParameter(f"scales: {', '.join(SCALES)}; tables: {', '.join(TABLES)}")
    output.mkdir(parents=True, exist_ok=True)
    families = FAMILIES[SCALES[scale].family]
    for name in only or [name for name, table in TABLES.items() if table.network in families]:
        start = time.perf_counter()
        file = output / f"{name}.json"
        measure(name, scale, networks, data, file, device)
        write_atomic(file.with_suffix(".md"), page(name, json.loads(file.read_text())))
        write_atomic(output / "README.md", claims(output))
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    command(main)
