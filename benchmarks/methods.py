"""Every alignment method on the trained Fashion-MNIST pairs: accuracy of the midpoint, time and memory of the matching.

Methods × {none, REPAIR (RESET with BatchNorm), RESCALE} × preserved layers; matching and calibration read the first
2,000 training images in order, accuracy is over the test images. Linear methods (ZipIt!, CCA, optimal transport) run on
the networks with BatchNorm folded. Each pair and method runs in a process of its own: seconds are the process's own
time on one thread, memory the peak above what the networks and their statistics took.

Results go to ``benchmarks/results``: methods.json and methods.md, written after each method; a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from vfx.passes.fold_normalization import FoldNormalization

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, Pair, command, fashion_mnist
from benchmarks.memory import current_memory, peak_memory, reset_peak_memory
from benchmarks.options import Checkpoints, DataFolder, Output, Samples
from benchmarks.pairs_report import grid
from vfx.api import collect, merge, symmetry, trace
from vfx.files import write_atomic
from vfx.match.catalogue import MATCHERS, matcher
from vfx.match.matcher import Known, Matcher, Matching, Problem
from vfx.match.transport import OptimalTransport
from vfx.match.zipit import ZipIt
from vfx.models.training import predict

CALIBRATION, BATCH = 2000, 128
NORMALIZATIONS = (None, "repair", "rescale")
LABELS = {None: "none", "repair": "REPAIR / RESET", "rescale": "RESCALE"}
# further settings of a method, by the name they are listed under
VARIANTS: dict[str, Callable[[], Matcher]] = {
    "ot, sinkhorn": lambda: OptimalTransport("sinkhorn"),
    "zipit, a = 0.3": lambda: ZipIt(a=0.3),
    "ot, weights": lambda: OptimalTransport(cost="weight"),
}
console = Console(stderr=True)


def methods() -> list[str]:
    """The names of all methods, direct merging first."""
    return ["none", *MATCHERS, *VARIANTS]


def build(name: str) -> Matcher | None:
    """A method's matcher."""
    return VARIANTS[name]() if name in VARIANTS else matcher(None if name == "none" else name, classes="permutation")


def measure(pair: Pair, name: str, checkpoints: Path, data: Path, samples: int | None) -> dict[str, Any]:
    """All cells of one method on one pair."""
    torch.set_num_threads(1)
    train, labels = fashion_mnist(data, "train", CALIBRATION)
    batches = list(zip(train.split(BATCH), labels.split(BATCH)))
    finder = build(name)
    program = trace(pair.edges(checkpoints), train[:2])
    if finder is not None and not finder.exact:
        program = FoldNormalization(batch_norm=True)(program)
    within = finder is not None and ("within" in finder.needs or not finder.exact)
    statistics = collect(program, data=batches, within=within, progress=False)
    result: dict[str, Any] = {}
    if finder is not None:
        problem = Problem(program, symmetry(program), statistics, data=batches)
        found, result = _timed(finder, problem)
        finder = Known(found, finder.needs - {"data"}, finder.exact)
    images, truth = fashion_mnist(data, "test", samples)
    result["test_images"] = len(images)
    result["cells"] = [
        _cell(program, finder, statistics, batches, cut, normalize, pair, images, truth)
        for normalize in NORMALIZATIONS
        for cut in pair.cuts
    ]
    return result


def _timed(finder: Matcher, problem: Problem) -> tuple[Matching, dict[str, Any]]:
    reset_peak_memory()
    before, start = current_memory(), time.process_time()
    found = finder(problem)
    seconds = time.process_time() - start
    return found, {"seconds": round(seconds, 2), "peak_mib": max(peak_memory() - before, 0)}


def _cell(
    program: Any, finder: Any, statistics: Any, batches: Any, cut: int, normalize: str | None, pair: Pair,
    images: Tensor, truth: Tensor,
) -> dict[str, Any]:  # fmt: skip
    folded = finder is not None and not finder.exact
    own = "reset" if normalize == "repair" and pair.batch_norm and not folded else normalize
    result = merge(
        program, data=batches, match=finder, statistics=statistics, normalize=own, preserve=cut, progress=False
    )
    right = predict(result.module, images, 250).argmax(1) == truth
    return {
        "preserve": cut,
        "normalize": normalize,
        "accuracy": round(100 * right.double().mean().item(), 2),
        "params_ratio": round(result.report.params_ratio, 4),
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Alignment methods on the trained pairs, α = 0.5",
        "",
        "Accuracy in percent on the first test images of Fashion-MNIST; matching and calibration on the first 2,000",
        "training images. l: the first l layers are kept for each edge. Seconds: the matching alone, processor time on",
        "one thread, behind statistics collected once; MiB: its peak above networks and statistics. Linear methods run",
        "on networks whose BatchNorm is folded. Written by `python -m benchmarks.methods`.",
        "",
    ]
    for name, pair in results.items():
        cuts = PAIRS[name].cuts
        rows = []
        for method, found in pair.items():
            for normalize in NORMALIZATIONS:
                own = {cell["preserve"]: cell for cell in found["cells"] if cell["normalize"] == normalize}
                costs = [str(found.get("seconds", "")), str(found.get("peak_mib", ""))] if not normalize else ["", ""]
                row = [method if not normalize else "", LABELS[normalize]]
                rows.append([*row, *(f"{own[cut]['accuracy']:.2f}" for cut in cuts), *costs])
        head = ["method", "normalization", *(f"l = {cut}" for cut in cuts), "seconds", "MiB"]
        images = ", ".join(f"{count:,}" for count in sorted({found["test_images"] for found in pair.values()}))
        lines += [f"## {name} ({images} test images)", "", *grid(head, rows), ""]
    return "\n".join(lines)


def main(
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    pair: Annotated[list[str] | None, typer.Option(help="Only this pair (may be repeated).")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method, measured anew (may be repeated).")] = None,
    samples: Samples = None,
) -> None:
    """Merge the trained pairs by every method and write methods.json and methods.md."""
    for chosen, known in ((pair, PAIRS), (method, methods())):
        unknown = sorted(set(chosen or ()) - set(known))
        if unknown:
            raise typer.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(known)}")
    output.mkdir(parents=True, exist_ok=True)
    run(pair or list(PAIRS), method or methods(), method is not None, checkpoints, data, output, samples)


def run(
    pairs: Sequence[str], names: Sequence[str], fresh: bool, checkpoints: Path, data: Path, output: Path,
    samples: int | None,
) -> None:  # fmt: skip
    file = output / "methods.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    todo = [(p, m) for p in pairs for m in names if fresh or m not in results.get(p, {})]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("methods", total=len(todo))
        for p, m in todo:
            progress.update(task, description=f"{p} {m}")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, PAIRS[p], m, checkpoints, data, samples).result()
            results.setdefault(p, {})[m] = found
            results = {p: {m: results[p][m] for m in methods() if m in results[p]} for p in PAIRS if p in results}
            write_atomic(file, json.dumps(results, indent=1) + "\n")
            write_atomic(output / "methods.md", markdown(results))
            progress.advance(task)


if __name__ == "__main__":
    command(main)
