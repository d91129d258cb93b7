"""vfx on a GPU: its own passes beside the processor's, and what it emits where it runs.

- passes: ``collect``, matching, reconstruction and pruning of two VGG16 (full width, 512 images of 32×32, random
  weights) on the device and on the processor, in seconds;
- results: ResNet18 (224×224 images): an edge, the ensemble of two, the merged network, PFM with half of the layers kept
  for each, and one with half of its channels, in float32 in eager mode, and in bfloat16 with channels last in eager
  mode, compiled (CUDA graphs) and as an AOTInductor package; milliseconds a batch, the median of ``--rounds``, beside
  the ratio of FLOPs;
- 2:4: an MLP of 4,096 channels in float16, dense and as semi-structured sparse tensors.

Every emitted module is compared with the float32 module in eager mode: the largest difference over the largest output
stands beside its time. Results go to ``benchmarks/results``: gpu.json and gpu.md, with card and versions.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.fashion import RESULTS, MissingData, command
from benchmarks.options import Output
from benchmarks.pairs_report import grid
from vfx.api import collect, merge, prune, prune_structured, trace
from vfx.files import write_atomic
from vfx.models import MODELS
from vfx.program import Program

IMAGES, BATCH, SIDE = 512, 128, 224
BATCHES = (1, 64)
console = Console(stderr=True)


class Ensemble(nn.Module):
    """The mean of two networks' outputs."""

    def __init__(self, edges: list[nn.Module]) -> None:
        super().__init__()
        self.edges = nn.ModuleList(edges)

    def forward(self, x: Tensor) -> Tensor:
        return (self.edges[0](x) + self.edges[1](x)) / 2


# passes --------------------------------------------------------------------------------------------------------------


def passes(device: str) -> Iterator[dict[str, Any]]:
    """Each call's time on the device and on the processor, behind a first one of a narrow network."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 1, 32, 32, generator=generator).split(BATCH)
    torch.manual_seed(0)
    narrow, edges = ([MODELS["vgg16"](width=width, in_channels=1).eval() for _ in range(2)] for width in (0.125, 1))
    merge(narrow, images[0][:2], data=images, device=device, progress=False)
    for name, call in calls(trace(edges, images[0][:2]), images).items():
        yield {"name": name, "device": timed(call, device), "processor": timed(call, "cpu")}


def calls(edges: Program, images: tuple[Tensor, ...]) -> dict[str, Callable[[str], Any]]:
    quiet: dict[str, Any] = {"data": images, "progress": False}
    merged: dict[str, Any] = quiet | {"solve": None, "normalize": None}
    return {
        "statistics": lambda place: collect(edges, device=place, **quiet),
        "matching by activations": lambda place: merge(edges, match="activation", device=place, **merged),
        "matching by weights": lambda place: merge(edges, match="weight", device=place, **merged),
        "REPAIR": lambda place: merge(edges, solve=None, normalize="repair", device=place, **quiet),
        "least squares": lambda place: merge(edges, solve="least_squares", follow=0, device=place, **quiet),
        "default merge": lambda place: merge(edges, device=place, **quiet),
        "default prune, 90 %": lambda place: prune(edges.select(0), sparsity=0.9, device=place, **quiet),
        "default prune_structured, 50 %": lambda place: prune_structured(
            edges.select(0), sparsity=0.5, device=place, **quiet
        ),
    }


def timed(call: Callable[[str], Any], place: str) -> float:
    start = time.perf_counter()
    call(place)
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 2)


# results -------------------------------------------------------------------------------------------------------------


def networks(device: str) -> dict[str, tuple[nn.Module, float]]:
    """Modules to time, with their FLOPs as a multiple of an edge's."""
    torch.manual_seed(0)
    edges = [torchvision.models.resnet18().eval() for _ in range(2)]
    x = torch.randn(2, 3, SIDE, SIDE)
    plain: dict[str, Any] = {"normalize": None, "match": None, "progress": False, "device": device}
    merged, kept = merge(edges, x, **plain), merge(edges, x, preserve=10, **plain)
    half = prune_structured(edges[0], x, sparsity=0.5, device=device, progress=False)
    results = {"merged": merged, "PFM 10/18": kept, "half the channels": half}
    return {"edge": (edges[0], 1.0), "ensemble": (Ensemble(edges), 2.0)} | {
        name: (result.module, result.report.flops_ratio) for name, result in results.items()
    }


def forms(module: nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every way to run a module on a batch."""
    yield "eager, float32", lambda: module(x)
    small = copy.deepcopy(module).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    narrow = x.to(torch.bfloat16, memory_format=torch.channels_last)
    yield "eager, bfloat16", lambda: small(narrow)
    torch.compiler.reset()
    compiled = torch.compile(small, fullgraph=True, mode="reduce-overhead")
    yield "compiled, bfloat16", lambda: compiled(narrow)
    package = str(folder / "model.pt2")
    program = torch.export.export(small, (narrow,))
    loaded = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=package))
    yield "AOTInductor, bfloat16", lambda: loaded(narrow)


@torch.no_grad()
def results(device: str, rounds: int) -> Iterator[dict[str, Any]]:
    chosen = networks(device)
    for batch in BATCHES:
        x = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(device)
        for name, (network, flops) in chosen.items():
            module = network.to(device).eval()
            goal = module(x)
            with tempfile.TemporaryDirectory() as folder:
                for form, run in forms(module, x, Path(folder)):
                    difference = float((run().float() - goal).abs().max() / goal.abs().max())
                    row = {"batch": batch, "network": name, "form": form, "ms": milliseconds(run, rounds)}
                    yield row | {"flops_ratio": round(flops, 3), "difference": difference}


def milliseconds(run: Callable[[], Tensor], rounds: int) -> float:
    """The median of the rounds, each between two events of the device."""
    for _ in range(5):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


# 2:4 -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sparse(device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A masked MLP as dense and as semi-structured tensors."""
    torch.manual_seed(0)
    width = 4096
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()).half().to(device)
    x = torch.randn(4096, width, dtype=torch.float16, device=device)
    options: dict[str, Any] = {"scope": "2:4", "device": device, "progress": False}
    dense = prune(model, x, **options).module
    packed = prune(model, x, masks="semi_structured", **options).module
    goal = dense(x).float()
    yield {
        "dense_ms": milliseconds(lambda: dense(x), rounds),
        "sparse_ms": milliseconds(lambda: packed(x), rounds),
        "difference": float((packed(x).float() - goal).abs().max() / goal.abs().max()),
    }


def markdown(found: dict[str, Any]) -> str:
    """What has been measured so far; what has not says so."""
    lines = ["# On a GPU", "", (__doc__ or "").split("\n\n", 1)[1].replace("``", "`"), "", found["machine"], ""]
    rows = [
        [row["name"], f"{row['device']:.2f}", f"{row['processor']:.2f}", f"{row['processor'] / row['device']:.1f}×"]
        for row in found.get("passes", [])
    ]
    lines += ["## Passes on two VGG16", "", *(grid(["call", "device, s", "processor, s", "faster"], rows)), ""]
    for batch in BATCHES:
        rows = _latency([row for row in found.get("results", []) if row["batch"] == batch])
        lines += [f"## Results, batch {batch}: milliseconds (× the edge's; difference)", "", *rows, ""]
    lines += ["## 2:4", ""]
    for mlp in found.get("sparse", []):
        lines.append(f"Dense {mlp['dense_ms']:.3f} ms, semi-structured {mlp['sparse_ms']:.3f} ms; difference ")
        lines[-1] += f"{mlp['difference']:.1e}."
    return "\n".join(lines if found.get("sparse") else [*lines, "Not measured."]) + "\n"


def _latency(rows: list[dict[str, Any]]) -> list[str]:
    edge = {row["form"]: row["ms"] for row in rows if row["network"] == "edge"}
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        line = table.setdefault(row["network"], {"": row["network"], "FLOPs": f"{row['flops_ratio']:.2f}×"})
        difference = "" if row["difference"] is None else f"; {row['difference']:.0e}"
        line[row["form"]] = f"{row['ms']:.3f} ({row['ms'] / edge[row['form']]:.2f}×{difference})"
    head = ["network", "FLOPs", *edge]
    cells = [[line[""], line["FLOPs"], *(line.get(form, "") for form in edge)] for line in table.values()]
    return grid(head, cells) if rows else ["Not measured."]


def main(
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    rounds: Annotated[int, typer.Option(help="Timed calls of each module.")] = 50,
    output: Output = RESULTS,
) -> None:
    """Measure everything and write gpu.json and gpu.md; under ten minutes."""
    if not torch.cuda.is_available():
        raise MissingData("this benchmark needs a CUDA device, and torch finds none")
    output.mkdir(parents=True, exist_ok=True)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} processor threads"
    found: dict[str, Any] = {"machine": f"{torch.cuda.get_device_name()} (capability {capability}), {versions}."}
    for part, rows in {
        "sparse": sparse(device, rounds), "passes": passes(device), "results": results(device, rounds)
    }.items():  # fmt: skip
        for row in rows:
            console.print(row)
            found.setdefault(part, []).append(row)
            write_atomic(output / "gpu.json", json.dumps(found, indent=1) + "\n")
            write_atomic(output / "gpu.md", markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    command(main)
