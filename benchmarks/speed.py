"""Speed against targets, as ratios to bare forward passes: each the median over interleaved rounds in one process.

- statistics: ``collect`` of the features of both edges, without assignments, against two bare forward passes, one of
  each edge, over the same batches;
- capture: ``trace`` and ``symmetry`` of ResNet50, in seconds;
- merge + REPAIR: ``merge(normalize="repair")`` with activation matching, that is statistics of features and layers,
  assignment, alignment, averaging, calibration and folding, against three bare forward passes;
- calibration: layer-by-layer REPAIR of VGG16 (exact statistics and affines, without folding) against one bare forward
  pass over the same batches; beside it the loop that runs the whole network anew for each layer, and the largest
  relative difference between what the two give; and the same with all activations spilled to disk;
- folded: forward of the merged network, its normalization folded away, against an edge's.

Left out of "merge + REPAIR": trace and symmetry (their own row), proofs (``verify=False``) and emission, which compares
the module with the graph in float64. Weights are random; times are of the CPU unless ``--device`` says otherwise.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics as stats
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from vfx.passes.align import Align
from vfx.passes.calibrate_normalization import CalibrateNormalization
from vfx.passes.fold_normalization import FoldNormalization
from vfx.passes.insert_normalization import InsertNormalization
from vfx.passes.interpolate import Interpolate

from benchmarks.fashion import RESULTS
from benchmarks.options import Device, Output
from vfx.analyse.layers import number_layers
from vfx.api import compile as run_passes
from vfx.api import merge, symmetry, trace
from vfx.emit.module import emit
from vfx.files import write_atomic
from vfx.match.activation import ActivationMatching
from vfx.match.matcher import Problem
from vfx.models import MODELS
from vfx.program import Program
from vfx.statistics.collect import collect
from vfx.statistics.moments import Moments, batch_moments

BATCH, FOLDED = 128, 4
console = Console()


@dataclass(frozen=True)
class Row:
    """One measured figure; ``seconds`` are the medians of what was divided."""

    name: str
    unit: str
    measured: float
    target: float | None
    seconds: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        return "" if self.target is None else "ok" if self.measured <= self.target else "missed"


@dataclass(frozen=True)
class Workload:
    """Two edges of one architecture and the batches they read."""

    name: str
    target: float
    side: int
    images: int

    def edges(self, device: str) -> list[nn.Module]:
        torch.manual_seed(0)
        if self.name == "resnet50":
            return [torchvision.models.resnet50().eval().to(device) for _ in range(2)]
        return [MODELS[self.name]().eval().to(device) for _ in range(2)]

    def batches(self, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return list(torch.randn(self.images, 3, self.side, self.side, generator=generator).to(device).split(BATCH))


WORKLOADS = (
    Workload("vgg16", 1.5, 32, 2 * BATCH),
    Workload("resnet20_bn", 1.5, 32, 8 * BATCH),
    Workload("resnet50", 2.2, 64, BATCH),
)


class Clock:
    """Runs functions in turns, so that a busy machine slows all of them alike."""

    def __init__(self, rounds: int, device: str):
        self.rounds, self.device = rounds, device

    def __call__(self, *functions: Callable[[], object]) -> list[list[float]]:
        """Seconds of each function in each round, after one unmeasured round."""
        times: list[list[float]] = [[] for _ in functions]
        for turn in range(self.rounds + 1):
            for own, function in zip(times, functions):
                seconds = self.once(function)
                if turn:
                    own.append(seconds)
        return times

    def once(self, function: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def ratio(name: str, target: float | None, measured: Sequence[float], base: Sequence[float]) -> Row:
    """The median of the rounds' ratios."""
    value = stats.median(a / b for a, b in zip(measured, base))
    return Row(name, "×", round(value, 3), target, (round(stats.median(measured), 4), round(stats.median(base), 4)))


def forward(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            for model in models:
                model(batch)


# the rows -----------------------------------------------------------------------------------------------------------


def statistics_rows(clock: Clock, work: Workload) -> Iterator[Row]:
    edges, batches = work.edges(clock.device), work.batches(clock.device)
    program = trace(edges, batches[0][:2])
    facts = symmetry(program)

    def features() -> Any:
        return collect(program, facts, batches, layers=False, progress=False)

    bare, measured = clock(lambda: forward(edges, batches), features)
    yield ratio(f"statistics {work.name}", work.target, measured, bare)
    found = features()
    seconds = clock.once(lambda: ActivationMatching()(Problem(program, facts, found)))
    yield Row(f"assignment {work.name}", "s", round(seconds, 3), None)


def capture_rows(clock: Clock, side: int = 224) -> Iterator[Row]:
    model = torchvision.models.resnet50().eval()
    example = torch.randn(2, 3, side, side)
    (seconds,) = clock(lambda: symmetry(trace(model, example)))
    yield Row("capture + symmetry resnet50", "s", round(stats.median(seconds), 3), 6.0)


def merge_rows(clock: Clock, work: Workload) -> Iterator[Row]:
    edges, batches = work.edges(clock.device), work.batches(clock.device)
    program = trace(edges, batches[0][:2])
    symmetry(program)
    parts: list[dict[str, float]] = []

    def repair() -> None:
        parts.append(merged(program, batches, "repair", verify=False).report.seconds)

    bare, whole = clock(lambda: forward([*edges, edges[0]], batches), repair)
    parts = parts[1:]
    left_out = [sum(one.get(stage, 0.0) for stage in ("trace", "symmetry", "emit")) for one in parts]
    yield ratio("merge + REPAIR vgg16", 1.5, [a - b for a, b in zip(whole, left_out)], bare)
    for stage in parts[0]:
        yield Row(f"  {stage}", "s", round(stats.median(one[stage] for one in parts), 3), None)


def calibration_rows(clock: Clock, work: Workload) -> Iterator[Row]:
    edges, batches = work.edges(clock.device), work.batches(clock.device)
    program = trace(edges, batches[0][:2])
    statistics = collect(program, symmetry(program), batches, features=False, progress=False)
    merged = Interpolate()(Align(None, statistics=statistics)(program))
    inserted = InsertNormalization(verify=False)(merged)
    network, _ = emit(merged)

    def exact(memory_limit: int | None = None) -> Program:
        return CalibrateNormalization("repair", batches, memory_limit=memory_limit, progress=False)(inserted)

    def naive() -> nn.Module:
        return naive_repair(copy.deepcopy(network), merged, batches)

    bare, measured, spilled, loop = clock(lambda: forward([network], batches), exact, lambda: exact(0), naive)
    yield ratio(f"calibration {work.name}", work.target, measured, bare)
    yield ratio("  spilled to disk", None, spilled, bare)
    yield ratio("  naive loop", None, loop, bare)
    with torch.no_grad():
        ours, theirs = run_passes(exact(), passes=[]).module(batches[0]), naive()(batches[0])
    yield Row("  difference to the loop", "", float((ours - theirs).abs().max() / theirs.abs().max()), 1e-5)


@torch.no_grad()
def naive_repair(network: nn.Module, merged: Program, batches: Sequence[Tensor]) -> nn.Module:
    """REPAIR by its definition: for each layer a forward pass of the whole network over all data."""
    for layer in number_layers(merged).select():
        module = network.get_submodule(layer.fqn)
        total = Moments(module.bias.numel(), module.bias.device)  # type: ignore[union-attr, operator]
        hook = module.register_forward_hook(lambda _, __, x, total=total: _observe(total, x))
        forward([network], batches)
        hook.remove()
        goal = merged.goals[layer.node]
        scale = goal.std[0] / total.std
        shift = goal.mean[0] - total.mean * scale
        module.weight.mul_(scale.reshape(-1, 1, 1, 1).to(module.weight))  # type: ignore[union-attr, operator]
        module.bias.copy_(module.bias.double() * scale + shift)  # type: ignore[union-attr, operator]
    return network


def _observe(total: Moments, x: Tensor) -> None:
    total.update(*batch_moments(x, 1))


def folded_rows(clock: Clock) -> Iterator[Row]:
    for name, normalize in (("vgg16", "repair"), ("vgg16_bn", "reset")):
        yield folded_row(clock, Workload(name, 1.05, 32, BATCH), normalize)


def folded_row(clock: Clock, work: Workload, normalize: str) -> Row:
    edges, batches = work.edges(clock.device), work.batches(clock.device)
    result = merged(trace(edges, batches[0][:2]), batches, normalize)
    if normalize == "reset":
        result = run_passes(result.program, passes=[FoldNormalization(batch_norm=True)])
    many = Clock(FOLDED * clock.rounds, clock.device)  # single forward passes vary more, and cost less
    edge, folded = many(lambda: forward(edges[:1], batches), lambda: forward([result.module], batches))
    return ratio(f"folded merged {work.name}", work.target, folded, edge)


def merged(program: Program, batches: Sequence[Tensor], normalize: str, verify: bool = True) -> Any:
    return merge(program, data=batches, match="activation", normalize=normalize, verify=verify, progress=False)


# running ------------------------------------------------------------------------------------------------------------


def stages(clock: Clock) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    found: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (f"statistics {work.name}", lambda work=work: statistics_rows(clock, work))  # type: ignore[misc]
        for work in WORKLOADS
    ]
    found.append(("capture", lambda: capture_rows(clock)))
    found.append(("merge", lambda: merge_rows(clock, Workload("vgg16", 1.5, 32, 4 * BATCH))))
    found.append(("calibration", lambda: calibration_rows(clock, Workload("vgg16", 1.6, 32, 4 * BATCH))))
    return [*found, ("folded", lambda: folded_rows(clock))]


def show(rows: Sequence[Row]) -> Table:
    table = Table(title="speed")
    for column in ("", "target", "measured", "", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:g} {row.unit}"
        colour = {"ok": "[green]ok", "missed": "[red]missed"}.get(row.verdict, "")
        seconds = " / ".join(f"{value:.2f}" for value in row.seconds)
        table.add_row(row.name, target, f"{row.measured:.3f} {row.unit}", colour, seconds)
    return table


def main(
    rounds: Annotated[int, typer.Option(help="Measured rounds of each comparison.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 2,
    device: Device = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Only stages whose name holds this (may be repeated).")] = None,
    output: Output = RESULTS,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if a target is missed.")] = False,
) -> None:
    """Measure the targets of speed and print a table."""
    if threads:
        torch.set_num_threads(threads)
    clock = Clock(rounds, device)
    chosen = [(name, stage) for name, stage in stages(clock) if not only or any(word in name for word in only)]
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("speed", total=len(chosen))
        for name, stage in chosen:
            progress.update(task, description=name)
            rows += stage()
            progress.advance(task)
    console.print(show(rows))
    if not only:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "speed.json", json.dumps(document(rows, rounds, device), indent=1) + "\n")
        console.print(f"wrote {output / 'speed.json'}")
    if strict and any(row.verdict == "missed" for row in rows):
        raise typer.Exit(1)


def document(rows: Sequence[Row], rounds: int, device: str) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
        "rounds": rounds,
        "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
    }


if __name__ == "__main__":
    typer.run(main)
