"""One-shot pruning of trained networks: accuracy over sparsity for every score, with and without repair.

The networks are VGG16-BN, ResNet20 and ResNet20-LN trained on scikit-learn's digits (kept in ``--cache``) and the first
VGG16-BN and ResNet20 of the trained Fashion-MNIST pairs. Scores read training images with their labels: 400 for
diagonal Fisher and WoodFisher, 128 for Wanda; the repair reads the first 64 (128, 256) of them: nets with BatchNorm are
RESET, the LayerNorm net is REPAIRed. "Solved" is least squares within the mask for the dense network's outputs on the
first 512 images, without their labels. Cells that are in ``pruning.json`` already are not measured again.

``--woodfisher`` measures WoodFisher's time and memory on VGG16-BN ×0.25 in a process of its own. Results go to
``benchmarks/results``: pruning.json, pruning.md and pruning.png.
"""

from __future__ import annotations

import copy
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fashion import CHECKPOINTS, FASHION_MNIST, PAIRS, RESULTS, MissingData, command, fashion_mnist
from benchmarks.options import Cache, Checkpoints, DataFolder, Output, Render, Samples
from benchmarks.pruning_report import draw, markdown
from vfx.api import Result, prune, trace
from vfx.data import digits
from vfx.files import write_atomic
from vfx.models import MODELS, Training, accuracy, fit
from vfx.pruning.scores.once import ScoreOnce

ROUNDS = ((0.5, 0.8, 0.9, 0.95, 0.99), (0.1, 0.3, 0.6, 0.7), (0.2, 0.4))
SAMPLES = {"magnitude": 0, "fisher": 400, "woodfisher": 400, "wanda": 128}
METHODS = (
    ("magnitude", "global"),
    ("magnitude", "layer"),
    ("fisher", "global"),
    ("fisher", "layer"),
    ("woodfisher", "global"),
    ("woodfisher", "layer"),
    ("wanda", "row"),
)
REPAIRS = ("none", "64", "solved")  # samples of the repair, or the solve in its place
MORE_REPAIRS = ("128", "256")
SOLVED = 512  # samples of the solve
MORE_FOR = (("magnitude", "global"), ("wanda", "row"))
MORE_SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DIGITS = {"vgg16_bn": (0.25, 10, 0.1), "resnet20_bn": (0.5, 15, 0.1), "resnet20_ln": (0.5, 20, 0.05)}
BATCH = 64
console = Console(stderr=True)

Cell = tuple[str, str, str, float]


@dataclass(frozen=True)
class Net:
    """A trained network with its calibration and test data."""

    model: nn.Module
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def trained_on_digits(name: str, cache: Path) -> Net:
    """A network from the cache, or trained and put there."""
    width, epochs, rate = DIGITS[name]
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = MODELS[name](width=width, in_channels=1)
    file = cache / f"{name}_w{width:g}_digits_e{epochs}_s0.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        fit(model, x, y, Training(epochs, rate, batch_size=64))
        cache.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    return Net(model.eval(), x, y, test_x, test_y)


def trained_on_fashion(name: str, checkpoints: Path, data: Path, samples: int | None) -> Net:
    x, y = fashion_mnist(data, "train", 2000)
    return Net(PAIRS[name].edges(checkpoints)[0], x, y, *fashion_mnist(data, "test", samples))


def cells() -> Iterator[Cell]:
    """Score, scope, repair, sparsity: the telling sparsities first, one score after another in each."""
    for sparsities in ROUNDS:
        for score, scope in METHODS:
            for repair in REPAIRS:
                yield from ((score, scope, repair, sparsity) for sparsity in sparsities)
            if (score, scope) in MORE_FOR:
                high = [sparsity for sparsity in sparsities if sparsity in MORE_SPARSITIES]
                yield from ((score, scope, repair, sparsity) for repair in MORE_REPAIRS for sparsity in high)


def key(cell: Cell) -> str:
    score, scope, repair, sparsity = cell
    return f"{score}/{scope}/{repair}/{sparsity:g}"


class Sweep:
    """All cells of one network."""

    def __init__(self, net: Net):
        self.net = net
        self.program = trace(net.model, net.x[:2])
        self.data = list(zip(net.x.split(BATCH), net.y.split(BATCH)))
        self.images = net.test_x.contiguous(memory_format=torch.channels_last)
        self.score: ScoreOnce | None = None

    def dense(self) -> float:
        return self.accuracy(self.net.model)

    def measure(self, cell: Cell) -> dict[str, Any]:
        name, scope, repair, sparsity = cell
        if self.score is None or self.score.name != name:
            self.score = ScoreOnce(name)
            self.pruned(scope, sparsity, SAMPLES[name] or None)  # computes the scores from these samples, once
        if repair == "none":
            result = self.pruned(scope, sparsity, None)
        elif repair == "solved":
            result = self.pruned(scope, sparsity, SOLVED, solve="least_squares")
        else:
            result = self.pruned(scope, sparsity, None, repair_samples=int(repair), normalize="auto")
        return {
            "accuracy": self.accuracy(result.module),
            "sparsity": round(result.report.sparsity, 6),
            "nonzeros": result.report.nonzeros,
            "normalize": result.report.choices["normalize"],
        }

    def pruned(self, scope: str, sparsity: float, max_samples: int | None, **repair: Any) -> Result:
        options: dict[str, Any] = {"solve": None, "normalize": None} | repair
        return prune(
            self.program,
            sparsity=sparsity,
            score=self.score,
            scope=scope,
            data=self.data,
            max_samples=max_samples,
            verify=False,  # the tests prove the passes; here they run hundreds of times
            progress=False,
            **options,
        )

    def accuracy(self, module: nn.Module) -> float:
        own = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return round(100 * accuracy(own, self.images, self.net.test_y, 250), 2)


def measure(
    name: str, make: Callable[[], Net], results: dict[str, Any], save: Callable[[], None], limit: int | None
) -> None:
    """Fill the cells of one network that are not there yet, ``limit`` of them at most."""
    found = results.get(name, {"cells": {}})
    missing = [cell for cell in cells() if key(cell) not in found["cells"]][:limit]
    if not missing:
        return
    net = make()
    results[name] = found
    sweep = Sweep(net)
    found |= {"dense": sweep.dense(), "test_images": len(net.test_x)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        for cell in bar.track(missing, description=name):
            found["cells"][key(cell)] = sweep.measure(cell)
            save()


def woodfisher_cost() -> dict[str, Any]:
    """Seconds and peak memory of WoodFisher on VGG16-BN ×0.25 with 400 samples, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.pruning", "--woodfisher-process"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def woodfisher_process() -> dict[str, Any]:
    torch.manual_seed(0)
    model = MODELS["vgg16_bn"](width=0.25, in_channels=1).eval()
    x, y = torch.randn(400, 1, 32, 32), torch.randint(10, (400,))
    program = trace(model, x[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    result = prune(
        program, sparsity=0.9, score="woodfisher", data=list(zip(x.split(100), y.split(100))), normalize=None
    )
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "rss_before_gib": round(before / 2**20, 3),
        "weights": sum(row.params for row in result.report.layers),
        "samples": 400,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main(
    cache: Cache = Path("demo"),
    checkpoints: Checkpoints = CHECKPOINTS,
    data: DataFolder = FASHION_MNIST,
    output: Output = RESULTS,
    net: Annotated[list[str] | None, typer.Option(help="Only this network (may be repeated).")] = None,
    samples: Samples = None,
    limit: Annotated[int | None, typer.Option(help="Measure at most this many cells of each network.")] = None,
    threads: Annotated[int, typer.Option(help="Torch's threads; 0 leaves its choice.")] = 0,
    woodfisher: Annotated[bool, typer.Option(help="Also measure WoodFisher's time and memory.")] = False,
    woodfisher_process_: Annotated[bool, typer.Option("--woodfisher-process", hidden=True)] = False,
    render: Render = False,
) -> None:
    """Prune the trained networks in every way and write pruning.json, pruning.md and pruning.png."""
    if threads:
        torch.set_num_threads(threads)
    if woodfisher_process_:
        print(json.dumps(woodfisher_process()))
        return
    makers: dict[str, Callable[[], Net]] = {
        f"{name} digits": lambda name=name: trained_on_digits(name, cache) for name in DIGITS
    }
    for name in ("vgg16_bn_w025", "resnet20_bn_w05"):
        makers[f"{name} fashion"] = lambda name=name: trained_on_fashion(name, checkpoints, data, samples)
    unknown = sorted(set(net or ()) - set(makers))
    if unknown:
        raise typer.BadParameter(f"no network {unknown[0]!r}; there are {', '.join(makers)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "pruning.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"networks": {}}
    save = lambda: write_atomic(file, json.dumps(results, indent=1) + "\n")  # noqa: E731
    names = [] if render else list(net or makers)
    absent: dict[str, MissingData] = {}
    for name in names:
        try:
            measure(name, makers[name], results["networks"], save, limit)
        except MissingData as error:
            absent[name] = error
            console.print(f"[yellow]not measured:[/] {error}")
    if names and len(absent) == len(names):
        raise absent[names[0]]
    if woodfisher and not render:
        results["woodfisher"] = woodfisher_cost()
    save()
    write_atomic(output / "pruning.md", markdown(results, (__doc__ or "").strip()))
    draw(results["networks"], output / "pruning.png")
    console.print(f"wrote {file}, pruning.md and pruning.png")


if __name__ == "__main__":
    command(main)
