"""Which target and which measure choose best between the candidates of a merge, without labels.

For each trained Fashion-MNIST pair the default call's deepest candidates (layers solved behind layer k of edge 0 or 1;
the edges as they are) are made from two in three of the first 2,000 training images, and scored on the others: by the
divergence of their logits (scaled to fit) from a target, by the target's probability of what they decide, and by how
often they decide as the target does. Targets: the arithmetic mean of the edges' probabilities, as they are, softened
by a temperature T, or with both edges scaled to one entropy or one mean confidence; the geometric mean, which is the
softmax of the mean logits; and the arithmetic mean over all candidates. A cell says which candidate is chosen by
``vfx.choice.best`` and its accuracy on the 10,000 test images when made of all 2,000 (from solving.json, where that is
measured). "bootstrap" takes what is chosen most often in 200 resamples of the held-out images.

Results go to ``benchmarks/results``: judging.json and judging.md. Logits of held-out images are kept in ``--cache``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from scipy.optimize import brentq
from torch import Tensor

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, MissingData, fashion_mnist
from benchmarks.options import Checkpoints, DataFolder, Output
from benchmarks.pairs_report import grid
from vfx.analyse.layers import number_layers
from vfx.api import collect, merge, trace
from vfx.api.reconstructing import SHARES
from vfx.choice import best
from vfx.files import write_atomic
from vfx.judge import EVERY, HeldOutScore, _logits_loss
from vfx.models.training import predict

CALIBRATION, RESAMPLES = 2000, 200
Logits = dict[str, Tensor]  # of held-out images, by candidate
console = Console(stderr=True)


# targets and measures -----------------------------------------------------------------------------------------------


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack([x.softmax(1) for x in logits]).mean(0)


def _entropy(logits: Tensor) -> float:
    return float(-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean())


def _confidence(logits: Tensor) -> float:
    return float(logits.softmax(1).amax(1).mean())


def _balanced(edges: list[Tensor], figure: Callable[[Tensor], float]) -> Tensor:
    """The mean probabilities of edges scaled so that all have the same ``figure``."""
    level = sum(figure(x) for x in edges) / len(edges)
    scales = [float(brentq(lambda s, x=x: figure(x * 2.0**s) - level, -10, 10)) for x in edges]
    return _mean([x * 2.0**s for x, s in zip(edges, scales)])


def targets(edges: list[Tensor], everything: Logits) -> dict[str, Tensor]:
    """Probabilities (N, classes) that candidates are held against."""
    return {
        "arithmetic": _mean(edges),
        "arithmetic, T = 2": _mean([x / 2 for x in edges]),
        "arithmetic, T = 4": _mean([x / 4 for x in edges]),
        "one entropy": _balanced(edges, _entropy),
        "one confidence": _balanced(edges, _confidence),
        "geometric": torch.stack(edges).mean(0).softmax(1),
        "all candidates": _mean(list(everything.values())),
    }


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # loss of each sample
    "divergence": lambda logits, target: _logits_loss(logits, target)[0],
    "probability": lambda logits, target: -target.gather(1, logits.argmax(1, keepdim=True))[:, 0],
    "agreement": lambda logits, target: -(logits.argmax(1) == target.argmax(1)).double(),
}


def choose(losses: dict[str, Tensor]) -> str:
    scores = {name: HeldOutScore(float(x.mean()), samples=x) for name, x in losses.items()}
    return best(scores, [name for name in scores if name.startswith("edge")], [])


def bootstrapped(losses: dict[str, Tensor]) -> str:
    generator, count = torch.Generator().manual_seed(0), len(next(iter(losses.values())))
    rows = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES)]
    return Counter(choose({name: x[own] for name, x in losses.items()}) for own in rows).most_common(1)[0][0]


def judged(edges: list[Tensor], solved: Logits) -> dict[str, dict[str, str]]:
    """What each target and measure choose, and what the bootstrap does, by ``target/measure``."""
    edges = [x.double() for x in edges]
    everything = {name: x.double() for name, x in solved.items()} | {f"edge {i}": x for i, x in enumerate(edges)}
    found = {}
    for title, target in targets(edges, everything).items():
        for name, measure in MEASURES.items():
            losses = {candidate: measure(x, target) for candidate, x in everything.items()}
            found[f"{title}/{name}"] = {"chosen": choose(losses), "bootstrap": bootstrapped(losses)}
    return found


# candidates ---------------------------------------------------------------------------------------------------------


def candidates(name: str, checkpoints: Path, data: Path) -> tuple[list[Tensor], Logits]:
    """The held-out logits of the edges, and of the candidates made from the other images."""
    models = PAIRS[name].edges(checkpoints)
    images, _ = fashion_mnist(data, "train", CALIBRATION)
    held = (torch.arange(len(images)) + 1) % EVERY == 0
    program = trace(models, images[:2])
    statistics = collect(program, data=images, progress=False)  # edges are aligned by all images
    total = len(number_layers(program))
    options: dict[str, Any] = {"data": images[~held], "statistics": statistics, "solve": "least_squares"}
    found = {}
    for edge in range(len(models)):
        for depth in (total - 1, total - 2, round(total * max(SHARES))):
            merged = merge(program, follow=depth, follow_edge=edge, progress=False, **options)
            found[f"layer {depth} of edge {edge}"] = predict(merged.module, images[held], 250)
    return [predict(model, images[held], 250) for model in models], found


def cached(name: str, folder: Path, checkpoints: Path, data: Path) -> tuple[list[Tensor], Logits]:
    """What ``candidates`` gives, measured once."""
    file = folder / f"{name}.pt"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(candidates(name, checkpoints, data), file)
    edges, solved = torch.load(file, weights_only=True)
    return edges, solved


# results ------------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any], accuracies: dict[str, dict[str, float]]) -> str:
    lines = ["# How to judge without labels", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]  # type: ignore

    def shown(pair: str, cell: dict[str, str]) -> str:
        parts = []
        for way, name in cell.items():
            accuracy = accuracies.get(pair, {}).get(name)
            parts.append(name + (f" ({accuracy:.2f})" if accuracy is not None else ""))
            if way == "chosen" and cell["bootstrap"] == name:
                break
        return "; bootstrap: ".join(parts)

    keys = list(dict.fromkeys(key for cells in results.values() for key in cells))
    rows = [[*key.split("/"), *(shown(pair, cells[key]) for pair, cells in results.items())] for key in keys]
    return "\n".join([*lines, *grid(["target", "measure", *results], rows), ""])


def measured(file: Path) -> dict[str, dict[str, float]]:
    """Test accuracies of candidates made from all images, by pair."""
    solving: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return {
        pair: {name.removeprefix("least squares behind "): x for name, x in found["candidates"].items()}
        for pair, found in solving.items()
    }


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    cache: Annotated[Path, typer.Option(help="Folder for logits.")] = Path("build/judging"),
) -> None:
    """Let every target and measure choose for the trained pairs, and write judging.json and judging.md."""
    torch.set_num_threads(1)
    file = output / "judging.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    try:
        for name in pair or list(PAIRS):
            console.print(name)
            results[name] = judged(*cached(name, cache, checkpoints, data))
            results = {known: results[known] for known in PAIRS if known in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(file.with_suffix(".md"), markdown(results, measured(output / "solving.json")))
    except MissingData as error:
        console.print(f"[red]nothing measured:[/] {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
