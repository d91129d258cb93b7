"""The effect of balanced scales on merging: the trained Fashion-MNIST pairs at α = 0.5, with and without it.

Pairs × {direct, weight, activation matching} × {as trained, balanced} × {none, REPAIR}. BatchNorm is folded first,
for both, since its scales are free only then. Matching and calibration read the first 2,000 training images in order;
accuracy and loss are over the first test images. A barrier is what the midpoint loses against the mean of the edges.
``spread`` says how far the edges are from balance: the mean over channels of |log ‖W_in‖/‖W_out‖|.

Results go to ``benchmarks/results``: balance.json and balance.md, written after each pair and form; a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from vfx.passes.balance_scales import BalanceScales
from vfx.passes.fold_normalization import FoldNormalization

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, Pair, command, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Fresh, Output, Render
from benchmarks.pairs_report import grid
from vfx.analyse.scales import Place, Scales
from vfx.analyse.symmetry import symmetry
from vfx.api import collect, merge, trace
from vfx.elements.parts import rows_of
from vfx.emit.module import emit
from vfx.files import write_atomic
from vfx.models.training import predict
from vfx.program import Program, Weights

CALIBRATION, BATCH, SAMPLES = 2000, 128, 2000
MATCHES = (None, "weight", "activation")
NORMALIZATIONS = (None, "repair")
FORMS = ("as trained", "balanced")
console = Console(stderr=True)


def measure(pair: Pair, form: str, checkpoints: Path, data: Path, samples: int, seeds: int) -> dict[str, Any]:
    """All cells of one pair, in one form."""
    train, _ = fashion_mnist(data, "train", CALIBRATION)
    images, labels = fashion_mnist(data, "test", samples)
    program = trace(pair.edges(checkpoints), train[:2])
    if pair.batch_norm:
        program = FoldNormalization(batch_norm=True)(program)
    if form == "balanced":
        program = BalanceScales()(program)
    statistics = collect(program, data=train.split(BATCH), progress=False)
    edges = [_score(emit(program, edge)[0], images, labels) for edge in range(program.edges)]
    cells = []
    for match in MATCHES:
        for normalize in NORMALIZATIONS:
            scores = []
            for seed in range(seeds if match == "weight" and normalize else 1):
                result = merge(
                    program, data=train.split(BATCH), statistics=statistics, match=match, classes="permutation",
                    normalize=normalize, seed=seed, progress=False,
                )  # fmt: skip
                scores.append(_score(result.module, images, labels))
            cells.append({"match": match, "normalize": normalize, "runs": scores, **_mean(scores)})
    return {"edges": edges, "spread": _spread(program), "test_images": len(images), "cells": cells}


def _score(module: torch.nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    logits = predict(module, images, 250)
    accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": round(accuracy, 2), "loss": round(F.cross_entropy(logits, labels).item(), 4)}


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    return {what: round(sum(score[what] for score in scores) / len(scores), 4) for what in scores[0]}


def _spread(program: Program) -> list[float]:
    """Of each edge."""
    places = Scales(symmetry(program), mixed=True).places.values()
    found = []
    for weights in program.weights:
        logs = [ratio for own in places for ratio in _ratios(weights, own)]
        found.append(round(float(torch.cat(logs).abs().mean()), 4))
    return found


def _ratios(weights: Weights, places: list[Place]) -> Iterator[Tensor]:
    """log of what writes a channel over what reads it, of the channels where both are there."""
    sums: dict[tuple[int, bool], Any] = defaultdict(float)
    for place in places:
        for part in place.parts:
            squares = rows_of(weights[place.fqn], place.dim, part).square().sum(1)
            sums[part.block, place.exponent > 0] += squares
    for block in {block for block, _ in sums}:
        up, down = sums[block, True], sums[block, False]
        alive = (up > 0) & (down > 0)
        yield 0.5 * (up[alive].log() - down[alive].log())


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Balanced scales before matching, α = 0.5",
        "",
        "Accuracy in percent (its barrier: mean of the edges less the midpoint) and loss barrier on the first test",
        "images of Fashion-MNIST; matching and calibration on the first 2,000 training images. BatchNorm is folded in",
        "both forms. A range is that of several runs of weight matching, the figure their mean. Imbalance: mean over",
        "channels of |log ‖W_in‖/‖W_out‖|. Written by `python -m benchmarks.balance`.",
        "",
    ]
    for name, forms in results.items():
        first = next(iter(forms.values()))
        edges = " / ".join(f"{edge['accuracy']:.2f}" for edge in first["edges"])
        lines += [f"## {name} ({first['test_images']:,} test images, edges {edges} %)", ""]
        head = ["matching", "normalization", *(f"{form}: {what}" for form in forms for what in ("accuracy", "loss"))]
        rows = []
        for index, cell in enumerate(first["cells"]):
            row = [cell["match"] or "direct", {None: "none", "repair": "REPAIR"}[cell["normalize"]]]
            for found in forms.values():
                row += _barriers(found["edges"], found["cells"][index])
            rows.append(row)
        lines += [*grid(head, rows), ""]
        spread = "; ".join(
            f"{form}: " + " / ".join(f"{s:.3f}" for s in found["spread"]) for form, found in forms.items()
        )
        lines += [f"Imbalance of the edges, {spread}.", ""]
    return "\n".join(lines)


def _barriers(edges: list[dict[str, float]], cell: dict[str, Any]) -> list[str]:
    accuracy, loss = (sum(edge[what] for edge in edges) / len(edges) for what in ("accuracy", "loss"))
    runs = [run["accuracy"] for run in cell.get("runs", [cell])]
    spread = f", {min(runs):.1f}–{max(runs):.1f}" if len(runs) > 1 else ""
    return [f"{cell['accuracy']:.2f} ({accuracy - cell['accuracy']:.2f}{spread})", f"{cell['loss'] - loss:.3f}"]


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    samples: Annotated[int, typer.Option(help="Test images to use.")] = SAMPLES,
    seeds: Annotated[int, typer.Option(help="Runs of weight matching with REPAIR: its order is random.")] = 1,
    fresh: Fresh = False,
    render: Render = False,
) -> None:
    """Merge the trained pairs as they are and with balanced scales; write balance.json and balance.md."""
    unknown = sorted(set(pair or ()) - set(PAIRS))
    if unknown:
        raise typer.BadParameter(f"no pair {unknown[0]!r}; there are {', '.join(PAIRS)}")
    torch.set_num_threads(1)
    run([] if render else pair or list(PAIRS), fresh, checkpoints, data, output, samples, seeds)


def run(names: list[str], fresh: bool, checkpoints: Path, data: Path, output: Path, samples: int, seeds: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    file = output / "balance.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    todo = [(name, form) for name in names for form in FORMS if fresh or form not in results.get(name, {})]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("balance", total=len(todo))
        for name, form in todo:
            progress.update(task, description=f"{name} {form}")
            results.setdefault(name, {})[form] = measure(PAIRS[name], form, checkpoints, data, samples, seeds)
            results = {p: {f: results[p][f] for f in FORMS if f in results[p]} for p in PAIRS if p in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            progress.advance(task)
    write_atomic(output / "balance.md", markdown(results))


if __name__ == "__main__":
    command(main)
