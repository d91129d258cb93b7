"""Diagnose the trained Fashion-MNIST pairs: vanishing features, barriers, and the choice of data.

Three parts for each pair, kept in ``benchmarks/results/diagnosis.json`` as soon as they are measured; what is there
already is not measured again (``--fresh`` does). Matching and calibration read the first 2,000 training images.

* layers: feature ratio, offset share and variance ratio of each layer on 512 test images, for every treatment and for
  PFM cuts (*Vanishing Feature*, the quantities of Figures 3 and 5);
* barriers: accuracy and loss at 11 values of α, before and after alignment and each normalization (Figure 1 of the
  papers), on the test images;
* data: matching and calibration on 5 % of the 20,000 training images (random with three seeds, easiest, hardest, by
  EL2N of the two edges), accuracy at α = 0.5 after REPAIR or RESET and variance ratio on 1,000 other training images
  (*The Role of Data in Model Merging*, Figures 1 to 3 in small).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import vfx
from benchmarks.diagnosis_report import draw, markdown
from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, Pair, command, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Render
from vfx.files import write_atomic
from vfx.match.matcher import Known, Problem

CALIBRATION, DIAGNOSED, BATCH = 2000, 512, 128
POOL, SHARE, OTHERS = 20_000, 0.05, 1000
PARTS = ("layers", "barriers", "data")
SUBSETS = {"random": ("random", 0), "random 2": ("random", 1), "random 3": ("random", 2), "easy": ("easy", 0)}
SUBSETS |= {"hard": ("hard", 0)}
PLAIN: tuple[str | None, ...] = (None, "bias_calibration", "repair", "rescale")
NORMED: tuple[str | None, ...] = (None, "reset")
console = Console(stderr=True)


class Subject:
    """One pair with its data."""

    def __init__(self, pair: Pair, checkpoints: Path, data: Path, samples: int):
        self.pair = pair
        self.images, self.labels = fashion_mnist(data, "train", POOL + OTHERS)
        test, labels = fashion_mnist(data, "test", samples)
        self.test = list(zip(test.split(250), labels.split(250)))
        self.edges = pair.edges(checkpoints)
        self.program = vfx.trace(self.edges, self.images[:2])
        self.calibration = self.images[:CALIBRATION].split(BATCH)
        self.statistics = vfx.collect(self.program, data=self.calibration)
        self.methods = NORMED if pair.batch_norm else PLAIN

    def merge(self, match: str | None, normalize: str | None, preserve: int = 0) -> vfx.Result:
        return vfx.merge(
            self.program,
            data=self.calibration,
            statistics=self.statistics,
            match=match,
            classes="permutation",
            normalize=normalize,
            preserve=preserve,
            progress=False,
        )

    def layers(self) -> Iterator[dict[str, Any]]:
        """A diagnosis for each treatment and cut."""
        treatments = [(match, method, 0) for match in (None, "activation") for method in self.methods]
        treatments += [("activation", None, cut) for cut in self.pair.cuts if cut]
        diagnosed = [x for x, _ in self.test[: -(-DIAGNOSED // 250)]]
        for match, method, cut in treatments:
            result = self.merge(match, method, cut)
            found = vfx.diagnose(result, self.program, data=diagnosed, max_samples=DIAGNOSED, progress=False)
            rows = [row for row in found.rows if not row.shortcut]
            yield {
                "match": match,
                "normalize": method,
                "preserve": cut,
                "verdict": found.verdict.kind,
                "layer": found.verdict.number,
                "text": str(found.verdict),
                **{name: [getattr(row, name) for row in rows] for name in _KEPT},
            }

    def barriers(self) -> dict[str, Any]:
        return vfx.barrier(
            self.program,
            data=self.calibration,
            evaluate=self.test,
            normalize=self.methods,
            statistics=self.statistics,
        ).to_dict()

    def data(self) -> Iterator[dict[str, Any]]:
        """Every pair of a subset to match on and one to calibrate on."""
        pool = list(zip(self.images[:POOL].split(BATCH), self.labels[:POOL].split(BATCH)))
        chosen = {
            name: vfx.select(pool, SHARE, strategy, models=self.program, seed=seed)  # type: ignore[arg-type]
            for name, (strategy, seed) in SUBSETS.items()
        }
        statistics = {name: vfx.collect(self.program, data=subset) for name, subset in chosen.items()}
        for matched in ("random", "easy", "hard"):
            for calibrated, subset in chosen.items():
                if matched != "random" and calibrated.startswith("random "):
                    continue  # further draws only show how much chance there is
                yield {
                    "matched": matched,
                    "calibrated": calibrated,
                    **self._on(statistics[matched], statistics[calibrated], subset),
                }

    def _on(self, matched: Any, calibrated: Any, subset: vfx.SampleSelection) -> dict[str, Any]:
        """Match on one subset; goals and calibration on another."""
        method = "reset" if self.pair.batch_norm else "repair"
        aligned = vfx.Align("activation", statistics=matched)(self.program)
        found = vfx.ActivationMatching("permutation")(Problem(self.program, vfx.symmetry(self.program), matched))
        result = vfx.merge(
            self.program,
            data=subset,
            statistics=calibrated,
            match=Known(found),
            normalize=method,
            progress=False,
        )
        others = self.images[POOL:].split(BATCH)
        diagnosed = vfx.diagnose(result, aligned, data=others, match=None, progress=False)
        ratios = [row.variance_ratio for row in diagnosed.rows if row.variance_ratio is not None]
        return {"accuracy": self._accuracy(result.module), "variance_ratio": median(ratios)}

    @torch.no_grad()
    def _accuracy(self, module: torch.nn.Module) -> float:
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in self.test)
        return round(100 * right / sum(len(y) for _, y in self.test), 2)


_KEPT = ("feature_ratio", "offset_share", "bound", "variance_ratio", "zero_share", "silenced", "magnitude_ratio")


def measure(subject: Subject, part: str) -> Any:
    found = getattr(subject, part)()
    return found if isinstance(found, dict) else list(found)


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Only layers, barriers or data (may be repeated).")] = None,
    samples: Annotated[int, typer.Option(help="Test images to use.")] = 10_000,
    fresh: Fresh = False,
    render: Render = False,
) -> None:
    """Diagnose the trained pairs and write diagnosis.json, diagnosis.md and two plots."""
    for name, known in (*((n, PAIRS) for n in pair or ()), *((n, PARTS) for n in part or ())):
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "diagnosis.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    todo = [
        (name, which)
        for name in ([] if render else pair or PAIRS)
        for which in part or PARTS
        if fresh or which not in results.get(name, {})
    ]
    run(todo, results, file, checkpoints, data, samples)
    if results:
        write_atomic(output / "diagnosis.md", markdown(results))
        draw(results, output)
        console.print(f"wrote {file}, diagnosis.md, diagnosis.png and diagnosis_data.png")


def run(
    todo: list[tuple[str, str]], results: dict[str, Any], file: Path, checkpoints: Path, data: Path, samples: int
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    subjects: dict[str, Subject] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("diagnosis", total=len(todo))
        for name, part in todo:
            progress.update(task, description=f"{name}: {part}")
            if name not in subjects:
                subjects = {name: Subject(PAIRS[name], checkpoints, data, samples)}
            found = results.setdefault(name, {})
            found[part] = measure(subjects[name], part)
            found[f"{part}_test_images"] = samples
            write_atomic(file, json.dumps({n: results[n] for n in PAIRS if n in results}, indent=1) + "\n")
            progress.advance(task)


if __name__ == "__main__":
    command(main)
