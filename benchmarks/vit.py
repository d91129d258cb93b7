"""Two vision transformers from different seeds on scikit-learn's digits: does alignment help their average?

Both are trained here (a third of ViT-Ti's width, six blocks, AdamW) and kept in ``--cache``. Matching and normalization
read the training images; accuracy is over the 500 test images. Results go to ``benchmarks/results``: vit.json, vit.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fashion import RESULTS
from benchmarks.options import Cache, Output
from benchmarks.pairs_report import grid
from vfx.analyse.verify import verify
from vfx.api import collect, merge, symmetry, trace
from vfx.data import digits
from vfx.files import write_atomic
from vfx.models import Training, ViT, fit, predict, vit_tiny

WIDTH, EPOCHS, LR = 1 / 3, 60, 1e-3
ALPHAS = (0.25, 0.5, 0.75)
MATCHES = (None, "weight", "activation")
NORMALIZATIONS = (None, "rescale", "repair")
console = Console(stderr=True)


def trained(seed: int, data: tuple[Tensor, ...], cache: Path, epochs: int) -> ViT:
    """One network, from the cache if it is there."""
    torch.manual_seed(seed)
    model = vit_tiny(width=WIDTH, in_channels=1)
    file = cache / f"vit_digits_e{epochs}_s{seed}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    fit(model, data[0], data[1], Training(epochs, LR, weight_decay=0.05, seed=seed, adam=True))
    cache.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model


def score(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in % and mean cross-entropy."""
    logits = predict(model, images)
    right = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": round(100 * right, 2), "loss": round(float(F.cross_entropy(logits, labels)), 4)}


def cells() -> Iterator[tuple[str | None, str | None, float, int]]:
    """match, normalize, α, preserved layers."""
    for match in MATCHES:
        for normalize in NORMALIZATIONS:
            for alpha in ALPHAS if normalize is None else (0.5,):
                yield match, normalize, alpha, 0
        for preserve in (7, 13, 19):
            yield match, None, 0.5, preserve


def measure(edges: list[ViT], data: tuple[Tensor, ...]) -> dict[str, Any]:
    train, _, images, labels = data
    program = trace(edges, train[:2])
    facts = symmetry(program)
    statistics = collect(program, data=train, progress=True)
    found = []
    chosen = list(cells())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for match, normalize, alpha, preserve in progress.track(chosen, description="merges"):
            options: dict[str, Any] = {"match": match, "normalize": normalize, "weights": alpha, "preserve": preserve}
            result = merge(program, data=train, statistics=statistics, classes="permutation", progress=False, **options)
            found.append(options | score(result.module, images, labels))
    return {
        "groups": len(facts.groups),
        "channels": facts.channels,
        "inside_blocks": sum(group.parent is not None for group in facts.groups),
        "verify": verify(facts),
        "edges": [score(edge, images, labels) for edge in edges],
        "merges": found,
    }


def markdown(result: dict[str, Any]) -> str:
    """One row a merge."""
    rows = [
        [f"edge {k + 1}", "", "", "", f"{e['accuracy']:.2f}", f"{e['loss']:.3f}"] for k, e in enumerate(result["edges"])
    ]
    for cell in result["merges"]:
        row = [cell["match"] or "direct", cell["normalize"] or "", f"{cell['weights']}", str(cell["preserve"])]
        rows.append([*row, f"{cell['accuracy']:.2f}", f"{cell['loss']:.3f}"])
    head = ["match", "normalization", "α", "preserved layers", "accuracy %", "loss"]
    text = (__doc__ or "").strip()
    facts = (
        f"{result['groups']} groups, {result['channels']:,} channels, {result['inside_blocks']} groups inside the "
        f"blocks of another (attention heads); verification error {result['verify']:.1e} in float64."
    )
    return "\n".join(["# Two vision transformers", "", text, "", facts, "", *grid(head, rows), ""])


def main(
    cache: Cache = Path("demo"),
    output: Output = RESULTS,
    epochs: Annotated[int, typer.Option(help="Epochs of training.", min=1)] = EPOCHS,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 2,
) -> None:
    """Train two ViTs (or take them from the cache), merge them in every way, and write the table."""
    torch.set_num_threads(threads)
    data = digits()
    result = measure([trained(seed, data, cache, epochs) for seed in (0, 1)], data)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "vit.json", json.dumps(result, indent=1) + "\n")
    write_atomic(output / "vit.md", markdown(result))
    console.print(f"wrote {output / 'vit.json'} and vit.md")


if __name__ == "__main__":
    typer.run(main)
