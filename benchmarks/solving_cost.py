"""What reconstruction costs: time against bare forward passes, and memory against the number of samples.

- time: ``Reconstruct`` of the average of two VGG16 (random weights) against three forward passes over the same images,
  the two edges' and the average's, as the graph runs them; both in one process, the median of interleaved rounds;
- memory: the peak above what the process held before, at 1,000 and at 8,000 images, each in a process of its own, with
  all activations that wait for other batches on disk (``memory_limit=0``); the images themselves are made batch by
  batch; the median of interleaved rounds.

Results go to ``benchmarks/results``: solving_cost.json and solving_cost.md.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from vfx.passes.interpolate import Interpolate
from vfx.passes.reconstruct import Reconstruct

from benchmarks.fashion import RESULTS
from benchmarks.memory import current_memory, peak_memory, reset_peak_memory
from benchmarks.options import Output
from benchmarks.pairs_report import grid
from vfx.api import trace
from vfx.files import write_atomic
from vfx.models import vgg16
from vfx.program import Program

BATCH, SIDE, IMAGES = 128, 32, 2000
WIDTHS, FEW, MANY = (0.25, 1.0), 1000, 8000
TIME, MEMORY = 4.0, 1.2  # targets
console = Console(stderr=True)


def edges(width: float) -> Program:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(vgg16(width=width).eval())
    return trace(models, torch.zeros(2, 3, SIDE, SIDE))


class Images:
    """A loader of random images that holds one batch at a time."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return -(-self.count // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, BATCH):
            yield torch.randn(min(BATCH, self.count - start), 3, SIDE, SIDE, generator=generator)


def clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def measure_time(width: float, rounds: int) -> dict[str, Any]:
    program = edges(width)
    average, batches = Interpolate()(program), list(Images(IMAGES))
    solve = Reconstruct(program, batches, centre="references", progress=False)

    def forward() -> None:
        for batch in batches:
            for network in (program.select(0), program.select(1), average):
                network(batch)

    forward()
    pairs = [(clock(forward), clock(lambda: solve(average))) for _ in range(rounds)]
    return {
        "forward": round(statistics.median(a for a, _ in pairs), 2),
        "solve": round(statistics.median(b for _, b in pairs), 2),
        "ratios": [round(b / a, 2) for a, b in pairs],
    }


def measure_memory(count: int) -> int:
    """MiB above what was resident before."""
    torch.set_num_threads(1)
    program = edges(0.25)
    average = Interpolate()(program)
    Reconstruct(program, Images(BATCH), memory_limit=0, progress=False)(average)  # what the libraries load once
    reset_peak_memory()
    before = current_memory()
    Reconstruct(program, Images(count), memory_limit=0, progress=False)(average)
    return peak_memory() - before


def markdown(found: dict[str, Any]) -> str:
    lines = ["# What reconstruction costs", "", *(__doc__ or "").split("\n\n")[1].splitlines(), ""]
    rows = []
    for name, row in found["time"].items():
        value = statistics.median(row["ratios"])
        spread = f"{value:.2f}× ({min(row['ratios']):.2f}–{max(row['ratios']):.2f})"
        rows.append([name, f"{row['solve']} s / {row['forward']} s", spread, _verdict(value, TIME)])
    if "memory" in found:
        few, many = (statistics.median(found["memory"][str(count)]) for count in (FEW, MANY))
        value = many / max(few, 1)
        rows.append(["memory", f"{many:.0f} MiB / {few:.0f} MiB", f"{value:.2f}×", _verdict(value, MEMORY)])
    return "\n".join([*lines, *grid(["", "measured", "ratio", "target"], rows), ""])


def _verdict(value: float, target: float) -> str:
    return f"≤ {target:g}×: {'ok' if value <= target else 'missed'}"


def main(
    output: Output = RESULTS,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 3,
    wide: Annotated[bool, typer.Option(help="Measure the whole VGG16, too (minutes).")] = True,
    memory: Annotated[bool, typer.Option(help="Measure memory, too.")] = True,
) -> None:
    """Measure time and memory and write solving_cost.json and solving_cost.md."""
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "time": {}}
    for width in WIDTHS[: 1 + wide]:
        found["time"][f"VGG16 ×{width:g}, {IMAGES:,} images"] = measure_time(width, rounds if width < 1 else 1)
        console.print(found["time"])
    if memory:
        found["memory"] = {str(count): [] for count in (FEW, MANY)}
        for count in (FEW, MANY) * rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found["memory"][str(count)].append(pool.submit(measure_memory, count).result())
        console.print(found["memory"])
    write_atomic(output / "solving_cost.json", json.dumps(found, indent=1) + "\n")
    write_atomic(output / "solving_cost.md", markdown(found))


if __name__ == "__main__":
    typer.run(main)
