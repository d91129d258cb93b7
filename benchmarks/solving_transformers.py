"""Midpoints of transformers from different seeds, with and without reconstruction.

The pairs of ``benchmarks.transformers`` (ViT on digits and Fashion-MNIST, GPT-2 on characters; trained here and kept in
``--cache``), aligned by activations over the full classes, as they are or lifted: accuracy and loss
on test samples of the edges, of the plain average, of the average solved by least squares, and of the default call.

Results go to ``benchmarks/results``: solving_transformers.json and .md, written after each pair.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.fashion import FASHION_MNIST, RESULTS, command
from benchmarks.options import Cache, DataFolder, Output
from benchmarks.pairs_report import grid
from benchmarks.transformers import PAIRS, SAMPLES, Subject
from vfx.api import merge
from vfx.files import write_atomic

METHODS: dict[str, dict[str, Any]] = {
    "average": {"normalize": None},
    "solved": {"solve": "least_squares", "follow": 0},
    "default": {},
}
console = Console(stderr=True)


def markdown(results: dict[str, Any]) -> str:
    lines = ["# Midpoints of transformers, solved", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    rows = []
    for found in results.values():
        for edge, score in enumerate(found["edges"]):
            rows.append([found["title"] if not edge else "", f"edge {edge}", _text(score), ""])
        for method in METHODS:
            cells = [_text(found["cells"][f"{method}/{prepare}"]) for prepare in (None, "lift")]
            rows.append(["", method, *cells])
        for prepare in (None, "lift"):
            lines.append(
                f"{found['title']}, {prepare or 'as it is'}: {found['cells'][f'default/{prepare}']['outcome']}."
            )
            lines.append("")
    head = ["pair", "network", "accuracy (loss)", "accuracy (loss), lifted"]
    return "\n".join([*lines, *grid(head, rows), ""])


def _text(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.2f} % ({score['loss']:.3f})"


def main(
    cache: Cache = Path("demo"),
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
) -> None:
    """Merge the pairs and write solving_transformers.json and .md."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "solving_transformers.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for one in [PAIRS[name] for name in pair or PAIRS]:
        loaded = one.load(data)
        subject = Subject(one.edges(loaded, cache, one.epochs), loaded, one, SAMPLES)
        found: dict[str, Any] = {"title": one.title, "edges": subject.facts()["edges"], "cells": {}}
        for prepare in (None, "lift"):
            for method, options in METHODS.items():
                result = merge(subject.program, data=subject.calibration, prepare=prepare, progress=False, **options)
                accuracy, loss = subject.score(result.program)
                outcome = result.report.outcome
                found["cells"][f"{method}/{prepare}"] = {"accuracy": accuracy, "loss": loss, "outcome": outcome}
                console.print(one.title, method, prepare, accuracy, loss)
        results[one.name] = found
        write_atomic(file, json.dumps(results, indent=1) + "\n")
        write_atomic(output / "solving_transformers.md", markdown(results))


if __name__ == "__main__":
    command(main)
